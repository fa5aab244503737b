"""The texts of a run: how many there are, how long, and which are read together."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture import Listed
from qk_sniffer.data import TextDataModule, TokenBatch

STREAMED_TEXTS = 1000
"""Texts of a stream that are counted; a stream may have no end, and each of them is tokenized."""

Lengths = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """What a run reads, in its batches.

    Attributes:
        batches: Tokens in each text of each batch that was counted.
        scale: Texts of the run for each one that was counted.
        note: What is assumed of those that were not; None where all were.
        largest: The batch that takes longest to read.
        listed: Positions to keep of each text that was counted, where they come with it.
    """

    batches: list[Lengths]
    scale: float
    note: str | None
    largest: TokenBatch
    listed: Listed | None

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64, tokens in each text that was counted."""
        return torch.from_numpy(np.concatenate(self.batches))

    @property
    def n_texts(self) -> int:
        """Texts of the run."""
        return round(self.lengths.numel() * self.scale)

    @property
    def n_tokens(self) -> int:
        """Tokens of the run, without padding."""
        return round(int(self.lengths.sum()) * self.scale)

    @property
    def n_batches(self) -> int:
        """Batches of the run."""
        return round(len(self.batches) * self.scale)

    @cached_property
    def shapes(self) -> npt.NDArray[np.int64]:
        """(batches, 2): texts, and tokens that the longest of them has."""
        return np.array([shape_of(lengths) for lengths in self.batches])


def shape_of(lengths: Lengths) -> tuple[int, int]:
    """Texts of a batch, and tokens that the longest of them has; a batch of empty texts has one."""
    return lengths.size, max(1, int(lengths.max()))


def cost(lengths: Lengths) -> tuple[int, int]:
    """Orders batches by the time that they take: by attention, and then by tokens."""
    size, longest = shape_of(lengths)
    return size * longest**2, size * longest


def count_texts(data: TextDataModule) -> Texts:
    """Count the texts of a data module that is set up; a stream is read as far as is needed.

    Raises:
        UserError: A row of the stream can't be read.
    """
    batches = data.batch_lengths()
    if batches is None:
        return _count_stream(data)
    number = max(range(len(batches)), key=lambda number: cost(batches[number]))
    return Texts(batches, 1.0, None, data.batch(number), data.batch_positions())


def _count_stream(data: TextDataModule) -> Texts:
    batches: list[Lengths] = []
    n_texts, has_more = 0, False
    largest: TokenBatch | None = None
    most = 0, 0
    lists: list[npt.NDArray[np.int32]] = []
    for batch in data.predict_dataloader():
        if n_texts >= STREAMED_TEXTS:
            has_more = True
            break
        lengths = batch["sequence_lengths"].numpy() + data.n_new_tokens
        batches.append(lengths)
        n_texts += lengths.size
        lists += batch.get("positions", [])
        if largest is None or cost(lengths) > most:
            largest, most = batch, cost(lengths)
    assert largest is not None  # A stream without rows is refused.
    listed = Listed.of(lists) if "positions" in largest else None
    if not has_more:
        return Texts(batches, 1.0, None, largest, listed)
    if data.max_samples is None:
        note = (
            f"the stream goes on after the first {n_texts:,}; everything below is for these alone, "
            "unless data.max_samples says how many there are to be"
        )
        return Texts(batches, 1.0, note, largest, listed)
    note = (
        f"the first {n_texts:,} of the stream were counted; the {data.max_samples:,} of "
        "data.max_samples are assumed to be there, and as long"
    )
    return Texts(batches, data.max_samples / n_texts, note, largest, listed)
