"""Moments of runs that are killed and begun again are those of a run that nobody disturbed."""

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow.parquet as pq
import pytest

from conftest import write_jsonl
from killing import AFTER, BEFORE, POINTS, Death, Processes
from qk_sniffer.cli import main
from readers import assert_same_moments
from test_ranks import Run

N_TEXTS = 24
TEXTS = [
    {"id": f"text-{i}", "text": topics["class"][13 * i :][: 1 + 7 * i % 40]} for i in range(N_TEXTS)
]
CAPTURE = {
    "sampler": {"type": "uniform", "base_rate": 2.0},
    "min_bucket_size": 8,
    "capture_values": True,
    "capture_outputs": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "batches of 1": {"data": {"batch_size": 1}},
    "batches of 4": {"data": {"batch_size": 4}},
    "passages": {"data": {"batch_size": 4}, "model": {"prefill_chunk_size": 8}},
}
NewRun = Callable[..., Run]

PRECISE = 20
"""Runs that are killed of a model in float64, which keep no rows: nothing shows there what was read
together, so that all of them have the same moments. Others keep rows, and batches of their own."""


@pytest.fixture(scope="module")
def new_run(
    processes: Processes,
    model_dir: Callable[[str], Path],
    in_float64: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> NewRun:
    """A run of the tiny Llama over the texts, with moments of all that there is."""
    texts = write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)

    def new(variant: str, *, precise: bool = False) -> Run:
        directory, sections = tmp_path_factory.mktemp("run"), VARIANTS[variant]
        moments = dict.fromkeys(("enabled", "by_bucket", "pre_rope", "cross"), True)
        config = {
            "model": {"name": str(in_float64 if precise else model_dir("llama"))}
            | sections.get("model", {}),
            "data": {"path": str(texts), "id_column": "id"} | sections["data"],
            "sniffer": {
                "check": False,
                "capture": CAPTURE | ({"sampler": {"type": "none"}} if precise else {}),
                "moments": moments,
                "output": {"data_root": str(directory / "root")},
            },
        }
        return Run(processes, directory, config)

    return new


Undisturbed = Callable[..., tuple[Path, list[Counter[str]]]]


@pytest.fixture(scope="module")
def undisturbed(new_run: NewRun) -> Undisturbed:
    """The data root of a variant, and how often each of some processes passed each fault point."""
    made: dict[tuple[str, int, bool], tuple[Path, list[Counter[str]]]] = {}

    def of(variant: str, size: int, *, precise: bool = False) -> tuple[Path, list[Counter[str]]]:
        if (variant, size, precise) not in made:
            run = new_run(variant, precise=precise)
            ended = run.run(size)
            assert all(end.exitcode == 0 for end in ended), [end.printed for end in ended]
            made[variant, size, precise] = run.root, [end.passages for end in ended]
        return made[variant, size, precise]

    return of


def assert_goes_on(run: Run, expected: Path, size: int) -> None:
    run.succeed(size)
    assert_same_moments(run.root, expected)
    assert not (run.root / ".journal").exists()
    assert main(["verify", str(run.root)]) == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_count_what_one_does(
    undisturbed: Undisturbed, variant: str, size: int
) -> None:
    assert_same_moments(undisturbed(variant, size)[0], undisturbed(variant, 1)[0])


@pytest.mark.parametrize("seed", range(PRECISE + 5))
def test_a_run_that_is_killed_counts_each_text_once(
    new_run: NewRun, undisturbed: Undisturbed, seed: int
) -> None:
    draw = random.Random(seed)
    variant, size = [*VARIANTS][seed % 3], 1 + seed // 3 % 3
    precise = seed < PRECISE
    expected, passages = undisturbed(variant, size, precise=precise)
    if precise:
        expected, _ = undisturbed("batches of 1", 1, precise=True)
    run = new_run(variant, precise=precise)
    for _ in range(draw.choice([1, 1, 2])):
        rank = draw.randrange(size)
        points = sorted(point for point in POINTS if passages[rank][point])
        point = draw.choice(points)
        moment = draw.choice(POINTS[point][2])
        death = Death(point, moment, draw.randint(1, passages[rank][point]))
        ended = run.run(size, deaths={rank: death})
        # The second time there may be less to do.
        assert ended[rank].exitcode in (0, -signal.SIGKILL), ended[rank].printed
    assert_goes_on(run, expected, draw.randint(1, 3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_goes_on_after_finalize(new_run: NewRun, undisturbed: Undisturbed, variant: str) -> None:
    run = new_run(variant)
    expected, (passages,) = undisturbed(variant, 1)
    run.run(1, deaths={0: Death("forward", BEFORE, passages["forward"] // 2)})
    assert main(["finalize", str(run.root)]) == 0
    counted = pq.read_metadata(run.root / "moments" / "texts.parquet").num_rows
    assert 0 < counted < N_TEXTS
    assert main(["verify", str(run.root)]) == 0
    assert_goes_on(run, expected, 1)


def test_texts_whose_rows_are_there_are_counted_alone(
    new_run: NewRun, undisturbed: Undisturbed
) -> None:
    run, (expected, _) = new_run("batches of 4"), undisturbed("batches of 4", 1)
    shutil.copytree(expected, run.root)
    shutil.rmtree(run.root / "moments")
    rows = {path: path.read_bytes() for path in run.root.glob("l*/data.parquet")}
    assert_goes_on(run, expected, 2)
    assert rows == {path: path.read_bytes() for path in run.root.glob("l*/data.parquet")}


def test_rows_of_a_damaged_batch_are_captured_again_and_not_counted_twice(
    new_run: NewRun, undisturbed: Undisturbed
) -> None:
    run = new_run("batches of 4")
    expected, (passages,) = undisturbed("batches of 4", 1)
    run.run(1, deaths={0: Death("finalizing", BEFORE, passages["finalizing"])})
    (segment,) = (run.root / ".journal" / "rank-00000").glob("segment-*.arrow")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    assert_goes_on(run, expected, 1)
    for path in expected.glob("l*/data.parquet"):
        assert (run.root / path.relative_to(expected)).read_bytes() == path.read_bytes()


def test_overwriting_counts_from_the_start(new_run: NewRun, undisturbed: Undisturbed) -> None:
    run, (expected, passages) = new_run("batches of 4"), undisturbed("batches of 4", 1)
    run.run(1, deaths={0: Death("forward", AFTER, passages[0]["forward"] // 2)})
    run.config["sniffer"]["output"]["overwrite"] = True
    assert_goes_on(run, expected, 1)
