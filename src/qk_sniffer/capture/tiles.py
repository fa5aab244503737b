"""Tiles: tokens of a batch whose moments are summed in one product of matrices."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qk_sniffer.capture.buffers import upload
from qk_sniffer.capture.sampling import Sampler
from qk_sniffer.moments import NO_BUCKET

MOMENTS_BYTES = 64 * 2**20
"""The most that the vectors of a tile take of a device, about their mean."""

_DIGIT_BITS = 8
"""Of a digit of a position, which every number format has without rounding; three are enough for as
many tokens as float32 counts."""

_HALVES = (torch.bfloat16, torch.float16)


@dataclass
class Positions:
    """How many tokens there are, and the sums of their positions and of the squares of these."""

    count: int = 0
    total: int = 0
    squares: int = 0

    @classmethod
    def between(cls, start: int, stop: int) -> "Positions":
        """Those from ``start`` on, before ``stop``."""
        below = [(n, n * (n - 1) // 2, n * (n - 1) * (2 * n - 1) // 6) for n in (start, stop)]
        return cls(*(last - first for first, last in zip(*below, strict=True)))

    def add(self, other: "Positions") -> None:
        """Take in others."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def copy(self) -> "Positions":
        """The same, to be added to."""
        return replace(self)

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / self.count


class Memory:
    """Where the vectors of a tile are laid down: memory of each device, for one tile at a time."""

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._laid: tuple[tuple[int, ...], Tensor] | None = None

    def room(self, n_heads: int, width: int, columns: Tensor) -> Tensor:
        """Room for vectors, with what comes behind each of them.

        Args:
            n_heads: H.
            width: D.
            columns: (N, C).

        Returns:
            (H, N, D + C), of the device and dtype of the columns, which all layers of a forward share.
        """
        key, shape = (columns.device, columns.dtype), (n_heads, len(columns), width + columns.shape[1])
        flat, size = self._flat.get(key), math.prod(shape)
        if flat is None or len(flat) < size:
            self._flat[key] = flat = columns.new_empty(size)
            self._laid = None
        room = flat[:size].view(shape)
        if self._laid is None or self._laid[0] != shape or self._laid[1] is not columns:
            room[..., width:] = columns
            self._laid = shape, columns
        return room


@dataclass(frozen=True)
class Tile:
    """N tokens of one bucket.

    Attributes:
        bucket: Theirs.
        sequences: Of each token, the place of its sequence in the forward: (N,) int64; None where the
            tokens are those of ``places`` in all B sequences.
        places: Of each token, its place in its sequence: (N,) int64, or a slice.
        positions: Theirs.
        origin: The position that they are counted from in the columns.
        columns: (N, C), what comes behind each vector: a one, the digits of its position, and zeros.
    """

    bucket: int
    sequences: Tensor | None
    places: Tensor | slice
    positions: Positions
    origin: int
    columns: Tensor

    def about_their_means(self, vectors: Sequence[Tensor], memory: Memory) -> tuple[Tensor, Tensor]:
        """The vectors about the mean of their head, and what comes behind them.

        Args:
            vectors: (B, n_heads, S, D) of each kind; H heads in all.
            memory: Where they are laid down.

        Returns:
            What they are about, (H, D), close to the mean; and (H, N, D + C), until the next tile is
            laid down. Both have the dtype of the columns.
        """
        n_heads, width = sum(states.shape[1] for states in vectors), vectors[0].shape[3]
        room = memory.room(n_heads, width, self.columns)
        exact = torch.float64 if self.columns.dtype == torch.float64 else torch.float32
        means, first = [], 0
        for states in vectors:
            own = self._own(states)
            out = room[first : first + len(own), :, :width].view(own.shape)
            # Rounded as the vectors are, so that those near it are put about it without rounding.
            mean = own.mean(tuple(range(1, own.dim() - 1)), dtype=exact).to(self.columns.dtype)
            torch.sub(own, mean.view(len(own), *(1,) * (own.dim() - 2), width), out=out)
            means.append(mean)
            first += len(own)
        return torch.cat(means), room

    def _own(self, states: Tensor) -> Tensor:
        """The tile's vectors: (n_heads, N, D), or (n_heads, B, n, D)."""
        if self.sequences is None:
            return states[:, :, self.places].transpose(0, 1)
        return states[self.sequences, :, self.places].transpose(0, 1)

    def with_positions(self, digit_sums: Tensor) -> Tensor:
        """Sums with the positions from the origin on, (H, D), in float64.

        Args:
            digit_sums: (H, C - 1, D), those with their digits.
        """
        sums = digit_sums[:, 0].clone()
        for number, bits in enumerate(_digit_bits(self.columns.dtype)[1:], start=1):
            sums.add_(digit_sums[:, number], alpha=2.0**bits)
        return sums


class _Span(NamedTuple):
    """Tokens of one bucket, in neighbouring places of each sequence of a forward.

    Attributes:
        bucket: Theirs.
        start: The first place.
        stops: (B,) the place behind the last of each sequence.
    """

    bucket: int
    start: int
    stops: list[int]


class Tiles:
    """Cuts the tokens of a batch into tiles; all layers of a forward share them.

    Args:
        sampler: Gives the buckets, which tiles don't cross; None for none.
    """

    def __init__(self, sampler: Sampler | None) -> None:
        self._sampler = sampler
        self._lengths: list[int] = []
        self._forward: tuple[range, range] | None = None
        self._spans: list[_Span] = []
        self._cut: dict[tuple[torch.device, torch.dtype, int], list[Tile]] = {}

    def begin_batch(self, lengths: Sequence[int]) -> None:
        """Take another batch.

        Args:
            lengths: Tokens of each sequence that count.
        """
        self._lengths, self._forward = list(lengths), None

    def of(self, vectors: Sequence[Tensor], sequences: range, tokens: range) -> list[Tile]:
        """The tiles of an attention call.

        Args:
            vectors: (B, n_heads, S, D) of each kind that is summed together.
            sequences: Its sequences among those of the batch.
            tokens: Its positions.
        """
        if (sequences, tokens) != self._forward:
            self._forward, self._cut = (sequences, tokens), {}
            self._spans = self._cut_at_buckets(sequences, tokens)
        device = vectors[0].device
        dtype = working_dtype(device, vectors[0].dtype)
        n_heads = sum(states.shape[1] for states in vectors)
        token_bytes = n_heads * (vectors[0].shape[3] + _n_columns(dtype)) * dtype.itemsize
        key = device, dtype, max(1, MOMENTS_BYTES // token_bytes)
        if key not in self._cut:
            self._cut[key] = [tile for span in self._spans for tile in _cut(span, tokens.start, *key)]
        return self._cut[key]

    def _cut_at_buckets(self, sequences: range, tokens: range) -> list[_Span]:
        """The tokens of a forward that count, by bucket."""
        lengths = self._lengths[sequences.start : sequences.stop]
        stop = min(tokens.stop, max(lengths, default=0))
        if stop <= tokens.start:
            return []
        ends = [stop]
        buckets = [NO_BUCKET]
        if self._sampler is not None:
            positions = torch.arange(tokens.start, stop)
            found, sizes = torch.unique_consecutive(
                self._sampler.buckets(positions), return_counts=True
            )
            buckets, ends = found.tolist(), (tokens.start + sizes.cumsum(0)).tolist()
        spans, first = [], tokens.start
        for bucket, end in zip(buckets, ends, strict=True):
            stops = [min(max(length, first), end) - tokens.start for length in lengths]
            spans.append(_Span(bucket, first - tokens.start, stops))
            first = end
        return spans


def _cut(
    span: _Span, first: int, device: torch.device, dtype: torch.dtype, at_once: int
) -> Iterator[Tile]:
    """The tiles of a span.

    Args:
        span: The span.
        first: The position at place 0.
        device: Of the vectors.
        dtype: In which they are laid down.
        at_once: The most tokens of a tile, where it need not have one of each sequence.
    """
    start, stops = span.start, span.stops
    if len(set(stops)) == 1:
        step = max(1, at_once // len(stops))
        for low in range(start, stops[0], step):
            high = min(low + step, stops[0])
            origin, columns = _columns(np.arange(first + low, first + high), dtype)
            columns = np.tile(columns, (len(stops), 1))
            positions = Positions()
            for _ in stops:
                positions.add(Positions.between(first + low, first + high))
            on_device = _on(columns, device, dtype)
            yield Tile(span.bucket, None, slice(low, high), positions, origin, on_device)
        return
    sizes = np.array(stops) - start
    sequences = np.repeat(np.arange(len(stops)), sizes)
    places = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes) + start
    for low in range(0, len(places), at_once):
        part = slice(low, low + at_once)
        found = (first + places[part]).tolist()
        origin, columns = _columns(first + places[part], dtype)
        yield Tile(
            span.bucket,
            upload(torch.from_numpy(sequences[part]), device),
            upload(torch.from_numpy(places[part]), device),
            Positions(len(found), sum(found), sum(position * position for position in found)),
            origin,
            _on(columns, device, dtype),
        )


def _columns(positions: npt.NDArray[np.int64], dtype: torch.dtype) -> tuple[int, npt.NDArray[np.int64]]:
    """What comes behind the vectors of some positions, (N, C), and what these are counted from.

    That is their middle, or the first where they are written in digits, so that no more is lost of
    their distances where they are large.
    """
    digit_bits = _digit_bits(dtype)
    is_whole = len(digit_bits) == 1
    origin = int(positions.min() + positions.max()) // 2 if is_whole else int(positions.min())
    columns = np.zeros((len(positions), _n_columns(dtype)), np.int64)
    columns[:, 0] = 1
    for number, bits in enumerate(digit_bits, start=1):
        digits = (positions - origin) >> bits
        columns[:, number] = digits if is_whole else digits % 2**_DIGIT_BITS
    return origin, columns


def _digit_bits(dtype: torch.dtype) -> tuple[int, ...]:
    """Where the digits of a position begin that a number format has without rounding."""
    return (0, _DIGIT_BITS, 2 * _DIGIT_BITS) if dtype in _HALVES else (0,)


def _n_columns(dtype: torch.dtype) -> int:
    """C: of half precision as many as leave the rows of a matrix aligned for tensor cores."""
    return 8 if dtype in _HALVES else 2


def _on(columns: npt.NDArray[np.int64], device: torch.device, dtype: torch.dtype) -> Tensor:
    return upload(torch.from_numpy(columns).to(dtype), device)


@lru_cache
def working_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which vectors about their mean are laid down.

    It is float32, or float64 for vectors of float64. Those of half precision stay as they are where
    the device sums their products in float32: what rounding does to a vector is then as small beside
    its distance from the mean as what the model's own rounding has done.
    """
    if dtype == torch.float64:
        return dtype
    return dtype if dtype in _HALVES and _sums_exactly(device, dtype) else torch.float32


def _sums_exactly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of matrices of half precision can be had in float32."""
    if device.type != "cuda":
        return False
    factors = torch.ones(1, 8, 4096, dtype=dtype, device=device)
    factors[:, 0, 0] = 2
    try:
        sums = torch.bmm(factors, factors.mT, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    # Which neither format of half precision has.
    return sums.dtype == torch.float32 and float(sums[0, 0, 1]) == 4097


def product(left: Tensor, right: Tensor) -> Tensor:
    """Sums over tokens of the products of two vectors.

    Args:
        left: (H, N, A).
        right: (H, N, B).

    Returns:
        (H, A, B) float64.
    """
    return in_float64(_product(left, right))


def product_with_itself(augmented: Tensor, width: int) -> Tensor:
    """The same of vectors, with what comes behind them, and the vectors.

    What stands above the diagonal also stands below it, and is not computed again.

    Args:
        augmented: (H, N, D + C).
        width: D.

    Returns:
        (H, D + C, D) float64.
    """
    half = width // 2
    first = _product(augmented, augmented[..., :half])
    second = _product(augmented[..., half:], augmented[..., half:width])
    shape = len(first), augmented.shape[2], width
    sums = torch.empty(shape, dtype=torch.float64, device=_device_of_sums(first))
    sums[..., :half] = first
    sums[:, half:, half:] = second
    sums[:, :half, half:] = first[:, half:width].mT
    return sums


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In float32, or float64."""
    if right.dtype in _HALVES:
        return torch.bmm(left.mT, right, out_dtype=torch.float32)
    with _full_precision():
        return torch.bmm(left.mT, right)


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the host where its device has no such numbers."""
    return tensor.to(_device_of_sums(tensor)).double()


def _device_of_sums(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 as it is, whatever somebody has allowed for the model."""
    allowed = torch.get_float32_matmul_precision()
    if allowed == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
