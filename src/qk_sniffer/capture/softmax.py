"""Statistics of the softmax of kept queries, over all keys that they attend to.

Scores are computed from the queries and keys of the attention call, on their device and in float32, for
the kept queries alone. A tile of them is made at a time, of some queries and some keys, and what stays
of a query from tile to tile are a few sums relative to its largest score so far, so that memory is
bounded whatever the number of queries and keys. Source of the running sums: M. Milakov, N. Gimelshein,
"Online normalizer calculation for softmax", 2018, arXiv:1805.02867.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qk_sniffer.capture.attention import capped
from qk_sniffer.capture.buffers import upload
from qk_sniffer.capture.heads import CapturedStream, Stream
from qk_sniffer.capture.plan import KeptQueries, KeptRows, Numbers
from qk_sniffer.capture.positions import first_new_key
from qk_sniffer.kinds import SOFTMAX_COLUMNS

MOST_SCORES = 2**22
"""Scores of a tile: 16 MiB in float32, of which some six are there at once."""

MOST_KEY_NUMBERS = 2**23
"""Numbers in the keys of a tile, copied as float32 where the model has another dtype: 32 MiB."""

SOFTMAX_BYTES = 256 * 2**20
"""More than all tensors take that are there at once while statistics are computed, beside what the
model has and their result: 24 bytes for each kept query of a layer's heads."""

_LEAST = -1e4
"""Where the exponential is 0 in float32 without doubt. An infinity times 0 would be no number."""


@dataclass(frozen=True, eq=False)
class SoftmaxInput:
    """What the softmax of an attention call takes.

    Attributes:
        query: (B, num_attention_heads, Q, head_dim), as it is multiplied.
        key: (B, num_key_value_heads, K, head_dim), K > Q where a cache holds other tokens.
        past_length: Places of the cache before the call.
        scaling: Factor of q·k.
        softcap: Scores become softcap · tanh(scores / softcap); None where they are not capped.
        bias: Added to the scaled and capped scores, (B or 1, num_attention_heads, Q or 1, K or more).
        mask: The call's own, (B or 1, num_attention_heads or 1, Q, K or more), bool or what is added;
            None where the kernel itself knows causality and window.
        sinks: Scores of a key without a value, (B or 1, num_attention_heads, Q or 1, 1); None for none.
        window: The layer's window; None for full attention.
        chunked: The window is a block, and not the tokens before the query.
    """

    query: Tensor
    key: Tensor
    past_length: int
    scaling: float
    softcap: float | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    window: int | None = None
    chunked: bool = False


class _Heads(NamedTuple):
    """The captured heads of a layer, by the key heads that serve them.

    Attributes:
        key: The key heads.
        query: Query heads of each, as many for one as for another: some are there more than once.
        own: Where each captured head is among those.
    """

    key: list[int]
    query: list[int]
    own: list[int]

    @classmethod
    def of(cls, stream: CapturedStream) -> "_Heads":
        groups: dict[int, list[int]] = {}
        for head in stream.heads:
            groups.setdefault(stream.layer.key_head(head), []).append(head)
        size = max(map(len, groups.values()))
        query = [head for group in groups.values() for head in group + group[:1] * (size - len(group))]
        return cls(list(groups), query, [query.index(head) for head in stream.heads])


class _Tile(NamedTuple):
    """Some queries of sequences that follow each other.

    Attributes:
        sequences: The sequences.
        rows: (S, R) the numbers of the queries, R slots for each sequence; where it has fewer queries,
            one is there more than once.
        slots: (n,) the slots of the queries, in their order.
        n_keys: The most keys to multiply at once.
    """

    sequences: slice
    rows: Numbers
    slots: Numbers
    n_keys: int


class SoftmaxStatistics:
    """Computes the statistics of kept queries.

    Args:
        streams: What is captured; statistics are wanted of the layers that say so.
        local_positions: Positions that local_prob counts, up to the query's own and with it.
    """

    def __init__(self, streams: Iterable[CapturedStream], local_positions: int) -> None:
        self._heads = {s.layer.layer_idx: _Heads.of(s) for s in streams if s.kind == "softmax"}
        self._local_positions = local_positions
        self._on_devices: dict[tuple[int, torch.device], Mapping[str, Tensor]] = {}

    def of(self, layer_idx: int, given: SoftmaxInput, rows: KeptRows) -> Tensor | None:
        """The statistics of the kept queries of a layer.

        Args:
            layer_idx: The layer.
            given: What its softmax takes.
            rows: The kept rows of the forward.

        Returns:
            (n_heads, N, 6) float32 on the device, the columns of ``SOFTMAX_COLUMNS``, of which
            argmax_position has the bits of an int32. With a learned sink lse counts it, entropy does
            not, and sink_prob is the mass on it and on the first token of the text. None where nothing
            is wanted of the layer, or no query is kept.
        """
        stream: Stream = (layer_idx, "softmax")
        if layer_idx not in self._heads or not rows.sizes[rows.draws[stream]]:
            return None
        queries = rows.queries(stream)
        order = np.argsort(queries.sequences, kind="stable")
        if (order[1:] > order[:-1]).all():
            return self._of_sorted(layer_idx, given, queries)
        found = self._of_sorted(layer_idx, given, queries.ordered(order))
        return found.index_select(1, upload(torch.from_numpy(np.argsort(order)), found.device))

    @torch.no_grad()
    def _of_sorted(self, layer_idx: int, given: SoftmaxInput, queries: KeptQueries) -> Tensor:
        heads, device = self._heads[layer_idx], given.query.device
        if (layer_idx, device) not in self._on_devices:
            self._on_devices[layer_idx, device] = {
                name: torch.tensor(numbers, device=device) for name, numbers in heads._asdict().items()
            }
        computing = _Computing(
            given, queries, heads, self._on_devices[layer_idx, device], self._local_positions
        )
        numbers_in_key = len(heads.key) * given.key.shape[3]
        tiles = _tiles(queries.sequences, len(heads.query), numbers_in_key, given.key.shape[2])
        shape = len(heads.own), len(queries.columns), len(SOFTMAX_COLUMNS)
        found, first = torch.empty(shape, device=device), 0
        for tile in tiles:
            stop = first + tile.slots.size
            found[:, first:stop] = computing.of_tile(tile)
            first = stop
        return found


def _tiles(sequences: Numbers, n_heads: int, numbers_in_key: int, n_keys: int) -> Iterator[_Tile]:
    """The queries of some sequences at a time, or some of one where those are too many."""
    present, firsts = np.unique(sequences, return_index=True)
    stops = [*firsts[1:].tolist(), len(sequences)]
    together: list[tuple[int, int, int]] = []
    n_slots = 0
    for part in zip(present.tolist(), firsts.tolist(), stops, strict=True):
        sequence, first, stop = part
        size = max(n_slots, stop - first)
        n_sequences = sequence + 1 - (together[0][0] if together else sequence)
        scores, numbers = size * n_heads / MOST_SCORES, numbers_in_key / MOST_KEY_NUMBERS
        if together and n_sequences * n_keys * max(scores, numbers) > 1:
            yield from _tiles_of(together, n_heads, numbers_in_key, n_keys)
            together, n_slots = [], 0
        together.append(part)
        n_slots = max(n_slots, stop - first)
    if together:
        yield from _tiles_of(together, n_heads, numbers_in_key, n_keys)


def _tiles_of(
    parts: Sequence[tuple[int, int, int]], n_heads: int, numbers_in_key: int, n_keys: int
) -> Iterator[_Tile]:
    """One tile of sequences, each with its first and last query; several where one has too many."""
    n_keys = max(1, min(n_keys, MOST_KEY_NUMBERS // numbers_in_key))
    most = max(1, MOST_SCORES // (n_heads * n_keys))
    (first_sequence, first, stop), *others = parts
    if not others and stop - first > most:
        for start in range(first, stop, most):
            rows = np.arange(start, min(start + most, stop))
            here = slice(first_sequence, first_sequence + 1)
            yield _Tile(here, rows[None], np.arange(rows.size), n_keys)
        return
    n_sequences = parts[-1][0] + 1 - first_sequence
    n_slots = max(stop - first for _, first, stop in parts)
    rows = np.full((n_sequences, n_slots), first)
    is_own = np.zeros((n_sequences, n_slots), bool)
    for sequence, first, stop in parts:
        rows[sequence - first_sequence] = np.minimum(np.arange(first, first + n_slots), stop - 1)
        is_own[sequence - first_sequence, : stop - first] = True
    here = slice(first_sequence, first_sequence + n_sequences)
    yield _Tile(here, rows, np.flatnonzero(is_own), n_keys)


class _Computing:
    """Computes the statistics of one layer's queries, a tile at a time."""

    def __init__(
        self,
        given: SoftmaxInput,
        queries: KeptQueries,
        heads: _Heads,
        on_device: Mapping[str, Tensor],
        local_positions: int,
    ) -> None:
        self._given, self._queries, self._local_positions = given, queries, local_positions
        self._on_device = on_device
        # A model that captures all of its key heads needs no copy of them.
        self._is_whole = heads.key == list(range(given.key.shape[1]))
        n_keys = given.key.shape[2]
        first_new = first_new_key(given.past_length, given.query.shape[2], n_keys)
        self._first_place = given.past_length - first_new
        self._own = first_new + queries.columns
        self._first = self._own - queries.n_before
        self._start = np.maximum(0, self._own - self._n_attended_before())

    def _n_attended_before(self) -> Numbers:
        """Keys before its own that each query attends to, where all keys are there."""
        window, n_before = self._given.window, self._queries.n_before
        if window is None:
            return n_before
        if self._given.chunked and self._given.mask is None:
            return n_before % window
        # A mask says of itself where a block begins.
        return np.minimum(n_before, window - 1)

    def of_tile(self, tile: _Tile) -> Tensor:
        """The statistics of its queries: (n_heads, n, 6) float32."""
        device, rows = self._given.query.device, tile.rows
        numbers = [self._queries.columns, self._own, self._start, self._first, self._queries.positions]
        columns, own, start, first, positions = upload(
            torch.from_numpy(np.stack([column[rows] for column in numbers])), device
        )
        query = self._rows_of(self._given.query, tile, columns).float() * self._given.scaling
        sums = _Sums(query.shape[:3], device)
        own_host, first_host = self._own[rows], self._first[rows]
        for low in range(int(self._start[rows].min()), int(own_host.max()) + 1, tile.n_keys):
            high = min(low + tile.n_keys, int(own_host.max()) + 1)
            scores = self._scores(tile, query, columns, low, high)
            place = torch.arange(low, high, device=device)
            is_out = (place > own[..., None]) | (place < start[..., None])
            if self._queries.key_positions is not None:
                is_out |= self._positions_at(tile, low, high)[:, None] < 0
            weights = sums.add(scores.masked_fill_(is_out[:, None], -torch.inf), low)
            if first_host.min() < high and first_host.max() >= low:
                sums.add_first(weights, first - low)
            if own_host.min() - self._local_positions < high - 1:
                is_far = place <= own[..., None] - self._local_positions
                sums.add_local(weights, is_far[:, None])
        found = sums.statistics(self._sinks(tile, columns))
        found[..., 3] = self._position_of(tile, sums.argmax, own, positions)
        flat = found.transpose(0, 1).flatten(1, 2).index_select(0, self._on_device["own"])
        return flat.index_select(1, upload(torch.from_numpy(tile.slots), device))

    def _rows_of(self, states: Tensor, tile: _Tile, columns: Tensor) -> Tensor:
        """What states (B or 1, heads or 1, Q or 1, …) have for the queries: (S, heads or 1, R, …)."""
        size, n_heads, length = states.shape[:3]
        device = states.device
        sequences = torch.arange(tile.sequences.start, tile.sequences.stop, device=device)
        heads = self._on_device["query"]
        return states[
            (sequences if size > 1 else sequences * 0)[:, None, None],
            heads[None, :, None] if n_heads > 1 else heads[None, :1, None] * 0,
            columns[:, None] if length > 1 else columns[:, None] * 0,
        ]

    def _scores(self, tile: _Tile, query: Tensor, columns: Tensor, low: int, high: int) -> Tensor:
        """Scores before causality and window are applied: (S, heads, R, keys) float32."""
        given = self._given
        key = given.key[tile.sequences, :, low:high]
        if not self._is_whole:
            key = key.index_select(1, self._on_device["key"])
        # The query heads of a key head are rows of one product.
        grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
        scores = capped((grouped @ key.float().mT).view(*query.shape[:3], -1), given.softcap)
        for added in (given.bias, given.mask):
            if added is None:
                continue
            own = self._rows_of(added[..., low:high], tile, columns)
            if own.dtype == torch.bool:
                scores = scores.masked_fill(~own, -torch.inf)
            else:
                scores = scores + own.float()
        return scores

    def _sinks(self, tile: _Tile, columns: Tensor) -> Tensor | None:
        sinks = self._given.sinks
        return None if sinks is None else self._rows_of(sinks, tile, columns).squeeze(-1).float()

    def _positions_at(self, tile: _Tile, low: int, high: int) -> Tensor:
        """Positions of some keys: (S, keys), -1 for padding."""
        assert self._queries.key_positions is not None
        place = slice(self._first_place + low, self._first_place + high)
        some = self._queries.key_positions[tile.sequences, place]
        # A static cache has places behind the call.
        missing = high - low - some.shape[1]
        return upload(torch.nn.functional.pad(some, (0, missing), value=-1), self._given.key.device)

    def _position_of(self, tile: _Tile, keys: Tensor, own: Tensor, positions: Tensor) -> Tensor:
        """Positions of keys of the queries, (S, heads, R), as the float32 of the same bits."""
        if self._queries.key_positions is None:
            found = positions[:, None] - own[:, None] + keys
        else:
            known = self._positions_at(tile, 0, self._given.key.shape[2])
            found = known.gather(1, keys.flatten(1)).view_as(keys)
        return found.to(torch.int32).view(torch.float32)


class _Sums:
    """What stays of the queries from tile to tile, relative to the largest score so far.

    Args:
        shape: (S, heads, R).
        device: Where they are computed.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._largest = torch.full(shape, -torch.inf, device=device)
        # Σ e^y, Σ y e^y, and Σ e^y over the first key and over the local ones, y = score - largest.
        self._total, self._weighted, self._first, self._local = torch.zeros(4, *shape, device=device)
        self.argmax = torch.zeros(shape, dtype=torch.int64, device=device)
        """Keys with the largest scores."""

    def add(self, scores: Tensor, low: int) -> Tensor:
        """Add some keys, and give their e^y: (S, heads, R, keys).

        Args:
            scores: (S, heads, R, keys) float32, -inf where a query does not attend.
            low: The number of the first key.
        """
        largest, key = scores.max(dim=-1)
        self.argmax = torch.where(largest > self._largest, key + low, self.argmax)
        largest = torch.maximum(largest, self._largest)
        step = (self._largest - largest).nan_to_num(nan=_LEAST).clamp(min=_LEAST)
        factor = step.exp()
        self._weighted = factor * (self._weighted + step * self._total)
        self._total, self._first, self._local = (
            factor * kept for kept in (self._total, self._first, self._local)
        )
        self._largest = largest
        finite = largest.clamp(min=torch.finfo(torch.float32).min)[..., None]
        exponents = scores.sub_(finite).clamp_(min=_LEAST)
        weights = exponents.exp()
        self._total += weights.sum(dim=-1)
        self._weighted += exponents.mul_(weights).sum(dim=-1)
        return weights

    def add_first(self, weights: Tensor, first: Tensor) -> None:
        """Add the weight of the first key of each query's text, (S, R), where it is among these."""
        is_here = (first >= 0) & (first < weights.shape[-1])
        place = first.clamp(0, weights.shape[-1] - 1)[:, None, :, None]
        own = weights.gather(-1, place.expand(*weights.shape[:3], 1)).squeeze(-1)
        self._first += own * is_here[:, None]

    def add_local(self, weights: Tensor, is_far: Tensor) -> None:
        """Add the weights of keys that are not far; it may overwrite the weights."""
        self._local += weights.masked_fill_(is_far, 0).sum(dim=-1)

    def statistics(self, sinks: Tensor | None) -> Tensor:
        """The statistics, (S, heads, R, 6), without argmax_position.

        Args:
            sinks: (S, heads, R) scores of the learned sinks; None for none.
        """
        lse = keys_lse = self._largest + self._total.log()
        if sinks is not None:
            lse = torch.logaddexp(keys_lse, sinks)
        share = (keys_lse - lse).exp()
        entropy = share * (lse - self._largest - self._weighted / self._total)
        largest = (self._largest - lse).exp()
        sink = self._first * largest
        if sinks is not None:
            sink = sink + (sinks - lse).exp()
        return torch.stack([lse, entropy, largest, largest, sink, self._local * largest], dim=-1)
