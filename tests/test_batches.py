"""Which texts are read together, in which order, and by which process."""

from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from conftest import LENGTHS, write_jsonl
from qk_sniffer.config import TokenizerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.data.batches import (
    WINDOW_BATCHES,
    padded_tokens,
    plan_batches,
    rest_of,
    share_of,
)
from qk_sniffer.data.streaming import StreamedBatches
from qk_sniffer.data.texts import TextSource
from qk_sniffer.data.tokenizing import Encode, TextColumn
from qk_sniffer.errors import UserError


def heavy_tailed(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(3, 1.5, count).astype(np.int64)


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("budget", [None, 1, 64, 2048])
def test_a_plan_has_every_text_once_and_keeps_its_limits(
    count: int, batch_size: int, budget: int | None
) -> None:
    lengths = heavy_tailed(count)
    batches = plan_batches(lengths, batch_size, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    for batch in batches:
        assert 1 <= batch.size <= batch_size
        assert budget is None or batch.size == 1 or padded_tokens(batch, lengths) <= budget
    if budget is None:
        assert [row for batch in batches for row in batch] == list(range(count))


def test_windows_don_t_change_when_texts_are_added() -> None:
    lengths, most_tokens = heavy_tailed(1000), 256 * WINDOW_BATCHES
    some, more = (plan_batches(lengths[:count], 32, 256) for count in (500, 1000))
    pairs = zip(some, more, strict=False)
    kept = takewhile(lambda pair: pair[0].tolist() == pair[1].tolist(), pairs)
    texts = [row for batch, _ in kept for row in batch]
    assert sorted(texts) == list(range(len(texts)))
    assert lengths[len(texts) : 500].sum() <= most_tokens


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("budget", [None, 2048])
def test_shares_are_whole_batches_balanced_by_tokens(size: int, budget: int | None) -> None:
    lengths = heavy_tailed(1000)
    batches = plan_batches(lengths, 8, budget)
    order = {tuple(batch): number for number, batch in enumerate(batches)}
    shares = [share_of(batches, lengths, rank, size) for rank in range(size)]
    numbers = [[order[tuple(batch)] for batch in share] for share in shares]
    assert all(share == sorted(share) for share in numbers)
    assert sorted(number for share in numbers for number in share) == list(range(len(batches)))
    loads = [sum(padded_tokens(batch, lengths) for batch in share) for share in shares]
    largest = max(padded_tokens(batch, lengths) for batch in batches)
    assert max(loads) <= max(largest, 1.02 * sum(loads) / size)


def test_texts_that_are_left_keep_their_company() -> None:
    is_left = np.array([True, False, True, True, False, False, True])
    batches = rest_of([np.array([0, 1, 2]), np.array([4, 5]), np.array([3, 6])], is_left)
    assert [batch.tolist() for batch in batches] == [[0, 2], [3, 6]]


@pytest.fixture
def batches(model_dir: Callable[[str], Path]) -> Callable[..., list[dict[str, Any]]]:
    def read(path: Path, **options: Any) -> list[dict[str, Any]]:
        data = TextDataModule(
            str(path), tokenizer=TokenizerConfig(name=str(model_dir("llama"))), **options
        )
        data.setup("predict")
        read = list(data.predict_dataloader())
        if (told := data.own_batches()) is not None:
            found = [[b["example_ids"].tolist(), b["sequence_lengths"].tolist()] for b in read]
            assert [[ids.tolist(), lengths.tolist()] for ids, lengths in told] == found
        assert (told is None) == data.streaming
        return read

    return read


Batches = Callable[..., list[dict[str, Any]]]


def test_a_budget_reads_the_longest_first_and_a_longer_text_alone(
    batches: Batches, text_file: Path
) -> None:
    read = batches(text_file, batch_size=4, max_tokens_per_batch=50)
    lengths = [batch["sequence_lengths"].tolist() for batch in read]
    assert lengths == [[61], [48], [37], [24, 13], [5, 1]]
    assert [list(batch["input_ids"].shape) for batch in read] == [
        [len(batch), max(batch)] for batch in lengths
    ]
    assert sorted(n for batch in lengths for n in batch) == sorted(LENGTHS)


@pytest.mark.parametrize("budget", [None, 50])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_has_the_batches_of_a_dataset(
    batches: Batches, tmp_path: Path, budget: int | None, num_workers: int
) -> None:
    lengths = np.minimum(heavy_tailed(150), 90)
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "x" * int(n)} for n in lengths])
    options = {"batch_size": 3, "max_tokens_per_batch": budget, "num_workers": num_workers}
    stored = [batch["source_ids"] for batch in batches(path, **options)]
    streamed = [batch["source_ids"] for batch in batches(path, **options, streaming=True)]
    assert sorted(streamed) == sorted(stored)
    if budget is None:
        assert streamed == stored
    else:
        longest = [int(lengths[[int(row) for row in batch]].max()) for batch in stored]
        assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("budget", [None, 50])
@pytest.mark.parametrize("size", [2, 3, 200])
def test_shares_of_a_stream_are_whole_batches_and_alike(
    model_dir: Callable[[str], Path], tmp_path: Path, budget: int | None, size: int
) -> None:
    lengths = np.minimum(heavy_tailed(150), 90)
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "x" * int(n)} for n in lengths])
    rows = TextSource(str(path), None, None, "train").stream(None)
    encode = Encode(AutoTokenizer.from_pretrained(model_dir("llama")), TextColumn("text"), None, None)

    def share(rank: int, size: int) -> list[tuple[int, ...]]:
        batches = StreamedBatches(rows, encode, 3, budget, [], rank, size)
        return [tuple(row["example_id"] for row in batch) for batch in batches]

    shares = [share(rank, size) for rank in range(min(size, 3))]
    whole = share(0, 1)
    assert sorted(row for batch in whole for row in batch) == list(range(150))
    assert all(batch in whole for one in shares for batch in one)
    if size <= 3:
        assert sorted(batch for one in shares for batch in one) == sorted(whole)
        tokens = [sum(lengths[list(batch)].sum() for batch in one) for one in shares]
        assert min(tokens) > 0.7 * max(tokens)


def test_tokenizing_in_several_processes_changes_nothing(batches: Batches, text_file: Path) -> None:
    one, two = (batches(text_file, batch_size=2, num_proc=num_proc) for num_proc in (None, 2))
    assert [b["input_ids"].tolist() for b in one] == [b["input_ids"].tolist() for b in two]


@pytest.mark.parametrize("field", ["max_tokens_per_batch", "num_proc"])
def test_fields_below_one_are_refused(text_file: Path, field: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.{field}: must be at least 1, got 0"):
        TextDataModule(str(text_file), **{field: 0})
