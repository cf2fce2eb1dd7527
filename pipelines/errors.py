"""Errors that are shown to people as one sentence, and the exit code each one means (DESIGN.md section 3)."""


class DinorayError(Exception):
    """Anything that ends a command with a sentence instead of a traceback."""

    exit_code = 1


class JobError(DinorayError):
    """The request was right and the job failed: a full disk, a broken tar, a lost bucket."""

    exit_code = 1


class RequestError(DinorayError):
    """The request was wrong: an unknown setting, a missing input, a store with another spec."""

    exit_code = 2


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that is shown as a sentence; None for a bug, which keeps its traceback."""
    if isinstance(error, DinorayError):
        return error.exit_code
    # these come from packages that know nothing of exit codes, and whose import would slow down --help
    codes = {
        ("pipelines.sources.errors", "StorageError"): 1,
        ("pipelines.sources.errors", "InputError"): 2,
        ("dino_ops.errors", "ModelError"): 2,
    }
    names = ((kind.__module__, kind.__name__) for kind in type(error).__mro__)
    return next((codes[name] for name in names if name in codes), None)
