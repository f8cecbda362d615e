"""The class of user errors."""


class UserError(ValueError):
    """An error that the user can fix, with a one-line message."""
