"""The finished runs that a data root holds: its own, and one that was pulled and waits to be merged."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qk_sniffer.ids import ExampleFilter
from qk_sniffer.storage.examples import read_examples
from qk_sniffer.storage.manifest import read_manifest
from qk_sniffer.storage.schema import DATA_FILE, EXAMPLES_DIRECTORY, PULLED_DIRECTORY

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        directory: Where its files are.
        manifest: Its manifest.
        example_ids: (E,) int32: its examples.
        selects: Its examples, but for those that were captured here or in an earlier one of the list.
    """

    directory: Path
    manifest: dict[str, Any]
    example_ids: npt.NDArray[np.int32]
    selects: ExampleFilter


def stored_example_ids(directory: Path) -> npt.NDArray[np.int32]:
    """The examples of a finished run, (E,) int32; none where its table is missing.

    Raises:
        UserError: It is damaged.
    """
    path = directory / EXAMPLES_DIRECTORY / DATA_FILE
    if not path.exists():
        return _NONE
    ids: npt.NDArray[np.int32] = read_examples(path, ["example_id", "n_tokens"])[
        "example_id"
    ].to_numpy()
    return ids


def finished_runs(data_root: Path, captured: npt.NDArray[np.int32] = _NONE) -> list[FinishedRun]:
    """The runs in a data root that have examples of their own; the data root's own comes first.

    Args:
        data_root: The data root.
        captured: Examples in its journal, which are not taken from a pulled run.

    Raises:
        UserError: A manifest or a table of texts is damaged.
    """
    runs: list[FinishedRun] = []
    seen = _NONE
    for directory in (data_root, data_root / PULLED_DIRECTORY):
        manifest = read_manifest(directory)
        if manifest is None:
            continue
        ids = stored_example_ids(directory)
        if directory != data_root:
            seen = np.union1d(seen, captured)
        if directory == data_root or np.setdiff1d(ids, seen).size:
            selects = ExampleFilter(np.intersect1d(ids, seen), listed=False)
            runs.append(FinishedRun(directory, manifest, ids, selects))
        seen = np.union1d(seen, ids)
    return runs
