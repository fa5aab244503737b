"""Example ids: int32 numbers that name a text, and the errors about them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import UserError

_INT32 = range(-(2**31), 2**31)
_FIELD = "data.id_column"
_LATEST = 2**14


def example_id(source_id: int | str) -> int:
    """The int32 id of a text.

    An integer that fits int32 is kept. Anything else is the 4-byte Blake2b digest of its UTF-8 text
    (of its decimal text, for a larger integer), read as a little-endian signed integer.
    """
    if isinstance(source_id, int) and source_id in _INT32:
        return source_id
    digest = hashlib.blake2b(str(source_id).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def hash_ids(source_ids: Sequence[Any], rows: Sequence[int]) -> list[int]:
    """The example ids of some rows of the dataset, given their source ids and numbers.

    Raises:
        UserError: A source id is neither an integer nor a string, null for example.
    """
    for source_id, row in zip(source_ids, rows, strict=True):
        if isinstance(source_id, bool) or not isinstance(source_id, int | str):
            raise UserError(
                f"{_FIELD}: row {row} has the id {source_id!r}, which is neither an integer nor a "
                "string; mend the row, or set id_column to null to number the rows"
            )
    return [example_id(source_id) for source_id in source_ids]


@dataclass(frozen=True)
class ExampleFilter:
    """Which texts are to be read.

    Attributes:
        ids: (E,) int32, ascending.
        listed: Whether the listed texts are read, or all others.
    """

    ids: npt.NDArray[np.int32]
    listed: bool

    def __call__(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each of some texts is to be read."""
        ids = np.asarray(ids)
        if self.ids.size == 0:
            return np.full(ids.shape, not self.listed)
        places = np.searchsorted(self.ids, ids).clip(max=self.ids.size - 1)
        selected: npt.NDArray[np.bool_] = (self.ids[places] == ids) == self.listed
        return selected

    def tokens(self, ids: npt.ArrayLike, lengths: npt.NDArray[np.int64]) -> list[int]:
        """Tokens of each of some texts, and none of those that are not to be read.

        A loader of someone's own may give such texts.

        Args:
            ids: (N,) the texts.
            lengths: (N,) their tokens.
        """
        tokens: list[int] = (lengths * self(ids)).tolist()
        return tokens


class OnceEach:
    """Notes the texts of a run as they come, four bytes each."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.int32)
        self._latest: set[int] = set()

    def note(self, ids: npt.NDArray[np.int32]) -> None:
        """Note some texts.

        Raises:
            UserError: One of them has come before.
        """
        for example in ids.tolist():
            place = int(np.searchsorted(self._sorted, example))
            if example in self._latest or example in self._sorted[place : place + 1]:
                raise UserError(
                    f"example_ids: the text {example} comes twice in this run; let the loader give "
                    "each text once"
                )
            self._latest.add(example)
        if len(self._latest) >= _LATEST:
            latest = np.fromiter(self._latest, np.int32, len(self._latest))
            self._sorted, self._latest = np.union1d(self._sorted, latest), set()


EVERY_EXAMPLE = ExampleFilter(np.empty(0, np.int32), listed=False)


def are_left(ids: npt.ArrayLike, filters: Sequence[ExampleFilter]) -> npt.NDArray[np.bool_]:
    """Whether each of some texts passes all filters."""
    left = np.full(np.shape(ids), True)
    for selects in filters:
        left &= selects(ids)
    return left


def collision(first: int | str, second: int | str) -> UserError:
    """The error for two rows whose source ids have one example id."""
    if first == second:
        return UserError(
            f"{_FIELD}: the id {first!r} appears twice; make ids unique, or set id_column to null to "
            "number the rows"
        )
    return UserError(
        f"{_FIELD}: the ids {first!r} and {second!r} both become example_id {example_id(first)}; "
        "rename one, use an integer column, or set id_column to null to number the rows"
    )
