"""A name in the config: a path on this machine or an id on the Hub, and what is said of neither."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from qk_sniffer.errors import UserError, first_line, last_line

_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt|ya?ml)(\.(gz|bz2|xz|zst))?$")


def is_address(name: str) -> bool:
    """Whether a name is no path but an address, such as s3://bucket/texts."""
    return "://" in name


def described(names: str | list[str]) -> str:
    """A name, or the first of a list and how many more there are."""
    if isinstance(names, str):
        return names
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def absent(field: str, name: str, what: str, error: Exception) -> UserError | None:
    """The error for a name that leads nowhere; None where something is there, or the Hub has it.

    Args:
        field: The field that gives it.
        name: The name.
        what: What would be here, such as directory.
        error: What a library raised that was to load it.
    """
    if is_address(name):
        return UserError(
            f"{field}: {name} is an address; give a path on this machine, or an id on the Hub"
        )
    path = Path(name).expanduser()
    if path.exists():
        return None
    missing = f"{field}: no {what} {name} is here"
    if not _may_be_on_the_hub(name):
        start = "" if path.is_absolute() else f", which starts from {Path.cwd()}"
        return UserError(f"{missing}; mend the path{start}, or give an id on the Hub, as OWNER/NAME")
    if not isinstance(error, OSError):
        return None
    if is_offline_mode():
        return UserError(
            f"{missing} or in the cache, and HF_HUB_OFFLINE keeps the client from the Hub; unset it, "
            "or mend the name"
        )
    return UserError(
        f"{missing}, and the Hub does not give it ({first_line(error)}); mend the name, or log in with "
        "`hf auth login` if it is private or gated"
    )


@contextmanager
def explained_loading(problem: str, remedy: str, name: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or broken checkpoint into a ``UserError``.

    Args:
        problem: The config field, and what can't be loaded.
        remedy: What the user can do.
        name: What the field gives: a directory or a Hub id.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        reason = last_line(error) if isinstance(error, StrictDataclassError) else first_line(error)
        if Path(name).expanduser().exists():
            # transformers would look for a directory of this machine on the Hub.
            reason = re.sub(r" Checkout 'https?://\S*' for available files\.$", "", reason)
        missing = absent(problem.partition(":")[0], name, "directory", error)
        raise missing or UserError(f"{problem} ({reason}); {remedy}") from error


def _may_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return _FILE.search(name) is None
