"""Heads whose files would be too large have several, which are read as one and change together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from conftest import REPO, Maker, Run
from killing import AFTER, BEFORE, Death, Processes
from loopback import LoopbackHub
from qk_sniffer import Captures
from qk_sniffer.cli import main
from readers import assert_readers_agree, error_line

LIMITS = {"ROW_GROUP_BYTES": 7 * 4 * 16, "MOST_BYTES": 9000}
"""Seven vectors, and some six row groups with them."""

BRANCH = "branch"
ON_THE_HUB = {"output": {"hf_repo_id": REPO, "hf_branch": BRANCH}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qk_sniffer.storage.parquet.ROW_GROUP_BYTES", LIMITS["ROW_GROUP_BYTES"])
    monkeypatch.setattr("qk_sniffer.storage.head_parts.MOST_BYTES", LIMITS["MOST_BYTES"])


def files_of(root: Path) -> dict[str, bytes]:
    """The bytes of every Parquet file."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/*"))}


def rows_of(root: Path, head: str) -> Any:
    return pq.read_table(sorted(map(str, (root / head).glob("*.parquet"))))


def test_a_head_in_several_files_is_read_as_one(
    small: None, predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict("many", sniffer={"capture": {"capture_softmax": True}}) == 0
    root = tmp_path / "many"
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["qk-sniffer"])
    assert predict("one", sniffer={"capture": {"capture_softmax": True}}) == 0
    names = sorted(path.name for path in (root / "l01h02q").iterdir())
    assert names[:2] == ["data-00000-of-00004.parquet", "data-00001-of-00004.parquet"]
    assert len(names) == 4
    facts = json.loads((root / "manifest.json").read_text())["heads"]["l01h02q"]
    sizes = [path.stat().st_size for path in sorted((root / "l01h02q").iterdir())]
    assert [file["bytes"] for file in facts["files"]] == sizes
    assert facts["bytes"] == sum(sizes) and min(sizes[:-1]) >= LIMITS["MOST_BYTES"]
    assert facts["rows"] == sum(file["rows"] for file in facts["files"])

    table = assert_readers_agree(root, "l01h02q", 16, softmax=True)
    assert table.equals(rows_of(tmp_path / "one", "l01h02q"))
    head, other = (Captures(tmp_path / name).head(1, 2) for name in ("many", "one"))
    assert len(head) == len(other) == table.num_rows
    for column, values in other.numpy().items():
        np.testing.assert_array_equal(head.numpy()[column], values)
    late, all_late = (h.where(position=range(30, 61)) for h in (head, other))
    assert len(late) == len(all_late) > 0
    assert late.arrow().equals(all_late.arrow())
    loader = DataLoader(head.batches(4), batch_size=None, num_workers=2)
    assert sum(len(batch["position"]) for batch in loader) == table.num_rows
    attention = [Captures(tmp_path / name).attention(1, 2, "topic-2") for name in ("many", "one")]
    np.testing.assert_array_equal(attention[0].probabilities, attention[1].probabilities)

    assert main(["verify", str(root), "--against-model"]) == 0
    assert main(["report", str(root)]) == 0


def test_damage_in_one_of_several_files_is_named(
    small: None, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict() == 0
    head = tmp_path / "root" / "l00h00k"
    first, second = sorted(head.iterdir())[:2]
    content = second.read_bytes()
    second.write_bytes(content[:100] + b"?" + content[101:])
    shutil.copy(first, head / "data.parquet")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "root")]) == 1
    out = capsys.readouterr().out
    assert f"l00h00k/{second.name}: damaged, its checksum is not that of the manifest\n" in out
    assert "l00h00k/data.parquet: not in the manifest\n" in out
    second.unlink()
    with pytest.raises(Exception, match=r"data-00001-of-0000.*: missing, though the manifest has it"):
        Captures(tmp_path / "root").head(0, 0, "k").numpy()
    shutil.copy(first, second)
    manifest = tmp_path / "root" / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["examples"]["files"] = changed["heads"]["l00h00k"]["files"]
    manifest.write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "root")]) == 2
    assert "examples" in error_line(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the data roots below, which are the same for all tests."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def start(
    made: Path, predict: Run, tmp_path: Path, texts: list[dict[str, Any]], small: None, monkeypatch: Any
) -> Callable[[str], Path]:
    """A data root whose journal adds texts to the files that its name says."""

    maker = Maker(made, predict, tmp_path, texts, monkeypatch)
    finish, interrupt = maker.finish, maker.interrupt

    if not (made / "whole").exists():
        finish("whole", *range(7))
        for name, numbers in EARLIER.items():
            finish(f"{name}'s", *numbers)
            if name != "pulled":
                shutil.copytree(made / f"{name}'s", tmp_path / name)
                interrupt(name, *range(7))
        finish("pulled", 0)
        shutil.copytree(made / "whole", made / "pulled" / ".pulled")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made / name, tmp_path / "root"))

    return copy


EARLIER = {
    "one file": (1, 3),
    "fewer files": (1, 2, 3),
    "as many files": (0, 2, 3, 4, 5, 6),
    "pulled": (0,),
}
N_FILES = {"one file": 1, "fewer files": 2, "as many files": 3, "pulled": 1}
DEATHS = [
    Death("rename", BEFORE, 1),
    *(Death("rename", AFTER, passage) for passage in (1, 3, 4, 5)),
    Death("row group", AFTER, 200),
    Death("manifest", BEFORE, 1),
]


@pytest.mark.parametrize(
    "death", DEATHS, ids=lambda death: f"{death.point}-{death.moment}-{death.passage}"
)
@pytest.mark.parametrize("name", EARLIER)
def test_a_kill_leaves_the_old_files_or_the_new_ones(
    processes: Processes, start: Callable[[str], Path], made: Path, name: str, death: Death
) -> None:
    root = start(name)
    assert len(list((made / f"{name}'s" / "l00h00q").iterdir())) == N_FILES[name]
    environment = {limit: str(value) for limit, value in LIMITS.items()}
    process = processes.start(["finalize", str(root)], death=death, environment=environment)
    ended = process.wait(60)
    assert ended.exitcode == -9 or (name, death.point) == ("pulled", "row group"), ended.printed
    assert main(["finalize", str(root)]) in (0, 2)
    assert files_of(root) == files_of(made / "whole")
    assert main(["verify", str(root)]) == 0


def test_a_run_that_replaces_another_leaves_no_file_of_it(
    start: Callable[[str], Path], predict: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = start("whole")
    monkeypatch.setattr("qk_sniffer.storage.head_parts.MOST_BYTES", 10**9)
    assert predict(sniffer={"output": {"overwrite": True}}) == 0
    assert {path.name for path in root.glob("l*/*")} == {"data.parquet"}


def test_several_files_are_published_pulled_and_loaded(
    small: None, predict: Run, hub: LoopbackHub, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"batch_size": 2}
    assert predict("first", data=data | {"max_samples": 4}, sniffer=ON_THE_HUB) == 0
    few = {path for path in hub.files(REPO, BRANCH) if path.startswith("l00h00q/")}
    assert predict("second", data=data, sniffer=ON_THE_HUB) == 0
    assert predict("whole", data=data) == 0
    assert files_of(tmp_path / "second") == files_of(tmp_path / "whole")
    there = {path: data for path, data in hub.files(REPO, BRANCH).items() if "/" in path}
    assert there == files_of(tmp_path / "second")
    many = {path for path in there if path.startswith("l00h00q/")}
    assert few and not few & many, "the number of files is in their names"
    assert_readers_agree(tmp_path / "second", "l00h00q", 16)
    loaded = datasets.load_dataset(REPO, "l00h00q", revision=BRANCH, split="train")
    stored = rows_of(tmp_path / "whole", "l00h00q")
    assert loaded.to_list() == stored.to_pylist()
    by_pattern = datasets.load_dataset(
        REPO, data_files="l00h00q/*.parquet", revision=BRANCH, split="train"
    )
    assert by_pattern.to_list() == stored.to_pylist()
    assert Captures(REPO, revision=BRANCH).head(0, 0).arrow().equals(stored)
