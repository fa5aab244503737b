"""What a recording takes from a batch, whoever has made it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture import Listed
from qk_sniffer.data.positions import lists_in
from qk_sniffer.errors import UserError

_INT32 = np.iinfo(np.int32)
_LIKE = "make batches as TextDataModule does"


@dataclass(frozen=True)
class BatchFields:
    """The fields of a batch, on the host.

    Attributes:
        input_ids: (B, S) integers; on a device where a loader of someone's own has no others.
        example_ids: (B,) int32, each its text's own.
        sequence_lengths: (B,) int64, in tokens.
        source_ids: The ids as the dataset has them.
        truncated: Whether a text was cut.
        listed: Positions to keep of each text; None where they don't come with it.
        n_prompt_tokens: (B,) int64, tokens before the last answer of a conversation, or before what a
            model has written; None where nobody tells them apart.
        messages: Role, first token and the token behind the last of each message of each conversation;
            None where they are none.
    """

    input_ids: Tensor
    example_ids: npt.NDArray[np.int32]
    sequence_lengths: Tensor
    source_ids: list[str]
    truncated: list[bool]
    listed: Listed | None = None
    n_prompt_tokens: npt.NDArray[np.int64] | None = None
    messages: list[list[dict[str, Any]]] | None = None


def batch_fields(batch: Any, *, listed: bool = False) -> BatchFields:
    """Read the fields of a batch.

    Each may be a tensor, an array or a list. Lengths are those of ``attention_mask`` where they are
    missing, or else the width; source ids are the example ids, and no text is cut.

    Args:
        batch: The batch.
        listed: Whether it has the positions to keep of each text.

    Raises:
        UserError: A field is missing or of another kind or size, ids are shared or no int32, or the
            batch is not padded on the right.
    """
    input_ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise UserError(
            "input_ids: expected a batch that is a dictionary with a tensor input_ids (B, S) of "
            f"integers, got {_described(batch, input_ids)}; {_LIKE}"
        )
    size = input_ids.shape[0]
    if batch.get("example_ids") is None:
        raise UserError("example_ids: a batch has none; give each text an integer of its own")
    ids = _integers("example_ids", batch["example_ids"], size)
    if ids.size and not (_INT32.min <= ids.min() and ids.max() <= _INT32.max):
        raise UserError("example_ids: one is no 32-bit integer; number the texts, or hash their ids")
    if len(set(ids.tolist())) < size:
        raise UserError("example_ids: two texts of a batch share one; give each an integer of its own")
    return BatchFields(
        getattr(batch, "host_input_ids", input_ids),
        ids.astype(np.int32),
        sequence_lengths(batch),
        [str(value) for value in _values("source_ids", batch, size, ids.tolist())],
        [bool(value) for value in _values("truncated", batch, size, [False] * size)],
        _listed(batch, size) if listed else None,
        _n_prompt_tokens(batch, size),
        batch.get("messages"),
    )


def _n_prompt_tokens(batch: Mapping[str, Any], size: int) -> npt.NDArray[np.int64] | None:
    values = batch.get("n_prompt_tokens")
    return None if values is None else _integers("n_prompt_tokens", values, size)


def _listed(batch: Mapping[str, Any], size: int) -> Listed:
    values = batch.get("positions")
    if values is None:
        raise UserError(
            "positions: a batch has none; give each text a list of those to keep, or list those of all "
            "texts in sniffer.capture.sampler.positions"
        )
    lists = lists_in(values, size)
    if lists is None:
        raise UserError(
            f"positions: expected {size} lists of integers of at least 0, one for each sequence; "
            f"{_LIKE}"
        )
    return Listed.of(lists)


def sequence_lengths(batch: Mapping[str, Any]) -> Tensor:
    """Tokens in each sequence of a batch, (B,) int64 on the host; padding comes after them.

    Raises:
        UserError: They are no numbers of tokens, or the mask shows padding that is not on the right.
    """
    size, width = batch["input_ids"].shape
    mask, lengths = batch.get("attention_mask"), batch.get("sequence_lengths")
    if mask is not None:
        mask = torch.as_tensor(mask).bool().cpu().numpy()
    if lengths is None:
        lengths = [width] * size if mask is None else mask.sum(1)
    found = _integers("sequence_lengths", lengths, size)
    if found.size and not 0 <= found.min() <= found.max() <= width:
        raise UserError(
            f"sequence_lengths: expected 0 to {width:,}, the width of input_ids, got {found.tolist()}; "
            f"{_LIKE}"
        )
    if mask is not None and not np.array_equal(mask, np.arange(width) < found[:, None]):
        raise UserError(
            "attention_mask: a batch is not padded on the right up to its sequence_lengths; set "
            "the tokenizer's padding_side to right"
        )
    return torch.from_numpy(found)


def _integers(name: str, values: Any, size: int) -> npt.NDArray[np.int64]:
    """A field of B integers."""
    try:
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError):
        array = np.empty(0, object)
    if array.shape != (size,) or array.dtype.kind not in "iu":
        raise UserError(f"{name}: expected {size} integers, one for each sequence; {_LIKE}")
    return array.astype(np.int64)


def _values(name: str, batch: Mapping[str, Any], size: int, default: list[Any]) -> list[Any]:
    """A field of B values of any kind."""
    values = batch.get(name)
    if values is None:
        return default
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != size:
        raise UserError(f"{name}: expected {size} values, one for each sequence; {_LIKE}")
    return list(values)


def _described(batch: Any, input_ids: Any) -> str:
    if not isinstance(batch, Mapping):
        return f"a {type(batch).__name__}"
    if input_ids is None:
        return f"the keys {', '.join(map(str, batch))}"
    if not isinstance(input_ids, Tensor):
        return f"input_ids that are a {type(input_ids).__name__}"
    return f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
