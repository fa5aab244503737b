"""The moments of the texts that one process of a run has counted, in its part of the journal.

They are one file, an archive of NumPy arrays with the checksums of ZIP, which is replaced as a whole. A
process that goes on later begins a file of its own. Each names its texts itself, so that a text counts
once whatever the commit logs say of its rows.

Processes that share a model have the moments of their own heads each, which count where all of them
have those of the same texts. So each of them has two files, and replaces the one that is older: while
some have begun to write, all have what was written before.
"""

import logging
import mmap
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.moments import MomentState, MomentTable
from qk_sniffer.storage.files import replacing
from qk_sniffer.storage.schema import temporary_name
from qk_sniffer.storage.shards import companions, has_texts, is_whole, part_directories

log = logging.getLogger(__name__)

_FILES = "moments-*.npz"
_EXAMPLE_IDS = "example_ids"
_LOCAL_HEADER = 30
"""Bytes of a member's header in a ZIP file before its name; the last two numbers are the length of the
name and that of the field behind it.

Source: <https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT>, 4.3.7.
"""


def state_files(journal: Path) -> list[Path]:
    """The moments in all parts of a journal."""
    return [path for part in part_directories(journal) for path in _files(part)]


def _files(part: Path) -> list[Path]:
    return sorted(part.glob(_FILES))


def _opening(path: Path) -> int:
    """The number of the opening of its part in which a file was written."""
    return int(path.stem.split("-")[1])


def next_state_files(part: Path) -> list[Path]:
    """Where a process that opens a part of a journal writes the moments of its texts, by turns.

    All processes that share its model must open theirs before one of them writes, so that they give
    this opening the same number.
    """
    there = [_opening(path) for other in companions(part) for path in _files(other)]
    name = f"moments-{max(there, default=-1) + 1:05d}"
    if is_whole(part):
        return [part / f"{name}.npz"]
    return [part / f"{name}-a.npz", part / f"{name}-b.npz"]


def most_state_files(n_shards: int) -> int:
    """Files of moments that a process has of one opening while it writes one of them.

    Args:
        n_shards: Processes that share its model.
    """
    n_kept = 1 if n_shards == 1 else 2
    return n_kept + 1


def counted_states(journal: Path) -> list[list[Path]]:
    """The files of moments that count; those of processes that share a model belong together.

    Of several that one opening of these has left, those count that have most texts, of which all
    processes have theirs.

    Raises:
        UserError: One of these is damaged.
    """
    found = []
    for part in filter(has_texts, part_directories(journal)):
        if is_whole(part):
            found += [[path] for path in _files(part)]
            continue
        for opening in sorted({_opening(path) for path in _files(part)}):
            by_texts = [
                {
                    counted_ids(path).tobytes(): path
                    for path in _files(other)
                    if _opening(path) == opening
                }
                for other in companions(part)
            ]
            if common := set.intersection(*map(set, by_texts)):
                texts = max(common, key=len)
                found.append([paths[texts] for paths in by_texts])
    return found


def write_state(path: Path, state: MomentState) -> None:
    """Write moments, or replace those that the file has."""
    arrays: dict[str, Any] = {
        f"{kind}.{number}.{name}": column
        for kind, tables in state.tables.items()
        for number, table in enumerate(tables)
        for name, column in table.columns.items()
    }
    arrays[_EXAMPLE_IDS] = state.example_ids
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def map_state(path: Path) -> MomentState:
    """The moments of a file, whose arrays stay on disk until they are read.

    Raises:
        UserError: They are damaged.
    """
    with _explained(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} is not what was written")
        content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        members = {info.filename: _mapped(archive, info, content) for info in archive.infolist()}
        return _state({name.removesuffix(".npy"): array for name, array in members.items()})


def counted_ids(path: Path) -> npt.NDArray[np.int32]:
    """The texts that the moments of a file count, (E,) int32, ascending.

    Raises:
        UserError: They are damaged.
    """
    with _explained(path), np.load(path, allow_pickle=False) as archive:
        return _as_texts(archive[_EXAMPLE_IDS])


def repair_states(journal: Path) -> None:
    """Remove the moments of a journal that are damaged or not complete, and tell the user of damage.

    Those of processes that share a model, of which not all have theirs, go too.
    """
    for part in part_directories(journal):
        for path in part.glob(temporary_name(_FILES)):
            path.unlink()
    for path in state_files(journal):
        try:
            map_state(path)
        except UserError:
            path.unlink()
            log.warning("%s: damaged, it holds no moments; its texts are counted anew", path)
    for path in {*state_files(journal)} - {*chain.from_iterable(counted_states(journal))}:
        path.unlink()


def _state(arrays: Mapping[str, npt.NDArray[Any]]) -> MomentState:
    columns: dict[tuple[str, int], dict[str, Any]] = {}
    for name in arrays:
        if name != _EXAMPLE_IDS:
            kind, number, column = name.split(".")
            columns.setdefault((kind, int(number)), {})[column] = arrays[name]
    tables: dict[str, list[MomentTable]] = {}
    for (kind, _), found in sorted(columns.items(), key=lambda item: item[0]):
        table = MomentTable(**found)
        if any(column.shape[:1] != table.count.shape for column in found.values()):
            raise ValueError("its arrays don't agree")
        tables.setdefault(kind, []).append(table)
    return MomentState(tables, _as_texts(arrays[_EXAMPLE_IDS]))


def _as_texts(ids: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    if ids.ndim != 1 or ids.dtype != np.int32 or (np.diff(ids.astype(np.int64)) <= 0).any():
        raise ValueError("its texts are no ascending ids")
    return ids


def _mapped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: mmap.mmap) -> npt.NDArray[Any]:
    """An array where it lies in its file; it may begin at any byte."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(member)
        after_header = info.header_offset + _LOCAL_HEADER
        names = sum(struct.unpack("<HH", content[after_header - 4 : after_header]))
        start = after_header + names + member.tell()
    return np.ndarray(shape, dtype, content, start, order="F" if is_fortran else "C")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    # NumPy and zipfile raise whatever damaged bytes lead them to.
    except Exception as error:
        raise UserError(
            f"{path}: damaged, it holds no moments ({first_line(error)}); run predict again, which "
            "counts its texts anew, or remove it to do without them"
        ) from error
