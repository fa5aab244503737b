"""What was captured in memory, as ``Captures`` reads it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qk_sniffer.capture import CapturedStream, Stream
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import KINDS, SOFTMAX_COLUMNS
from qk_sniffer.reading.places import CapturePlace
from qk_sniffer.reading.rows import NUMBERS, HeadRows, TableRows, numbers_of
from qk_sniffer.sniffing.memory import RowStore
from qk_sniffer.sniffing.texts import Texts
from qk_sniffer.storage import EXAMPLES_SCHEMA, head_name


def token_strings(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """Tokens as strings, empty for those that a tokenizer does not know."""
    strings: list[str | None] = tokenizer.convert_ids_to_tokens(token_ids)
    return [string or "" for string in strings]


class MemoryPlace(CapturePlace):
    """Rows and texts of the calls so far.

    Args:
        about: Settings, layers and notes, as a manifest has them.
        streams: The captured heads of each layer and kind.
        store: Their rows.
        texts: The texts that were read.
        tokenizer: Gives the token strings; None leaves them out.
    """

    def __init__(
        self,
        about: Mapping[str, Any],
        streams: list[CapturedStream],
        store: RowStore,
        texts: Texts,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._about = about
        self._heads = {
            head_name(stream.layer.layer_idx, head, stream.kind): (stream, number)
            for stream in streams
            if stream.kind in KINDS
            for number, head in enumerate(stream.heads)
        }
        self._statistics = {stream.key for stream in streams if stream.kind == "softmax"}
        self._store = store
        self._texts = texts
        self._tokenizer = tokenizer

    def __str__(self) -> str:
        return "memory"

    @property
    def manifest(self) -> Mapping[str, Any]:
        """That of a data root, but for what only files have.

        Raises:
            UserError: No call has ended yet.
        """
        self.require_texts()
        heads = {
            name: {"rows": self._store.n_rows(stream.key)} for name, (stream, _) in self._heads.items()
        }
        return {**self._about, "examples": {"rows": len(self._texts.read)}, "heads": heads}

    def require_texts(self) -> None:
        """See that there is something to read.

        Raises:
            UserError: No call has ended yet.
        """
        if not self._texts.read:
            raise UserError(
                "captured: nothing was read yet; call the model in the block, and read what was "
                "captured when the call has ended"
            )

    def examples(self) -> pa.Table:
        """The texts so far."""
        texts = sorted(self._texts.read, key=lambda text: text.example_id)
        columns = {
            "example_id": [text.example_id for text in texts],
            "source_id": [text.source_id for text in texts],
            "n_tokens": [len(text.positions) for text in texts],
            "truncated": [False] * len(texts),
        }
        return pa.table(columns, schema=EXAMPLES_SCHEMA)

    def rows(self, name: str, schema: pa.Schema) -> HeadRows:
        """Those of a head so far, at each reading."""
        return _StoredRows(partial(self._table, name, schema), partial(self._tensors, name))

    def start_of(self, example_id: int) -> int:
        """Where a text that is padded on the left begins, if its positions count the padding."""
        starts = (text.start for text in self._texts.read if text.example_id == example_id)
        return next(starts, None) or 0

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Those of a head as tensors, where the vectors are."""
        stream, number = self._heads[name]
        rows = self._store.rows(stream.key)
        example_ids, positions, buckets = rows.numbers.to(rows.vectors.device)
        vectors = rows.vectors[number].float()
        return {
            "vector": vectors,
            "bucket": buckets,
            "example_id": example_ids,
            "position": positions,
            **self._statistics_of(stream, number),
        }

    def _statistics_of(self, stream: CapturedStream, number: int) -> dict[str, Tensor]:
        """The statistics of a head's queries, where they were captured."""
        key: Stream = (stream.layer.layer_idx, "softmax")
        if stream.kind != "q" or key not in self._statistics:
            return {}
        values = self._store.rows(key).vectors[number]
        columns = {name: values[:, i].contiguous() for i, name in enumerate(SOFTMAX_COLUMNS)}
        columns["argmax_position"] = columns["argmax_position"].view(torch.int32)
        return columns

    def _table(self, name: str, schema: pa.Schema) -> pa.Table:
        rows = {column: values.cpu().numpy() for column, values in self._tensors(name).items()}
        layer, n_rows = self._heads[name][0].layer, len(rows["position"])
        window = np.full(n_rows, layer.sliding_window or 0, np.int32)
        columns = [
            *(pa.array(rows[column]) for column in NUMBERS),
            pa.FixedSizeListArray.from_arrays(
                pa.array(rows["vector"].reshape(-1)), type=schema.field("vector").type
            ),
            pa.array(window, mask=np.full(n_rows, layer.sliding_window is None)),
            self._token_strings(rows["example_id"], rows["position"]),
            *(pa.array(rows[column]) for column in numbers_of(schema)[len(NUMBERS) :]),
        ]
        return pa.Table.from_arrays(columns, schema=schema)

    def _token_strings(
        self, example_ids: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]
    ) -> pa.Array:
        if self._tokenizer is None:
            return pa.nulls(len(positions), pa.string())
        tokens = {
            (text.example_id, position): token
            for text in self._texts.read
            for position, token in zip(text.positions, text.tokens, strict=True)
        }
        ids = [tokens[row] for row in zip(example_ids.tolist(), positions.tolist(), strict=True)]
        return pa.array(token_strings(self._tokenizer, ids), pa.string())


class _StoredRows(TableRows):
    """Rows in memory, whose tensors are made without a table."""

    def __init__(self, table: Callable[[], pa.Table], tensors: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__(table)
        self._tensors = tensors

    def tensors(self, schema: pa.Schema, condition: ds.Expression | None = None) -> dict[str, Tensor]:
        """Some of them, on the device where they were kept."""
        found = self._tensors()
        if condition is None:
            return {name: values.clone() for name, values in found.items()}
        numbers = {name: pa.array(found[name].cpu().numpy()) for name in NUMBERS}
        numbered = pa.table(numbers | {"row": pa.array(np.arange(len(found["position"])))})
        rows = ds.dataset(numbered).to_table(columns=["row"], filter=condition)["row"].to_numpy()
        chosen = torch.tensor(rows, device=found["vector"].device)
        return {name: values[chosen] for name, values in found.items()}


class UnfinishedPlace(CapturePlace):
    """A data root that is being written, of which nothing can be read yet."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """None yet.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"captured: its rows are written to {self._path}; read them when the block has ended"
        )

    def examples(self) -> pa.Table:
        """None yet."""
        return self.manifest["examples"]

    def rows(self, name: str, schema: pa.Schema) -> HeadRows:
        """None yet."""
        raise NotImplementedError
