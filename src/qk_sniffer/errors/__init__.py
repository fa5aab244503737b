"""Mistakes of a user, and how they are told."""

from qk_sniffer.errors.misspelt import did_you_mean, nearest
from qk_sniffer.errors.secrets import redact
from qk_sniffer.errors.user_error import UserError, first_line, last_line, shortened

__all__ = ["UserError", "did_you_mean", "first_line", "last_line", "nearest", "redact", "shortened"]
