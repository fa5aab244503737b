"""A push of more files than one commit may have: in portions, which no reader of the branch sees."""

import re
from pathlib import Path
from typing import Any

import pytest

from conftest import HUB_TOKEN, REPO, Run, copy_old_and_new
from killing import Processes
from loopback import Fault, LoopbackHub, environment_of
from qk_sniffer.cli import main
from qk_sniffer.hub import staging

BRANCH = "a/branch"
TARGET = ("--hf_repo_id", REPO, "--hf_branch", BRANCH)
MOST = 8
PORTIONS = 4
"""Of 24 heads, the texts and three other files."""

STAGED = "/preupload/a%2Fbranch.staging-[0-9a-f]{16}$"
COMMIT = "/commit/a%2Fbranch.staging-[0-9a-f]{16}$"
MOVE = "/branch/a%2Fbranch$"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of two data roots: ``old``, and ``new`` with more texts."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def roots(made: Path, predict: Run, tmp_path: Path, hub: LoopbackHub, monkeypatch: Any) -> Path:
    """Directory of copies of both, where the first is on a branch and commits may be small."""
    copy_old_and_new(made, predict, tmp_path)
    assert main(["push", str(tmp_path / "old"), *TARGET]) == 0
    monkeypatch.setattr(staging, "MOST_CHANGES", MOST)
    hub.most_changes = MOST
    return tmp_path


def published(hub: LoopbackHub, root: Path) -> None:
    """See that the branch has the files of a data root and no others, and nothing else is left."""
    there = hub.files(REPO, BRANCH)
    local = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    local.pop(".hub.json")
    there.pop(".gitattributes")
    assert there == local
    assert set(hub.branches(REPO)) == {"main", BRANCH}


def requests(hub: LoopbackHub, method: str, path: str) -> list[Any]:
    return [r for r in hub.requests if r.method == method and re.search(path, r.path)]


@pytest.fixture
def ends(hub: LoopbackHub, roots: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ends of the branch that any request of a push has met, in order."""
    met: list[str] = []

    def before(*_: str) -> None:
        end = hub.branches(REPO)[BRANCH]
        if not met or met[-1] != end:
            met.append(end)

    monkeypatch.setattr(hub, "before", before)
    return met


def test_the_branch_moves_once(hub: LoopbackHub, roots: Path, ends: list[str]) -> None:
    before, old = hub.branches(REPO)[BRANCH], len(hub.commits(REPO, BRANCH))
    assert main(["push", str(roots / "new"), *TARGET]) == 0
    published(hub, roots / "new")
    assert ends == [before, hub.branches(REPO)[BRANCH]]
    assert len(hub.commits(REPO, BRANCH)) == old + PORTIONS
    card = hub.files(REPO, "main")["README.md"].decode()
    assert card.count("staging") == 0 and card.count("| [a/branch]") == 1
    hub.forget()
    assert main(["push", str(roots / "new")]) == 0
    assert not requests(hub, "POST", "/commit/|/branch/")


def killed_at(
    hub: LoopbackHub, processes: Processes, root: Path, method: str, path: str, passage: int
) -> None:
    """Push in a process that is killed as one of its requests arrives."""
    hub.forget()
    seen = hub.before

    def before(asked: str, where: str) -> None:
        if seen is not None:
            seen(asked, where)
        if asked == method and re.search(path, where):
            passed.append(where)
            if len(passed) == passage:
                process.kill()

    passed: list[str] = []
    hub.before = before
    environment = environment_of(hub, HUB_TOKEN, root.parent / "killed-cache")
    environment["MOST_CHANGES"] = str(MOST)
    process = processes.start(["push", str(root), *TARGET], environment=environment)
    assert process.wait(60).exitcode == -9, process.printed
    hub.before = seen


@pytest.mark.parametrize(
    ("method", "path", "passage", "n_left"),
    [
        ("POST", "/branch/a%2Fbranch.staging", 1, PORTIONS),
        ("POST", COMMIT, 1, PORTIONS),
        ("POST", COMMIT, 2, PORTIONS - 1),
        ("POST", COMMIT, PORTIONS, 1),
        ("PUT", "/lfs/", 12, PORTIONS - 1),
        ("POST", MOVE, 1, 0),
        ("DELETE", "/branch/", 1, 0),
    ],
)
def test_a_killed_push_goes_on_where_it_was(
    hub: LoopbackHub,
    roots: Path,
    ends: list[str],
    processes: Processes,
    method: str,
    path: str,
    passage: int,
    n_left: int,
) -> None:
    before = hub.branches(REPO)[BRANCH]
    killed_at(hub, processes, roots / "new", method, path, passage)
    stored = hub.uploaded()
    n_commits = len([r for r in requests(hub, "POST", COMMIT) if r.status == 200])
    n_killed = len(hub.requests)
    assert main(["push", str(roots / "new")]) == 0
    anew = hub.requests[n_killed:]
    published(hub, roots / "new")
    assert ends == [before, hub.branches(REPO)[BRANCH]]
    # A request that arrived whole is done although nobody waits for its answer.
    sent_anew = len([r for r in requests(hub, "POST", COMMIT) if r.status == 200]) - n_commits
    assert n_left - 1 <= sent_anew <= n_left
    # The files that are not Parquet are looked at in any case.
    assert len([r for r in requests(hub, "POST", STAGED) if r in anew]) <= max(1, n_left)
    assert max(hub.uploaded().values()) == 1, "nothing that had arrived is sent again"
    assert stored.keys() <= hub.uploaded().keys()


def test_another_push_removes_what_a_killed_one_prepared(
    hub: LoopbackHub, roots: Path, processes: Processes
) -> None:
    killed_at(hub, processes, roots / "new", "POST", COMMIT, 2)
    (left,) = set(hub.branches(REPO)) - {"main", BRANCH}
    assert left.startswith(f"{BRANCH}.staging-")
    hub.add_branch(REPO, f"{BRANCH}s.staging-0123456789abcdef")
    assert main(["push", str(roots / "old")]) == 0
    assert set(hub.branches(REPO)) == {"main", BRANCH, f"{BRANCH}s.staging-0123456789abcdef"}


@pytest.mark.parametrize("moment", [COMMIT, MOVE])
@pytest.mark.parametrize("removes", [False, True])
def test_a_branch_that_has_moved_meanwhile_is_not_replaced(
    hub: LoopbackHub, roots: Path, monkeypatch: pytest.MonkeyPatch, moment: str, removes: bool
) -> None:
    """Someone commits as the second portion arrives, or the branch is asked for before the move.

    Where that was a push, it has removed what the other had prepared.
    """
    asked: list[str] = []
    n_portions = 2 if moment == COMMIT else PORTIONS

    def before(_: str, path: str) -> None:
        asked.append(path)
        is_there = moment == COMMIT or path.endswith("/refs")
        n_commits = sum(re.search(COMMIT, path) is not None for path in asked)
        if is_there and n_commits == n_portions and b"hers" not in hub.files(REPO, BRANCH).values():
            hub.commit(REPO, BRANCH, {"notes.txt": b"hers"})
            for name in set(hub.branches(REPO)) - {"main", BRANCH} if removes else ():
                del hub.repos[REPO].branches[name]

    monkeypatch.setattr(hub, "before", before)
    assert main(["push", str(roots / "new"), *TARGET]) == 0
    assert hub.files(REPO, BRANCH)["notes.txt"] == b"hers"
    assert set(hub.branches(REPO)) == {"main", BRANCH}
    assert max(hub.uploaded().values()) == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", COMMIT, status=500, done=True, times=1),
        Fault("POST", COMMIT, drop="after", after=1, times=1),
        Fault("POST", MOVE, drop="after", times=1),
        Fault("POST", MOVE, status=503, times=1),
        Fault("DELETE", "/branch/", drop="after", times=1),
    ],
    ids=str,
)
def test_a_fault_that_passes(hub: LoopbackHub, roots: Path, ends: list[str], fault: Fault) -> None:
    hub.fail(fault)
    assert main(["push", str(roots / "new"), *TARGET]) == 0
    published(hub, roots / "new")
    assert len(ends) == 2
    assert max(hub.uploaded().values()) == 1


def test_files_that_go_are_counted_too(hub: LoopbackHub, roots: Path) -> None:
    """Heads of an older run on the branch are removed together with what is added."""
    others = {f"l07h{head:02d}q/data.parquet": b"%d" % head for head in range(20)}
    hub.commit(REPO, BRANCH, others)
    assert main(["push", str(roots / "new"), *TARGET]) == 0
    published(hub, roots / "new")
