"""A push that fails, at any request and in any way: nothing is lost, mixed, or sent twice."""

import os
import re
import time
from collections import Counter
from pathlib import Path
from signal import SIGINT, SIGTERM
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import HUB_TOKEN, REPO, Run, WriteRun, copy_old_and_new
from killing import Processes
from loopback import Fault, LoopbackHub, environment_of
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.hub.requests import explained
from readers import error_line

BRANCH = "branch"
TARGET = ("--hf_repo_id", REPO, "--hf_branch", BRANCH)
PREUPLOAD = ("POST", "/preupload/")
BATCH = ("POST", "/objects/batch")
PUT = ("PUT", "/lfs/")
COMMIT = ("POST", f"/commit/{BRANCH}$")
INDEX = ("POST", "/commit/main$")
REFS = ("GET", "/refs$")
MANIFEST = ("GET|HEAD", "manifest.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of two data roots: ``old``, and ``new`` with more texts."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def old_and_new(
    made: Path, predict: Run, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, bytes], Path]:
    """The files of a branch that holds the old run, and the data root of the new one."""
    copy_old_and_new(made, predict, tmp_path)
    assert main(["push", str(tmp_path / "old"), *TARGET]) == 0
    # The client waits up to eight seconds between its tries.
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    return hub.files(REPO, BRANCH), tmp_path / "new"


def whole(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.parquet")}


def stored_twice(hub: LoopbackHub) -> list[str]:
    """The objects that were sent again although the hub had taken them."""
    sent = Counter(
        request.path for request in hub.requests if request.method == "PUT" and request.status == 200
    )
    return [path for path, times in sent.items() if times > 1]


def holds(hub: LoopbackHub, rows: dict[str, bytes]) -> bool:
    there = hub.files(REPO, BRANCH)
    return {path: data for path, data in there.items() if path.endswith(".parquet")} == rows


LASTING = [
    *((PREUPLOAD, Fault(*PREUPLOAD, status=status)) for status in (401, 403, 404, 500)),
    *((COMMIT, Fault(*COMMIT, status=status)) for status in (401, 403, 404, 500)),
    *((stage, Fault(*stage, status=503)) for stage in (REFS, BATCH, PUT, INDEX, MANIFEST)),
    (PUT, Fault(*PUT, status=403, after=4)),
    (PUT, Fault(*PUT, drop="before", after=7)),
    (COMMIT, Fault(*COMMIT, status=409)),
    (COMMIT, Fault(*COMMIT, status=412)),
    (COMMIT, Fault(*COMMIT, status=429, headers={"Retry-After": "0"})),
    (COMMIT, Fault(*COMMIT, drop="before")),
    (COMMIT, Fault(*COMMIT, status=500, done=True)),
    (INDEX, Fault(*INDEX, drop="after")),
]  # fmt: skip


def _name(value: Any) -> str:
    if not isinstance(value, Fault):
        return re.sub(r"\W+", "-", value[1]).strip("-")
    done = "-but-done" if value.done else ""
    return f"{value.drop or value.status}{done}"


@pytest.mark.parametrize(("stage", "fault"), LASTING, ids=_name)
def test_a_fault_that_lasts(
    hub: LoopbackHub,
    old_and_new: tuple[dict[str, bytes], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[str, str],
    fault: Fault,
) -> None:
    old, root = old_and_new
    rows = whole(root)
    # The client keeps what it was given; a slow one would wait for the seconds that a hub asks for.
    monkeypatch.setattr("qk_sniffer.hub.requests.time", SimpleNamespace(sleep=lambda _: None))
    hub.fail(fault)
    capsys.readouterr()
    assert main(["push", str(root), *TARGET]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("qk-sniffer: error: sniffer.output.hf_")
    assert f"`qk-sniffer push {root}`" in line
    if fault.status in (401, 403, 404) and stage != PUT:
        assert fault._met == 1, "what is refused is not asked again"
    assert hub.files(REPO, BRANCH) == old or holds(hub, rows)
    if stage != MANIFEST:
        assert (stage == INDEX or fault.done) == holds(hub, rows)
    assert main(["verify", str(root)]) == 0
    hub.heal()
    assert main(["push", str(root)]) == 0
    assert whole(root) == rows
    assert holds(hub, rows)
    assert not stored_twice(hub)
    assert f"[{BRANCH}](" in hub.files(REPO, "main")["README.md"].decode()


PASSING = [
    Fault(*REFS, status=500, times=1),
    Fault(*PREUPLOAD, status=503, times=2),
    Fault(*BATCH, status=429, headers={"Retry-After": "1"}, times=1),
    Fault(*PUT, drop="before", times=3),
    Fault(*PUT, status=500, times=2, after=3),
    Fault(*PUT, delay=0.5, times=2),
    Fault("GET|HEAD", "/resolve/", status=503, times=1),
    Fault("GET|HEAD", "/resolve/", drop="before", times=1),
    Fault(*COMMIT, status=429, headers={"Retry-After": "1"}, times=1),
    Fault(*COMMIT, status=503, times=1),
    Fault(*COMMIT, status=500, done=True, times=1),
    Fault(*COMMIT, drop="before", times=1),
    Fault(*COMMIT, drop="after", times=1),
    Fault(*COMMIT, delay=2.0, times=1),
    Fault(*INDEX, drop="after", times=1),
]


@pytest.mark.parametrize(
    "fault", PASSING, ids=lambda f: f"{_name((f.method, f.path))}-{_name(f)}-{f.delay}"
)
def test_a_fault_that_passes(
    hub: LoopbackHub, old_and_new: tuple[dict[str, bytes], Path], fault: Fault
) -> None:
    _, root = old_and_new
    n_commits = len(hub.commits(REPO, BRANCH))
    hub.fail(fault)
    assert main(["push", str(root), *TARGET]) == 0
    assert fault._met > 0
    assert holds(hub, whole(root))
    assert len(hub.commits(REPO, BRANCH)) == n_commits + 1
    assert not stored_twice(hub)


def test_retry_after_is_waited_for(
    hub: LoopbackHub,
    old_and_new: tuple[dict[str, bytes], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("qk_sniffer.hub.requests.time", SimpleNamespace(sleep=waits.append))
    hub.fail(Fault(*COMMIT, status=429, headers={"Retry-After": "42"}, times=1))
    hub.fail(Fault(*INDEX, status=503, times=1))
    assert main(["push", str(old_and_new[1]), *TARGET]) == 0
    assert waits == [43.0, 0.01]


def test_a_run_that_cannot_be_pushed_keeps_its_rows(
    hub: LoopbackHub, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = {"hf_repo_id": REPO, "hf_branch": BRANCH}
    hub.fail(Fault(*COMMIT, status=503))
    assert predict(sniffer={"output": output}) == 2
    assert f"publish {tmp_path / 'root'} with `qk-sniffer push {tmp_path / 'root'}`" in error_line(
        capsys
    )
    assert main(["verify", str(tmp_path / "root")]) == 0
    hub.heal()
    hub.forget()
    assert main(["push", str(tmp_path / "root")]) == 0
    assert holds(hub, whole(tmp_path / "root"))
    assert not [request for request in hub.requests if request.method == "PUT"]


def test_the_hubs_own_limit_is_waited_for(
    hub: LoopbackHub, old_and_new: tuple[dict[str, bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("qk_sniffer.hub.requests.time", SimpleNamespace(sleep=waits.append))
    limit = {"RateLimit": '"api";r=0;t=200', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.fail(Fault(*COMMIT, status=429, headers=limit, times=1))
    assert main(["push", str(old_and_new[1]), *TARGET]) == 0
    assert waits == [201.0]


def test_a_lost_uploader_is_told() -> None:
    """What the client's own uploader raises has no answer of the Hub in it."""
    with (
        pytest.raises(UserError, match=r"no connection to the Hub \(gone away\); see .* then push"),
        explained("sniffer.output.hf_repo_id: a/b", "push"),
    ):
        raise ConnectionError("gone away")


def test_ctrl_c_ends_a_pull_that_waits(
    hub: LoopbackHub,
    old_and_new: tuple[dict[str, bytes], Path],
    processes: Processes,
    write_run: WriteRun,
    tmp_path: Path,
) -> None:
    run = write_run(sniffer={"output": {"hf_repo_id": REPO, "hf_branch": BRANCH}})
    hub.fail(Fault("GET", "/cdn/", status=429, headers={"Retry-After": "200"}))
    process = processes.start(run, environment=environment_of(hub, HUB_TOKEN, tmp_path / "its-cache"))
    deadline = time.monotonic() + 30
    while "Waiting 201.0s before retry" not in process.printed and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.process.pid, SIGINT)
    assert process.wait(20).exitcode not in (0, None)


@pytest.mark.parametrize("status", [401, 404, 500, 503])
def test_a_run_that_cannot_pull_captures_nothing(
    hub: LoopbackHub,
    old_and_new: tuple[dict[str, bytes], Path],
    predict: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: int,
) -> None:
    """One that took the branch for empty would replace it."""
    old, _ = old_and_new
    message = "Invalid credentials in Authorization header" if status == 401 else ""
    hub.fail(Fault("GET|HEAD", "manifest.json|data.parquet|/cdn/", status=status, message=message))
    output = {"hf_repo_id": REPO, "hf_branch": BRANCH}
    capsys.readouterr()
    assert predict(sniffer={"output": output}) == 2
    assert error_line(capsys).startswith(f"sniffer.output.hf_branch: {REPO}, branch {BRANCH}: ")
    assert hub.files(REPO, BRANCH) == old
    hub.heal()
    assert predict(sniffer={"output": output}) == 0
    assert main(["verify", str(tmp_path / "root")]) == 0


def test_a_broken_download_is_repeated_and_a_changed_file_found(
    hub: LoopbackHub,
    old_and_new: tuple[dict[str, bytes], Path],
    predict: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = {"hf_repo_id": REPO, "hf_branch": BRANCH}
    hub.fail(Fault("GET", "/cdn/", drop="halfway", times=1))
    hub.fail(Fault("GET", "/cdn/", status=503, times=1, after=5))
    assert predict(sniffer={"output": output}) == 0
    assert main(["verify", str(tmp_path / "root")]) == 0
    head = pq.read_table(old_and_new[1] / "l00h00q" / "data.parquet").slice(1)
    pq.write_table(head, tmp_path / "changed.parquet")
    changed = {"l00h00q/data.parquet": (tmp_path / "changed.parquet").read_bytes()}
    hub.commit(REPO, BRANCH, changed)
    capsys.readouterr()
    assert predict("second", sniffer={"output": output}) == 2
    line = error_line(capsys)
    assert f"branch {BRANCH}: l00h00q/data.parquet is not what its manifest describes" in line


@pytest.mark.parametrize(
    ("stage", "passage"),
    [(PUT, 3), (PREUPLOAD, 1), (COMMIT, 1), (INDEX, 1), (MANIFEST, 1), (("GET", "/cdn/"), 9)],
    ids=lambda value: _name(value) if isinstance(value, tuple) else str(value),
)
def test_a_process_that_is_killed(
    hub: LoopbackHub,
    old_and_new: tuple[dict[str, bytes], Path],
    processes: Processes,
    write_run: WriteRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: tuple[str, str],
    passage: int,
) -> None:
    """Killed when one of its requests arrives, as it pulls or pushes; the same command goes on."""
    old, new = old_and_new
    run = write_run(sniffer={"output": {"hf_repo_id": REPO, "hf_branch": BRANCH}})
    passed: list[str] = []

    def before(method: str, path: str) -> None:
        if re.fullmatch(stage[0], method) and re.search(stage[1], path):
            passed.append(path)
            if len(passed) == passage:
                process.kill()

    with monkeypatch.context() as patch:
        patch.setattr(hub, "before", before)
        environment = environment_of(hub, HUB_TOKEN, tmp_path / "killed-cache")
        process = processes.start(run, environment=environment)
        assert process.wait(60).exitcode == -9, process.printed
    assert hub.files(REPO, BRANCH) == old or holds(hub, whole(tmp_path / "root"))
    assert main(run) == 0
    assert whole(tmp_path / "root") == whole(new)
    assert holds(hub, whole(new))
    assert not stored_twice(hub)
    assert main(["verify", str(tmp_path / "root")]) == 0


def test_sigterm_ends_a_push(
    hub: LoopbackHub, processes: Processes, write_run: WriteRun, tmp_path: Path
) -> None:
    run = write_run(sniffer={"output": {"hf_repo_id": REPO, "hf_branch": BRANCH}})
    root = tmp_path / "root"
    hub.fail(Fault(*PUT, delay=2.0))
    signals = [SIGTERM]

    def before(method: str, _: str) -> None:
        if method == "PUT" and signals:
            os.kill(process.process.pid, signals.pop())

    hub.before = before
    process = processes.start(run, environment=environment_of(hub, HUB_TOKEN, tmp_path / "its-cache"))
    ended = process.wait(30)
    assert ended.exitcode == 128 + SIGTERM, ended.printed
    assert "is not published, nothing in it is lost" in ended.printed
    assert f"publish it with: `qk-sniffer push {root}`" in ended.printed
    hub.heal()
    assert main(["push", str(root)]) == 0
    assert holds(hub, whole(root))
