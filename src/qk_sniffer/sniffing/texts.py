"""The texts that the calls of a model read: new ones, and those that a cache continues."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
        example_id: Its number.
        source_id: Its name.
        positions: Of its tokens, ascending.
        tokens: Their ids.
    """

    example_id: int
    source_id: str
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass
class _Row:
    """What a cache holds of one sequence.

    Attributes:
        text: The text that is read last in it; None where there is only padding.
        position: The last that was read; -1 before the first.
        token: The token there.
        has_ended: ``generate`` has ended this text, and pads it while others go on.
    """

    text: Text | None = None
    position: int = -1
    token: int | None = None
    has_ended: bool = False


@dataclass(frozen=True, eq=False)
class _Part:
    """Tokens of one text in one call.

    Attributes:
        text: The text.
        sequence: The sequence of the batch.
        columns: (N,) int64, their places among the tokens of the call.
        positions: (N,) int64, ascending.
        token_ids: (N,) int64.
    """

    text: Text
    sequence: int
    columns: Tensor
    positions: Tensor
    token_ids: Tensor


@dataclass(frozen=True, eq=False)
class Call:
    """A call on its way.

    Attributes:
        tokens: What it reads.
        parts: What it adds to each text.
        rows: What a cache holds of each sequence behind it.
        n_places: Places of the cache behind it, padding included.
        new: The texts that begin in it.
        names: Theirs, as they were given.
    """

    tokens: CallTokens
    parts: list[_Part]
    rows: list[_Row]
    n_places: int
    new: list[Text]
    names: list[int | str]


class Texts:
    """Numbers the texts in the order in which they are first read, and follows them through caches.

    A text that has a name has the example id that a run gives to it.

    Args:
        eos_token_ids: Tokens with which ``generate`` ends a text.
        pad_token_id: The token with which it then pads it; None for the first of those.
    """

    def __init__(self, eos_token_ids: Sequence[int], pad_token_id: int | None) -> None:
        self.read: list[Text] = []
        """Those that a call has read to its end, and nobody has taken."""
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pad_token_id = next(iter(eos_token_ids), None) if pad_token_id is None else pad_token_id
        self._caches: WeakKeyDictionary[Any, tuple[int, list[_Row]]] = WeakKeyDictionary()
        self._names: list[int | str] = []
        self._named: dict[int, str] = {}
        self._left_out: frozenset[int] = frozenset()
        self._lock = threading.Lock()

    def name_next(self, names: Sequence[int | str]) -> None:
        """Name the texts that the next call begins.

        Raises:
            UserError: One is neither an integer nor a string, or has the example id of another text.
        """
        if isinstance(names, str) or not all(isinstance(name, int | str) for name in names):
            raise UserError(f"names: expected a list of strings or integers, got {names!r}")
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
            self._names = list(names)

    def leave_out(self, example_ids: Iterable[int]) -> None:
        """Keep no rows of some texts, which were captured before."""
        self._left_out = frozenset(example_ids)

    def is_left_out(self, text: Text) -> bool:
        """Whether no rows of a text are kept."""
        return text.example_id in self._left_out

    def take_ended(self) -> list[Text]:
        """Forget the texts that no cache goes on with, and give them."""
        with self._lock:
            rows = [row for _, rows in self._caches.values() for row in rows]
            going_on = {id(row.text) for row in rows}
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
            UserError: The cache holds other places than were read, or names are too few or too many.
        """
        with self._lock:
            rows = self._rows_of(cache, past_length, sequences.input_ids.shape[0])
            return self._begin(sequences, rows, past_length)

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
                self._caches[cache] = (call.n_places, call.rows)

    def drop(self, call: Call) -> None:
        """Forget a call that has failed; its names and numbers are for the next."""
        with self._lock:
            self._names = call.names
            for text in call.new:
                del self._named[text.example_id]

    def _rows_of(self, cache: Any, past_length: int, size: int) -> list[_Row]:
        n_places, rows = self._caches.get(cache, (0, [])) if cache is not None else (0, [])
        if past_length == 0 or not rows:
            return [_Row() for _ in range(size)]
        if n_places != past_length or len(rows) != size:
            raise UserError(
                f"sniff: the cache holds {past_length} places of {size} sequences, and {n_places} of "
                f"{len(rows)} were read; a cache that is changed between calls can't be followed"
            )
        return rows

    def _begin(self, sequences: CallSequences, rows: Sequence[_Row], past_length: int) -> Call:
        parts: list[_Part] = []
        new: list[Text] = []
        behind = []
        for sequence, row in enumerate(rows):
            columns, has_ended = self._columns(sequences, sequence, row)
            position, text, token = row.position, row.text, row.token
            for run in _ascending_runs(sequences.positions[sequence, columns]):
                part = columns[run]
                positions = sequences.positions[sequence, part]
                if text is None or int(positions[0]) <= position:
                    text = Text(*self._next_ids(new))
                    new.append(text)
                parts.append(
                    _Part(text, sequence, part, positions, sequences.input_ids[sequence, part])
                )
                position, token = int(positions[-1]), int(parts[-1].token_ids[-1])
            behind.append(_Row(text, position, token, has_ended))
        if self._names and len(self._names) != len(new):
            raise UserError(
                f"names: {len(self._names)} names were given, and the call begins {len(new)} texts; "
                "give one name for each"
            )
        names, self._names = self._names, []
        self._named |= {text.example_id: text.source_id for text in new}
        n_places = past_length + sequences.input_ids.shape[1]
        kept = [part for part in parts if not self.is_left_out(part.text)]
        return Call(_tokens(kept), parts, behind, n_places, new, names)

    def _columns(self, sequences: CallSequences, sequence: int, row: _Row) -> tuple[Tensor, bool]:
        """The columns of a sequence's tokens, and whether ``generate`` has ended its text."""
        token_ids = sequences.input_ids[sequence]
        is_step = token_ids.numel() == 1 and row.text is not None
        has_ended = row.has_ended or row.token in self._eos_token_ids
        if is_step and has_ended and int(token_ids) == self._pad_token_id:
            return torch.empty(0, dtype=torch.int64), True
        return sequences.is_token[sequence].nonzero().squeeze(1), False

    def _next_ids(self, new: Sequence[Text]) -> tuple[int, str]:
        """Example id and name of the next text that begins, behind others of the same call."""
        if len(new) < len(self._names):
            name = self._names[len(new)]
            return example_id(name), str(name)
        taken = {text.example_id for text in new}
        numbers = count(len(self._named) + len(new))
        number = next(n for n in numbers if n not in taken and n not in self._named)
        return number, str(number)


def _ascending_runs(positions: Tensor) -> list[Tensor]:
    """The indices of positions, split where they don't rise: packed texts begin anew there."""
    borders = (positions.diff() <= 0).nonzero().squeeze(1) + 1
    indices = torch.arange(positions.numel())
    return [run for run in torch.tensor_split(indices, borders) if run.numel()]


def _tokens(parts: Sequence[_Part]) -> CallTokens:
    sizes = torch.tensor([part.columns.numel() for part in parts], dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.int64)

    def repeated(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).repeat_interleave(sizes)

    return CallTokens(
        repeated([part.sequence for part in parts]),
        torch.cat([empty, *(part.columns for part in parts)]),
        repeated([part.text.example_id for part in parts]),
        torch.cat([empty, *(part.positions for part in parts)]),
    )
