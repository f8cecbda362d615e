"""The error for what a user can put right."""


class UserError(ValueError):
    """Something that the caller can put right. The message is one line and says what."""
