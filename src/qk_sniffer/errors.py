"""The one exception that stands for a user's mistake rather than a bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that begins with the config field or the file at fault and ends with the
    remedy. The command line prints it alone and exits with status 2; any other exception is a bug
    and keeps its traceback.
    """

    is_told = False
    """Whether another process of the run has been told, and prints it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, for quoting a library inside a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def explained_loading(problem: str, remedy: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or broken checkpoint into a ``UserError``.

    Args:
        problem: The config field, and what can't be loaded.
        remedy: What the user can do.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{problem} ({first_line(error)}); {remedy}") from error
