"""Turns rows of a dataset into tokens, example ids and what the examples table needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from qk_sniffer.data.columns import values_of
from qk_sniffer.data.conversations import Conversations, Rendered
from qk_sniffer.data.positions import positions_in
from qk_sniffer.errors import UserError, shortened
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

CONVERSATION = datasets.Features(
    n_prompt_tokens=datasets.Value("int32"),
    messages=datasets.List(
        {
            "role": datasets.Value("string"),
            "start": datasets.Value("int32"),
            "stop": datasets.Value("int32"),
        }
    ),
)
"""Columns that are there too of conversations."""


@dataclass(frozen=True)
class Tokens:
    """A text as tokens.

    Attributes:
        input_ids: (S,) int32.
        offsets: (S, 2), the first character of each token and the one behind its last; None where they
            are not needed.
    """

    input_ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64] | None = None


class TextColumn:
    """Texts that a column has as strings.

    Args:
        name: Its name.
    """

    needs_offsets = False
    features: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, name: str) -> None:
        self.name = name
        self.columns: dict[str, str | None] = {"text_column": name}

    def read(
        self, columns: Mapping[str, list[Any]], rows: Sequence[int], source_ids: Sequence[Any]
    ) -> list[Rendered]:
        """The texts of some rows.

        Raises:
            UserError: One is not a string.
        """
        texts = values_of(columns, self.name)
        for text, row in zip(texts, rows, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_column: row {row} has {shortened(text)} in {self.name!r}, not a "
                    "string; mend or drop the row, or name another column"
                )
        return [Rendered(text, len(text)) for text in texts]

    def places(self, texts: Sequence[Rendered], tokenized: Sequence[Tokens]) -> dict[str, list[Any]]:
        """Nothing is known of their parts."""
        return {}


class ConversationColumn:
    """Conversations, which a column has as lists of messages.

    Args:
        name: Its name.
        tools: Column with the tools that the assistant may call; None for none.
        conversations: Renders them.
    """

    needs_offsets = True
    features = CONVERSATION

    def __init__(self, name: str, tools: str | None, conversations: Conversations) -> None:
        self.name = name
        self.tools = tools
        self.columns: dict[str, str | None] = {"messages_column": name, "tools_column": tools}
        self.conversations = conversations

    def read(
        self, columns: Mapping[str, list[Any]], rows: Sequence[int], source_ids: Sequence[Any]
    ) -> list[Rendered]:
        """The conversations of some rows.

        Raises:
            UserError: One is none, or the chat template refuses it.
        """
        messages = values_of(columns, self.name)
        tools = [None] * len(messages) if self.tools is None else values_of(columns, self.tools)
        return [
            self.conversations.render(conversation, some_tools, f"row {row} (id {source_id!r})")
            for conversation, some_tools, row, source_id in zip(
                messages, tools, rows, source_ids, strict=True
            )
        ]

    def places(self, texts: Sequence[Rendered], tokenized: Sequence[Tokens]) -> dict[str, list[Any]]:
        """The tokens of the prompt, and those of each message."""
        pairs = list(zip(texts, tokenized, strict=True))
        return {
            "n_prompt_tokens": [_n_prompt_tokens(*pair) for pair in pairs],
            "messages": [_messages(*pair) for pair in pairs],
        }


def _n_prompt_tokens(text: Rendered, tokens: Tokens) -> int:
    """The tokens before the first that has a character behind the prompt."""
    assert tokens.offsets is not None
    behind = np.flatnonzero(tokens.offsets[:, 1] > text.n_prompt)
    return int(behind[0]) if behind.size else len(tokens.input_ids)


def _messages(text: Rendered, tokens: Tokens) -> list[dict[str, Any]]:
    """Role, first token and the token behind the last of each message.

    A token with a character of a message is one of it; a tokenizer may join the message's ends with
    what the template writes around it.
    """
    assert tokens.offsets is not None
    starts, stops = tokens.offsets.T
    found, stop = [], 0
    for span in text.spans:
        inside = np.flatnonzero((starts < span.stop) & (stops > span.start) & (stops > starts))
        if inside.size and inside[-1] >= stop:
            start, stop = max(stop, int(inside[0])), int(inside[-1]) + 1
            found.append({"role": span.role, "start": start, "stop": stop})
    return found


class Encode:
    """Encodes some rows at once, for ``datasets.map`` and for a stream.

    Args:
        tokenizer: The tokenizer.
        texts: What it reads of each row.
        id_column: Column with the ids; None numbers the rows.
        max_length: Tokens kept from the start of each text; None keeps all.
        add_special_tokens: Whether the tokenizer adds tokens such as the one that begins a text.
        positions_column: Column with a list of positions for each text; None for none.
        n_new_tokens: Tokens by which a model continues each text at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: TextColumn | ConversationColumn,
        id_column: str | None,
        max_length: int | None,
        *,
        add_special_tokens: bool = True,
        positions_column: str | None = None,
        n_new_tokens: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = texts
        self.id_column = id_column
        self.max_length = max_length
        self.add_special_tokens = add_special_tokens
        self.positions_column = positions_column
        self.n_new_tokens = n_new_tokens
        self.row_numbers: npt.NDArray[np.int64] | None = None
        """Numbers of the rows in the dataset, where only some of them are given."""

    def __call__(self, columns: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        """The columns of ``features``.

        Args:
            columns: Values by column.
            rows: Number of each row.

        Raises:
            UserError: A text is not a string or a conversation, an id neither an integer nor a string,
                or positions are no list of them.
        """
        if self.row_numbers is not None:
            rows = self.row_numbers[rows].tolist()
        source_ids = rows if self.id_column is None else values_of(columns, self.id_column)
        example_ids = hash_ids(source_ids, rows)
        found = self.texts.read(columns, rows, source_ids)
        tokenized, truncated = self._tokenize([text.text for text in found])
        n_tokens = [len(text.input_ids) for text in tokenized]
        listed = {}
        if (name := self.positions_column) is not None:
            lists = zip(values_of(columns, name), rows, n_tokens, strict=True)
            listed["positions"] = [self._positions(*each) for each in lists]
        return {
            "input_ids": [text.input_ids for text in tokenized],
            "n_tokens": n_tokens,
            "truncated": truncated,
            "example_id": example_ids,
            "source_id": [str(source_id) for source_id in source_ids],
            **listed,
            **self.texts.places(found, tokenized),
        }

    @property
    def columns(self) -> dict[str, str | None]:
        """The columns that it reads, by the field of the section data that names them."""
        return self.texts.columns | {
            "id_column": self.id_column,
            "positions_column": self.positions_column,
        }

    @property
    def features(self) -> datasets.Features:
        """The columns that it gives."""
        listed = {} if self.positions_column is None else LISTED
        return datasets.Features(FEATURES | listed | self.texts.features)

    def _positions(self, values: Any, row: int, n_tokens: int) -> npt.NDArray[np.int32]:
        """The positions that a text lists, as far as it has them, or may have once it is continued."""
        found = positions_in(values)
        if found is None:
            raise UserError(
                f"data.positions_column: row {row} has {shortened(values)} in "
                f"{self.positions_column!r}, not a list of integers of at least 0; mend or drop the "
                "row; an empty list keeps nothing of a text"
            )
        return found[found < n_tokens + self.n_new_tokens].astype(np.int32)

    def _tokenize(self, texts: list[str]) -> tuple[list[Tokens], list[bool]]:
        """The tokens of each text, and whether it was cut."""
        options: dict[str, Any] = {"add_special_tokens": self.add_special_tokens, "verbose": False}
        if self.texts.needs_offsets:
            options["return_offsets_mapping"] = True
        if self.max_length is None:
            return _tokens_of(self.tokenizer(texts, **options)), [False] * len(texts)
        limits = {"truncation": True, "max_length": self.max_length}
        if not self.tokenizer.is_fast:
            whole = self.tokenizer(texts, **options)["input_ids"]
            kept = self.tokenizer(texts, **options, **limits)
            return _tokens_of(kept), [len(ids) > self.max_length for ids in whole]
        # What is cut off comes as further pieces, so that a text is tokenized once.
        pieces = self.tokenizer(texts, **options, **limits, return_overflowing_tokens=True)
        owners = np.array(pieces["overflow_to_sample_mapping"])
        firsts = np.searchsorted(owners, np.arange(len(texts)))
        all_tokens = _tokens_of(pieces)
        return (
            [all_tokens[first] for first in firsts],
            (np.bincount(owners, minlength=len(texts)) > 1).tolist(),
        )


def _tokens_of(encoding: Any) -> list[Tokens]:
    input_ids = [np.array(ids, np.int32) for ids in encoding["input_ids"]]
    if "offset_mapping" not in encoding:
        return [Tokens(ids) for ids in input_ids]
    offsets = [np.array(each, np.int64).reshape(-1, 2) for each in encoding["offset_mapping"]]
    return [Tokens(*each) for each in zip(input_ids, offsets, strict=True)]
