"""Runs of processes that share a model, which are killed, stopped or fail, and are begun again.

Whatever ends them, the same command goes on with any number of processes, and the files are those of a
run that nobody disturbed.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import write_jsonl
from killing import AFTER, BEFORE, HALFWAY, POINTS, Death, Ended, Processes, Started, until
from qk_sniffer.cli import main
from qk_sniffer.storage import earlier_run
from qk_sniffer.storage.commits import read_commits
from qk_sniffer.storage.moment_states import counted_ids
from readers import assert_same_moments, assert_same_rows
from test_crashes import BATCH_SIZE, N_TEXTS, TEXTS
from test_ranks import Run

N_BATCHES = N_TEXTS // BATCH_SIZE
MOST_SECONDS = 50.0
"""How long the others may live on after one has died."""

SAMPLED = {
    "sampler": {"type": "uniform", "base_rate": 2.0},
    "min_bucket_size": 8,
    "capture_values": True,
    "capture_outputs": True,
    "capture_softmax": True,
}
MOMENTS = dict.fromkeys(("enabled", "by_bucket", "pre_rope", "cross"), True)
VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {"capture": SAMPLED},
    "rows and moments": {"capture": SAMPLED, "moments": MOMENTS},
    "moments": {
        "capture": SAMPLED | {"sampler": {"type": "none"}, "capture_softmax": False},
        "moments": MOMENTS,
    },
}
"""Of the section sniffer. Moments alone are of a model in float64, which are the same however many
processes compute it."""

ROWS, BOTH, ALONE = VARIANTS


@dataclass(frozen=True)
class Layout:
    """Processes of a run, and how many of them share a model."""

    size: int
    count: int

    def __str__(self) -> str:
        return f"{self.size} of {self.count}"

    def group(self, rank: int) -> list[int]:
        """The processes that share a model with one, itself too."""
        first = rank - rank % self.count
        return list(range(first, first + self.count))


ONE, PAIR, TWO_PAIRS = Layout(1, 1), Layout(2, 2), Layout(4, 2)
LAYOUTS = [ONE, PAIR, TWO_PAIRS]

Deaths = Mapping[int, Death]


class SharedRun(Run):
    """A prediction that begins and goes on with processes of any layout."""

    def lay_out(self, layout: Layout) -> "SharedRun":
        self.config["model"]["tensor_parallel"] = layout.count
        return self

    def begin(self, layout: Layout, deaths: Deaths = {}, **trainer: Any) -> list[Started]:  # noqa: B006
        return self.lay_out(layout).start(layout.size, deaths=deaths, **trainer)

    def end(self, layout: Layout, **trainer: Any) -> list[Ended]:
        return self.lay_out(layout).run(layout.size, **trainer)


NewRun = Callable[..., SharedRun]


@pytest.fixture(scope="module")
def new_run(
    processes: Processes,
    model_dir: Callable[[str], Path],
    in_float64: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> NewRun:
    """A run of the tiny Llama over the texts of a variant."""
    texts = write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)

    def new(variant: str = ROWS, **data: Any) -> SharedRun:
        directory = tmp_path_factory.mktemp("run")
        model = in_float64 if variant == ALONE else model_dir("llama")
        config = {
            "model": {"name": str(model)},
            "data": {"path": str(texts), "id_column": "id", "batch_size": BATCH_SIZE} | data,
            "sniffer": {"check": False, "output": {"data_root": str(directory / "root")}}
            | VARIANTS[variant],
        }
        return SharedRun(processes, directory, config)

    return new


@dataclass(frozen=True)
class Undisturbed:
    """A data root that nothing disturbed, and how its processes ended."""

    root: Path
    ended: list[Ended]


UndisturbedOf = Callable[..., Undisturbed]


@pytest.fixture(scope="module")
def undisturbed(new_run: NewRun) -> UndisturbedOf:
    made: dict[tuple[str, Layout], Undisturbed] = {}

    def of(variant: str, layout: Layout = ONE) -> Undisturbed:
        if (variant, layout) not in made:
            run = new_run(variant)
            ended = run.end(layout)
            assert [end.exitcode for end in ended] == [0] * layout.size, ended
            made[variant, layout] = Undisturbed(run.root, ended)
        return made[variant, layout]

    return of


def captured(root: Path) -> set[int]:
    """The texts of finished files, and those that the logs of all processes of a group name."""
    texts: set[int] = set()
    if (root / "manifest.json").exists():
        texts |= set(pq.read_table(root / "examples" / "data.parquet")["example_id"].to_pylist())
    groups: dict[tuple[int, int], list[set[int]]] = {}
    for part in (root / ".journal").glob("rank-*"):
        rank, _, count = part.name.removeprefix("rank-").partition("-tp")
        size = int(count or 1)
        ids = {i for commit in read_commits(part).commits for i in commit.example_ids.tolist()}
        groups.setdefault((size, int(rank) // size), []).append(ids)
    for (size, _), parts in groups.items():
        if len(parts) == size:
            texts |= set.intersection(*parts)
    return texts


def assert_goes_on(run: SharedRun, layout: Layout, expected: Path) -> None:
    """The same command reads what is missing and nothing else, and the files are as expected."""
    left = N_TEXTS - len(captured(run.root))
    ended = run.end(layout)
    assert [end.exitcode for end in ended] == [0] * layout.size, ended
    if "moments" not in run.config["sniffer"]:
        read = [end.passages["flush"] for end in ended]
        assert sum(read[:: layout.count]) == -(-left // BATCH_SIZE)
        assert all(read[rank] == read[layout.group(rank)[0]] for rank in range(layout.size))
    assert_same(run.root, expected)


def assert_same(root: Path, expected: Path) -> None:
    assert_same_rows(root, expected)
    assert_same_moments(root, expected)
    assert not (root / ".journal").exists()
    assert main(["verify", str(root)]) == 0


def let_others_end(started: Sequence[Started], dead: Sequence[int]) -> list[Ended]:
    """Wait until some processes are dead, and then that the others end in order before long."""
    for rank in dead:
        started[rank].join(100)
        assert not started[rank].is_alive(), started[rank].printed
    ended = [process.wait(MOST_SECONDS) for process in started]
    printed = "".join(end.printed for end in ended)
    assert "Traceback" not in printed, printed
    for rank, end in enumerate(ended):
        assert end.exitcode not in (0, None), printed
        assert rank in dead or end.exitcode > 0, printed
    return ended


def die(run: SharedRun, layout: Layout, deaths: Deaths) -> list[Ended]:
    """Let some processes kill themselves; the others end with one line about the first of them."""
    ended = let_others_end(run.begin(layout, deaths), list(deaths))
    printed = "".join(end.printed for end in ended)
    assert all(ended[rank].exitcode == -signal.SIGKILL for rank in deaths), printed
    if len(deaths) < layout.size:
        assert printed.count("): died; the other processes stop after their batch") == 1, printed
    assert printed.count("qk-sniffer: error") <= 1, printed
    return ended


READING = Death("forward", BEFORE, 22)
"""In the second layer of the sixth batch: the others of the group wait for the output of the layer."""

READING_SLOWLY = Death("forward", AFTER, 30, signal.SIGSTOP)
COMMITTING, COMMITTED = Death("commit", BEFORE, 6), Death("commit", AFTER, 6)
HALF_READING = Death("forward", AFTER, 11)


@pytest.mark.parametrize(
    ("begun", "deaths", "goes_on"),
    [
        (PAIR, {0: READING}, ONE),
        (PAIR, {1: READING}, PAIR),
        (PAIR, {0: COMMITTING}, TWO_PAIRS),
        (PAIR, {1: COMMITTED}, PAIR),
        (PAIR, {0: Death("row group", BEFORE, 9)}, PAIR),
        (PAIR, {1: Death("rename", AFTER, 9)}, ONE),
        (TWO_PAIRS, {1: HALF_READING}, PAIR),
        (TWO_PAIRS, {2: Death("commit", HALFWAY, 3)}, ONE),
        (TWO_PAIRS, {0: HALF_READING, 3: HALF_READING}, TWO_PAIRS),
        (TWO_PAIRS, {1: Death("row group", AFTER, 4), 2: Death("rename", BEFORE, 4)}, PAIR),
    ],
    ids=str,
)
def test_a_run_whose_processes_are_killed_goes_on(
    new_run: NewRun, undisturbed: UndisturbedOf, begun: Layout, deaths: Deaths, goes_on: Layout
) -> None:
    run = new_run()
    die(run, begun, deaths)
    assert not (run.root / "manifest.json").exists()
    done = len(captured(run.root)) // BATCH_SIZE
    if begun == PAIR:
        (death,) = deaths.values()
        assert done == {READING: 5, COMMITTING: 5, COMMITTED: 6}.get(death, N_BATCHES)
    else:
        assert done > 0
    assert_goes_on(run, goes_on, undisturbed(ROWS).root)


@pytest.mark.parametrize("seed", range(9))
def test_a_run_whose_processes_are_killed_at_a_random_point_goes_on(
    new_run: NewRun, undisturbed: UndisturbedOf, seed: int
) -> None:
    """Of rows, of moments, or of both; once or twice."""
    draw = random.Random(seed)
    variant = [*VARIANTS][seed % 3]
    run, layout = new_run(variant), PAIR if draw.random() < 0.7 else TWO_PAIRS
    for _ in range(draw.choice([1, 1, 2])):
        rank = draw.randrange(layout.size)
        passages = undisturbed(variant, layout).ended[rank].passages
        point = draw.choice(sorted(point for point in POINTS if passages[point]))
        moment = draw.choice(POINTS[point][2])
        death = Death(point, moment, draw.randint(1, passages[point]))
        started = run.begin(layout, {rank: death})
        started[rank].join(100)
        # The second time there may be less to do.
        if started[rank].process.exitcode != 0:
            let_others_end(started, [rank])
    goes_on = layout if variant == BOTH else draw.choice(LAYOUTS)
    assert_goes_on(run, goes_on, undisturbed(variant, layout if variant == BOTH else ONE).root)


@pytest.mark.parametrize("moment", [BEFORE, AFTER])
@pytest.mark.parametrize(("variant", "passage", "killed"), [(ALONE, 4, 0), (BOTH, 5, 1)])
def test_a_death_between_the_saves_of_two_processes_costs_one_of_them(
    new_run: NewRun, undisturbed: UndisturbedOf, variant: str, passage: int, killed: int, moment: str
) -> None:
    run = new_run(variant)
    die(run, PAIR, {killed: Death("moments", moment, passage)})
    found = [counted_by(run.root / ".journal" / f"rank-{rank:05d}-tp2") for rank in range(2)]
    # Each keeps the newest that it has and those before, and they have some in common.
    common = max(set(found[0]) & set(found[1]))
    assert common >= passage - 1
    earlier = earlier_run(run.root)
    assert earlier is not None and earlier.counted_ids.size == BATCH_SIZE * common
    expected = undisturbed(variant, PAIR).root
    assert_goes_on(run, PAIR, expected)


def counted_by(part: Path) -> list[int]:
    """How many batches the moments of a process count, file by file."""
    return [counted_ids(path).size // BATCH_SIZE for path in part.glob("moments-*.npz")]


BUG = RuntimeError("something that is not so")
IN_THE_PROBE, IN_THE_CHECK, IN_A_BATCH = 38, 66, 200
"""Projections of the model, of which a forward has 28; the first are of the model without weights."""


@pytest.mark.parametrize(
    ("failing", "passage"), [(0, IN_THE_PROBE), (1, IN_THE_PROBE), (1, IN_THE_CHECK), (0, IN_A_BATCH)]
)
def test_a_bug_in_one_process_ends_all(new_run: NewRun, failing: int, passage: int) -> None:
    run = new_run()
    del run.config["sniffer"]["check"]
    death = Death("projection", BEFORE, passage, error=BUG)
    started = run.begin(PAIR, {failing: death})
    began = time.monotonic()
    ended = [process.wait(MOST_SECONDS) for process in started]
    assert time.monotonic() - began < MOST_SECONDS
    assert [end.exitcode for end in ended] == [1, 1]
    assert f"rank {failing} (" in ended[1 - failing].printed
    assert "): RuntimeError: something that is not so; the other" in ended[1 - failing].printed
    assert "Traceback" not in ended[1 - failing].printed, ended[1 - failing].printed
    assert ended[failing].printed.splitlines()[-1] == "RuntimeError: something that is not so"


MANY = [{"text": TEXTS[i % N_TEXTS]["text"][i % 5 :] + "."} for i in range(400)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A data section of more texts than are read before a signal comes."""
    path = write_jsonl(tmp_path_factory.mktemp("many") / "texts.jsonl", MANY)
    return {"path": str(path), "id_column": None}


@pytest.fixture(scope="module")
def many_alone(new_run: NewRun, many: dict[str, Any]) -> Path:
    """The data root of one process that has read them."""
    run = new_run(**many)
    (ended,) = run.end(ONE)
    assert ended.exitcode == 0
    return run.root


def batches_of(root: Path) -> list[list[tuple[int, ...]]]:
    """The texts of each batch that each process has committed, by its part."""
    parts = sorted((root / ".journal").glob("rank-*"))
    return [[tuple(c.example_ids.tolist()) for c in read_commits(part).commits] for part in parts]


def wait_for_batches(run: SharedRun, started: Sequence[Started], n_batches: int, size: int) -> None:
    def has_come() -> bool:
        found = batches_of(run.root)
        return len(found) == size and all(len(batches) >= n_batches for batches in found)

    until(has_come, lambda: all(process.is_alive() for process in started), lambda: started[0].printed)


def send_at_once(started: Sequence[Started], signum: signal.Signals) -> None:
    """Send a signal as a terminal does: no process can hear of the end of another before it."""
    for each in (signal.SIGSTOP, signum, signal.SIGCONT):
        for process in started:
            os.kill(process.process.pid, each)


def assert_all_go_on(run: SharedRun, layout: Layout, many_alone: Path) -> None:
    """No batch that any process has committed is read again."""
    batches = batches_of(run.root)
    for rank in range(0, len(batches), 2):
        assert batches[rank] == batches[rank + 1]
    done = len(captured(run.root))
    assert done == sum(len(ids) for part in batches[::2] for ids in part)
    ended = run.end(layout)
    assert [end.exitcode for end in ended] == [0] * layout.size, ended
    read = sum(end.passages["flush"] for end in ended[:: layout.count])
    assert read == (len(MANY) - done) // BATCH_SIZE
    assert_same(run.root, many_alone)


@pytest.mark.parametrize(
    ("begun", "told"), [(PAIR, [0]), (PAIR, [1]), (TWO_PAIRS, [0, 1, 2, 3])], ids=str
)
def test_processes_that_are_told_to_stop_end_after_the_same_batch(
    new_run: NewRun, many: dict[str, Any], many_alone: Path, begun: Layout, told: list[int]
) -> None:
    run = new_run(**many)
    started = run.begin(begun)
    wait_for_batches(run, started, 5, begun.size)
    send_at_once([started[rank] for rank in told], signal.SIGTERM)
    ended = [process.wait(MOST_SECONDS) for process in started]
    assert [end.exitcode for end in ended] == [128 + signal.SIGTERM] * begun.size, ended
    assert ended[0].printed.splitlines()[-1] == "qk-sniffer: stopped by SIGTERM"
    assert f"qk-sniffer finalize {run.root}" in ended[0].printed
    assert "Traceback" not in "".join(end.printed for end in ended)
    assert_all_go_on(run, PAIR, many_alone)


@pytest.mark.parametrize("slow", [Death("commit", BEFORE, 8, signal.SIGSTOP), READING_SLOWLY], ids=str)
def test_processes_that_hear_of_the_end_of_others_were_told_to_stop_too(
    new_run: NewRun, many: dict[str, Any], many_alone: Path, slow: Death
) -> None:
    """The signal reaches all, and one pair has ended before the other is done with its batch."""
    run = new_run(**many)
    started = run.begin(TWO_PAIRS, {0: slow})
    started[0].wait_until_stopped()
    for process in started:
        os.kill(process.process.pid, signal.SIGTERM)
    ended = [process.wait(MOST_SECONDS) for process in started[2:]]
    started[0].go_on()
    ended = [process.wait(MOST_SECONDS) for process in started[:2]] + ended
    printed = "".join(end.printed for end in ended)
    assert [end.exitcode for end in ended] == [128 + signal.SIGTERM] * 4, printed
    assert ended[0].printed.splitlines()[-1] == "qk-sniffer: stopped by SIGTERM"
    assert printed.splitlines().count("qk-sniffer: stopped by SIGTERM") == 1
    assert "Traceback" not in printed
    assert_all_go_on(run, PAIR, many_alone)


def test_a_process_of_another_group_ends_where_one_is_told_to_stop(
    new_run: NewRun, many: dict[str, Any], many_alone: Path
) -> None:
    run = new_run(**many)
    started = run.begin(TWO_PAIRS)
    wait_for_batches(run, started, 3, 4)
    os.kill(started[2].process.pid, signal.SIGTERM)
    ended = [process.wait(MOST_SECONDS) for process in started]
    assert [end.exitcode for end in ended] == [1, 1, 143, 143], ended
    assert "): stopped by SIGTERM; the other processes stop" in ended[0].printed
    assert "Traceback" not in "".join(end.printed for end in ended)
    assert_all_go_on(run, ONE, many_alone)


@pytest.mark.parametrize(
    ("begun", "stopped"),
    [
        (PAIR, {1: READING_SLOWLY}),
        (PAIR, {0: Death("commit", BEFORE, 8, signal.SIGSTOP)}),
        (PAIR, {0: Death("loading", BEFORE, 1, signal.SIGSTOP)}),
        (TWO_PAIRS, {}),
    ],
    ids=["reading", "committing", "loading", "two groups"],
)
def test_ctrl_c(
    new_run: NewRun,
    many: dict[str, Any],
    many_alone: Path,
    begun: Layout,
    stopped: Deaths,
) -> None:
    """It reaches all processes, of which one may stand still for a moment."""
    run = new_run(**many)
    started = run.begin(begun, stopped)
    if not stopped:
        wait_for_batches(run, started, 5, begun.size)
    for rank in stopped:
        started[rank].wait_until_stopped()
    for rank in stopped:
        os.kill(started[rank].process.pid, signal.SIGINT)
    send_at_once([started[rank] for rank in range(begun.size) if rank not in stopped], signal.SIGINT)
    for rank in stopped:
        started[rank].go_on()
    ended = [process.wait(MOST_SECONDS) for process in started]
    printed = "".join(end.printed for end in ended)
    assert [end.exitcode for end in ended] == [130] * begun.size, printed
    assert printed.splitlines().count("qk-sniffer: interrupted") == 1
    assert "Traceback" not in printed
    done = len(captured(run.root))
    assert (done > 0) == all(death.point != "loading" for death in stopped.values())
    (again,) = run.end(ONE)
    assert again.exitcode == 0, again.printed
    assert again.passages["flush"] == (len(MANY) - done) // BATCH_SIZE
    assert_same(run.root, many_alone)


def test_a_full_disk_of_one_process_ends_all(new_run: NewRun, undisturbed: UndisturbedOf) -> None:
    run, full = new_run(), OSError(errno.ENOSPC, "No space left on device")
    started = run.begin(PAIR, {1: Death("append", BEFORE, 9, error=full)})
    ended = [process.wait(MOST_SECONDS) for process in started]
    printed = "".join(end.printed for end in ended)
    assert [end.exitcode for end in ended] == [1, 2], printed
    assert printed.count("rank-00001-tp2/segment-00000.arrow: No space left on device") == 1, printed
    assert "Traceback" not in printed
    assert len(captured(run.root)) == 4 * BATCH_SIZE
    assert_goes_on(run, PAIR, undisturbed(ROWS).root)


def test_texts_join_with_other_processes(new_run: NewRun, undisturbed: UndisturbedOf) -> None:
    """A run that each time has more texts and is killed, and goes on with another layout."""
    run, end = new_run(ALONE, max_samples=8), [0, 0]
    assert [ended.exitcode for ended in run.end(PAIR)] == end
    run.config["data"]["max_samples"] = 16
    die(run, ONE, {0: Death("forward", AFTER, 6)})
    die(run, PAIR, {1: Death("forward", AFTER, 6)})
    assert [ended.exitcode for ended in run.end(PAIR)] == end
    del run.config["data"]["max_samples"]
    assert_goes_on(run, ONE, undisturbed(ALONE).root)


def test_finalize_writes_what_all_processes_of_a_group_have(
    new_run: NewRun, undisturbed: UndisturbedOf
) -> None:
    run = new_run(BOTH)
    die(run, PAIR, {0: COMMITTING})
    there = captured(run.root)
    assert main(["finalize", str(run.root)]) == 0
    assert captured(run.root) == there
    assert main(["verify", str(run.root)]) == 0
    assert_goes_on(run, PAIR, undisturbed(BOTH, PAIR).root)
