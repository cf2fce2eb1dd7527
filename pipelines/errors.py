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
