"""Moments of several runs become one's, damaged ones are counted anew, and a kill changes nothing."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from killing import AFTER, BEFORE, HALFWAY, Death, Processes
from moment_runs import MadeUp, finish, no_progress
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.storage import (
    clear_data_root,
    earlier_run,
    merge_pulled,
    prepare_data_root,
    require_captured,
)
from readers import error_line
from test_damage import small_disk  # noqa: F401

RUN = MadeUp(kinds=("q", "k"))
UNEQUAL = MadeUp(widths=(4, 6), kinds=("q", "v"), by_bucket=False)


def finished(root: Path, *texts: int, made_up: MadeUp = RUN, moments: tuple[int, ...] = ()) -> Path:
    """A finished run of some texts, whose moments count them or others."""
    made_up.journal(root, texts, moments or texts)
    finish(root, complete=True)
    return root


def pulled(root: Path, *texts: int, made_up: MadeUp = RUN) -> None:
    """Let a run of some texts wait in a data root."""
    finished(root / "other", *texts, made_up=made_up)
    (root / "other").rename(root / ".pulled")


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.parametrize("made_up", [RUN, UNEQUAL], ids=["equal", "unequal widths"])
def test_a_later_run_of_other_processes_adds_to_a_finished_one(tmp_path: Path, made_up: MadeUp) -> None:
    finished(tmp_path, 3, -7, made_up=made_up)
    made_up.journal(tmp_path, [12], [12])
    made_up.journal(tmp_path, [40, 41], [40, 41], rank=1)
    assert finish(tmp_path, complete=True)["moments"]["texts"]["rows"] == 5
    made_up.assert_counted(tmp_path, 3, -7, 12, 40, 41)
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("made_up", [RUN, UNEQUAL], ids=["equal", "unequal widths"])
@pytest.mark.parametrize(
    ("ours", "journal", "theirs"),
    [
        ([3, -7], [], [12, 40]),
        ([3, -7], [41], [12, 40]),
        ([3, -7], [41], [3]),
        ([3], [12], [3, 12, 40]),
        ([3], [12], [3, 12]),
        ([], [3], [3, 12]),
        ([], [3], [12]),
        ([], [], [12]),
        ([3], [12], [12, 40]),
    ],
    ids=str,
)
def test_a_pulled_run_is_added_or_one_is_part_of_the_other(
    tmp_path: Path, made_up: MadeUp, ours: list[int], journal: list[int], theirs: list[int]
) -> None:
    if ours:
        finished(tmp_path, *ours, made_up=made_up)
    pulled(tmp_path, *theirs, made_up=made_up)
    if journal:
        made_up.journal(tmp_path, journal, journal)
    manifest = merge_pulled(tmp_path, no_progress)
    texts = {*ours, *journal, *theirs}
    assert manifest["examples"]["rows"] == len(texts)
    made_up.assert_counted(tmp_path, *texts)
    assert not (tmp_path / ".pulled").exists()


def test_moments_that_share_some_texts_are_not_merged(tmp_path: Path) -> None:
    finished(tmp_path, 3, -7)
    pulled(tmp_path, -7, 12)
    before = contents(tmp_path)
    with pytest.raises(UserError) as error:
        merge_pulled(tmp_path, no_progress)
    assert str(error.value) == (
        f"{tmp_path}/.pulled/moments: the moments there and in {tmp_path}/moments both count text -7 "
        f"and can't be taken apart; remove {tmp_path}/moments, whose texts the next predict counts anew"
    )
    shutil.rmtree(tmp_path / ".journal")
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / "moments")
    merge_pulled(tmp_path, no_progress)
    RUN.assert_counted(tmp_path, -7, 12)
    earlier = earlier_run(tmp_path)
    assert earlier is not None
    assert (earlier.example_ids.tolist(), earlier.counted_ids.tolist()) == ([-7, 3, 12], [-7, 12])
    with pytest.raises(RuntimeError, match="1 of 3 texts were not counted in the moments"):
        require_captured(tmp_path, earlier.example_ids)
    RUN.journal(tmp_path, [], [3])
    require_captured(tmp_path, earlier.example_ids)
    finish(tmp_path, complete=True)
    RUN.assert_counted(tmp_path, -7, 12, 3)
    assert main(["verify", str(tmp_path)]) == 0


def test_a_pulled_run_that_adds_moments_alone(tmp_path: Path) -> None:
    finished(tmp_path, 3, -7)
    shutil.rmtree(tmp_path / "moments")
    pulled(tmp_path, 3, -7)
    merge_pulled(tmp_path, no_progress)
    RUN.assert_counted(tmp_path, 3, -7)
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("counted", [[12], []], ids=["adds moments", "adds rows alone"])
def test_damaged_moments_of_a_finished_run_are_not_merged(tmp_path: Path, counted: list[int]) -> None:
    finished(tmp_path, 3)
    path = tmp_path / "moments" / "k.parquet"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    RUN.journal(tmp_path, [12], counted)
    with pytest.raises(UserError, match=r"k\.parquet: damaged, it is not what the manifest describes"):
        finish(tmp_path)
    shutil.rmtree(tmp_path / "moments")
    finish(tmp_path)
    RUN.journal(tmp_path, [], sorted({3, 12} - {*counted}))
    finish(tmp_path, complete=True)
    RUN.assert_counted(tmp_path, 3, 12)
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("seed", range(40))
def test_damaged_states_are_counted_anew(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    RUN.journal(tmp_path, [3], [3])
    RUN.journal(tmp_path, [-7, 12], [-7, 12], rank=1)
    path = tmp_path / ".journal" / "rank-00001" / "moments-00000.npz"
    content = bytearray(path.read_bytes())
    draw = random.Random(seed)
    if seed % 4 == 0:
        del content[draw.randrange(len(content)) :]
    else:
        # Of the directory at its end too, which is small.
        at = draw.randrange(len(content) if seed % 2 else 2000)
        content[-1 - at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    prepare_data_root(tmp_path, overwrite=False)
    warned = [record.message for record in caplog.records]
    if path.exists():
        # A bit that no reader looks at.
        assert not warned
    else:
        assert warned == [f"{path}: damaged, it holds no moments; its texts are counted anew"]
        earlier = earlier_run(tmp_path)
        assert earlier is not None
        assert earlier.example_ids.tolist() == [-7, 3, 12]
        assert earlier.counted_ids.tolist() == [3]
        RUN.journal(tmp_path, [], [-7, 12])
    finish(tmp_path, complete=True)
    RUN.assert_counted(tmp_path, 3, -7, 12)


def rewritten(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: arrays | changes


HOSTILE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "objects": rewritten(example_ids=np.array([{}])),
    "texts of other numbers": rewritten(example_ids=np.array([1.5])),
    "texts in a table": rewritten(example_ids=np.zeros((2, 2), np.int32)),
    "texts twice": rewritten(example_ids=np.zeros(2, np.int32)),
    "no texts": lambda arrays: {name: a for name, a in arrays.items() if name != "example_ids"},
    "a name": rewritten(q=np.zeros(2)),
    "a column": rewritten(**{"q.0.more": np.zeros(2)}),
    "a shape": rewritten(**{"q.0.head": np.zeros(2, np.int32)}),
}


@pytest.mark.parametrize("case", [*HOSTILE, "compressed", "a text"])
def test_hostile_states_are_dropped(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    RUN.journal(tmp_path, [3], [3])
    path = tmp_path / ".journal" / "rank-00000" / "moments-00000.npz"
    arrays = dict(np.load(path))
    if case == "a text":
        path.write_text("moments")
    elif case == "compressed":
        np.savez_compressed(path, **arrays)
    else:
        np.savez(path, **HOSTILE[case](arrays))
    prepare_data_root(tmp_path, overwrite=False)
    assert [record.message for record in caplog.records] == [
        f"{path}: damaged, it holds no moments; its texts are counted anew"
    ]
    assert not path.exists()


def test_damage_that_finalizing_finds_is_named(tmp_path: Path) -> None:
    RUN.journal(tmp_path, [3], [3])
    path = tmp_path / ".journal" / "rank-00000" / "moments-00000.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"moments-00000\.npz: damaged, it holds no moments"):
        finish(tmp_path)
    prepare_data_root(tmp_path, overwrite=False)
    RUN.journal(tmp_path, [], [3])
    finish(tmp_path)
    RUN.assert_counted(tmp_path, 3)


def test_captured_texts_without_moments_make_empty_files(tmp_path: Path) -> None:
    RUN.journal(tmp_path, [3])
    facts = finish(tmp_path)["moments"]
    assert {name: about["rows"] for name, about in facts.items()} == {"q": 0, "k": 0, "texts": 0}
    assert facts["texts"]["tokens"] == 0
    assert main(["verify", str(tmp_path)]) == 0
    RUN.journal(tmp_path, [], [3])
    finish(tmp_path, complete=True)
    RUN.assert_counted(tmp_path, 3)


LARGE = MadeUp(widths=(64, 64), kinds=("q", "k"))
"""The state of a text of 30 tokens takes 5 MB."""


def test_a_disk_that_is_full_of_what_is_counted(
    small_disk: Callable[[str], Path],  # noqa: F811
) -> None:
    root = small_disk("3m") / "root"
    with pytest.raises(UserError) as error:
        LARGE.journal(root, [3], [3])
    assert str(error.value) == (
        f"{root}/.journal/rank-00000/moments-00000.npz: No space left on device; make room or mend the "
        "disk, then run the same command again, which goes on after the last batch that was saved"
    )
    small_disk("64m")
    LARGE.journal(root, [3], [3])
    finish(root)
    LARGE.assert_counted(root, 3)


def test_a_disk_that_is_full_when_files_are_made(
    small_disk: Callable[[str], Path],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = small_disk("7m") / "root"
    LARGE.journal(root, [3], [3])
    assert main(["finalize", str(root)]) == 2
    assert not list(root.rglob(".*.tmp"))
    assert "No space left on device; make room or mend the disk" in error_line(capsys)
    small_disk("64m")
    assert main(["finalize", str(root)]) == 0
    LARGE.assert_counted(root, 3)


def test_overwriting_removes_moments(tmp_path: Path) -> None:
    finished(tmp_path, 3)
    clear_data_root(tmp_path)
    assert not (tmp_path / "moments").exists()


def start(root: Path) -> None:
    """A finished run, a pulled one, and the journal of two processes."""
    finished(root, 3, -7)
    pulled(root, 12)
    RUN.journal(root, [40], [40])
    RUN.journal(root, [41, 99], [41, 99], rank=1)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("begun")
    start(root)
    return root


@pytest.fixture(scope="module")
def expected(begun: Path, processes: Processes) -> Callable[[str], int]:
    """How often an uninterrupted end of the run passes a fault point."""
    root = begun.with_name("uninterrupted")
    shutil.copytree(begun, root)
    ended = processes.run(["finalize", str(root)], sync_seconds=0.0)
    assert ended.exitcode == 0, ended.printed
    RUN.assert_counted(root, 3, -7, 12, 40, 41, 99)
    return lambda point: ended.passages[point]


DEATHS = [
    *((point, moment) for point in ("rename", "sync", "journal's end") for moment in (BEFORE, AFTER)),
    ("finalizing", HALFWAY),
    ("row group", AFTER),
    ("checksum", BEFORE),
    ("manifest", BEFORE),
    ("manifest", AFTER),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("point", "moment"), DEATHS)
def test_finalizing_goes_on_after_a_kill(
    processes: Processes,
    begun: Path,
    expected: Callable[[str], int],
    tmp_path: Path,
    point: str,
    moment: str,
    seed: int,
) -> None:
    root = tmp_path / "root"
    shutil.copytree(begun, root)
    draw = random.Random(f"{point} {moment} {seed}")
    for _ in range(2):
        death = Death(point, moment, draw.randint(1, expected(point)))
        if processes.run(["finalize", str(root)], sync_seconds=0.0, death=death).exitcode == 0:
            break
    earlier = earlier_run(root)
    assert earlier is not None
    assert earlier.counted_ids.tolist() == [-7, 3, 12, 40, 41, 99]
    ended = processes.run(["finalize", str(root)], sync_seconds=0.0)
    assert ended.exitcode == 0 or "no interrupted run is here" in ended.printed, ended.printed
    RUN.assert_counted(root, 3, -7, 12, 40, 41, 99)
    assert not (root / ".journal").exists()
    assert not list(root.rglob(".*.tmp"))
    assert main(["verify", str(root)]) == 0
