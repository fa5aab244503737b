"""The one exception that stands for a user's mistake rather than a bug."""


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


def last_line(error: BaseException) -> str:
    """The last line of an exception's text, where the first only says that there is something wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def shortened(value: object) -> str:
    """A value as Python writes it, in at most 40 characters, for a message of one line."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
