"""A run that was pulled is merged, killed at any moment of it and begun again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from conftest import Maker, Run
from killing import AFTER, BEFORE, HALFWAY, Death, Processes
from qk_sniffer.cli import main
from qk_sniffer.storage import StoredRows, checksum
from readers import files_of

DEATHS = [
    *(Death("rename", moment, passage) for moment in (BEFORE, AFTER) for passage in (1, 9, 20)),
    Death("row group", AFTER, 5),
    Death("finalizing", HALFWAY, 1),
    Death("text", HALFWAY, 1),
    *(Death("manifest", moment, 1) for moment in (BEFORE, AFTER)),
    *(Death("journal's end", moment, 1) for moment in (BEFORE, AFTER)),
]
OURS, THEIRS = (0, 2, 4, 5), (1, 2, 3, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the data roots below, which are the same for all tests."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def start(
    made: Path,
    predict: Run,
    tmp_path: Path,
    texts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Path]:
    """A data root with a pulled run and what its name says besides."""

    maker = Maker(made, predict, tmp_path, texts, monkeypatch)
    finish, interrupt = maker.finish, maker.interrupt

    if not (made / "theirs").exists():
        finish("theirs", *THEIRS)
        finish("finished", *OURS)
        finish("nothing's whole", *THEIRS)
        finish("finished's whole", *OURS, 1, 3)
        finish("journal's whole", *OURS, 1, 3)
        finish("both's whole", *range(7))
        interrupt("journal", *OURS)
        shutil.copytree(made / "finished", tmp_path / "both")
        interrupt("both", 3, 6)
        (made / "nothing").mkdir()

    def copy(name: str) -> Path:
        root = tmp_path / "root"
        shutil.copytree(made / name, root)
        shutil.copytree(
            made / "theirs", root / ".pulled", ignore=shutil.ignore_patterns("*.md", "*.yaml")
        )
        return root

    return copy


@pytest.mark.parametrize(
    "death", DEATHS, ids=lambda death: f"{death.point}-{death.moment}-{death.passage}"
)
@pytest.mark.parametrize("name", ["nothing", "finished", "journal", "both"])
def test_merging_goes_on_after_a_kill(
    processes: Processes, start: Callable[[str], Path], made: Path, name: str, death: Death
) -> None:
    root = start(name)
    ended = processes.run(["finalize", str(root)], sync_seconds=0.0, death=death)
    if ended.exitcode != -9:
        # A run that is taken over as a whole has no row groups, and some files fewer to rename.
        assert name == "nothing" and ended.exitcode == 0, ended.printed
    elif main(["finalize", str(root)]) == 2:
        # Nothing but the end of the removal was left.
        assert (death.point, death.moment) == ("journal's end", AFTER)
    assert files_of(root) == files_of(made / f"{name}'s whole")
    assert main(["verify", str(root)]) == 0
    assert not (root / ".pulled").exists()
    assert not (root / ".journal").exists()


@pytest.mark.parametrize("complete", [True, False])
def test_what_is_joined_is_as_complete_as_its_parts(
    start: Callable[[str], Path], complete: bool
) -> None:
    root = start("finished")
    pulled = root / ".pulled" / "manifest.json"
    pulled.write_text(json.dumps(json.loads(pulled.read_text()) | {"complete": complete}))
    assert main(["finalize", str(root)]) == 0
    assert json.loads((root / "manifest.json").read_text())["complete"] is complete


@pytest.mark.parametrize("name", ["finished", "journal"])
@pytest.mark.parametrize("superset", [True, False])
def test_what_was_captured_here_stays(
    start: Callable[[str], Path], made: Path, name: str, superset: bool
) -> None:
    """The vectors of the pulled run are others, and it has all examples or some of them."""
    root = start(name)
    pulled = root / ".pulled"
    if superset:
        shutil.rmtree(pulled)
        shutil.copytree(made / "finished's whole", pulled)
    manifest = json.loads((pulled / "manifest.json").read_text())
    for head, facts in manifest["heads"].items():
        facts["xxh3_128"] = _negate(pulled / head / "data.parquet")
    (pulled / "manifest.json").write_text(json.dumps(manifest))
    assert main(["finalize", str(root)]) == 0
    assert main(["verify", str(root)]) == 0
    ours = pq.read_table(made / "finished" / "examples" / "data.parquet")["example_id"].to_pylist()
    for path in root.glob("l*/data.parquet"):
        found = pq.read_table(path)
        plain = pq.read_table(made / f"{name}'s whole" / path.relative_to(root))
        is_ours = np.isin(found["example_id"].to_numpy(), ours)
        vectors = [np.stack(table["vector"].to_numpy()) for table in (found, plain)]
        np.testing.assert_array_equal(vectors[0], np.where(is_ours[:, None], vectors[1], -vectors[1]))


def _negate(path: Path) -> str:
    """Change the sign of a file's vectors; gives its new checksum."""
    table = pq.read_table(path)
    vectors = table["vector"].combine_chunks()
    column = pa.FixedSizeListArray.from_arrays(pc.negate(vectors.flatten()), type=vectors.type)
    number = table.schema.get_field_index("vector")
    # The metadata has the digest of the examples, by which a whole file is known.
    pq.write_table(table.set_column(number, table.schema.field(number), column), path)
    return checksum(path)


def test_merging_does_not_hold_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    numbers = np.random.default_rng(0).random(2**23, np.float32)
    columns = {
        "example_id": np.arange(2**17, dtype=np.int32),
        "vector": pa.FixedSizeListArray.from_arrays(numbers, 64),
    }
    pq.write_table(pa.table(columns), path, row_group_size=2**12, use_dictionary=False)
    del columns, numbers
    rows = StoredRows([path], ["vector"])
    before = pa.total_allocated_bytes()
    for _ in range(2**17 // 2**12):
        rows.take(2**12)
        assert pa.total_allocated_bytes() - before < path.stat().st_size / 3
