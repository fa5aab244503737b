"""Ctrl-C and SIGTERM in every phase of a command: one clear end, 130 or 143, and nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import HUB_TOKEN, LENGTHS, REPO, write_jsonl
from killing import BEFORE, Death, Ended, Processes, Started, until
from loopback import LoopbackHub, environment_of
from qk_sniffer.cli import main
from qk_sniffer.storage.commits import COMMITS_FILE, read_commits

ModelDir = Callable[[str], Path]
WriteRun = Callable[..., list[str]]
COMMAND = str(Path(sys.executable).with_name("qk-sniffer"))
END = {signal.SIGINT: "qk-sniffer: interrupted", signal.SIGTERM: "qk-sniffer: stopped by SIGTERM"}
each_signal = pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])


def stopped_at(started: Started, sent: signal.Signals, reached: Callable[[], bool]) -> Ended:
    """Send a signal to a process once it is in a phase, and let it end."""
    until(reached, started.is_alive, lambda: started.printed)
    os.kill(started.process.pid, sent)
    return assert_stopped(started.wait(60), sent)


def assert_stopped(ended: Ended, sent: signal.Signals) -> Ended:
    assert ended.exitcode == 128 + sent, ended.printed
    # Threads that are cut off may still tell of it.
    assert END[sent] in ended.printed.splitlines()
    assert ended.printed.count("qk-sniffer: ") == 1
    assert "Traceback" not in ended.printed
    return ended


@each_signal
@pytest.mark.parametrize("command", ["predict", "verify"])
def test_while_python_imports(
    sent: signal.Signals, command: str, write_run: WriteRun, tmp_path: Path
) -> None:
    """The interpreter tells each module that it has imported; the signal comes with one of torch's."""
    arguments = write_run() if command == "predict" else [command, str(tmp_path)]
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    told = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    with subprocess.Popen(
        [COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=told, preexec_fn=heeded
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " torch." in line:
                process.send_signal(sent)
                break
        printed = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 128 + sent
    assert [line.rstrip() for line in printed] == [END[sent]]
    assert not (tmp_path / "root").exists()


HELD = """
import pathlib, time, weakref
from transformers import LlamaForCausalLM

class Part:
    pass

class Removed:
    def __del__(self):
        hold()

def hold(_=None):
    pathlib.Path({marker!r}).touch()
    time.sleep(100)

class Held(LlamaForCausalLM):
    def __init__(self, config):
        {way}
        time.sleep(100)
"""
WAYS = {
    "at once": "hold()",
    "in a __del__": "Removed()",
    "in a callback": "part = Part(); reference = weakref.ref(part, hold); del part",
}
"""What a model is at as the signal comes: Python drops what is raised in the last two."""


@each_signal
@pytest.mark.parametrize("way", WAYS)
def test_while_the_model_is_loaded(
    sent: signal.Signals,
    way: str,
    model_dir: ModelDir,
    processes: Processes,
    write_run: WriteRun,
    tmp_path: Path,
) -> None:
    """A model with code of its own, which takes its time."""
    model, marker = tmp_path / f"held_{sent.name}_{[*WAYS].index(way)}", tmp_path / "loading"
    model.mkdir()
    for file in model_dir("llama").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "held.Held"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "held.py").write_text(HELD.format(marker=str(marker), way=WAYS[way]))
    run = write_run(model={"name": str(model), "trust_remote_code": True})
    ended = stopped_at(processes.start(run), sent, marker.exists)
    assert "is safe" not in ended.printed


@each_signal
@pytest.mark.parametrize("num_proc", [None, 2])
def test_while_texts_are_tokenized(
    sent: signal.Signals,
    num_proc: int | None,
    processes: Processes,
    write_run: WriteRun,
    tmp_path: Path,
) -> None:
    rows = [{"id": i, "text": "word " * 400} for i in range(20_000)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    run = write_run(data={"path": str(path), "num_proc": num_proc})
    cache = processes.directory / f"cache-{sent.name}-{num_proc}"
    started = processes.start(run, cache=cache.name)
    stopped_at(started, sent, lambda: any(size_of(file) for file in cache.rglob("tmp*")))
    if num_proc is None:
        # datasets has removed what it had begun.
        assert not list(cache.rglob("tmp*"))


def size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


@each_signal
def test_while_texts_are_read_and_while_files_are_written(
    sent: signal.Signals, processes: Processes, write_run: WriteRun, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    rows = [{"id": i, "text": "y" * LENGTHS[0]} for i in range(20_000)]
    data = {"path": str(write_jsonl(tmp_path / "many.jsonl", rows)), "streaming": True}
    commits = root / ".journal" / "rank-00000" / "commits.jsonl"
    started = processes.start(write_run(data=data))
    ended = stopped_at(started, sent, lambda: commits.exists() and commits.read_text().count("\n") > 5)
    assert f"or write it as Parquet with: qk-sniffer finalize {root}" in ended.printed
    captured = commits.read_text().count("\n") * 3

    # With no more to read the same command writes files, and stands still at one of them. What it has
    # begun it may end before it heeds the signal, so that each command has a journal of its own.
    run = write_run(data=data | {"max_samples": 3})
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    writing = Death("row group", BEFORE, 3, signal.SIGSTOP)
    for command, written, is_safe in ((run, root, True), (["finalize", str(copy)], copy, False)):
        started = processes.start(command, death=writing)
        started.wait_until_stopped()
        os.kill(started.process.pid, sent)
        started.go_on()
        ended = assert_stopped(started.wait(60), sent)
        assert (f"qk-sniffer finalize {written}" in ended.printed) is is_safe
        assert not (written / "manifest.json").exists()

    assert main(run) == 0
    assert pq.read_table(root / "l03h03q" / "data.parquet").num_rows == captured * LENGTHS[0]
    assert main(["verify", str(root)]) == 0


@each_signal
def test_while_files_are_pushed(
    sent: signal.Signals, hub: LoopbackHub, processes: Processes, write_run: WriteRun, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    arrived: list[str] = []
    hub.before = lambda method, path: hold(arrived, method)
    run = write_run(sniffer={"output": {"hf_repo_id": REPO, "hf_branch": "held"}})
    environment = environment_of(hub, HUB_TOKEN, tmp_path / "its-cache")
    for command in (run, ["push", str(root)]):
        arrived.clear()
        started = processes.start(command, environment=environment)
        ended = stopped_at(started, sent, lambda: bool(arrived))
        assert "is not published, nothing in it is lost" in ended.printed
        assert f"publish it with: `qk-sniffer push {root}`" in ended.printed
    hub.before = lambda method, path: None
    assert main(["push", str(root)]) == 0


def hold(arrived: list[str], method: str) -> None:
    """Let an upload wait for some time."""
    if method == "PUT":
        arrived.append(method)
        time.sleep(2)


@each_signal
def test_while_a_report_is_drawn(
    sent: signal.Signals, processes: Processes, write_run: WriteRun, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    assert main(write_run()) == 0
    stopped_at(processes.start(["report", str(root)]), sent, (root / "report").exists)
    assert main(["verify", str(root)]) == 0


@each_signal
def test_two_ranks(
    sent: signal.Signals, model_dir: ModelDir, write_run: WriteRun, tmp_path: Path
) -> None:
    """Ctrl-C reaches all processes of a terminal, SIGTERM the one that it is sent to."""
    root = tmp_path / "root"
    rows = [{"id": i, "text": "y" * LENGTHS[0]} for i in range(20_000)]
    run = write_run(
        data={"path": str(write_jsonl(tmp_path / "many.jsonl", rows))}
        | {"streaming": True, "num_workers": 1},
        trainer={"devices": 2, "strategy": "ddp"},
    )
    parts = [root / ".journal" / f"rank-{rank:05d}" for rank in range(2)]
    logs = [part / COMMITS_FILE for part in parts]
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    output = tmp_path / "output"
    with (
        output.open("w") as file,
        subprocess.Popen(
            [COMMAND, *run], stdout=file, stderr=file, preexec_fn=heeded, start_new_session=True
        ) as process,
    ):
        try:
            until(
                lambda: all(log.exists() and log.read_text().count("\n") > 1 for log in logs),
                lambda: process.poll() is None,
                output.read_text,
            )
            (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
            process.wait(60)
            until(lambda: not is_running(process.pid), lambda: True, output.read_text)
        finally:
            if is_running(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    printed = output.read_text()
    assert process.returncode == 128 + sent, printed
    assert printed.count(END[sent]) == 1
    assert "Traceback" not in printed
    assert f"qk-sniffer finalize {root}" in printed
    commits = [commit for part in parts for commit in read_commits(part).commits]
    captured = sum(commit.example_ids.size for commit in commits)
    assert main(["finalize", str(root)]) == 0
    assert pq.read_table(root / "examples" / "data.parquet").num_rows == captured


def is_running(group: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
