"""The class of user errors, and the messages that commands print for errors."""

from .user_error import UserError

__all__ = ["UserError"]
