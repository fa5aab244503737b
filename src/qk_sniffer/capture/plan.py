"""The rows that are kept of one batch, drawn on the host before the forward."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture.buffers import upload
from qk_sniffer.capture.sampling import Sampler, count_draws, draw_positions, longest_of

Kind = Literal["q", "k"]
Stream = tuple[int, Kind]
"""A layer and kind."""


class BatchPlan:
    """The rows that each layer and kind keeps of one batch.

    Those of every draw lie in one tensor, sorted by draw, sequence and position. Each layer and kind
    has a draw of its own, but for a sampler that keeps every position: there they share one.

    Args:
        streams: The layers and kinds.
        example_ids: (B,) int64.
        lengths: (B,) int64, tokens in each sequence.
        sampler: Which positions are kept.
        seed: 64-bit seed of the random stream.
    """

    def __init__(
        self,
        streams: tuple[Stream, ...],
        example_ids: Tensor,
        lengths: Tensor,
        sampler: Sampler,
        seed: int,
    ) -> None:
        batch_size = lengths.numel()
        self.longest = longest_of(lengths)
        self.draws, stream_ids = _draws(streams, count_draws(sampler, len(streams), lengths))
        n_draws = stream_ids.numel()
        sequences, self.positions = draw_positions(
            sampler,
            seed,
            stream_ids.repeat_interleave(batch_size),
            example_ids.repeat(n_draws),
            lengths.repeat(n_draws),
        )
        self.example_ids, self.lengths = example_ids, lengths
        self.batch_indices = sequences % batch_size
        self.buckets = sampler.buckets(self.positions)
        self.stops = torch.searchsorted(sequences, torch.arange(1, n_draws + 1) * batch_size)
        """(n_draws,) the row after the last of each draw."""
        self._passage: Passage | None = None

    def passage(self, sequences: range, tokens: range) -> "Passage":
        """The rows that one forward reads; every layer of a forward asks for the same."""
        passage = self._passage
        if passage is None or (passage.sequences, passage.tokens) != (sequences, tokens):
            self._passage = passage = Passage(self, sequences, tokens)
        return passage


@lru_cache(maxsize=16)
def _draws(streams: tuple[Stream, ...], n_draws: int) -> tuple[Mapping[Stream, int], Tensor]:
    """The draw of each layer and kind, and what names the random stream of each draw: (n_draws,)."""
    ids = [2 * layer_idx + (kind == "k") for layer_idx, kind in streams[:n_draws]]
    draws = {stream: min(number, n_draws - 1) for number, stream in enumerate(streams)}
    return draws, torch.tensor(ids, dtype=torch.int64)


class Passage:
    """The rows of a batch in some of its sequences and positions.

    Args:
        plan: The batch's.
        sequences: Some of its sequences.
        tokens: Some positions.
    """

    def __init__(self, plan: BatchPlan, sequences: range, tokens: range) -> None:
        self.sequences, self.tokens = sequences, tokens
        self.draws = plan.draws
        self._plan = plan
        self._rows: Tensor | slice = slice(None)
        stops = plan.stops
        if (sequences, tokens.start) != (range(len(plan.lengths)), 0) or tokens.stop < plan.longest:
            inside = (plan.positions >= tokens.start) & (plan.positions < tokens.stop)
            inside &= plan.batch_indices >= sequences.start
            inside &= plan.batch_indices < sequences.stop
            self._rows = inside.nonzero().squeeze(1)
            stops = torch.searchsorted(self._rows, stops)
        self.stops: list[int] = stops.tolist()
        """The row after the last of each draw."""
        self.sizes: list[int] = np.diff(self.stops, prepend=0).tolist()
        """Rows of each draw."""
        self._steps: dict[tuple[torch.device, int, int], Sequence[Tensor]] = {}
        self._steps_on_host: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def steps_on_host(self, per_sequence: int, per_token: int) -> npt.NDArray[np.int64]:
        """Where the rows of all draws lie in states of this passage: (K,) int64.

        Args:
            per_sequence: Steps from one sequence to the next.
            per_token: Steps from one token to the next.
        """
        key = per_sequence, per_token
        if key not in self._steps_on_host:
            sequences = self._plan.batch_indices[self._rows] - self.sequences.start
            tokens = self._plan.positions[self._rows] - self.tokens.start
            self._steps_on_host[key] = (sequences * per_sequence + tokens * per_token).numpy()
        return self._steps_on_host[key]

    def steps(self, device: torch.device, per_sequence: int, per_token: int) -> Sequence[Tensor]:
        """The same on a device, for each draw."""
        key = device, per_sequence, per_token
        if key not in self._steps:
            steps = torch.from_numpy(self.steps_on_host(per_sequence, per_token))
            self._steps[key] = torch.split(upload(steps, device), self.sizes)
        return self._steps[key]

    def forget_steps(self) -> None:
        """Let go of what only a forward needs."""
        self._steps.clear()
        self._steps_on_host.clear()

    def sizes_within(self, lengths: Tensor) -> list[int]:
        """Rows of each draw that come before the end of their sequence.

        Args:
            lengths: (B,) tokens that each sequence has in the end.
        """
        plan = self._plan
        sequences, positions = plan.batch_indices[self._rows], plan.positions[self._rows]
        live = np.concatenate([[0], (positions < lengths[sequences]).numpy().cumsum()])
        sizes: list[int] = np.diff(live[self.stops], prepend=0).tolist()
        return sizes

    def numbers(self, lengths: Tensor) -> Tensor:
        """Example id, position and bucket of each row: (3 K,) int32.

        Those of a draw, (3, its rows), begin at three times its first row.

        Args:
            lengths: (B,) tokens that each sequence has in the end; rows behind have the position -1.
        """
        plan = self._plan
        sequences, positions = plan.batch_indices[self._rows], plan.positions[self._rows]
        live = torch.where(positions < lengths[sequences], positions, -1)
        columns = plan.example_ids[sequences], live, plan.buckets[self._rows]
        sizes, stops = np.array(self.sizes), np.array(self.stops)
        # Row i of a draw of n rows, the first of them number s, goes to 3 s + column n + (i - s).
        places = np.arange(positions.numel()) + 2 * np.repeat(stops - sizes, sizes)
        strides = np.repeat(sizes, sizes)
        numbers = np.empty(3 * positions.numel(), np.int32)
        for number, column in enumerate(columns):
            numbers[places + number * strides] = column.numpy()
        return torch.from_numpy(numbers)
