"""Journals of processes that share a model: what counts, and files that are those of one process."""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moment_runs import MadeUp, finish, no_progress
from qk_sniffer.errors import UserError
from qk_sniffer.moments import MomentState
from qk_sniffer.storage import (
    Example,
    JournalWriter,
    Shard,
    commits,
    earlier_run,
    finalizing,
    merge_pulled,
    prepare_data_root,
)

WIDTH = {"q": 4, "k": 4, "softmax": 6}
LENGTHS = {3: 700, -7: 5, 12: 300, 40: 1, 41: 520, 99: 11}
BATCHES = ([3, -7], [12], [40, 41], [99])
PASSAGE = 256
WHOLE = MadeUp(kinds=("q", "k"))
ROWS: dict[str, Any] = WHOLE.header
del ROWS["settings"]["moments"]
ROWS["settings"]["capture"] |= {
    "sampler": {"type": "all", "base_rate": 1.0, "seed": 0},
    "capture_softmax": True,
    "capture_token_strings": True,
}
ROWS["streams"] = [
    {"layer_idx": layer_idx, "kind": kind, "heads": heads, "head_dim": WIDTH[kind]}
    for layer_idx in range(2)
    for kind, heads in (("q", [0, 1, 3]), ("softmax", [0, 1, 3]), ("k", [0, 1]))
]

Layout = Callable[[int, str], list[list[int]]]
"""The heads that each process has of a layer and kind."""


def of_two(_: int, kind: str) -> list[list[int]]:
    return [[0], [1]] if kind == "k" else [[1], [0, 3]]


def of_four(_: int, kind: str) -> list[list[int]]:
    return [[1], [], [0], []] if kind == "k" else [[0], [3], [1], []]


def of_layers(layer_idx: int, kind: str) -> list[list[int]]:
    every = [0, 1] if kind == "k" else [0, 1, 3]
    return [every, []] if layer_idx else [[], every]


def of_one_of_three(_: int, kind: str) -> list[list[int]]:
    return [[], [0, 1] if kind == "k" else [0, 1, 3], []]


LAYOUTS: list[Layout] = [of_two, of_four, of_layers, of_one_of_three]


def shards(layout: Layout | None, header: dict[str, Any] = ROWS) -> list[Shard | None]:
    """Those of the processes that share a model; None for one that has it alone."""
    if layout is None:
        return [None]
    held = [layout(stream["layer_idx"], stream["kind"]) for stream in header["streams"]]
    count = len(held[0])
    return [Shard(i, count, tuple(tuple(heads[i]) for heads in held)) for i in range(count)]


@dataclass(frozen=True)
class Piece:
    """All vectors of a batch."""

    content: npt.NDArray[np.uint8]
    start: int = 0

    def wait(self) -> npt.NDArray[np.uint8]:
        return self.content

    def release(self) -> None:
        pass


@dataclass(frozen=True)
class Rows:
    """A block."""

    layer_idx: int
    kind: Any
    dtype: str
    n_rows: int
    vectors: int
    rows: int
    sliding_window: None = None


def values(layer_idx: int, kind: str, head: int, text: int) -> npt.NDArray[np.float32]:
    """(N, width) of a text, which bfloat16 holds exactly."""
    seed = [layer_idx, ord(kind[0]), head, text + 100]
    numbers = np.random.default_rng(seed).integers(-100, 100, (LENGTHS[text], WIDTH[kind]))
    return numbers.astype(np.float32)


def stored(vectors: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    flat = vectors.reshape(-1)
    if dtype == "bfloat16":
        flat = (flat.view(np.uint32) >> 16).astype(np.uint16)
    return np.frombuffer(flat.tobytes(), np.uint8)


def append(
    writer: JournalWriter, shard: Shard | None, texts: Sequence[int], dtype: str = "float32"
) -> None:
    """Let a process commit its heads of a batch, which is read in passages."""
    content, numbers = [np.empty(0, np.uint8)], [np.empty(0, np.int32)]
    blocks, size, n_numbers = [], 0, 0
    for first in range(0, max(LENGTHS[text] for text in texts), PASSAGE):
        positions = {text: np.arange(LENGTHS[text])[first : first + PASSAGE] for text in texts}
        ids = np.repeat(texts, [len(positions[text]) for text in texts])
        columns = np.stack([ids, np.concatenate([*positions.values()]), np.zeros_like(ids)])
        for i, stream in enumerate(ROWS["streams"]):
            heads = stream["heads"] if shard is None else shard.heads[i]
            layer_idx, kind = stream["layer_idx"], stream["kind"]
            of_block = "float32" if kind == "softmax" else dtype
            if not heads:
                continue
            blocks.append(Rows(layer_idx, kind, of_block, ids.size, size, n_numbers))
            for head in heads:
                rows = [values(layer_idx, kind, head, text)[p] for text, p in positions.items()]
                content.append(stored(np.concatenate(rows), of_block))
                size += content[-1].size
            content.append(np.zeros(-size % 64, np.uint8))
            size += content[-1].size
        numbers.append(columns.reshape(-1).astype(np.int32))
        n_numbers += columns.size
    examples = [
        Example(
            text, f"text {text}", LENGTHS[text], False, [f"{text}.{i}" for i in range(LENGTHS[text])]
        )
        for text in texts
    ]
    writer.append(Piece(np.concatenate(content)))
    writer.commit(blocks, np.concatenate(numbers), examples)


def capture(
    root: Path,
    layout: Layout | None,
    *batches: Sequence[int],
    reader: int = 0,
    lacking: dict[int, int] | None = None,
    dtype: str = "float32",
) -> None:
    """Let processes that share a model capture batches; some of them die before the last ones."""
    found = shards(layout)
    for number, shard in enumerate(found):
        writer = JournalWriter(root / ".journal", ROWS, len(found) * reader + number, shard)
        for texts in batches[: len(batches) - (lacking or {}).get(number, 0)]:
            append(writer, shard, texts, dtype)
        writer.close()


def files_of(root: Path) -> dict[str, str]:
    """The SHA-256 of each file, but for the journal."""
    assert not (root / ".journal").exists()
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of one process that has captured all batches."""
    root = tmp_path_factory.mktemp("whole")
    capture(root, None, *BATCHES)
    finish(root, complete=True)
    files = files_of(root)
    assert len(files) == 2 * (3 + 2) + 3
    return files


def captured(root: Path) -> list[int]:
    earlier = earlier_run(root)
    return [] if earlier is None else earlier.example_ids.tolist()


def part(root: Path, name: str) -> Path:
    return root / ".journal" / name


@pytest.fixture
def many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is committed at once and has a segment of its own."""
    monkeypatch.setattr("qk_sniffer.storage.journal.SEGMENT_BYTES", 1)
    monkeypatch.setattr("qk_sniffer.storage.journal.SYNC_SECONDS", 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_of_one_process(
    tmp_path: Path, layout: Layout, expected: dict[str, str]
) -> None:
    capture(tmp_path, layout, *BATCHES)
    assert captured(tmp_path) == sorted(LENGTHS)
    manifest = finish(tmp_path, complete=True)
    assert manifest["examples"]["rows"] == len(LENGTHS)
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_do_not_depend_on_groups_and_segments(
    tmp_path: Path, layout: Layout, expected: dict[str, str], many_segments: None
) -> None:
    capture(tmp_path, layout, BATCHES[0], BATCHES[3])
    capture(tmp_path, layout, BATCHES[1], BATCHES[2], reader=1)
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


def test_several_dtypes(tmp_path: Path, expected: dict[str, str]) -> None:
    """Rows are gathered then, and not read in stretches."""
    capture(tmp_path, of_two, *BATCHES[:2], dtype="bfloat16")
    capture(tmp_path, of_four, BATCHES[2])
    capture(tmp_path, None, BATCHES[3], dtype="bfloat16")
    finish(tmp_path, complete=True)
    assert files_of(tmp_path).keys() == expected.keys()
    other = tmp_path / "other"
    capture(other, None, *BATCHES[:2], dtype="bfloat16")
    capture(other, None, BATCHES[2])
    capture(other, None, BATCHES[3], dtype="bfloat16")
    finish(other, complete=True)
    theirs = files_of(other)
    shutil.rmtree(other)
    assert files_of(tmp_path) == theirs


@pytest.mark.parametrize("order", itertools.permutations([of_two, of_four, None]))
def test_a_run_goes_on_with_other_processes(
    tmp_path: Path, order: Sequence[Layout | None], expected: dict[str, str]
) -> None:
    for layout, batch in zip([*order, order[0]], BATCHES, strict=True):
        prepare_data_root(tmp_path, overwrite=False)
        capture(tmp_path, layout, batch)
    assert captured(tmp_path) == sorted(LENGTHS)
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_finished_and_pulled_runs_are_merged(
    tmp_path: Path, layout: Layout, expected: dict[str, str]
) -> None:
    other = tmp_path / "other"
    capture(other, layout, BATCHES[1])
    finish(other, complete=True)
    capture(tmp_path, layout, BATCHES[0])
    finish(tmp_path)
    other.rename(tmp_path / ".pulled")
    capture(tmp_path, layout, *BATCHES[2:], lacking={1: 1})
    assert merge_pulled(tmp_path, no_progress)["examples"]["rows"] == 5
    capture(tmp_path, of_two, BATCHES[3])
    finish(tmp_path, complete=True)
    rows = {name: content for name, content in files_of(tmp_path).items() if name.startswith("l")}
    # Merged rows are other pieces of the files, so that one process merges the same ones.
    whole = tmp_path / "whole"
    capture(whole / "other", None, BATCHES[1])
    finish(whole / "other", complete=True)
    capture(whole, None, BATCHES[0])
    finish(whole)
    (whole / "other").rename(whole / ".pulled")
    capture(whole, None, BATCHES[2])
    merge_pulled(whole, no_progress)
    capture(whole, None, BATCHES[3])
    finish(whole, complete=True)
    theirs = {name: content for name, content in files_of(whole).items() if name.startswith("l")}
    assert len(rows) == 10
    assert rows == theirs


def test_a_process_that_has_the_model_alone_writes_what_it_did(tmp_path: Path) -> None:
    capture(tmp_path, None, *BATCHES)
    names = sorted(path.name for path in part(tmp_path, "rank-00000").iterdir() if path.name != "lock")
    assert names == ["commits.jsonl", "segment-00000.arrow"]


@pytest.mark.parametrize("layout", [of_two, of_four])
def test_texts_are_in_one_part_of_a_group(tmp_path: Path, layout: Layout) -> None:
    capture(tmp_path, layout, *BATCHES, reader=2)
    count = len(shards(layout))
    parts = sorted((tmp_path / ".journal").glob(f"rank-*-tp{count}"))
    assert [path.name for path in parts] == [
        f"rank-{2 * count + number:05d}-tp{count}" for number in range(count)
    ]
    is_there = [b"41.519" in (path / "segment-00000.arrow").read_bytes() for path in parts]
    assert is_there == [True, *[False] * (count - 1)]


@pytest.mark.parametrize("ending", ["finalize", "predict"])
@pytest.mark.parametrize(
    "lacking", [{0: 1}, {1: 1}, {0: 2, 1: 1}, {0: 1, 1: 4}, {0: 4}, {0: 4, 1: 4}], ids=str
)
def test_a_batch_counts_where_all_have_it(
    tmp_path: Path,
    lacking: dict[int, int],
    ending: str,
    expected: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    capture(tmp_path, of_two, *BATCHES, lacking=lacking)
    n_left = max(lacking.values())
    counted = sorted(itertools.chain(*BATCHES[: len(BATCHES) - n_left]))
    assert captured(tmp_path) == counted
    if ending == "finalize":
        assert finish(tmp_path)["examples"]["rows"] == len(counted)
        assert captured(tmp_path) == counted
        return
    prepare_data_root(tmp_path, overwrite=False)
    assert captured(tmp_path) == counted
    for name in ("rank-00000-tp2", "rank-00001-tp2"):
        kept = commits.read_commits(part(tmp_path, name)).commits
        assert len(kept) == len(BATCHES) - n_left
        sizes = {path: path.stat().st_size for path in part(tmp_path, name).glob("segment-*")}
        assert sizes == ({kept[-1].segment: kept[-1].stop} if kept else {})
    capture(tmp_path, of_two, *BATCHES[len(BATCHES) - n_left :])
    assert caplog.messages == []
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("n_calls", range(6))
def test_a_repair_that_is_killed_goes_on(
    tmp_path: Path, n_calls: int, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(tmp_path, of_two, *BATCHES[:2], lacking={0: 1})
    capture(tmp_path, of_two, *BATCHES[2:], reader=1, lacking={1: 1})
    cut, calls = commits._cut_segments, itertools.count()

    def die(*args: Any) -> None:
        if next(calls) == n_calls:
            raise KeyboardInterrupt
        cut(*args)

    with monkeypatch.context() as patch:
        patch.setattr(commits, "_cut_segments", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_data_root(tmp_path, overwrite=False)
    counted = sorted([*BATCHES[0], *BATCHES[2]])
    assert captured(tmp_path) == counted
    prepare_data_root(tmp_path, overwrite=False)
    assert captured(tmp_path) == counted
    capture(tmp_path, of_two, BATCHES[1], BATCHES[3])
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("goes_on_with", [None, of_two, of_four])
@pytest.mark.parametrize("missing", ["no part", "an empty part", "no directory of the first"])
def test_a_process_that_died_before_its_first_batch(
    tmp_path: Path, missing: str, goes_on_with: Layout | None, expected: dict[str, str]
) -> None:
    capture(tmp_path, None, BATCHES[0])
    prepare_data_root(tmp_path, overwrite=False)
    capture(tmp_path, of_two, BATCHES[1], reader=1)
    lost = part(tmp_path, "rank-00002-tp2" if "first" in missing else "rank-00003-tp2")
    shutil.rmtree(lost)
    if missing == "an empty part":
        lost.mkdir()
    assert captured(tmp_path) == sorted(BATCHES[0])
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / ".journal", alone / ".journal")
    assert finish(alone)["examples"]["rows"] == len(BATCHES[0])
    shutil.rmtree(alone)
    prepare_data_root(tmp_path, overwrite=False)
    capture(tmp_path, goes_on_with, *BATCHES[1:])
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


def test_a_batch_that_was_captured_twice_counts_once(tmp_path: Path, expected: dict[str, str]) -> None:
    """Nobody repaired the journal in between."""
    capture(tmp_path, of_two, *BATCHES, lacking={1: 2})
    capture(tmp_path, of_two, *BATCHES[2:])
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("file", ["commits.jsonl", "segment-00000.arrow"])
def test_a_damaged_batch_of_one_counts_for_none(
    tmp_path: Path,
    number: int,
    file: str,
    expected: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    capture(tmp_path, of_two, *BATCHES)
    damaged = part(tmp_path, f"rank-0000{number}-tp2")
    flip(damaged / file, -40)
    prepare_data_root(tmp_path, overwrite=False)
    assert captured(tmp_path) == sorted(itertools.chain(*BATCHES[:3]))
    assert caplog.messages == [
        f"{damaged}/commits.jsonl: 1 entries were torn or damaged; "
        "what they stood for is captured again"
    ]
    capture(tmp_path, of_two, BATCHES[3])
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("number", [0, 1])
def test_damage_that_finalizing_finds(
    tmp_path: Path, number: int, expected: dict[str, str], many_segments: None
) -> None:
    capture(tmp_path, of_two, *BATCHES)
    damaged = part(tmp_path, f"rank-0000{number}-tp2") / "segment-00000.arrow"
    flip(damaged, 50)
    with pytest.raises(UserError) as error:
        finish(tmp_path, complete=True)
    assert str(error.value).startswith(f"{damaged}: damaged, the rows of 2 texts are not what was")
    assert captured(tmp_path) == sorted(itertools.chain(*BATCHES[1:]))
    prepare_data_root(tmp_path, overwrite=False)
    capture(tmp_path, of_two, BATCHES[0])
    finish(tmp_path, complete=True)
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("repairs", [False, True])
@pytest.mark.parametrize("lost", [[], [0], [1]])
def test_finalizing_goes_on(
    tmp_path: Path,
    lost: list[int],
    repairs: bool,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What names its beginning stays through a repair, also in a part of which nothing counts."""
    capture(tmp_path, of_two, [*BATCHES[0]])
    for number in lost:
        shutil.rmtree(part(tmp_path, f"rank-0000{number}-tp2"))
    capture(tmp_path, of_four, *BATCHES[len(lost) == 0 :], reader=1)
    with monkeypatch.context() as patch:

        def die(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(finalizing, "_end", die)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path, complete=True)
    if repairs:
        prepare_data_root(tmp_path, overwrite=False)
    earlier = earlier_run(tmp_path)
    assert earlier is not None and earlier.finalizing
    assert finish(tmp_path)["complete"]
    assert files_of(tmp_path) == expected


def test_a_part_keeps_its_heads(tmp_path: Path) -> None:
    capture(tmp_path, of_two, BATCHES[0])
    with pytest.raises(UserError) as error:
        capture(tmp_path, of_layers, BATCHES[1])
    assert str(error.value) == (
        f"{part(tmp_path, 'rank-00000-tp2')}/heads.json: this process now has other heads than before "
        f"the run was interrupted; write what is there with `qk-sniffer finalize {tmp_path}`, then run "
        "the same command again"
    )
    finish(tmp_path)
    capture(tmp_path, of_layers, BATCHES[1])
    finish(tmp_path)
    assert captured(tmp_path) == [-7, 3, 12]


def test_a_part_without_batches_takes_other_heads(tmp_path: Path) -> None:
    capture(tmp_path, of_two)
    capture(tmp_path, of_layers, BATCHES[0])
    finish(tmp_path)


def wrong(**heads: Any) -> Any:
    held = json.loads(json.dumps(shards(of_two)[0].heads))  # type: ignore[union-attr]
    for stream, value in heads.items():
        held[int(stream[1:])] = value
    return held


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "it is no JSON"),
        ([], "it has other than 6 lists of heads"),
        ({}, "it has other than 6 lists of heads"),
        (wrong(s0=[1, 0]), "[1, 0] are no captured heads of layer 0, in order"),
        (wrong(s0=[2]), "[2] are no captured heads of layer 0, in order"),
        (wrong(s0="01"), "01 are no captured heads of layer 0, in order"),
        (wrong(s2=[{}]), "[{}] are no captured heads of layer 0, in order"),
        (wrong(s1=[0]), "the statistics of layer 0 are of other heads than its queries"),
        (wrong(s5=[0, 1]), "it and those beside it don't name each head once of layer 1"),
        (wrong(s5=[]), "it and those beside it don't name each head once of layer 1"),
    ],
    ids=str,
)
def test_heads_that_cannot_be_believed(tmp_path: Path, content: Any, fault: str) -> None:
    capture(tmp_path, of_two, BATCHES[0])
    path = part(tmp_path, "rank-00000-tp2") / "heads.json"
    path.unlink()
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        finish(tmp_path)
    assert str(error.value).startswith(f"{path}: damaged, {fault}")


def test_a_shard_without_the_statistics_of_its_queries_is_a_mistake(tmp_path: Path) -> None:
    (shard, _) = shards(of_two)
    assert shard is not None
    broken = replace(shard, heads=(shard.heads[0], (), *shard.heads[2:]))
    with pytest.raises(ValueError, match="statistics of layer 0 are of other heads"):
        JournalWriter(tmp_path / ".journal", ROWS, 0, broken)


def held_by_two(layer_idx: int, kind: str) -> list[list[int]]:
    return [[0], [1]] if kind == "k" else [[0, 1], [2, 3]]


def held_by_four(layer_idx: int, kind: str) -> list[list[int]]:
    if layer_idx:
        return [[], [], [], [0, 1] if kind == "k" else [0, 1, 2, 3]]
    return [[0], [1], [], []] if kind == "k" else [[0, 1], [2, 3], [], []]


def own(state: MomentState, shard: Shard | None) -> MomentState:
    """What one process has of moments."""
    if shard is None:
        return state
    held = {
        (stream["layer_idx"], stream["kind"]): heads
        for stream, heads in zip(WHOLE.header["streams"], shard.heads, strict=True)
    }
    tables = {}
    for kind, (table,) in state.tables.items():
        of = zip(table.layer_idx.tolist(), table.head.tolist(), strict=True)
        rows = np.array([head in held[layer_idx, kind] for layer_idx, head in of])
        tables[kind] = [table.select(rows)] if rows.any() else []
    return MomentState(tables, state.example_ids)


def count(
    root: Path,
    layout: Layout | None,
    *texts: int,
    saves: Sequence[int] | None = None,
    reader: int = 0,
) -> None:
    """Let processes count texts, and save after each; some of them die before the last saves."""
    found = shards(layout, WHOLE.header)
    writers = [
        JournalWriter(root / ".journal", WHOLE.header, len(found) * reader + number, shard)
        for number, shard in enumerate(found)
    ]
    for n_texts in range(1, len(texts) + 1):
        for number, (writer, shard) in enumerate(zip(writers, found, strict=True)):
            if saves is None or n_texts <= saves[number]:
                save(writer, own(WHOLE.state(*texts[:n_texts]), shard))
    examples = [Example(text, f"text {text}", LENGTHS_OF_MOMENTS[text], False) for text in texts]
    for writer in writers:
        writer.commit([], np.empty(0, np.int32), examples)
        writer.close()


LENGTHS_OF_MOMENTS = {3: 30, -7: 5, 12: 17, 40: 1, 41: 24, 99: 11}


def save(writer: JournalWriter, state: MomentState) -> None:
    assert writer.moments_are_saved
    writer.save_moments(state)
    wait_until_saved(writer)


def wait_until_saved(writer: JournalWriter) -> None:
    deadline = time.monotonic() + 60
    while not writer.moments_are_saved:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def states(root: Path) -> dict[str, list[int]]:
    """The texts of each file of moments."""
    journal = root / ".journal"
    return {
        str(path.relative_to(journal)): np.load(path)["example_ids"].tolist()
        for path in sorted(journal.glob("*/moments-*.npz"))
    }


def counted(root: Path) -> list[int]:
    earlier = earlier_run(root)
    return [] if earlier is None else earlier.counted_ids.tolist()


def test_saves_take_turns(tmp_path: Path) -> None:
    count(tmp_path, held_by_two, 3, -7, 12)
    count(tmp_path, held_by_two, 40)
    count(tmp_path, None, 41)
    assert states(tmp_path) == {
        "rank-00000-tp2/moments-00000-a.npz": [-7, 3, 12],
        "rank-00000-tp2/moments-00000-b.npz": [-7, 3],
        "rank-00000-tp2/moments-00001-a.npz": [40],
        "rank-00000/moments-00000.npz": [41],
        "rank-00001-tp2/moments-00000-a.npz": [-7, 3, 12],
        "rank-00001-tp2/moments-00000-b.npz": [-7, 3],
        "rank-00001-tp2/moments-00001-a.npz": [40],
    }
    assert counted(tmp_path) == [-7, 3, 12, 40, 41]


@pytest.mark.parametrize("layout", [held_by_two, held_by_four])
def test_moments_are_those_of_one_process(tmp_path: Path, layout: Layout) -> None:
    count(tmp_path, layout, 3, -7, 12)
    finish(tmp_path, complete=True)
    WHOLE.assert_counted(tmp_path, 3, -7, 12)
    count(tmp_path / "whole", None, 3, -7, 12)
    finish(tmp_path / "whole", complete=True)
    theirs = files_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    assert files_of(tmp_path) == theirs


def test_moments_of_all_ways_to_share_are_added(tmp_path: Path) -> None:
    count(tmp_path, held_by_two, 3, -7)
    count(tmp_path, held_by_four, 12, reader=1)
    count(tmp_path, None, 40)
    finish(tmp_path)
    count(tmp_path, held_by_two, 41, reader=3)
    count(tmp_path, held_by_two, 99)
    finish(tmp_path, complete=True)
    WHOLE.assert_counted(tmp_path, 3, -7, 12, 40, 41, 99)


@pytest.mark.parametrize("repairs", [False, True])
@pytest.mark.parametrize("saves", itertools.product(range(4), repeat=2), ids=str)
def test_moments_count_where_all_have_them(
    tmp_path: Path, saves: tuple[int, int], repairs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A process has its last two saves, so that all have some in common if none is two behind."""
    texts = [3, -7, 12]
    count(tmp_path, held_by_two, *texts, saves=saves)
    common = {saves[0], saves[0] - 1} & {saves[1], saves[1] - 1}
    expected = texts[: max(common, default=0)]
    assert abs(saves[0] - saves[1]) > 1 or len(expected) == min(saves)
    assert counted(tmp_path) == sorted(expected)
    if repairs:
        prepare_data_root(tmp_path, overwrite=False)
        assert caplog.messages == []
        assert counted(tmp_path) == sorted(expected)
        assert [*states(tmp_path).values()] == [sorted(expected)] * (2 if expected else 0)
        left = [text for text in texts if text not in expected]
        count(tmp_path, held_by_two, *left)
        openings = {name[-11:-6] for name in states(tmp_path)}
        assert len(openings) == bool(expected) + bool(left)
        expected = texts
    if not expected:
        return
    finish(tmp_path, complete=True)
    WHOLE.assert_counted(tmp_path, *expected)


@pytest.mark.parametrize("there", itertools.product([False, True], repeat=4), ids=str)
def test_every_file_of_moments_may_be_missing(tmp_path: Path, there: Sequence[bool]) -> None:
    count(tmp_path, held_by_two, 3, -7, 12)
    for name, stays in zip(states(tmp_path), there, strict=True):
        if not stays:
            (tmp_path / ".journal" / name).unlink()
    has_last, has_first = there[0] and there[2], there[1] and there[3]
    expected = [-7, 3, 12] if has_last else [-7, 3] if has_first else []
    assert counted(tmp_path) == expected
    prepare_data_root(tmp_path, overwrite=False)
    assert counted(tmp_path) == expected
    assert [*states(tmp_path).values()] == [expected] * (2 if expected else 0)
    # The texts that are not counted are, by whoever goes on.
    left = [text for text in (3, -7, 12) if text not in expected]
    count(tmp_path, held_by_four, *left, reader=1)
    finish(tmp_path, complete=True)
    WHOLE.assert_counted(tmp_path, 3, -7, 12)


def test_all_openings_have_one_number(tmp_path: Path) -> None:
    """Also where nobody has removed what one process saved that the other has not."""
    count(tmp_path, held_by_two, 3)
    count(tmp_path, held_by_two, -7, saves=(1, 0))
    count(tmp_path, held_by_two, 12)
    assert sorted(states(tmp_path)) == [
        "rank-00000-tp2/moments-00000-a.npz",
        "rank-00000-tp2/moments-00001-a.npz",
        "rank-00000-tp2/moments-00002-a.npz",
        "rank-00001-tp2/moments-00000-a.npz",
        "rank-00001-tp2/moments-00002-a.npz",
    ]
    assert counted(tmp_path) == [3, 12]


@pytest.mark.parametrize("missing", [0, 1])
def test_moments_without_a_part_do_not_count(tmp_path: Path, missing: int) -> None:
    count(tmp_path, held_by_two, 3)
    count(tmp_path, held_by_two, -7, reader=1)
    shutil.rmtree(part(tmp_path, f"rank-0000{2 + missing}-tp2"))
    assert counted(tmp_path) == [3]
    prepare_data_root(tmp_path, overwrite=False)
    assert len(states(tmp_path)) == 2
    finish(tmp_path)
    WHOLE.assert_counted(tmp_path, 3)


@pytest.mark.parametrize("name", ["rank-00000-tp2/moments-00000-a", "rank-00001-tp2/moments-00000-a"])
def test_damaged_moments_leave_those_before(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    count(tmp_path, held_by_two, 3, -7, 12)
    path = tmp_path / ".journal" / f"{name}.npz"
    flip(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="damaged, it holds no moments"):
        finish(tmp_path)
    prepare_data_root(tmp_path, overwrite=False)
    assert caplog.messages == [f"{path}: damaged, it holds no moments; its texts are counted anew"]
    assert counted(tmp_path) == [-7, 3]
    count(tmp_path, held_by_two, 12)
    finish(tmp_path, complete=True)
    WHOLE.assert_counted(tmp_path, 3, -7, 12)


def test_moments_that_the_disk_refuses_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard, _) = shards(held_by_two, WHOLE.header)
    writer = JournalWriter(tmp_path / ".journal", WHOLE.header, 0, shard)
    writer.directory.joinpath(".moments-00000-a.npz.tmp").mkdir()
    writer.save_moments(own(WHOLE.state(3), shard))
    with pytest.raises(UserError, match=r"moments-00000-a\.npz: Is a directory; make room or mend"):
        wait_until_saved(writer)
    with pytest.raises(UserError):
        writer.close()
