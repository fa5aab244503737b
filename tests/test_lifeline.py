"""The connections over which the processes of a run notice that one of them has died."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest

PROGRAM = """
import os, sys, time
from qk_sniffer.processes import lifeline
lifeline.STOP_SECONDS, lifeline.SILENCE_SECONDS = 1.0, 1.5
rank, size, port, ends = int(sys.argv[1]), 3, int(sys.argv[2]), sys.argv[3]
line = lifeline.Lifeline(rank, [f"host-{i}" for i in range(size)], b"key")
if rank == 0:
    print(line.port, flush=True)
line.connect("127.0.0.1", port)
line.progress = (rank + 1, 10)
if ends == "forks" and os.fork() == 0:
    os.close(1), os.close(2)
    time.sleep(15)
    os._exit(0)
print("connected", flush=True)
if ends in ("stuck", "forks"):
    time.sleep(60)
if ends == "adds up":
    while line.total_progress() != [6, 30]:
        time.sleep(0.01)
time.sleep(1.2)
line.close("out of luck" if ends == "stops" else None)
print("parted", "failed" if line.failure else "well", flush=True)
time.sleep(1.5)
"""


class Three:
    """Three processes, each with its end of the lines."""

    def __init__(self, *ends: str) -> None:
        self.processes: list[subprocess.Popen] = []
        port = 0
        for rank, end in enumerate(ends):
            command = [sys.executable, "-c", PROGRAM, str(rank), str(port), end]
            process = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)
            self.processes.append(process)
            if rank == 0:
                port = int(process.stdout.readline())
        for process in self.processes:
            assert process.stdout.readline() == "connected\n"

    def end(self) -> list[tuple[int, str, str]]:
        """Exit status, output and errors of each."""
        printed = [process.communicate(timeout=30) for process in self.processes]
        return [(p.returncode, *texts) for p, texts in zip(self.processes, printed, strict=True)]


def test_who_parts_at_the_end_disturbs_nobody() -> None:
    for status, out, errors in Three("adds up", "ends", "ends").end():
        assert (status, out, errors) == (0, "parted well\n", "")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_death_ends_processes_that_are_stuck(killed: int, sent: signal.Signals) -> None:
    three = Three("stuck", "stuck", "stuck")
    started = time.monotonic()
    os.kill(three.processes[killed].pid, sent)
    survivors = [rank for rank in range(3) if rank != killed]
    for rank in survivors:
        assert three.processes[rank].wait(20) == 1
    assert time.monotonic() - started < 10
    three.processes[killed].kill()
    errors = [errors for _, _, errors in three.end()]
    said = "died" if sent == signal.SIGKILL else "was silent for 2 seconds"
    assert f"qk-sniffer: error: rank {killed} (host-{killed}): {said}; the other" in "".join(errors)
    assert [bool(errors[rank]) for rank in survivors] == [True, False]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_death_shows_though_a_forked_process_lives_on(killed: int) -> None:
    ends = ["stuck", "stuck", "stuck"]
    ends[killed] = "forks"
    three = Three(*ends)
    three.processes[killed].kill()
    errors = "".join(errors for _, _, errors in three.end())
    assert f"qk-sniffer: error: rank {killed} (host-{killed}): died; the other" in errors


@pytest.mark.parametrize("stops", [0, 1])
def test_a_process_that_stops_says_why(stops: int) -> None:
    ends = ["stuck", "stuck", "stuck"]
    ends[stops] = "stops"
    ended = Three(*ends).end()
    assert [status for status, _, _ in ended] == [0 if rank == stops else 1 for rank in range(3)]
    speaker = 1 - stops
    assert f"rank {stops} (host-{stops}): out of luck; the other" in ended[speaker][2]
    assert [bool(errors) for _, _, errors in ended] == [rank == speaker for rank in range(3)]


def test_an_address_that_is_not_reached_is_named() -> None:
    from qk_sniffer.errors import UserError
    from qk_sniffer.processes.lifeline import Lifeline

    with pytest.raises(UserError, match=r"rank 1 \(b\) can't reach rank 0 at 127\.0\.0\.1, port 1 "):
        Lifeline(1, ["a", "b"], b"key").connect("127.0.0.1", 1)


GATHER = """
import signal, sys, time
import torch.distributed as dist
from qk_sniffer.processes import Ranks
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
ranks = Ranks(rank, 2, 2, dist.new_group(backend="gloo"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
ranks.gather(rank)
print("met", flush=True)
if rank == 1:
    time.sleep(60)
ranks.gather(rank)
"""


def test_who_waits_for_others_hears_signals(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GATHER]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=PIPE, text=True)
        for rank in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["met\n", "met\n"]
        time.sleep(0.3)
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(10) == 7
    finally:
        for process in processes:
            process.kill()
            process.communicate()
