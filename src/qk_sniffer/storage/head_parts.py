"""How the files of a head come to their names: all of them, and only when all are complete.

A head has one file, or where that would be too large, several. Those that are complete wait under
temporary names until the last is, so that at any moment the old files are whole or the new ones are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.kinds import SOFTMAX_COLUMNS
from qk_sniffer.storage.file_facts import FILE_NAME, file_names
from qk_sniffer.storage.files import sync_directory, sync_file
from qk_sniffer.storage.schema import DATA_FILE, temporary_name

MOST_BYTES = 5 * 10**9
"""Size that a file must have reached for another one to follow: some uploads end at 5 GB."""

EXAMPLES_KEY = b"qk_sniffer.examples"
"""Metadata of a head's file: the digest of the examples that it holds, from ``finalize``."""

_ROWS_ENCODED_AT_ONCE = 2**16
_TEMPORARY_NAME = re.compile(rf"\.(data-[0-9]{{5}}\.parquet|{FILE_NAME.pattern})\.tmp")


class HeadParts:
    """Writes the rows of a head, into as many files as they need.

    They have their names when the block ends; its caller syncs the directory.

    Args:
        directory: The head's.
        schema: Its columns.
        digest: Names the examples that the files hold in the end.
    """

    def __init__(self, directory: Path, schema: pa.Schema, digest: str) -> None:
        self._directory = directory
        self._schema = schema
        self._digest = digest
        self._temporary: list[Path] = []
        self._open = ExitStack()

    def __enter__(self) -> "HeadParts":
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._removing_temporary():
            self._begin()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        with self._removing_temporary(also=error is not None):
            self._open.close()
            if error is None:
                for path in self._temporary:
                    sync_file(path)
                self._name()

    @contextmanager
    def _removing_temporary(self, *, also: bool = False) -> Iterator[None]:
        """Remove what is not complete after an error, or if ``also`` is true in any case."""
        failed = True
        try:
            yield
            failed = also
        finally:
            for path in self._temporary if failed else ():
                path.unlink(missing_ok=True)

    def write(self, table: pa.Table) -> None:
        """Write one row group."""
        if self._sink.tell() >= MOST_BYTES:
            self._open.close()
            self._begin()
        self._writer.write_table(table, row_group_size=table.num_rows)

    def _begin(self) -> None:
        number = len(self._temporary)
        name = f"data-{number:05d}.parquet" if number else DATA_FILE
        path = self._directory / temporary_name(name)
        self._temporary.append(path)
        with ExitStack() as stack:
            self._sink = stack.enter_context(pa.OSFile(str(path), "wb"))
            self._writer = stack.enter_context(open_writer(self._sink, self._schema))
            self._writer.add_key_value_metadata({EXAMPLES_KEY: self._digest})
            self._open = stack.pop_all()

    def _name(self) -> None:
        names = file_names(len(self._temporary))
        if len(names) == 1:
            self._temporary[0].replace(self._directory / DATA_FILE)
            remove_others(self._directory, names)
            return
        waiting = [self._directory / temporary_name(name) for name in names]
        for path, place in zip(self._temporary, waiting, strict=True):
            path.replace(place)
        give_names(self._directory, waiting, names)


def completed(directory: Path, elsewhere: Sequence[Path], digest: str) -> list[Path] | None:
    """The files of a head that hold a digest already, in order; None where not all do.

    Some may wait for their names, where an attempt was cut off, or be those of a head elsewhere.

    Args:
        directory: The head's.
        elsewhere: Directories whose files may be moved here.
        digest: Names the examples.
    """
    for count in sorted(
        {_count(path.name) for place in (directory, *elsewhere) for path in _files(place)}
    ):
        names = file_names(count)
        found = [_find(name, count, directory, elsewhere, digest) for name in names]
        files = [path for path in found if path is not None]
        if len(files) == count:
            return files
    return None


def give_names(directory: Path, files: Sequence[Path], names: Sequence[str]) -> None:
    """Give complete files their names in a head's directory, and remove the others that it has."""
    moves = [(path, directory / name) for path, name in zip(files, names, strict=True)]
    moves = [(path, place) for path, place in moves if path != place]
    if moves:
        # An old file goes only where the new ones survive a loss of power.
        sync_directory(directory)
        for path, place in moves:
            path.replace(place)
        sync_directory(directory)
    remove_others(directory, names)


def remove_others(directory: Path, names: Sequence[str]) -> None:
    """Remove a head's files that have other names than those that it has now."""
    others = [
        path
        for path in directory.iterdir()
        if path.name not in names
        and (FILE_NAME.fullmatch(path.name) or _TEMPORARY_NAME.fullmatch(path.name))
    ]
    if others:
        sync_directory(directory)
    for path in others:
        path.unlink()


def _files(directory: Path) -> list[Path]:
    """The head's files in a directory that have their names, or wait for them."""
    if not directory.is_dir():
        return []
    return [path for path in directory.iterdir() if FILE_NAME.fullmatch(_final(path.name))]


def _final(name: str) -> str:
    return name.removeprefix(".").removesuffix(".tmp")


def _count(name: str) -> int:
    match = FILE_NAME.fullmatch(_final(name))
    assert match is not None
    return int(match[1] or 1)


def _find(
    name: str, count: int, directory: Path, elsewhere: Sequence[Path], digest: str
) -> Path | None:
    """A file of a head that holds a digest, wherever it is."""
    # A single file is complete only under its name.
    waiting = [directory / temporary_name(name)] if count > 1 else []
    places = [directory / name, *waiting, *(place / name for place in elsewhere)]
    return next((path for path in places if _holds(path, digest)), None)


def _holds(path: Path, digest: str) -> bool:
    if not path.exists():
        return False
    try:
        metadata: Mapping[bytes, bytes] = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return metadata.get(EXAMPLES_KEY) == digest.encode()


def open_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer with the encodings of a head's file.

    Args:
        sink: The open file. One that the writer opened would stay open where a full disk refuses its
            end, and keep its space.
        schema: That of the file.
    """
    return pq.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=["bucket", "example_id", "sliding_window", "token_str"],
        column_encoding={
            "position": "DELTA_BINARY_PACKED",
            "vector.list.element": "BYTE_STREAM_SPLIT",
            **{name: "BYTE_STREAM_SPLIT" for name in SOFTMAX_COLUMNS if name in schema.names},
        },
        write_statistics=["bucket", "example_id", "position", "sliding_window"],
        write_batch_size=_ROWS_ENCODED_AT_ONCE,
        sorting_columns=[
            pq.SortingColumn(schema.get_field_index(name)) for name in ("example_id", "position")
        ],
    )
