"""Turns rows of a dataset into tokens, example ids and what the examples table needs."""

from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from qk_sniffer.data.columns import values_of
from qk_sniffer.data.positions import positions_in
from qk_sniffer.errors import UserError
from qk_sniffer.ids import hash_ids

FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")),
    n_tokens=datasets.Value("int32"),
    truncated=datasets.Value("bool"),
    example_id=datasets.Value("int32"),
    source_id=datasets.Value("string"),
)
"""Columns of an encoded row."""

LISTED = datasets.Features(positions=datasets.List(datasets.Value("int32")))
"""The column that is there too where positions come with each text."""


class Encode:
    """Encodes some rows at once, for ``datasets.map`` and for a stream.

    Args:
        tokenizer: The tokenizer.
        text_column: Column with the texts.
        id_column: Column with the ids; None numbers the rows.
        max_length: Tokens kept from the start of each text; None keeps all.
        positions_column: Column with a list of positions for each text; None for none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_column: str,
        id_column: str | None,
        max_length: int | None,
        positions_column: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.id_column = id_column
        self.max_length = max_length
        self.positions_column = positions_column
        self.row_numbers: npt.NDArray[np.int64] | None = None
        """Numbers of the rows in the dataset, where only some of them are given."""

    def __call__(self, columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        """The columns of ``features``.

        Args:
            columns: Values by column.
            rows: Number of each row.

        Raises:
            UserError: A text is not a string, an id neither an integer nor a string, or positions are
                no list of them.
        """
        if self.row_numbers is not None:
            rows = self.row_numbers[rows].tolist()
        texts = values_of(columns, self.text_column)
        for text, row in zip(texts, rows, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_column: row {row} has {_shorten(text)} in {self.text_column!r}, not a "
                    "string; mend or drop the row, or name another column"
                )
        source_ids = rows if self.id_column is None else values_of(columns, self.id_column)
        input_ids, truncated = self._tokenize(texts)
        n_tokens = [len(ids) for ids in input_ids]
        listed = {}
        if (name := self.positions_column) is not None:
            lists = zip(values_of(columns, name), rows, n_tokens, strict=True)
            listed["positions"] = [self._positions(*each) for each in lists]
        return {
            "input_ids": input_ids,
            "n_tokens": n_tokens,
            "truncated": truncated,
            "example_id": hash_ids(source_ids, rows),
            "source_id": [str(source_id) for source_id in source_ids],
            **listed,
        }

    @property
    def features(self) -> datasets.Features:
        """The columns that it gives."""
        return FEATURES if self.positions_column is None else datasets.Features(FEATURES | LISTED)

    def _positions(self, values: Any, row: int, n_tokens: int) -> npt.NDArray[np.int32]:
        """The positions that a text lists, as far as it has them."""
        found = positions_in(values)
        if found is None:
            raise UserError(
                f"data.positions_column: row {row} has {_shorten(values)} in "
                f"{self.positions_column!r}, not a list of integers of at least 0; mend or drop the "
                "row; an empty list keeps nothing of a text"
            )
        return found[found < n_tokens].astype(np.int32)

    def _tokenize(self, texts: list[str]) -> tuple[list[Any], list[bool]]:
        """The tokens of each text, and whether it was cut."""
        if self.max_length is None:
            whole = self.tokenizer(texts, verbose=False)["input_ids"]
            return _as_arrays(whole), [False] * len(texts)
        limits = {"truncation": True, "max_length": self.max_length}
        if not self.tokenizer.is_fast:
            whole = self.tokenizer(texts, verbose=False)["input_ids"]
            kept = self.tokenizer(texts, **limits)["input_ids"]
            return _as_arrays(kept), [len(ids) > self.max_length for ids in whole]
        # What is cut off comes as further pieces, so that a text is tokenized once.
        pieces = self.tokenizer(texts, **limits, return_overflowing_tokens=True)
        owners = np.array(pieces["overflow_to_sample_mapping"])
        firsts = np.searchsorted(owners, np.arange(len(texts)))
        kept = [pieces["input_ids"][first] for first in firsts]
        return _as_arrays(kept), (np.bincount(owners, minlength=len(texts)) > 1).tolist()


def _as_arrays(tokens: list[list[int]]) -> list[npt.NDArray[np.int32]]:
    return [np.array(ids, np.int32) for ids in tokens]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
