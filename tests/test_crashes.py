"""Runs killed by SIGKILL, at fault points and at random moments, and started again."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest
import xxhash
import yaml

from conftest import write_jsonl
from killing import AFTER, BEFORE, HALFWAY, POINTS, Death, Ended, Processes

N_TEXTS, BATCH_SIZE = 24, 2
TEXTS = [
    {"id": f"text-{i}", "text": topics["class"][13 * i :][: 1 + 7 * i % 40]} for i in range(N_TEXTS)
]

ALL: dict[str, Any] = {"sampler": {"type": "all"}, "capture_token_strings": True}
SAMPLED: dict[str, Any] = {
    "sampler": {"type": "uniform", "base_rate": 2.0},
    "min_bucket_size": 8,
    "capture_values": True,
    "capture_outputs": True,
    "capture_softmax": True,
}
DATA = {"id_column": "id", "batch_size": BATCH_SIZE}

Sections = tuple[dict[str, Any], dict[str, Any], float]
VARIANTS: dict[str, Sections] = {
    "every batch committed": (ALL, DATA, 0.0),
    "streamed": (SAMPLED, DATA | {"streaming": True}, 0.0),
    "committed at the end": (ALL, DATA, 60.0),
}
"""The sections capture and data, and the seconds between two commits."""

PLAIN, STREAMED, AT_THE_END = VARIANTS


@dataclass(frozen=True)
class Run:
    """One command line, and the data root that it writes."""

    processes: Processes
    root: Path
    command: tuple[str, ...]
    sync_seconds: float

    def go(self, **options: Any) -> Ended:
        return self.processes.run(self.command, sync_seconds=self.sync_seconds, **options)

    def succeed(self, **options: Any) -> Ended:
        ended = self.go(**options)
        assert ended.exitcode == 0, ended.printed
        return ended

    def die(self, death: Death) -> None:
        ended = self.go(death=death)
        assert ended.exitcode == -signal.SIGKILL, ended.printed

    @property
    def header(self) -> Path:
        return self.root / ".journal" / "header.json"

    def finalize(self) -> "Run":
        return Run(self.processes, self.root, ("finalize", str(self.root)), self.sync_seconds)


NewRun = Callable[..., Run]


@pytest.fixture(scope="module")
def new_run(
    processes: Processes,
    model_dir: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> NewRun:
    """A prediction of a variant into a new data root, or into a copy of one."""
    texts = write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)

    def new(variant: str, copied: Path | None = None, overwrite: bool = False, **data: Any) -> Run:
        capture, section, sync_seconds = VARIANTS[variant]
        directory = tmp_path_factory.mktemp("run")
        root = directory / "root"
        if copied is not None:
            shutil.copytree(copied, root)
        output = {"data_root": str(root), "overwrite": overwrite}
        config = {
            "model": {"name": str(model_dir("llama"))},
            "data": {"path": str(texts)} | section | data,
            "sniffer": {"check": False, "capture": capture, "output": output},
            "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        command = ("predict", "--config", str(directory / "config.yaml"))
        return Run(processes, root, command, sync_seconds)

    return new


@dataclass(frozen=True)
class Uninterrupted:
    """A data root that no death disturbed, and how its last command ended."""

    root: Path
    ended: Ended

    def draw(self, seed: str, point: str, moment: str) -> Death:
        return Death(point, moment, random.Random(seed).randint(1, self.ended.passages[point]))


@pytest.fixture(scope="module")
def uninterrupted(new_run: NewRun) -> Callable[[str], Uninterrupted]:
    made: dict[str, Uninterrupted] = {}

    def of(variant: str) -> Uninterrupted:
        if variant not in made:
            run = new_run(variant)
            made[variant] = Uninterrupted(run.root, run.succeed(since=run.header))
        return made[variant]

    return of


UninterruptedOf = Callable[[str], Uninterrupted]


def captured(root: Path) -> set[int]:
    """The examples that a data root holds, in files that are finished or in whole lines of the log."""
    examples: set[int] = set()
    if (root / "manifest.json").exists():
        examples.update(pq.read_table(root / "examples" / "data.parquet")["example_id"].to_pylist())
    log = root / ".journal" / "rank-00000" / "commits.jsonl"
    for line in log.read_text().splitlines(keepends=True) if log.exists() else ():
        digest, _, content = line.partition(" ")
        if content.endswith("\n") and digest == xxhash.xxh3_64_hexdigest(content[:-1].encode()):
            examples.update(json.loads(content).get("example_ids", ()))
    return examples


def assert_same_files(root: Path, expected: Path) -> None:
    """Both data roots hold the same files, and nothing besides."""
    names = sorted(path.relative_to(root) for path in root.rglob("*"))
    assert names == sorted(path.relative_to(expected) for path in expected.rglob("*"))
    for name in names:
        if name.suffix == ".yaml":
            config, other = (yaml.safe_load((place / name).read_text()) for place in (root, expected))
            del config["sniffer"]["output"], other["sniffer"]["output"]
            assert config == other
        elif (root / name).is_file():
            assert (root / name).read_bytes() == (expected / name).read_bytes(), name


def assert_goes_on(run: Run, expected: Path, **options: Any) -> None:
    """The same command captures what is missing and nothing else, and the files are as expected."""
    left = N_TEXTS - len(captured(run.root))
    ended = run.succeed(**options)
    assert ended.passages["flush"] == -(-left // BATCH_SIZE), ended.printed
    assert_same_files(run.root, expected)


def describe(value: Any) -> str | None:
    if isinstance(value, list):
        return ", then ".join(" ".join(part) for part in value)
    return None


def test_an_uninterrupted_run_keeps_every_row_once(uninterrupted: UninterruptedOf) -> None:
    root = uninterrupted(PLAIN).root
    expected = {(i, p) for i, row in enumerate(TEXTS) for p in range(len(row["text"]))}
    examples = pq.read_table(root / "examples" / "data.parquet").to_pylist()
    number = {row["example_id"]: int(row["source_id"].removeprefix("text-")) for row in examples}
    assert len(examples) == len(number) == N_TEXTS
    files = sorted(root.glob("l*/data.parquet"))
    assert len(files) == 24
    for file in files:
        table = pq.read_table(file, columns=["example_id", "position"])
        assert table.num_rows == len(expected)
        assert {(number[row["example_id"]], row["position"]) for row in table.to_pylist()} == expected


Deaths = list[tuple[str, str]]
EVERY_POINT: list[tuple[str, Deaths]] = [
    (PLAIN, [(point, moment)])
    for point, (_, _, moments) in POINTS.items()
    if point not in ("clearing", "moments")
    for moment in moments
]
ELSEWHERE: list[tuple[str, Deaths]] = [
    (STREAMED, [("forward", AFTER)]),
    (STREAMED, [("commit", HALFWAY)]),
    (STREAMED, [("journal's end", AFTER)]),
    (AT_THE_END, [("forward", BEFORE)]),
    (AT_THE_END, [("append", HALFWAY)]),
    (AT_THE_END, [("commit", HALFWAY)]),
]
TWICE: list[tuple[str, Deaths]] = [
    (PLAIN, [("forward", AFTER), ("checksum", BEFORE)]),
    (PLAIN, [("commit", HALFWAY), ("row group", AFTER)]),
    (PLAIN, [("finalizing", HALFWAY), ("row group", BEFORE)]),
    (STREAMED, [("rename", AFTER), ("removal", HALFWAY)]),
]


@pytest.mark.parametrize(("variant", "deaths"), EVERY_POINT + ELSEWHERE + TWICE, ids=describe)
def test_a_run_killed_at_a_fault_point_goes_on(
    new_run: NewRun, uninterrupted: UninterruptedOf, variant: str, deaths: Deaths
) -> None:
    expected, run = uninterrupted(variant), new_run(variant)
    for point, moment in deaths:
        run.die(expected.draw(f"{variant} {deaths}", point, moment))
    assert_goes_on(run, expected.root)


def kill_within(
    seconds: float,
    seed: str,
    new: Callable[[], Run],
    since: Callable[[Run], Path | None],
    **options: Any,
) -> Run:
    """A run that was killed at a moment drawn from some seconds."""
    moments = random.Random(seed)
    while True:
        run, after = new(), moments.uniform(0, seconds)
        ended = run.go(after=after, since=since(run), **options)
        if ended.exitcode == -signal.SIGKILL:
            return run
        # It was faster than the one that was measured.
        assert ended.exitcode == 0, ended.printed
        seconds = after


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_at_a_random_moment_goes_on(
    new_run: NewRun, uninterrupted: UninterruptedOf, variant: str, seed: int
) -> None:
    expected = uninterrupted(variant)
    name = f"{variant} {seed}"
    run = kill_within(expected.ended.seconds, name, lambda: new_run(variant), lambda run: run.header)
    assert_goes_on(run, expected.root)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_while_it_loads_data_and_model_goes_on(
    new_run: NewRun, uninterrupted: UninterruptedOf, seed: int
) -> None:
    expected, cache = uninterrupted(PLAIN), f"cache-{seed}"
    seconds = expected.ended.waited
    run = kill_within(seconds, f"{seed}", lambda: new_run(PLAIN), lambda _: None, cache=cache)
    assert_goes_on(run, expected.root, cache=cache)


def test_workers_of_a_killed_run_do_not_keep_the_next_one_out(
    new_run: NewRun, uninterrupted: UninterruptedOf
) -> None:
    run = new_run(STREAMED, num_workers=1)
    run.die(Death("forward", AFTER, 30))
    left = N_TEXTS - len(captured(run.root))
    assert run.succeed().passages["flush"] == left // BATCH_SIZE
    for file in run.root.glob("*/data.parquet"):
        other = uninterrupted(STREAMED).root / file.relative_to(run.root)
        assert file.read_bytes() == other.read_bytes()


def test_a_run_killed_while_it_clears_a_data_root_clears_the_rest(
    new_run: NewRun, uninterrupted: UninterruptedOf
) -> None:
    expected, other = uninterrupted(PLAIN), uninterrupted(STREAMED).root
    run = new_run(PLAIN, copied=other, overwrite=True)
    entry = random.Random("clearing").randint(1, len(list(other.iterdir())))
    run.die(Death("clearing", AFTER, entry))
    run.succeed()
    assert_same_files(run.root, expected.root)


@pytest.fixture(scope="module")
def first_texts(new_run: NewRun) -> Path:
    """A finished data root with the first third of the texts."""
    run = new_run(PLAIN, max_samples=N_TEXTS // 3)
    run.succeed()
    return run.root


@pytest.fixture(scope="module")
def merged(new_run: NewRun, first_texts: Path) -> Uninterrupted:
    """The same with all texts, after a second run."""
    run = new_run(PLAIN, copied=first_texts)
    return Uninterrupted(run.root, run.succeed(since=run.header))


def test_texts_that_a_second_run_adds_give_the_files_of_a_single_run(
    merged: Uninterrupted, uninterrupted: UninterruptedOf
) -> None:
    assert merged.ended.passages["flush"] == (N_TEXTS - N_TEXTS // 3) // BATCH_SIZE
    assert_same_files(merged.root, uninterrupted(PLAIN).root)


@pytest.mark.parametrize(
    "deaths",
    [
        [("flush", AFTER)],
        [("commit", HALFWAY)],
        [("finalizing", AFTER)],
        [("row group", BEFORE)],
        [("rename", AFTER)],
        [("manifest", BEFORE), ("journal's end", BEFORE)],
    ],
    ids=describe,
)
def test_a_run_killed_while_it_adds_texts_goes_on(
    new_run: NewRun, first_texts: Path, merged: Uninterrupted, deaths: Deaths
) -> None:
    run = new_run(PLAIN, copied=first_texts)
    for point, moment in deaths:
        run.die(merged.draw(f"merge {deaths}", point, moment))
    assert_goes_on(run, merged.root)


@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_a_random_moment_while_it_adds_texts_goes_on(
    new_run: NewRun, first_texts: Path, merged: Uninterrupted, seed: int
) -> None:
    run = kill_within(
        merged.ended.seconds,
        f"merge {seed}",
        lambda: new_run(PLAIN, copied=first_texts),
        lambda run: run.header,
    )
    assert_goes_on(run, merged.root)


@pytest.fixture(scope="module")
def interrupted(new_run: NewRun) -> Path:
    """What a run leaves that dies in the middle of its texts."""
    run = new_run(PLAIN)
    run.die(Death("forward", AFTER, 26))
    return run.root


@pytest.fixture(scope="module")
def finalized(new_run: NewRun, interrupted: Path) -> Uninterrupted:
    """The same after ``finalize``."""
    run = new_run(PLAIN, copied=interrupted).finalize()
    return Uninterrupted(run.root, run.succeed())


@pytest.mark.parametrize(
    "deaths",
    [
        [("finalizing", HALFWAY)],
        [("row group", AFTER)],
        [("rename", BEFORE)],
        [("checksum", BEFORE), ("manifest", AFTER)],
        [("journal's end", AFTER)],
        [("removal", HALFWAY)],
    ],
    ids=describe,
)
def test_finalize_killed_at_a_fault_point_goes_on(
    new_run: NewRun, interrupted: Path, finalized: Uninterrupted, deaths: Deaths
) -> None:
    run = new_run(PLAIN, copied=interrupted).finalize()
    for point, moment in deaths:
        run.die(finalized.draw(f"finalize {deaths}", point, moment))
    run.succeed()
    assert_same_files(run.root, finalized.root)


def test_a_run_goes_on_after_finalize_was_killed(
    new_run: NewRun, interrupted: Path, finalized: Uninterrupted, merged: Uninterrupted
) -> None:
    run = new_run(PLAIN, copied=interrupted)
    run.finalize().die(finalized.draw("finalize", "rename", AFTER))
    assert_goes_on(run, merged.root)


@pytest.mark.parametrize("moment", [BEFORE, HALFWAY])
def test_a_run_that_adds_texts_goes_on_after_finalize_was_killed(
    new_run: NewRun, first_texts: Path, merged: Uninterrupted, moment: str
) -> None:
    run = new_run(PLAIN, copied=first_texts)
    run.die(Death("commit", moment, 3))
    run.finalize().die(Death("rename", AFTER, 10))
    assert_goes_on(run, merged.root)
