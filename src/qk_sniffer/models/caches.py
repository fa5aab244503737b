"""What a cache may not do while its texts are followed from call to call."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

from transformers.cache_utils import Cache

from qk_sniffer.errors import UserError
from qk_sniffer.models.wrapping import wrapped

_REFUSALS = {
    "reorder_cache": "sniff: beam search moves texts between the sequences of a cache; generate with "
    "num_beams=1",
    "crop": "sniff: tokens are taken back from a cache, as assisted decoding does; generate without "
    "an assistant, and begin a new cache for another text",
    "batch_repeat_interleave": "sniff: the sequences of a cache are repeated; read each text in a call "
    "of its own",
    "batch_select_indices": "sniff: sequences are removed from a cache; read the texts that go on "
    "in calls of their own",
}


@contextmanager
def watch_caches(follows: Callable[[Any], bool]) -> Iterator[None]:
    """Refuse what would mix the texts of a cache, within a block.

    Args:
        follows: Whether the texts of a cache are followed; others may do what they like.
    """
    with ExitStack() as stack:
        for name, message in _REFUSALS.items():
            stack.enter_context(wrapped(Cache, name, partial(_refusing, follows, message)))
        yield


def _refusing(
    follows: Callable[[Any], bool], message: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    @wraps(original)
    def refusing(cache: Any, *args: Any, **kwargs: Any) -> Any:
        if follows(cache):
            raise UserError(message)
        return original(cache, *args, **kwargs)

    return refusing
