"""What the Hub's client raises: what is worth another try, and what a user is told."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import errors
from huggingface_hub.utils import parse_ratelimit_headers

from qk_sniffer.errors import UserError, first_line, redact

log = logging.getLogger(__name__)

T = TypeVar("T")

HTTP_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
"""What every failed request raises; httpx or httpx2 defines it, by the release of the client."""

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of a request that may succeed later."""

_LONGEST_WAIT = 310.0
"""Seconds; the Hub's limits count requests over five minutes."""

_WORTH_ANOTHER_TRY = (408, 429, 500, 502, 503, 504)
_MEANINGS = {
    401: ("the Hub does not accept the token", "log in with `hf auth login`, or set HF_TOKEN"),
    403: ("the token may not write there", "use a token with write permission, or another repository"),
    404: ("it is not there, or the token may not see it", "see that name and token are right"),
    429: ("the Hub has had too many requests", "wait some minutes"),
}


def retried(task: Callable[[], T]) -> T:
    """Do what may be done twice, again and again while the Hub or the network fails for a moment.

    Raises:
        Exception: What the client raises, where it failed for good or too often.
    """
    for wait in WAITS:
        try:
            return task()
        except Exception as error:
            if not _may_pass(error):
                raise
            seconds = min(max(wait, _retry_after(error)), _LONGEST_WAIT)
            reason, _ = _meaning(_source(error) or error)
            log.warning("%s; trying again in %.0f s", redact(reason), seconds)
            time.sleep(seconds)
    return task()


def _may_pass(error: BaseException) -> bool:
    if isinstance(_source(error), HTTP_ERROR):
        status = status_of(error)
        return status is None or status in _WORTH_ANOTHER_TRY
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an exception of the client; None where no answer came."""
    response = getattr(_source(error), "response", None)
    return None if response is None else int(response.status_code)


@contextmanager
def explained(what: str, remedy: str, directory: Path | None = None) -> Iterator[None]:
    """Turn what the client raises, and what a disk refuses it, into a ``UserError``.

    Args:
        what: The config field, and what was asked for.
        remedy: How to go on once the fault is gone.
        directory: Where files are written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        source = _source(error)
        if source is None and _is_lost_connection(error):
            source = error
        if source is None and isinstance(error, OSError) and error.errno:
            raise UserError(
                f"{directory or what}: {error.strerror}; make room or mend the disk, then {remedy}"
            ) from error
        if source is None:
            raise
        reason, cure = _meaning(source)
        raise UserError(f"{what}: {reason}; {cure}, then {remedy}") from error


def _is_lost_connection(error: BaseException) -> bool:
    """Whether the client's uploader, which has tried again by itself, has given up."""
    if type(error).__module__.partition(".")[0] == "hf_xet":
        return True
    return isinstance(error, ConnectionError | TimeoutError) and not error.errno


def _source(error: BaseException) -> BaseException | None:
    """The failed request behind an exception: uploads and downloads wrap it."""
    found: BaseException | None = None
    step: BaseException | None = error
    while step is not None:
        if isinstance(step, HTTP_ERROR | errors.OfflineModeIsEnabled):
            found = step
            if getattr(step, "response", None) is not None:
                break
        step = step.__cause__
    return found


def _meaning(error: BaseException) -> tuple[str, str]:
    status = status_of(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps the client from the Hub", "unset it"
    if status is None:
        return f"no connection to the Hub ({first_line(error)})", "see that the network is up"
    said = getattr(error, "server_message", None) or ""
    answer = f"{status} {said.splitlines()[0]}" if said else f"{status}"
    reason, cure = _MEANINGS.get(status, ("the Hub refused or failed", "wait some minutes"))
    return f"{reason} ({answer})", cure


def _retry_after(error: BaseException) -> float:
    """Seconds that the Hub asks to wait."""
    response: Any = getattr(_source(error), "response", None)
    if response is None:
        return 0.0
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    value = response.headers.get("Retry-After", "")
    return float(value) + 1.0 if value.isdigit() else 0.0
