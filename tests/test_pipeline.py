"""What a run moves: few copies to the host, few writes, and no more memory than its buffers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import LENGTHS
from qk_sniffer.capture import buffers, plan
from qk_sniffer.capture.buffers import ALIGNMENT, N_BUFFERS, Staging
from qk_sniffer.storage import journal

SMALL = 32 * ALIGNMENT
CAPTURES: dict[str, dict[str, Any]] = {
    "all": {"sampler": {"type": "all"}},
    "uniform": {"sampler": {"type": "uniform", "base_rate": 4}, "min_bucket_size": 16},
    "everything": {
        "sampler": {"type": "uniform", "base_rate": 4},
        "min_bucket_size": 8,
        "capture_values": True,
        "capture_outputs": True,
        "capture_softmax": True,
    },
    "log_uniform": {"sampler": {"type": "log_uniform", "base_rate": 4}, "min_bucket_size": 16},
}


N_FILES = {name: 4 * (4 + 2) * (1 + (name == "everything")) + 1 for name in CAPTURES}


class Counted:
    """What passes on the way to the disk, batch by batch.

    Attributes:
        batches: Copies to the host, writes, and bytes of vectors of each batch.
        most_waiting: Buffers that were under way at once, at most.
        allocated: Bytes of all buffers.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, int, int]] = []
        self.most_waiting = self.allocated = 0
        self._copies = self._writes = 0
        copy, write, allocate = Staging._copy, journal._Segment.write, buffers._allocate
        end_batch = journal._Segment.end_batch

        def counting_copy(staging: Staging, *args: Any) -> Any:
            self._copies += 1
            self.most_waiting = max(self.most_waiting, N_BUFFERS - staging._free.qsize())
            return copy(staging, *args)

        def counting_write(segment: Any, data: Any) -> None:
            self._writes += 1
            write(segment, data)

        def counting_end(segment: Any) -> str:
            n_bytes = segment.size - sum(n for _, _, n in self.batches)
            self.batches.append((self._copies, self._writes, n_bytes))
            self._writes = 0
            return end_batch(segment)

        def counting_allocate(*args: Any, **options: Any) -> torch.Tensor:
            buffer = allocate(*args, **options)
            self.allocated += buffer.nbytes
            return buffer

        patch.setattr(Staging, "_copy", counting_copy)
        patch.setattr(journal._Segment, "write", counting_write)
        patch.setattr(journal._Segment, "end_batch", counting_end)
        patch.setattr(buffers, "_allocate", counting_allocate)
        patch.setattr(buffers, "needs_copy", lambda device: True)


@pytest.mark.parametrize("passage", [None, 32])
@pytest.mark.parametrize("name", CAPTURES)
def test_copies_writes_and_memory_have_limits(
    name: str,
    passage: int | None,
    predict: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a GPU's code and buffers that the vectors of one layer overflow; files stay the same."""
    run = {"sniffer": {"capture": CAPTURES[name]}, "model": {"prefill_chunk_size": passage}}
    assert predict(**run) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "root").glob("*/data.parquet")}
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "BUFFER_BYTES", SMALL)
        patch.setattr(journal, "SYNC_SECONDS", 0)
        counted = Counted(patch)
        run["sniffer"]["output"] = {"overwrite": True}
        assert predict(**run) == 0
    assert len(files) == N_FILES[name]
    assert all(path.read_bytes() == content for path, content in files.items())
    assert len(counted.batches) == -(-len(LENGTHS) // 3)
    copies_before = 0
    for copies, writes, n_bytes in counted.batches:
        # Copies of the batches behind may have begun, as the thread that writes is behind too.
        assert writes <= 2 + n_bytes / SMALL
        copies_before = copies
    total = sum(n_bytes for _, _, n_bytes in counted.batches)
    assert copies_before <= 2 * len(counted.batches) + total / SMALL
    assert 0 < counted.most_waiting <= N_BUFFERS
    assert counted.allocated <= 2 * N_BUFFERS * SMALL
    if name == "all":
        assert total > 20 * N_BUFFERS * SMALL


def test_batches_that_soon_follow_each_other_are_written_together(
    predict: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy, two writes and one commit for all of them; the files are those of single batches."""
    files = []
    for name, seconds, n_commits in (("single", 0.0, len(LENGTHS)), ("together", 3600.0, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(journal, "SYNC_SECONDS", seconds)
            counted = Counted(patch)
            run = {"sniffer": {"capture": CAPTURES["uniform"]}, "data": {"batch_size": 1}}
            assert predict(name, **run) == 0
        assert len(counted.batches) == n_commits
        n_copies, n_writes, _ = counted.batches[-1]
        assert n_copies <= n_commits and n_writes <= 2
        found = (tmp_path / name).glob("*/data.parquet")
        files.append({path.parent.name: path.read_bytes() for path in found})
    assert len(files[0]) == 4 * (4 + 2) + 1
    assert files[0] == files[1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", CAPTURES)
def test_batches_to_come_are_drawn_with_the_first(
    name: str,
    streaming: bool,
    predict: Callable[..., int],
    tmp_path: Path,
    draws: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they are known; the files are those of single draws."""
    files = []
    run = {
        "sniffer": {"capture": CAPTURES[name], "check": False},
        "data": {"batch_size": 1, "streaming": streaming},
    }
    for root, at_once, n_draws in (
        ("single", 1, len(LENGTHS)),
        ("together", plan.BATCHES_AT_ONCE, len(LENGTHS) if streaming else 1),
    ):
        draws.clear()
        monkeypatch.setattr(plan, "BATCHES_AT_ONCE", at_once)
        assert predict(root, **run) == 0
        assert len(draws) == n_draws
        found = (tmp_path / root).glob("*/data.parquet")
        files.append({path.parent.name: path.read_bytes() for path in found})
    assert len(files[0]) == N_FILES[name]
    assert files[0] == files[1]
