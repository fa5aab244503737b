"""A data root belongs to one run: whoever comes second ends at once, and has touched nothing."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import HUB_TOKEN, REPO, WriteRun
from killing import AFTER, BEFORE, Death, Processes
from loopback import LoopbackHub, environment_of
from qk_sniffer.cli import main
from qk_sniffer.errors import UserError
from qk_sniffer.reading import Captures
from qk_sniffer.storage import Ownership, owner_of, ownership
from readers import error_line
from test_ranks import Alone, NewRun, alone, new_run  # noqa: F401

PHASES = {
    "reading texts": Death("tokenizing", BEFORE, 1, signal.SIGSTOP),
    "loading": Death("loading", BEFORE, 1, signal.SIGSTOP),
    "reading": Death("forward", BEFORE, 3, signal.SIGSTOP),
    "writing": Death("row group", BEFORE, 3, signal.SIGSTOP),
    "the last file": Death("manifest", AFTER, 1, signal.SIGSTOP),
}


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """All files below a directory, with their bytes and times."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def assert_refused(
    command: list[str], process: int, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(root)
    capsys.readouterr()
    assert main(command) == 2
    line = error_line(capsys)
    assert (
        f"{root} belongs to a run at work on {socket.gethostname()}, process {process}, since 20"
        in line
    )
    assert contents(root) == before


@pytest.mark.parametrize("phase", PHASES)
def test_a_second_run_is_refused_in_every_phase_of_the_first(
    phase: str,
    processes: Processes,
    write_run: WriteRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, command = tmp_path / "root", write_run()
    first = processes.start(command, death=PHASES[phase])
    first.wait_until_stopped()
    pid = first.process.pid
    for second in (
        command,
        [*command, "--sniffer.output.overwrite", "true"],
        ["finalize", str(root)],
        ["push", str(root), "--hf_repo_id", REPO],
        ["report", str(root)],
    ):
        assert_refused(second, pid, root, capsys)
    if phase != "the last file":
        assert_refused(["verify", str(root)], pid, root, capsys)
    first.go_on()
    ended = first.wait(60)
    assert ended.exitcode == 0, ended.printed
    assert main(["verify", str(root)]) == 0
    assert not list(root.glob(".owner*"))
    assert main(command) == 0


def test_readers_of_a_run_that_goes_on_say_what_they_see(
    processes: Processes,
    write_run: WriteRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, command = tmp_path / "root", write_run(data={"max_samples": 3})
    assert main(command) == 0
    second = processes.start([*command, "--data.max_samples", "7"], death=PHASES["reading"])
    second.wait_until_stopped()
    before, pid = contents(root), second.process.pid
    assert main(["verify", str(root)]) == 0
    assert f"process {pid}" in caplog.text
    caplog.clear()
    captures = Captures(root)
    assert f"process {pid}" in caplog.text
    assert len(captures.head(layer=0, head=0).numpy()["example_id"]) > 0
    assert contents(root) == before
    second.go_on()
    assert second.wait(60).exitcode == 0


def test_a_second_run_is_refused_while_the_first_is_pushing(
    processes: Processes,
    write_run: WriteRun,
    hub: LoopbackHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    command = write_run(sniffer={"output": {"hf_repo_id": REPO}})
    first = processes.start(
        command,
        death=Death("pushing", BEFORE, 1, signal.SIGSTOP),
        environment=environment_of(hub, HUB_TOKEN, tmp_path / "cache"),
    )
    first.wait_until_stopped()
    for second in (command, ["push", str(root)], [*command, "--sniffer.output.overwrite", "true"]):
        assert_refused(second, first.process.pid, root, capsys)
    first.go_on()
    ended = first.wait(60)
    assert ended.exitcode == 0, ended.printed
    assert main(["push", str(root)]) == 0


def test_the_processes_of_a_run_are_one_owner(
    new_run: NewRun,  # noqa: F811
    alone: Alone,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = new_run()
    stop = Death("forward", BEFORE, 5, signal.SIGSTOP)
    first, second = run.start(2, deaths={0: stop, 1: stop})
    for process in (first, second):
        process.wait_until_stopped()
    assert_refused(
        ["predict", "--config", str(run.write_config(1))], first.process.pid, run.root, capsys
    )
    for process in (first, second):
        process.go_on()
    for process in (first, second):
        ended = process.wait(60)
        assert ended.exitcode == 0, ended.printed
    names = sorted(path.parent.name for path in run.root.glob("*/data.parquet"))
    assert names == sorted(path.parent.name for path in alone().glob("*/data.parquet"))


def test_a_run_whose_first_process_was_killed_lasts_until_the_others_end(
    new_run: NewRun,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = new_run()
    first, second = run.start(2, deaths={1: Death("forward", BEFORE, 5, signal.SIGSTOP)})
    second.wait_until_stopped()
    first.kill()
    first.join(10)
    command = ["predict", "--config", str(run.write_config(1))]
    assert_refused(command, first.process.pid, run.root, capsys)
    second.kill()
    second.join(10)
    assert main(command) == 0


def test_a_run_that_was_killed_leaves_the_data_root_free(
    processes: Processes, write_run: WriteRun, tmp_path: Path
) -> None:
    command = write_run(data={"num_workers": 2})
    assert processes.run(command, sync_seconds=0.0, death=Death("forward", AFTER, 9)).exitcode == -9
    assert (tmp_path / "root" / ".owner.json").exists()
    assert owner_of(tmp_path / "root") is None
    assert main(command) == 0
    assert not list((tmp_path / "root").glob(".owner*"))


def test_a_run_that_is_refused_leaves_no_directory(
    predict: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "and" / "deep"
    assert predict(sniffer={"output": {"data_root": str(root)}}, model={"name": "no/such-model"}) == 2
    assert not (tmp_path / "new").exists()


HERE = socket.gethostname()
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_owner(root: Path, host: str, age: float, n_nodes: int = 1, boot: str = BOOT) -> Path:
    root.mkdir(exist_ok=True)
    path = root / ".owner.json"
    owner = {
        "host": host,
        "process": 4242,
        "since": "2026-01-02 03:04:05",
        "n_nodes": n_nodes,
        "boot": boot,
    }
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize(
    ("host", "n_nodes", "boot"),
    [("elsewhere", 1, BOOT), (HERE, 2, BOOT), (HERE, 1, "of another host of this name")],
)
def test_an_owner_on_another_host_is_dead_after_a_minute_without_a_sign(
    host: str,
    n_nodes: int,
    boot: str,
    predict: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    write_owner(root, host, 5, n_nodes, boot)
    assert predict() == 2
    line = error_line(capsys)
    assert f"a run at work on {host}, process 4242, since 2026-01-02 03:04:05" in line
    assert "wait for its end, or 60 seconds if it is dead" in line
    assert owner_of(root) is not None
    write_owner(root, host, 70, n_nodes, boot)
    assert owner_of(root) is None
    assert predict() == 0


def test_an_owner_on_another_host_that_misses_its_signs_is_waited_for(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_owner(root, "elsewhere", age=59)
    started, mine = time.monotonic(), Ownership(root)
    mine.take()
    assert time.monotonic() - started > 0.5
    mine.release()
    path = write_owner(root, "elsewhere", age=30)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(mine.take)
        time.sleep(1)
        assert not second.done()
        os.utime(path)
        with pytest.raises(UserError, match="belongs to a run at work on elsewhere"):
            second.result(20)


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A file system with locks, and one without."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return bool(request.param == "locks")


@pytest.mark.parametrize("state", ["new", "left by a dead run", "left empty"])
def test_of_many_who_come_at_once_one_owns(locks: bool, state: str, tmp_path: Path) -> None:
    def take(root: Path) -> Ownership | None:
        mine = Ownership(root)
        barrier.wait()
        try:
            mine.take()
        except UserError:
            return None
        return mine

    for number in range(8):
        root, barrier = tmp_path / str(number), threading.Barrier(6)
        if state != "new":
            path = write_owner(root, socket.gethostname() if locks else "elsewhere", age=70)
            if state == "left empty":
                path.write_text("")
                os.utime(path, (time.time() - 70,) * 2)
        with ThreadPoolExecutor(6) as pool:
            owners = [mine for mine in pool.map(take, [root] * 6) if mine is not None]
        assert len(owners) == 1
        owners[0].require()
        owners[0].release()
        assert not list(root.glob(".owner*"))


def test_an_owner_without_locks_is_seen_by_its_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.02)
    root, first = tmp_path / "root", Ownership(tmp_path / "root")
    first.take()
    path = root / ".owner.json"
    os.utime(path, (0, 0))
    while path.stat().st_mtime == 0:
        time.sleep(0.01)
    with pytest.raises(UserError, match="or 60 seconds if it is dead"):
        Ownership(root).take()
    first.release()


def test_an_owner_that_stood_still_for_too_long_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.02)
    first = Ownership(tmp_path / "root")
    first.take()
    write_owner(tmp_path / "root", "elsewhere", age=0)
    deadline = time.monotonic() + 10
    with pytest.raises(UserError, match="was taken over by another run"):
        while time.monotonic() < deadline:
            first.require()
            time.sleep(0.01)
    first.release()
    assert (tmp_path / "root" / ".owner.json").exists()
