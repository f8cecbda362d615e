"""The error for what a user can put right, and what commands say about errors."""

from .user_error import UserError

__all__ = ["UserError"]
