"""Moments of every token that a model reads, summed on the device beside the forward.

The tokens of an attention call are taken in tiles. The vectors of a tile are put about their own mean,
behind each come a one and the token's position, and one product of matrices gives all sums of the tile.
Tiles are brought together in float64, about their means again (see ``qk_sniffer.moments``), so that
nothing is lost where means are large. A batch counts when it has ended.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qk_sniffer.capture.heads import CapturedStream
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.capture.tiles import (
    Memory,
    Positions,
    Tile,
    Tiles,
    in_float64,
    product,
    product_with_itself,
)
from qk_sniffer.kinds import Kind
from qk_sniffer.moments import MomentTable

_TOGETHER: tuple[tuple[Kind, ...], ...] = (("q", "k"), ("v", "o"))
"""Kinds whose vectors have one width and come in one call."""


@dataclass(frozen=True, eq=False)
class _Heads:
    """The captured heads of one attention call that are summed together, H in all.

    Attributes:
        layer_idx: The layer.
        numbers: Those of each kind.
        keys: The row of each query head's key head among the H; None where that is not asked for.
    """

    layer_idx: int
    numbers: Mapping[Kind, tuple[int, ...]]
    keys: tuple[int, ...] | None

    @cached_property
    def rows(self) -> dict[Kind, slice]:
        """Where those of each kind are among the H."""
        stops = np.cumsum([len(numbers) for numbers in self.numbers.values()]).tolist()
        starts = [0, *stops[:-1]]
        return {kind: slice(*ends) for kind, *ends in zip(self.numbers, starts, stops, strict=True)}


class _Sums(NamedTuple):
    """Moments of H heads, in float64; those of queries come first.

    Attributes:
        positions: Of the tokens.
        mean: (H, D).
        products: (H, D, D), sums of products about the mean.
        position_products: (H, D), of those with the position.
        key_products: (H', D, D), of those of each query head with its key head; None for none.
    """

    positions: Positions
    mean: Tensor
    products: Tensor
    position_products: Tensor
    key_products: Tensor | None

    def add(self, other: "_Sums", keys: Sequence[int] | None) -> None:
        """Take in the tokens of another.

        Args:
            other: Of the same heads.
            keys: The row of each query head's key head.
        """
        old, new = self.positions, other.positions
        share = new.count / (old.count + new.count)
        step = other.mean - self.mean
        weighted = step * (old.count * share)
        self.products.add_(other.products).baddbmm_(weighted[:, :, None], step[:, None])
        self.position_products.add_(other.position_products)
        self.position_products.add_(weighted, alpha=new.mean - old.mean)
        if keys is not None:
            assert self.key_products is not None and other.key_products is not None
            self.key_products.add_(other.key_products)
            self.key_products.baddbmm_(weighted[: len(keys), :, None], step[list(keys), None])
        self.mean.add_(step, alpha=share)
        old.add(new)


class _Place(NamedTuple):
    """What is summed by itself: the heads of a call, at a stage, in a bucket."""

    heads: _Heads
    pre_rope: bool
    bucket: int


class MomentSums:
    """Sums the moments of all tokens of the captured heads.

    For each batch call ``begin_batch``, let every attention call ``add`` its vectors, and call
    ``end_batch``.

    Args:
        streams: The captured heads of each layer and part; the statistics of softmax have no moments.
        sampler: Gives the buckets that are summed by themselves; None sums all positions together.
        pre_rope: Sum those of the vectors before the rotary embedding too.
        cross: Sum the products of queries with the keys at their positions.
    """

    def __init__(
        self,
        streams: Iterable[CapturedStream],
        sampler: Sampler | None = None,
        *,
        pre_rope: bool = False,
        cross: bool = False,
    ) -> None:
        self.pre_rope = pre_rope
        self._heads = _heads_of_calls(streams, cross=cross)
        self._tiles, self._memory = Tiles(sampler), Memory()
        self._total: dict[_Place, _Sums] = {}
        self._pending: dict[_Place, _Sums] = {}
        self._read: range | None = None
        self.is_whole = True
        """Whether the sums are those of whole batches."""

    def begin_batch(self, lengths: Sequence[int]) -> None:
        """Begin a batch, and forget one that has not ended.

        Args:
            lengths: Tokens of each sequence that count: those before it; 0 leaves a text out.

        Raises:
            RuntimeError: Some of a batch that has not ended is counted already.
        """
        if not self.is_whole:
            raise RuntimeError(
                "a batch was given up when some of it was counted, which can't be taken back"
            )
        self._tiles.begin_batch(lengths)
        self._forget()

    def begin_part(self, sequences: range) -> None:
        """Let the next forwards read some sequences of the batch alone, from their first token on.

        What was added of them before, in a forward that could not be finished, is forgotten.
        """
        read = self._read
        if read is not None and (read.stop <= sequences.start or sequences.stop <= read.start):
            self._count()
        self._forget()

    def end_batch(self) -> None:
        """Count the batch."""
        self._count()
        self._forget()
        self.is_whole = True

    def _forget(self) -> None:
        self._pending, self._read = {}, None

    @torch.inference_mode()
    def _count(self) -> None:
        self.is_whole = False
        for place, sums in self._pending.items():
            _add(self._total, place, sums)

    @torch.inference_mode()
    def add(
        self,
        layer_idx: int,
        states: Mapping[Kind, Tensor],
        sequences: range,
        tokens: range,
        *,
        pre_rope: bool = False,
    ) -> None:
        """Sum the vectors of an attention call; enqueues work and waits for nothing.

        Args:
            layer_idx: Layer in the text decoder.
            states: Vectors of some kinds, (B, n_heads, S, width), those of the tokens that it reads.
            sequences: Its sequences among those of the batch.
            tokens: Their positions.
            pre_rope: Whether the vectors are those before the rotary embedding.
        """
        if pre_rope and not self.pre_rope:
            return
        self._read = sequences
        for heads in self._heads.get(layer_idx, ()):
            if heads.numbers.keys() <= states.keys():
                vectors = [_of_heads(states[kind], own) for kind, own in heads.numbers.items()]
                for tile in self._tiles.of(vectors, sequences, tokens):
                    place = _Place(heads, pre_rope, tile.bucket)
                    _add(self._pending, place, _sums_of(tile, vectors, heads, self._memory))

    def tables(self) -> dict[Kind, list[MomentTable]]:
        """The moments of all batches that have ended, by kind; one table for each width."""
        places: dict[tuple[Kind, int], list[_Place]] = {}
        for place, sums in self._total.items():
            for kind in place.heads.numbers:
                places.setdefault((kind, sums.mean.shape[1]), []).append(place)
        tables: dict[Kind, list[MomentTable]] = {}
        # Kind by kind, since what comes from a device is there twice until its table is made.
        for (kind, _), own in places.items():
            parts = [_table(place, kind, self._total[place]) for place in own]
            tables.setdefault(kind, []).append(MomentTable.concatenated(parts))
        return tables


def _heads_of_calls(streams: Iterable[CapturedStream], *, cross: bool) -> dict[int, list[_Heads]]:
    """What is summed together of each layer."""
    by_layer: dict[int, dict[Any, CapturedStream]] = {}
    for stream in streams:
        by_layer.setdefault(stream.layer.layer_idx, {})[stream.kind] = stream
    heads: dict[int, list[_Heads]] = {}
    for layer_idx, own in by_layer.items():
        for kinds in _TOGETHER:
            numbers = {kind: own[kind].heads for kind in kinds if kind in own}
            if numbers:
                # One of several processes that share a model may have no query head of a layer.
                has_both = kinds == ("q", "k") and numbers.keys() == set(kinds)
                keys = _key_rows(own["q"], own["k"]) if cross and has_both else None
                heads.setdefault(layer_idx, []).append(_Heads(layer_idx, numbers, keys))
    return heads


def _key_rows(queries: CapturedStream, keys: CapturedStream) -> tuple[int, ...]:
    """The row of each query head's key head; the keys' rows follow those of the queries."""
    key_heads = map(queries.layer.key_head, queries.heads)
    return tuple(len(queries.heads) + keys.heads.index(head) for head in key_heads)


def _of_heads(states: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some heads of (B, n_heads, S, width)."""
    if len(numbers) == states.shape[1]:
        return states
    return states[:, list(numbers)]


def _add(sums: dict[_Place, _Sums], place: _Place, new: _Sums) -> None:
    if place in sums:
        sums[place].add(new, place.heads.keys)
    else:
        sums[place] = new


def _sums_of(tile: Tile, vectors: Sequence[Tensor], heads: _Heads, memory: Memory) -> _Sums:
    """The moments of a tile.

    Args:
        tile: The tile.
        vectors: (B, n_heads, S, D) of each kind.
        heads: Theirs.
        memory: Where the vectors are laid down about their mean.
    """
    about, augmented = tile.about_their_means(vectors, memory)
    width, count = about.shape[1], tile.positions.count
    sums = product_with_itself(augmented, width)
    # What rounding has left of the sums about the mean.
    rest = sums[:, width]
    products = sums[:, :width].baddbmm_(rest[:, :, None], rest[:, None], alpha=-1 / count)
    position_products = tile.with_positions(sums[:, width + 1 :])
    position_products.sub_(rest, alpha=tile.positions.mean - tile.origin)
    key_products = None
    if heads.keys is not None:
        keys, centred = list(heads.keys), augmented[..., :width]
        key_products = product(centred[: len(keys)], centred[keys])
        key_products.baddbmm_(rest[: len(keys), :, None], rest[keys, None], alpha=-1 / count)
    mean = in_float64(about) + rest / count
    return _Sums(tile.positions.copy(), mean, products, position_products, key_products)


def _table(place: _Place, kind: Kind, sums: _Sums) -> MomentTable:
    """The moments of the heads of one kind, on the host."""
    heads, rows = place.heads, place.heads.rows[kind]
    numbers, positions = heads.numbers[kind], sums.positions
    n_rows = len(numbers)
    cross = {}
    if kind == "q" and heads.keys is not None and sums.key_products is not None:
        cross = {
            "key_mean": sums.mean[list(heads.keys)].cpu().numpy(),
            "key_products": sums.key_products.cpu().numpy(),
        }
    return MomentTable(
        layer_idx=np.full(n_rows, heads.layer_idx, np.int32),
        head=np.array(numbers, np.int32),
        bucket=np.full(n_rows, place.bucket, np.int32),
        pre_rope=np.full(n_rows, place.pre_rope),
        count=np.full(n_rows, positions.count),
        position_sum=np.full(n_rows, positions.total),
        position_square_sum=np.full(n_rows, float(positions.squares)),
        mean=sums.mean[rows].cpu().numpy(),
        products=sums.products[rows].cpu().numpy(),
        position_products=sums.position_products[rows].cpu().numpy(),
        **cross,
    )
