"""The rows that are kept of one batch, drawn on the host before the forward."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qk_sniffer.capture.buffers import upload
from qk_sniffer.capture.sampling import Sampler, count_draws, draw_positions

Kind = Literal["q", "k"]


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
        streams: Sequence[tuple[int, Kind]],
        example_ids: Tensor,
        lengths: Tensor,
        sampler: Sampler,
        seed: int,
    ) -> None:
        batch_size = lengths.numel()
        longest = int(lengths.max()) if batch_size else 0
        drawn = streams[: count_draws(sampler, len(streams), longest)]
        self.draws = {stream: min(i, len(drawn) - 1) for i, stream in enumerate(streams)}
        stream_ids = torch.tensor([2 * layer_idx + (kind == "k") for layer_idx, kind in drawn])
        sequences, self.positions = draw_positions(
            sampler,
            seed,
            stream_ids.repeat_interleave(batch_size),
            example_ids.repeat(len(drawn)),
            lengths.repeat(len(drawn)),
        )
        self.example_ids, self.lengths = example_ids, lengths
        self.batch_indices = sequences % batch_size
        self.buckets = sampler.buckets(self.positions)
        self.ends = torch.bincount(sequences // batch_size, minlength=len(drawn)).cumsum(0)
        self._passage: Passage | None = None

    def passage(self, sequences: range, tokens: range) -> "Passage":
        """The rows that one forward reads; every layer of a forward asks for the same."""
        passage = self._passage
        if passage is None or (passage.sequences, passage.tokens) != (sequences, tokens):
            self._passage = passage = Passage(self, sequences, tokens)
        return passage


class Passage:
    """The rows of a batch in some of its sequences and positions.

    Args:
        plan: The batch's.
        sequences: Some of its sequences.
        tokens: Some positions.
    """

    def __init__(self, plan: BatchPlan, sequences: range, tokens: range) -> None:
        self.sequences, self.tokens = sequences, tokens
        inside = (plan.positions >= tokens.start) & (plan.positions < tokens.stop)
        inside &= plan.batch_indices >= sequences.start
        inside &= plan.batch_indices < sequences.stop
        self._plan = plan
        self._rows = inside.nonzero().squeeze(1)
        stops = torch.searchsorted(self._rows, plan.ends)
        self._sizes = stops.diff(prepend=stops.new_zeros(1))
        self.stops: list[int] = stops.tolist()
        self.starts = [0, *self.stops[:-1]]
        self._places: dict[torch.device, Tensor] = {}
        self._steps: dict[tuple[torch.device, int, int], Tensor] = {}

    def steps(self, device: torch.device, per_sequence: int, per_token: int) -> Tensor:
        """Where the rows of all draws lie in states of this passage: (K,) int64 on ``device``.

        Args:
            device: The states'.
            per_sequence: Steps from one sequence to the next.
            per_token: Steps from one token to the next.
        """
        key = device, per_sequence, per_token
        if key not in self._steps:
            if device not in self._places:
                sequences = self._plan.batch_indices[self._rows] - self.sequences.start
                tokens = self._plan.positions[self._rows] - self.tokens.start
                self._places[device] = upload(torch.stack([sequences, tokens]), device)
            sequences, tokens = self._places[device]
            self._steps[key] = sequences * per_sequence + tokens * per_token
        return self._steps[key]

    def numbers(self, lengths: Tensor) -> Tensor:
        """Example id, position and bucket of each row: (3 K,) int32.

        Those of a draw, (3, its rows), begin at three times its first row.

        Args:
            lengths: (B,) tokens that each sequence has in the end; rows behind have the position -1.
        """
        plan = self._plan
        sequences, positions = plan.batch_indices[self._rows], plan.positions[self._rows]
        live = torch.where(positions < lengths[sequences], positions, -1)
        columns = torch.stack([plan.example_ids[sequences], live, plan.buckets[self._rows]])
        # Row i of a draw of n rows, the first of them number s, goes to 3 s + c n + (i - s).
        firsts = torch.tensor(self.starts).repeat_interleave(self._sizes)
        places = torch.arange(len(firsts)) + 2 * firsts
        numbers = torch.empty(columns.numel(), dtype=torch.int32)
        sizes = self._sizes.repeat_interleave(self._sizes)
        for number, column in enumerate(columns):
            numbers[places + number * sizes] = column.to(torch.int32)
        return numbers
