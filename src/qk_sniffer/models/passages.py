"""Reading a text in passages with a cache, so that a long one fits a small device."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qk_sniffer.errors import UserError
from qk_sniffer.models.apart import must_be_read_alone
from qk_sniffer.models.check import opening
from qk_sniffer.models.frequencies import frequencies_for

_CACHE_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_CACHE_NAMES = ("cache", "past_key_values")


def read_in_passages(backbone: nn.Module, input_ids: Tensor, passage_length: int) -> Iterator[Any]:
    """Run the backbone over one passage after the other, each with the cache of those before.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        input_ids: (B, S) int64.
        passage_length: Tokens in a passage; the last may be shorter.

    Yields:
        The backbone's output for each passage.

    Raises:
        UserError: The model keeps no cache.
    """
    with frequencies_for(backbone, input_ids.shape[1]):
        yield from read_with_cache(backbone, input_ids, passage_length)


def read_with_cache(backbone: nn.Module, input_ids: Tensor, passage_length: int) -> Iterator[Any]:
    """Do as ``read_in_passages`` does, with RoPE's frequencies as they are."""
    cache: dict[str, Any] = {}
    for passage in torch.split(input_ids, passage_length, dim=1):  # type: ignore[no-untyped-call]
        output = backbone(input_ids=passage, **cache, use_cache=True)
        # The name depends on the release of transformers.
        names = [n for n in _CACHE_NAMES if hasattr(getattr(output, n, None), "get_seq_length")]
        if not names:
            raise _unreadable(backbone, "keeps no cache to read on from")
        cache = {names[0]: getattr(output, names[0])}
        yield output


@torch.inference_mode()
def check_passages(backbone: nn.Module, input_ids: Tensor) -> None:
    """See on a short text that the model reads passages as it reads the whole.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        input_ids: (1, S) tokens of a real text, of which the first 512 are read.

    Raises:
        UserError: It does not, as some recurrent layers don't.
    """
    if must_be_read_alone(backbone):
        raise _unreadable(backbone, "quantizes the tokens of a forward together")
    input_ids = opening(backbone, input_ids)
    with frequencies_for(backbone, input_ids.shape[1]):
        whole = backbone(input_ids=input_ids, use_cache=False)[0].float()
    passage_length = max(1, input_ids.shape[1] // 3)
    try:
        outputs = [output[0] for output in read_in_passages(backbone, input_ids, passage_length)]
    except torch.OutOfMemoryError:
        raise
    except _CACHE_ERRORS as error:
        raise _unreadable(backbone, f"fails with a cache ({type(error).__name__})") from error
    difference = float((torch.cat(outputs, dim=1) - whole).norm() / whole.norm())
    if not difference < (1e-3 if outputs[0].dtype == torch.float32 else 0.1):
        raise _unreadable(backbone, f"reads passages otherwise than the whole (by {difference:.1%})")


def _unreadable(backbone: nn.Module, what: str) -> UserError:
    return UserError(f"model.prefill_chunk_size: {type(backbone).__name__} {what}; set it to null")
