"""Full disks, damaged files: each is found and named, and what was captured is not lost."""

import gc
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import REPO, write_jsonl
from loopback import LoopbackHub
from qk_sniffer.cli import main
from readers import error_line, files_of
from test_resume import interrupt

__all__ = ["interrupt"]

Predict = Callable[..., int]
BATCHES: dict[str, Any] = {"batch_size": 2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of some size, which can grow."""
    directory = tmp_path / "disk"
    directory.mkdir()

    def resize(size: str) -> Path:
        options = f"remount,size={size}" if os.path.ismount(directory) else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system takes root")
        return directory

    yield resize
    if os.path.ismount(directory):
        subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture
def long_texts(tmp_path: Path) -> Path:
    """Rows enough for a journal and files of 5 MB each."""
    rows = [{"id": i, "text": f"text {i} " + "abcdefg " * 20} for i in range(20)]
    return write_jsonl(tmp_path / "long.jsonl", rows)


def test_a_disk_that_is_full_of_what_is_pulled(
    hub: LoopbackHub,
    predict: Predict,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = {"output": {"hf_repo_id": REPO, "hf_branch": "branch"}}
    assert predict("first", data={"max_samples": 4}, sniffer=output) == 0
    root = small_disk("150k") / "root"
    output["output"]["data_root"] = str(root)
    assert predict(sniffer=output) == 2
    line = error_line(capsys)
    assert line.startswith(f"{root}: ")
    assert "No space left on device; make room or mend the disk, then run the same command" in line
    small_disk("50m")
    assert predict(sniffer=output) == 0
    assert main(["verify", str(root)]) == 0


def test_too_little_room_is_seen_at_the_start(
    predict: Predict,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    long_texts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = small_disk("6m")
    sections = {
        "data": {"path": str(long_texts)},
        "sniffer": {"output": {"data_root": str(disk / "root")}},
    }
    assert predict(**sections) == 2
    assert "has 0.0 GB free, and the run needs about" in error_line(capsys)
    small_disk("64m")
    assert predict(**sections) == 0


@pytest.mark.parametrize(("size", "where"), [("2m", "segment-00000.arrow"), ("7m", "root")])
def test_a_full_disk_ends_in_a_run_that_can_go_on(
    predict: Predict,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    long_texts: Path,
    capsys: pytest.CaptureFixture[str],
    size: str,
    where: str,
) -> None:
    """In the journal, and in the files that are made of it; a stream can't be measured beforehand."""
    data = BATCHES | {"path": str(long_texts), "streaming": True}
    assert predict("whole", data=data) == 0
    capsys.readouterr()
    root = small_disk(size) / "root"
    sections = {"data": data, "sniffer": {"output": {"data_root": str(root)}}}
    assert predict(**sections) == 2
    line = error_line(capsys)
    assert line.split(":")[0].endswith(where)
    assert "No space left on device; make room" in line
    assert not (root / "manifest.json").exists()
    assert not list(root.rglob("*.tmp"))
    small_disk("64m")
    assert predict(**sections) == 0
    assert files_of(root) == files_of(tmp_path / "whole")


def test_little_room_is_told_while_the_run_goes_on(
    predict: Predict,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    long_texts: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qk_sniffer.storage.journal.SYNC_SECONDS", 0)
    root = small_disk("7m") / "root"
    sections = {"data": {"path": str(long_texts), "streaming": True}}
    predict(**sections, sniffer={"output": {"data_root": str(root)}})
    warnings = [record for record in caplog.records if "less than the Parquet files" in record.message]
    assert len(warnings) == 1


def test_a_full_disk_leaves_no_file_open(
    predict: Predict, small_disk: Callable[[str], Path], long_texts: Path
) -> None:
    """One that is open keeps the room that removing it should give back."""
    sections = {"data": {"path": str(long_texts), "streaming": True}}
    gc.disable()
    try:
        for size in range(5600, 7400, 100):
            disk = small_disk(f"{size}k")
            assert predict(**sections, sniffer={"output": {"data_root": str(disk / "root")}}) == 2
            places = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
            assert [place for place in places if place.startswith(str(disk))] == []
            shutil.rmtree(disk / "root")
    finally:
        gc.enable()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def flip(path: Path, place: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["commits.jsonl", "segment-00000.arrow"])
def test_a_damaged_end_of_the_journal_is_captured_again(
    predict: Predict,
    interrupt: Predict,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    name: str,
) -> None:
    assert predict("whole", data=BATCHES) == 0
    interrupt("root", data=BATCHES)
    damage(tmp_path / "root" / ".journal" / "rank-00000" / name)
    assert predict("root", data=BATCHES) == 0
    assert (
        "commits.jsonl: 1 entries were torn or damaged; what they stood for is captured" in caplog.text
    )
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")


def test_bytes_behind_the_last_commit_are_cut_off(
    predict: Predict, interrupt: Predict, tmp_path: Path
) -> None:
    assert predict("whole", data=BATCHES) == 0
    interrupt("root", data=BATCHES)
    with (tmp_path / "root" / ".journal" / "rank-00000" / "segment-00000.arrow").open("ab") as segment:
        segment.write(b"half a block")
    assert predict("root", data=BATCHES) == 0
    assert files_of(tmp_path / "root") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("command", ["predict", "finalize"])
def test_damage_in_the_middle_is_found_when_files_are_made(
    predict: Predict,
    interrupt: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr("qk_sniffer.storage.journal.SEGMENT_BYTES", 1)
    monkeypatch.setattr("qk_sniffer.storage.journal.SYNC_SECONDS", 0)
    root = tmp_path / "root"
    assert predict("whole", data=BATCHES) == 0
    interrupt("root", data=BATCHES, after=3)
    damaged = root / ".journal" / "rank-00000" / "segment-00001.arrow"
    flip(damaged, 5000)
    capsys.readouterr()
    arguments = ["finalize", str(root)]
    assert (predict("root", data=BATCHES) if command == "predict" else main(arguments)) == 2
    line = error_line(capsys)
    assert line.startswith(f"{damaged}: damaged, the rows of 2 texts")
    assert not list(root.glob("l*/data.parquet"))
    assert predict("root", data=BATCHES) == 0
    assert files_of(root) == files_of(tmp_path / "whole")


def test_a_damaged_parquet_file_is_not_merged(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    assert predict(data=BATCHES | {"max_samples": 4}) == 0
    good = (root / "l02h01q" / "data.parquet").read_bytes()
    flip(root / "l02h01q" / "data.parquet", 100)
    assert main(["verify", str(root)]) == 1
    out = capsys.readouterr().out
    assert "l02h01q/data.parquet: damaged, its checksum is not that of the manifest\n" in out
    assert predict(data=BATCHES) == 2
    assert error_line(capsys).startswith(f"{root}/l02h01q/data.parquet: damaged")
    (root / "l02h01q" / "data.parquet").write_bytes(good)
    assert predict(data=BATCHES) == 0
    assert main(["verify", str(root)]) == 0


@pytest.mark.parametrize("name", [".journal/header.json", "manifest.json"])
def test_a_damaged_description_is_named(
    predict: Predict,
    interrupt: Predict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    predict() if name == "manifest.json" else interrupt()
    path = tmp_path / "root" / name
    path.write_text(path.read_text()[:-5])
    capsys.readouterr()
    assert predict() == 2
    assert error_line(capsys).startswith(f"{path}: damaged, it is no JSON")
    assert predict(sniffer={"output": {"overwrite": True}}) == 0


def test_an_unwritable_data_root_of_a_finished_run_is_refused(
    predict: Predict,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = small_disk("16m")
    sections = {"sniffer": {"output": {"data_root": str(disk / "root")}}}
    assert predict(**sections, data={"max_samples": 3}) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    capsys.readouterr()
    assert predict(**sections) == 2
    assert "is not writable (Read-only file system)" in error_line(capsys)
    assert main(["verify", str(disk / "root")]) == 0
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert predict(**sections) == 0
    assert json.loads((disk / "root" / "manifest.json").read_text())["examples"]["rows"] == 7


def test_a_file_in_the_place_of_a_directory_is_told(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "notes.txt").write_text("mine")
    assert predict() == 2
    assert "is not empty and holds no run that could be continued" in error_line(capsys)
    (root / "notes.txt").unlink()
    assert predict() == 0
    assert pq.read_metadata(root / "l00h00q" / "data.parquet").num_rows > 0
