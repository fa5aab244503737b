"""Moments go to a branch of the Hub and come from it, with the rows."""

import shutil
from pathlib import Path

import datasets
import pytest

from conftest import REPO
from loopback import LoopbackHub
from moment_runs import MadeUp, finish
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.hub import Publication, pull, staging

RUN = MadeUp(kinds=("q", "k"))
BRANCH = "made-up"


def finished(root: Path, *texts: int) -> Path:
    RUN.journal(root, texts, texts)
    finish(root, complete=True)
    return root


def push(root: Path) -> int:
    return main(["push", str(root), "--hf_repo_id", REPO, "--hf_branch", BRANCH])


def take_up(root: Path) -> None:
    """What a run does with its branch before it begins."""
    root.mkdir(exist_ok=True)
    fingerprint = RUN.header["fingerprint"]
    pull(root, Publication(REPO, BRANCH), fingerprint, overwrite=False)


def moments_of(hub: LoopbackHub) -> dict[str, bytes]:
    return {path: data for path, data in hub.files(REPO, BRANCH).items() if path.startswith("moments/")}


def local_moments(root: Path) -> dict[str, bytes]:
    return {f"moments/{path.name}": path.read_bytes() for path in (root / "moments").iterdir()}


@pytest.fixture(params=[900, 5], ids=["at once", "in portions"])
def _portions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MOST_CHANGES", request.param)


@pytest.mark.usefixtures("_portions")
def test_moments_are_published_and_loaded_by_name(hub: LoopbackHub, tmp_path: Path) -> None:
    root = finished(tmp_path / "root", 3, -7)
    assert push(root) == 0
    assert set(moments_of(hub)) == {f"moments/{name}.parquet" for name in ("q", "k", "texts")}
    assert moments_of(hub) == local_moments(root)
    rows = datasets.load_dataset(REPO, "moments_k", revision=BRANCH, split="train")
    assert len(rows) == 2 * 2 * 2 * 4
    RUN.journal(root, [12], [12])
    finish(root, complete=True)
    assert push(root) == 0
    assert moments_of(hub) == local_moments(root)


def test_moments_that_are_not_there_any_more_go(hub: LoopbackHub, tmp_path: Path) -> None:
    assert push(finished(tmp_path / "root", 3, -7)) == 0
    other = MadeUp(kinds=("q",))
    other.journal(tmp_path / "other", [3], [3])
    finish(tmp_path / "other", complete=True)
    assert push(tmp_path / "other") == 0
    assert moments_of(hub) == local_moments(tmp_path / "other")


@pytest.mark.parametrize(
    ("ours", "journal", "theirs"),
    [([], [], [3, -7]), ([12], [], [3, -7]), ([12], [40], [3, -7, 12]), ([3], [12], [3])],
    ids=str,
)
def test_moments_of_a_branch_are_pulled(
    hub: LoopbackHub,
    tmp_path: Path,
    ours: list[int],
    journal: list[int],
    theirs: list[int],
) -> None:
    assert push(finished(tmp_path / "theirs", *theirs)) == 0
    root = tmp_path / "root"
    if ours:
        finished(root, *ours)
    take_up(root)
    RUN.journal(root, journal, journal)
    finish(root, complete=True)
    RUN.assert_counted(root, *{*ours, *journal, *theirs})
    assert push(root) == 0
    assert moments_of(hub) == local_moments(root)
    assert main(["verify", str(root)]) == 0


def test_a_push_merges_what_another_has_pushed_meanwhile(hub: LoopbackHub, tmp_path: Path) -> None:
    ours, theirs = finished(tmp_path / "ours", 3, -7), finished(tmp_path / "theirs", 12)
    assert push(theirs) == 0
    assert push(ours) == 0
    RUN.assert_counted(ours, 3, -7, 12)
    assert moments_of(hub) == local_moments(ours)


def test_moments_that_share_some_texts_are_refused_before_rows_are_brought(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    assert push(finished(tmp_path / "theirs", 3, -7)) == 0
    root = finished(tmp_path / "root", -7, 12)
    hub.forget()
    with pytest.raises(UserError) as error:
        take_up(root)
    assert str(error.value) == (
        f"sniffer.output.hf_branch: {REPO}, branch {BRANCH}: the moments there and in {root}/moments "
        f"both count text -7 and can't be taken apart; remove {root}/moments, whose texts the next "
        "predict counts anew"
    )
    fetched = {request.path.rpartition("/")[2] for request in hub.requests if "parquet" in request.path}
    assert fetched <= {"data.parquet", "texts.parquet"}
    assert not any("l00h00q" in request.path for request in hub.requests)
    assert push(root) == 2
    RUN.assert_counted(root, -7, 12)
    shutil.rmtree(root / "moments")
    take_up(root)
    RUN.journal(root, [], [12])
    finish(root, complete=True)
    RUN.assert_counted(root, 3, -7, 12)
    assert push(root) == 0


def test_moments_alone_are_brought_where_they_are_missing(hub: LoopbackHub, tmp_path: Path) -> None:
    root = finished(tmp_path / "root", 3, -7)
    assert push(root) == 0
    shutil.rmtree(root / "moments")
    take_up(root)
    RUN.journal(root)
    finish(root, complete=True)
    RUN.assert_counted(root, 3, -7)
