"""Which texts ``generate`` has ended, while it goes on with the others of a batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList

from qk_sniffer.models.wrapping import wrapped


@contextmanager
def watch_stopping(on_stop: Callable[[list[bool]], None]) -> Iterator[None]:
    """Report what every ``generate`` decides about its texts, within a block.

    Args:
        on_stop: Takes for each sequence of a batch whether its text ends with its last token. What
            comes behind is padding.
    """
    with wrapped(StoppingCriteriaList, "__call__", partial(_reporting, on_stop)):
        yield


def _reporting(
    on_stop: Callable[[list[bool]], None], original: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(original)
    def reporting(criteria: StoppingCriteriaList, *args: Any, **kwargs: Any) -> Any:
        is_done = original(criteria, *args, **kwargs)
        if isinstance(is_done, Tensor):
            on_stop(is_done.tolist())
        return is_done

    return reporting
