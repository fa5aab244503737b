"""Finalizing a journal against writing the same rows barely and naively, and the size of the files."""

import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.loops import predict, timed
from bench.tables import section
from bench.texts import ALL, DOCUMENTS, documents
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.config import OutputConfig
from qk_sniffer.storage import JOURNAL_DIRECTORY, finalize
from qk_sniffer.storage.finalizing import n_threads
from qk_sniffer.storage.head_parts import open_writer
from qk_sniffer.storage.schema import DATA_FILE

SCRATCH_BYTES = 2 * 2**30
NAIVE_HEADS = 6


class JournalKeeper(SnifferCallback):
    """Leaves the journal as it is after the last batch, without files."""

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._recorder is not None
        self._recorder.close()


def back_page_cache() -> None:
    """Give the next writer page cache in memory that the host of a virtual machine has backed.

    Memory touched for the first time is slow there, which would hit whoever comes first.
    """
    chunk = bytes(2**24)
    with tempfile.TemporaryFile() as file:
        for _ in range(SCRATCH_BYTES // len(chunk)):
            file.write(chunk)
    os.sync()


def clear(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def finalize_copy(journal: Path, data_root: Path) -> float:
    """Seconds of finalizing a copy of the journal in an empty data root."""
    clear(data_root)
    shutil.copytree(journal, data_root / JOURNAL_DIRECTORY)
    back_page_cache()
    return timed(lambda: finalize(data_root, lambda files, total: files, complete=True))


def write_own(table: pa.Table, sink: Any) -> None:
    """``pq.write_table`` with the settings of a head's file."""
    with open_writer(sink, table.schema) as writer:
        writer.write_table(table)


def write_bare(tables: dict[str, pa.Table], directory: Path) -> float:
    """Seconds of writing tables that are in memory, on as many threads as finalizing has."""
    clear(directory)
    back_page_cache()
    paths = [directory / f"{name}.parquet" for name in tables]
    with ThreadPoolExecutor(n_threads()) as pool:
        return timed(lambda: list(pool.map(write_own, tables.values(), paths)))


def write_naive(lists: dict[str, dict[str, list[Any]]], directory: Path) -> float:
    """Seconds of writing Python lists with pyarrow's defaults, one head after the other."""
    schema = pa.schema(
        [(name, pa.int32()) for name in ("bucket", "example_id", "position", "sliding_window")]
        + [("token_str", pa.string()), ("vector", pa.list_(pa.float32()))]
    )
    clear(directory)
    back_page_cache()

    def write() -> None:
        for name, columns in lists.items():
            pq.write_table(pa.table(columns, schema=schema), directory / f"{name}.parquet")

    return timed(write)


def time_finalizing(repetitions: int) -> str:
    """Finalize the journal of one `all` run, and write the same rows barely and naively, in turn."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with documents(DOCUMENTS) as data:
            predict(data, JournalKeeper(OutputConfig(str(place / "kept")), ALL, False))
        journal, root = place / "kept" / JOURNAL_DIRECTORY, place / "root"
        finalize_copy(journal, root)
        files = {path.parent.name: path for path in sorted(root.glob(f"l*/{DATA_FILE}"))}
        tables = {name: pq.read_table(path) for name, path in files.items()}
        own_bytes = sum(path.stat().st_size for path in files.values())
        step = max(1, len(tables) // NAIVE_HEADS)
        lists = {name: tables[name].to_pydict() for name in list(tables)[::step][:NAIVE_HEADS]}
        scale = len(tables) / len(lists)
        seconds = [
            (
                finalize_copy(journal, root),
                write_bare(tables, place / "bare"),
                scale * write_naive(lists, place / "naive"),
            )
            for _ in range(repetitions)
        ]
        return (
            f"{finalizing_section(seconds, tables, len(lists))}\n\n{sizes_section(tables, own_bytes)}"
        )


def plain_bytes(tables: dict[str, pa.Table]) -> int:
    """Bytes of the vectors as plain float32."""
    return sum(
        4 * len(table) * table.schema.field("vector").type.list_size for table in tables.values()
    )


def finalizing_section(
    seconds: list[tuple[float, float, float]], tables: dict[str, pa.Table], n_naive: int
) -> str:
    rows, size = sum(map(len, tables.values())), plain_bytes(tables)
    names = (
        "finalize",
        f"bare: write_table from memory, {n_threads()} threads",
        f"naive: {n_naive} heads from lists, 1 thread, scaled to {len(tables)}",
    )
    to_bare = median(own / bare for own, bare, _ in seconds)
    to_naive = median(naive / own for own, _, naive in seconds)
    ratios = (
        ("", ""),
        (f"finalize / bare {to_bare:.2f}", "at most 1.25"),
        (f"naive / finalize {to_naive:.1f}", "at least 5"),
    )
    cells = [("", "s", "rows/s", "MB/s of float32", "ratio", "goal")]
    for name, values, ratio in zip(names, zip(*seconds, strict=True), ratios, strict=True):
        taken = median(values)
        cells.append(
            (name, f"{taken:.2f}", f"{rows / taken:,.0f}", f"{size / 1e6 / taken:,.0f}", *ratio)
        )
    return section(
        "Finalizing `all`",
        f"{rows:,} rows in {len(tables)} files, medians of {len(seconds)}. Bare writes the same "
        "columns with the same encodings, and unlike finalizing neither reads a journal nor syncs and "
        "checksums files. Naive is pa.table and pq.write_table with pyarrow's defaults.",
        *cells,
    )


def as_bfloat16(table: pa.Table) -> pa.Table:
    """The table as if a bfloat16 model had given its vectors."""
    vector = table["vector"].combine_chunks()
    bits = vector.flatten().to_numpy().view(np.uint32) & np.uint32(0xFFFF0000)
    column = pa.FixedSizeListArray.from_arrays(pa.array(bits.view(np.float32)), type=vector.type)
    number = table.schema.get_field_index("vector")
    return table.set_column(number, table.schema.field(number), column)


def written_bytes(table: pa.Table, write: Callable[[pa.Table, Any], None]) -> int:
    sink = pa.MockOutputStream()
    write(table, sink)
    return sink.size()


def sizes_section(tables: dict[str, pa.Table], own_bytes: int) -> str:
    """Bytes of the files against those of plain vectors, and against what pyarrow's defaults give."""

    def sizes(table: pa.Table) -> tuple[int, int, int]:
        rounded = as_bfloat16(table)
        own, default = written_bytes(rounded, write_own), written_bytes(rounded, pq.write_table)
        return written_bytes(table, pq.write_table), own, default

    with ThreadPoolExecutor(n_threads()) as pool:
        snappy, own_bfloat16, snappy_bfloat16 = map(
            sum, zip(*pool.map(sizes, tables.values()), strict=True)
        )
    plain = plain_bytes(tables)

    def row(name: str, own: int, default: int, goal: str) -> tuple[str, ...]:
        return name, f"{own / 1e6:,.1f}", f"{own / plain:.3f}", goal, f"{own / default:.3f}"

    return section(
        "Size of the files",
        "Against plain float32 vectors alone, and against files with pyarrow's defaults, which are "
        "snappy and dictionaries.",
        ("vectors", "MB", "/ plain float32", "goal", "/ pyarrow's defaults"),
        row("float32", own_bytes, snappy, "at most 0.87"),
        row("bfloat16, stored as float32", own_bfloat16, snappy_bfloat16, "at most 0.45"),
    )
