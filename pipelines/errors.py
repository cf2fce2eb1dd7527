"""Errors that are shown to people as one sentence, and the exit code each one means."""


class DinorayError(Exception):
    """Anything that ends a command with a sentence instead of a traceback."""

    exit_code = 1


class JobError(DinorayError):
    """The request was right and the job failed: a full disk, a broken tar, a lost bucket."""

    exit_code = 1


class RequestError(DinorayError):
    """The request was wrong: an unknown setting, a missing input, a store with another spec."""

    exit_code = 2


class InputError(RequestError, ValueError):
    """INPUT is not what it should be: one sentence with what was asked, what was found and what to do."""


class StorageError(InputError):
    """The storage that INPUT lies on did not answer, or broke off: the same command may succeed later."""

    exit_code = 1


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number of things in a sentence: "1 image", "2,000 images". plural: where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that is shown as a sentence; None for a bug, which keeps its traceback."""
    if isinstance(error, DinorayError):
        return error.exit_code
    # dino_ops knows nothing of exit codes, and importing it would slow down --help
    names = ((kind.__module__, kind.__name__) for kind in type(error).__mro__)
    return RequestError.exit_code if ("dino_ops.errors", "ModelError") in names else None
