"""The journal: where a batch's rows go when it is flushed, so that memory holds one batch.

``blocks.arrow`` is a sequence of Arrow IPC messages: for every layer and kind of a batch one tensor
of row numbers and one of vectors in the model's dtype, and for every batch one stream with its
examples. ``commits.jsonl`` has one line for each batch with the offsets of its messages, and a last
one when every text was read. ``header.json`` says what is captured. Reading is by memory map, without
copies.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qk_sniffer.storage.files import write_text
from qk_sniffer.storage.schema import EXAMPLES_SCHEMA, Kind

_BLOCKS, _COMMITS, _HEADER = "blocks.arrow", "commits.jsonl", "header.json"
_TOKENS_SCHEMA = EXAMPLES_SCHEMA.append(pa.field("tokens", pa.list_(pa.string())))


@dataclass(frozen=True)
class Block:
    """The kept rows of one layer and kind from one batch.

    Attributes:
        layer_idx: Layer in the text decoder.
        kind: "q" or "k".
        sliding_window: The layer's window; None for full attention.
        dtype: Number format of the vectors: float32, float16 or bfloat16.
        vectors: (n_heads, K, head_dim); bfloat16 as the uint16 of its bits.
        rows: (3, K) int32: example_id, position and bucket. The rows of an example are adjacent and
            ascend in position.
    """

    layer_idx: int
    kind: Kind
    sliding_window: int | None
    dtype: str
    vectors: npt.NDArray[Any]
    rows: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One text: its row in the examples table, and its tokens where they are captured."""

    example_id: int
    source_id: str
    n_tokens: int
    truncated: bool
    tokens: list[str] | None = None


class JournalWriter:
    """Appends blocks and commits batches.

    Args:
        directory: Made if it is missing.
        header: What is captured, kept for whoever reads the journal.
    """

    def __init__(self, directory: Path, header: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / _HEADER, json.dumps(header))
        self._blocks = pa.OSFile(str(directory / _BLOCKS), "wb")
        self._commits = (directory / _COMMITS).open("w")
        self._uncommitted: list[dict[str, Any]] = []

    def append(self, block: Block) -> None:
        """Write one block; it counts once its batch is committed."""
        entry = {
            "layer_idx": block.layer_idx,
            "kind": block.kind,
            "sliding_window": block.sliding_window,
            "dtype": block.dtype,
        }
        for name, array in (("rows", block.rows), ("vectors", block.vectors)):
            entry[name] = self._blocks.tell()
            pa.ipc.write_tensor(pa.Tensor.from_numpy(array), self._blocks)
        self._uncommitted.append(entry)

    def commit(self, examples: Sequence[Example]) -> None:
        """Make the blocks since the last commit and these examples part of the capture."""
        table = pa.Table.from_pylist([vars(e) for e in examples], schema=_TOKENS_SCHEMA)
        offset = self._blocks.tell()
        with pa.ipc.new_stream(self._blocks, _TOKENS_SCHEMA) as stream:
            stream.write_table(table)
        self._blocks.flush()
        self._write_commit({"examples": offset, "blocks": self._uncommitted})
        self._uncommitted = []

    def mark_complete(self) -> None:
        """Note that every text has been read."""
        self._write_commit({"complete": True})

    def close(self) -> None:
        """Close the files; what was committed stays readable."""
        self._blocks.close()
        self._commits.close()

    def _write_commit(self, commit: dict[str, Any]) -> None:
        self._commits.write(json.dumps(commit) + "\n")
        self._commits.flush()


class JournalReader:
    """Reads what was committed to a journal."""

    def __init__(self, directory: Path) -> None:
        self.header: dict[str, Any] = json.loads((directory / _HEADER).read_text())
        self._entries: dict[tuple[int, Kind], list[dict[str, Any]]] = defaultdict(list)
        self._example_offsets: list[int] = []
        self.complete = False
        """Whether the run read every text."""
        with (directory / _COMMITS).open() as commits:
            for line in commits:
                if not line.endswith("\n"):
                    break  # the process died while it wrote this commit
                commit = json.loads(line)
                if "complete" in commit:
                    self.complete = True
                    continue
                self._example_offsets.append(commit["examples"])
                for entry in commit["blocks"]:
                    self._entries[entry["layer_idx"], entry["kind"]].append(entry)
        self._buffer = pa.memory_map(str(directory / _BLOCKS)).read_buffer()

    def blocks(self, layer_idx: int, kind: Kind) -> list[Block]:
        """The committed blocks of one layer and kind, as views of the memory map."""
        return [
            Block(
                layer_idx,
                kind,
                entry["sliding_window"],
                entry["dtype"],
                vectors=self._tensor(entry["vectors"]),
                rows=self._tensor(entry["rows"]),
            )
            for entry in self._entries[layer_idx, kind]
        ]

    def examples(self) -> Iterator[pa.Table]:
        """The examples of each batch, with the columns of ``EXAMPLES_SCHEMA`` and tokens."""
        for offset in self._example_offsets:
            with pa.ipc.open_stream(self._buffer.slice(offset)) as stream:
                yield stream.read_all()

    def _tensor(self, offset: int) -> npt.NDArray[Any]:
        array: npt.NDArray[Any] = pa.ipc.read_tensor(
            pa.BufferReader(self._buffer.slice(offset))
        ).to_numpy()
        return array
