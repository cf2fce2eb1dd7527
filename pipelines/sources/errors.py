"""The one error of this package that is shown to people."""


class InputError(ValueError):
    """INPUT is not what it should be: one sentence with what was asked, what was found and what to do."""
