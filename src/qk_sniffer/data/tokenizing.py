"""Turns rows of a dataset into tokens, example ids and what the examples table needs."""

from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

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


class Encode:
    """Encodes some rows at once, for ``datasets.map`` and for a stream.

    Args:
        tokenizer: The tokenizer.
        text_column: Column with the texts.
        id_column: Column with the ids; None numbers the rows.
        max_length: Tokens kept from the start of each text; None keeps all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_column: str,
        id_column: str | None,
        max_length: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.id_column = id_column
        self.max_length = max_length
        self.row_numbers: npt.NDArray[np.int64] | None = None
        """Numbers of the rows in the dataset, where only some of them are given."""

    def __call__(self, columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        """The columns of ``FEATURES``.

        Args:
            columns: Values by column.
            rows: Number of each row.

        Raises:
            UserError: A text is not a string, or an id neither an integer nor a string.
        """
        if self.row_numbers is not None:
            rows = self.row_numbers[rows].tolist()
        texts = columns[self.text_column]
        for text, row in zip(texts, rows, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_column: row {row} has {_shorten(text)} in {self.text_column!r}, not a "
                    "string; mend or drop the row, or name another column"
                )
        source_ids = rows if self.id_column is None else columns[self.id_column]
        input_ids, truncated = self._tokenize(texts)
        return {
            "input_ids": input_ids,
            "n_tokens": [len(ids) for ids in input_ids],
            "truncated": truncated,
            "example_id": hash_ids(source_ids, rows),
            "source_id": [str(source_id) for source_id in source_ids],
        }

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
