"""The moments that a data root holds: of its finished run, of its journal's parts, and of a pulled run.

Moments can't be taken apart by text. So two of these either count other texts, and are added, or all
texts of one are among the other's, and it is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.kinds import Kind
from qk_sniffer.moments import MomentState, MomentTable
from qk_sniffer.storage.file_facts import is_described, moment_file, moment_files
from qk_sniffer.storage.manifest import read_manifest
from qk_sniffer.storage.moment_files import as_moments, fault_of_moments, read_layer
from qk_sniffer.storage.moment_states import counted_ids, counted_states, map_state
from qk_sniffer.storage.schema import (
    JOURNAL_DIRECTORY,
    MANIFEST_FILE,
    MOMENT_TEXTS,
    MOMENT_TEXTS_SCHEMA,
    MOMENTS_DIRECTORY,
    PULLED_DIRECTORY,
)
from qk_sniffer.storage.stored_rows import fault_of_columns

_NONE = np.empty(0, np.int32)


class StoredMoments:
    """The moments of a finished run.

    Args:
        directory: The run's.
        place: What a person is told of where they are; None names the directory.

    Attributes:
        place: What a person is told.
        example_ids: (E,) int32, ascending: the texts that they count.

    Raises:
        UserError: The file of their texts is damaged.
    """

    def __init__(self, directory: Path, place: str | None = None) -> None:
        self._directory = directory
        self.place = place or str(directory / MOMENTS_DIRECTORY)
        self.example_ids = stored_counted_ids(directory)

    def tables(self, kind: Kind, layer_idx: int) -> list[MomentTable]:
        """Those of a layer and kind."""
        path = self._directory / moment_file(kind)
        rows = read_layer(path, layer_idx)
        if fault := fault_of_moments(rows):
            raise damaged_moments(path, fault)
        return as_moments(rows)

    def require_intact(self, schemas: Mapping[Kind, pa.Schema]) -> None:
        """See that their files have the columns of these kinds, and are what the manifest describes.

        Raises:
            UserError: One is not.
        """
        files = moment_files(read_manifest(self._directory) or {})
        for name in (*schemas, MOMENT_TEXTS):
            path = self._directory / moment_file(name)
            if not is_described(path, files.get(moment_file(name), {"xxh3_128": None})):
                raise damaged_moments(path, "it is not what the manifest describes")
        for kind, schema in schemas.items():
            path = self._directory / moment_file(kind)
            if fault := fault_of_columns(path, schema):
                raise damaged_moments(path, fault)


class CountedMoments:
    """The moments that a process of a run has counted; attributes and methods as above.

    Args:
        paths: Their file; several of processes that share a model, each of which has other heads.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.place = str(paths[0])
        self.example_ids = counted_ids(paths[0])

    @cached_property
    def _states(self) -> list[MomentState]:
        return [map_state(path) for path in self._paths]

    def tables(self, kind: Kind, layer_idx: int) -> list[MomentTable]:
        """Those of a layer and kind."""
        tables = (table for state in self._states for table in state.tables.get(kind, ()))
        found = (table.select(table.layer_idx == layer_idx) for table in tables)
        return [table for table in found if len(table)]

    def require_intact(self, _: Mapping[Kind, pa.Schema]) -> None:
        """See that the files are what was written.

        Raises:
            UserError: One is not.
        """
        self._states  # noqa: B018


Moments = StoredMoments | CountedMoments


def stored_counted_ids(directory: Path) -> npt.NDArray[np.int32]:
    """The texts that the moments of a finished run count, (E,) int32; none where it has no moments.

    Raises:
        UserError: Their file is damaged.
    """
    path = directory / moment_file(MOMENT_TEXTS)
    if not path.exists():
        return _NONE
    try:
        with pq.ParquetFile(path) as file:
            ids = file.read().cast(MOMENT_TEXTS_SCHEMA)["example_id"].to_numpy()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged_moments(path, f"it can't be read ({first_line(error)})") from error
    if (np.diff(ids.astype(np.int64)) <= 0).any():
        raise damaged_moments(path, "an example_id is repeated, or they don't ascend")
    return np.asarray(ids)


def damaged_moments(path: Path, fault: str) -> UserError:
    """The error for a file of moments that can't be believed."""
    return UserError(
        f"{path}: damaged, {fault}; restore it from a copy, or remove {path.parent} and run predict "
        "again, which counts its texts anew"
    )


def moments_there(data_root: Path) -> list[Moments]:
    """All that a data root holds: its finished run's, its journal's, and those of a pulled run.

    Raises:
        UserError: One of them does not tell its texts.
    """
    # Without a manifest they are those of an attempt that was cut off.
    own, pulled = (
        [StoredMoments(directory)] if (directory / MANIFEST_FILE).exists() else []
        for directory in (data_root, data_root / PULLED_DIRECTORY)
    )
    states = counted_states(data_root / JOURNAL_DIRECTORY)
    return [*own, *map(CountedMoments, states), *pulled]


def together(moments: Iterable[Moments]) -> list[Moments]:
    """Those that count each text once, and all texts that any of them counts.

    Raises:
        UserError: Two of them share some texts and each has others.
    """
    taken: list[Moments] = []
    for more in moments:
        if np.isin(more.example_ids, _texts_of(taken)).all():
            continue
        others = [m for m in taken if not np.isin(m.example_ids, more.example_ids).all()]
        for other in others:
            if (shared := np.intersect1d(other.example_ids, more.example_ids)).size:
                raise UserError(
                    f"{more.place}: the moments there and in {other.place} both count text {shared[0]} "
                    f"and can't be taken apart; remove {other.place}, whose texts the next predict "
                    "counts anew"
                )
        taken = [*others, more]
    return taken


def require_joinable(data_root: Path, directory: Path, place: str) -> None:
    """See that the moments of a data root and of a finished run can be brought together.

    Args:
        data_root: The data root.
        directory: The run's.
        place: What a person is told of where it is.

    Raises:
        UserError: They share some texts, and each has others.
    """
    together([*moments_there(data_root), StoredMoments(directory, place)])


def counted_anywhere(data_root: Path) -> npt.NDArray[np.int32]:
    """The texts that the moments of a data root count, (C,) int32, ascending.

    Raises:
        UserError: As ``moments_there``.
    """
    return np.unique(_texts_of(moments_there(data_root)))


def _texts_of(moments: Sequence[Moments]) -> npt.NDArray[np.int32]:
    return np.concatenate([_NONE, *(some.example_ids for some in moments)])
