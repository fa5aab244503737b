"""The texts that the calls of a model read: new ones, and those that a cache continues."""

import operator
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qk_sniffer.capture import CallTokens
from qk_sniffer.errors import UserError
from qk_sniffer.ids import example_id
from qk_sniffer.models import CallSequences


@dataclass(eq=False)
class Text:
    """One text, as far as it was read.

    Attributes:
        start: The first position that its tokens can attend to, which is 0 where tokens before them
            were read elsewhere; None before the first.
        example_id: Its number.
        source_id: Its name.
        positions: Of its tokens, ascending.
        tokens: Their ids.
    """

    start: int | None
    example_id: int = -1
    source_id: str = ""
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """What a cache holds of one sequence.

    Attributes:
        text: Its text.
        places: (P,) int64, the positions of the tokens at its places; -1 for padding.
        position: The last position that was read; -1 before the first.
        tokens_left: Tokens that ``generate`` still reads of the text before it pads it, while others go
            on; None where it has not ended.
    """

    text: Text
    places: Tensor
    position: int = -1
    tokens_left: int | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """Tokens of one text in one call.

    Attributes:
        text: The text.
        sequence: The sequence of the batch.
        columns: (N,) int64, their places among the tokens of the call.
        positions: (N,) int64, ascending.
        n_before: (N,) int64, places before theirs, from the first of the text on.
        token_ids: (N,) int64.
    """

    text: Text
    sequence: int
    columns: Tensor
    positions: Tensor
    n_before: Tensor
    token_ids: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A call on its way.

    Attributes:
        tokens: What it reads.
        parts: What it adds to each text.
        rows: What a cache holds of each sequence behind it.
        new: The texts that begin in it.
        names: Theirs, as they were given.
    """

    tokens: CallTokens
    parts: list[_Part]
    rows: list[Row]
    new: list[Text]
    names: list[int | str]


class Texts:
    """Numbers the texts in the order in which they are first read, and follows them through caches.

    A text that has a name has the example id that a run gives to it.

    Args:
        has_windows: Whether a layer of the model has a window, which counts places.
    """

    def __init__(self, has_windows: bool) -> None:
        self.read: list[Text] = []
        """Those that a call has read to its end, and nobody has taken."""
        self.must_be_whole = False
        """Whether texts are refused that are not read from position 0 on without gaps."""
        self.has_windows = has_windows
        self._caches: WeakKeyDictionary[Any, list[Row]] = WeakKeyDictionary()
        self._names: list[int | str] = []
        self._named: dict[int, str] = {}
        self._left_out: frozenset[int] = frozenset()
        self._lock = threading.Lock()

    def name_next(self, names: Iterable[int | str]) -> None:
        """Name the texts that the next call begins.

        Raises:
            UserError: One is neither an integer nor a string, or has the example id of another text.
        """
        names = _as_names(names)
        with self._lock:
            given: dict[int, str] = {}
            for name in names:
                number = example_id(name)
                if (other := self._named.get(number, given.get(number))) is not None:
                    raise UserError(
                        f"names: {name!r} has the example id {number}, as the text {other!r} has; "
                        "choose another name"
                    )
                given[number] = str(name)
            self._names = names

    def leave_out(self, example_ids: Iterable[int]) -> None:
        """Keep no rows of some texts, which were captured before."""
        self._left_out = frozenset(example_ids)

    def is_left_out(self, text: Text) -> bool:
        """Whether no rows of a text are kept."""
        return text.example_id in self._left_out

    def take_ended(self) -> list[Text]:
        """Forget the texts that no cache goes on with, and give them."""
        with self._lock:
            going_on = {id(row.text) for rows in self._caches.values() for row in rows}
            ended = [text for text in self.read if id(text) not in going_on]
            self.read = [text for text in self.read if id(text) in going_on]
            return ended

    def take_all(self) -> list[Text]:
        """Forget all texts, and give them."""
        with self._lock:
            texts, self.read = self.read, []
            return texts

    def follows(self, cache: Any) -> bool:
        """Whether a cache holds texts that were read here."""
        return cache in self._caches

    def begin(self, sequences: CallSequences, cache: Any, past_length: int) -> Call:
        """The texts and positions of the tokens of a call.

        Args:
            sequences: What it reads.
            cache: Its cache; None where it has none.
            past_length: Places that the cache holds already.

        Raises:
            UserError: The call can't be told from its texts: the cache holds other places than were
                read, the mask changes what earlier calls have read, or positions begin anew; or names
                are too few or too many.
        """
        with self._lock:
            rows = self._rows_of(cache, past_length, sequences.input_ids.shape[0])
            return _Reader(self, sequences, past_length).read(rows)

    def end(self, call: Call, cache: Any) -> None:
        """Note what a call has read.

        Args:
            call: The call.
            cache: What holds its texts now; None where nothing does.
        """
        with self._lock:
            for part in call.parts:
                part.text.positions += part.positions.tolist()
                part.text.tokens += part.token_ids.tolist()
            self.read.extend(call.new)
            if cache is not None:
                self._caches[cache] = call.rows

    def drop(self, call: Call) -> None:
        """Forget a call that has failed; its names and numbers are for the next."""
        with self._lock:
            self._names = call.names
            for text in call.new:
                del self._named[text.example_id]

    def _rows_of(self, cache: Any, past_length: int, size: int) -> list[Row] | None:
        """What the cache of a call holds; None where nothing of it was read here."""
        rows = None if cache is None or past_length == 0 else self._caches.get(cache)
        if rows is not None and (len(rows) != size or len(rows[0].places) != past_length):
            raise UserError(
                f"sniff: the cache holds {past_length} places of {size} sequences, and "
                f"{len(rows[0].places)} of {len(rows)} were read; a cache that is changed between "
                "calls can't be followed"
            )
        return rows

    def take_names(self, new: Sequence[Text]) -> list[int | str]:
        """Give new texts, in their order, the names that wait for them, or numbers.

        Raises:
            UserError: The names are too few or too many.
        """
        names = self._names
        if names and len(names) != len(new):
            raise UserError(
                f"names: {len(names)} names were given, and the call begins {len(new)} texts; give one "
                "name for each"
            )
        numbers = (n for n in count(len(self._named)) if n not in self._named)
        for text, name in zip(new, names or numbers, strict=False):
            text.example_id, text.source_id = example_id(name), str(name)
            self._named[text.example_id] = text.source_id
        self._names = []
        return names


class _Reader:
    """Finds the texts of one call."""

    def __init__(self, texts: Texts, sequences: CallSequences, past_length: int) -> None:
        self._texts = texts
        self._sequences = sequences
        self._past_length = past_length
        self._parts: list[_Part] = []
        self._new: list[Text] = []

    def read(self, rows: list[Row] | None) -> Call:
        texts = self._texts
        size = self._sequences.input_ids.shape[0]
        known = [None] * size if rows is None else rows
        behind = [self._read_sequence(number, row) for number, row in enumerate(known)]
        names = texts.take_names(self._new)
        kept = [part for part in self._parts if not texts.is_left_out(part.text)]
        return Call(_tokens(kept, behind), self._parts, behind, self._new, names)

    def _read_sequence(self, sequence: int, row: Row | None) -> Row:
        mask = self._sequences.is_token[sequence]
        before, now = mask[: self._past_length], mask[self._past_length :]
        if row is None:
            # Tokens that were read elsewhere are attended to, and were not captured.
            counted = torch.where(before, before.cumsum(0) - 1, -1)
            row = Row(self._begin_text(start=0 if before.any() else None), counted)
        tokens_left = row.tokens_left if now.numel() == 1 else None
        if tokens_left == 0:
            now = torch.zeros_like(now)
        columns = now.nonzero().squeeze(1)
        positions = torch.where(now, self._sequences.positions[sequence], -1)
        places = torch.cat([row.places, positions])
        if columns.numel():
            _require_same(row.places >= 0, before)
            if self._texts.has_windows:
                _require_unbroken(places >= 0)
        tokens_left = None if tokens_left is None else 0
        return replace(
            self._read_tokens(sequence, row, columns, places), places=places, tokens_left=tokens_left
        )

    def _read_tokens(self, sequence: int, row: Row, columns: Tensor, places: Tensor) -> Row:
        positions = self._sequences.positions[sequence, columns]
        text, position = row.text, row.position
        for number, run in enumerate(self._runs(positions)):
            if number:
                text, position = self._begin_text(), -1
            _require_rising(positions[run], position)
            if self._texts.must_be_whole:
                _require_next(text, positions[run], position)
            if text.start is None:
                text.start = int(positions[run][0])
            token_ids = self._sequences.input_ids[sequence, columns[run]]
            own = self._past_length + columns[run]
            # Packed texts begin where the one before ends, others with the first token of the sequence.
            n_before = own - (own[0] if number else (places >= 0).nonzero()[0])
            self._parts.append(_Part(text, sequence, columns[run], positions[run], n_before, token_ids))
            position = int(positions[run][-1])
        return Row(text, row.places, position)

    def _begin_text(self, start: int | None = None) -> Text:
        self._new.append(Text(start))
        return self._new[-1]

    def _runs(self, positions: Tensor) -> list[Tensor]:
        """The indices of the tokens of each text: packed ones end where positions don't follow."""
        indices = torch.arange(positions.numel())
        borders = torch.empty(0, dtype=torch.int64)
        if self._sequences.keeps_apart:
            borders = (positions.diff() != 1).nonzero().squeeze(1) + 1
        return [run for run in torch.tensor_split(indices, borders) if run.numel()]


def _require_same(read: Tensor, mask: Tensor) -> None:
    """See that the places of a cache are masked as they were when they were read."""
    if (read & ~mask).any():
        raise UserError(
            "sniff: attention_mask hides tokens that an earlier call has read; pass the mask of all "
            "that the cache holds"
        )
    if (mask & ~read).any():
        raise UserError(
            "sniff: attention_mask lets tokens attend to padding that the cache holds; pass the mask "
            "of all that the cache holds, with 0 for its padding"
        )


def _require_unbroken(places: Tensor) -> None:
    """See that the tokens of a sequence lie side by side."""
    tokens = places.nonzero().squeeze(1)
    if int(tokens[-1] - tokens[0]) + 1 != tokens.numel():
        raise UserError(
            "sniff: there is padding between the tokens of a text, and this model's sliding window "
            "counts it; pad on the left alone, and begin a new cache for the next turn"
        )


def _require_rising(positions: Tensor, last: int) -> None:
    """See that the positions of a text ascend."""
    if int(positions[0]) <= last or (positions.diff() <= 0).any():
        raise UserError(
            "sniff: position_ids begin anew within a sequence, and the model lets such texts attend to "
            "each other where it has a cache or an attention_mask; pass use_cache=False and no mask"
        )


def _require_next(text: Text, positions: Tensor, last: int) -> None:
    """See that a text has no gaps."""
    if int(positions[0]) != last + 1 or (positions.diff() != 1).any():
        raise not_whole(int(positions[0]), last + 1)


def not_whole(position: int, expected: int) -> UserError:
    """The error for a text that can't be in a data root."""
    return UserError(
        f"data_root: it holds whole texts, and one was read at position {position} where {expected} "
        "must come; pad on the right, pass position_ids that count each text from 0, and begin it in "
        "the block"
    )


def _as_names(names: Any) -> list[int | str]:
    """Names as a list of strings and integers."""
    found: list[int | str] = []
    try:
        if isinstance(names, str):
            raise TypeError
        for name in names:
            if isinstance(name, bool):
                raise TypeError
            found.append(name if isinstance(name, str) else operator.index(name))
    except TypeError:
        raise UserError(f"names: expected a list of strings or integers, got {names!r}") from None
    return found


def _tokens(parts: Sequence[_Part], rows: Sequence[Row]) -> CallTokens:
    sizes = torch.tensor([part.columns.numel() for part in parts], dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.int64)

    def repeated(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).repeat_interleave(sizes)

    return CallTokens(
        repeated([part.sequence for part in parts]),
        torch.cat([empty, *(part.columns for part in parts)]),
        repeated([part.text.example_id for part in parts]),
        torch.cat([empty, *(part.positions for part in parts)]),
        torch.cat([empty, *(part.n_before for part in parts)]),
        torch.stack([row.places for row in rows]) if any(map(_has_gaps, rows)) else None,
    )


def _has_gaps(row: Row) -> bool:
    """Whether the positions at the places of a sequence don't follow each other."""
    tokens = (row.places >= 0).nonzero().squeeze(1)
    return tokens.numel() > 1 and bool((row.places[tokens[0] : tokens[-1] + 1].diff() != 1).any())
