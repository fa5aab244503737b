"""Sampling through the command line: the same rows whatever the batches, the same for every head."""

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conftest import write_jsonl

Predict = Callable[..., int]
CAPTURE = {"sampler": {"type": "log_uniform", "base_rate": 2.0, "seed": 3}, "min_bucket_size": 4}


def read(root: Path) -> dict[str, dict[tuple[int, int, int], list[float]]]:
    """Vectors by (example_id, position, bucket) for every head."""
    columns = ("example_id", "position", "bucket")
    heads = {}
    for file in sorted(root.glob("l*/data.parquet")):
        table = pq.read_table(file)
        keys = zip(*(table[name].to_pylist() for name in columns), strict=True)
        heads[file.parent.name] = dict(zip(keys, table["vector"].to_pylist(), strict=True))
    return heads


def assert_same_rows(first: Path, second: Path) -> None:
    a, b = read(first), read(second)
    assert a.keys() == b.keys()
    assert sum(map(len, a.values())) > 1000
    for head in a:
        assert list(a[head]) == list(b[head])
        np.testing.assert_allclose(list(a[head].values()), list(b[head].values()), atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_rows_do_not_depend_on_the_batch_size(
    predict: Predict, tmp_path: Path, batch_size: int
) -> None:
    assert predict("one", data={"batch_size": 1}, sniffer={"capture": CAPTURE}) == 0
    assert predict("more", data={"batch_size": batch_size}, sniffer={"capture": CAPTURE}) == 0
    assert_same_rows(tmp_path / "one", tmp_path / "more")


def test_rows_do_not_depend_on_the_order_of_the_texts(
    predict: Predict, texts: list[dict], tmp_path: Path
) -> None:
    shuffled = write_jsonl(tmp_path / "s.jsonl", random.Random(0).sample(texts, len(texts)))
    assert predict("in_order", sniffer={"capture": CAPTURE}) == 0
    assert predict("shuffled", data={"path": str(shuffled)}, sniffer={"capture": CAPTURE}) == 0
    assert_same_rows(tmp_path / "in_order", tmp_path / "shuffled")


def test_rows_do_not_depend_on_streaming(predict: Predict, tmp_path: Path) -> None:
    assert predict("mapped", sniffer={"capture": CAPTURE}) == 0
    assert predict("streamed", data={"streaming": True}, sniffer={"capture": CAPTURE}) == 0
    assert_same_rows(tmp_path / "mapped", tmp_path / "streamed")


def test_all_heads_of_a_layer_and_kind_keep_the_same_positions(
    predict: Predict, tmp_path: Path
) -> None:
    assert predict(sniffer={"capture": CAPTURE}) == 0
    draws = defaultdict(set)
    for head, rows in read(tmp_path / "root").items():
        layer, kind = head[:3], head[-1]
        draws[layer, kind].add(tuple(rows))
    assert len(draws) == 8
    assert all(len(masks) == 1 for masks in draws.values())
    assert len(set.union(*draws.values())) == 8


def test_a_sample_is_a_part_of_the_whole(predict: Predict, tmp_path: Path) -> None:
    assert predict("sample", sniffer={"capture": CAPTURE}) == 0
    assert predict("whole") == 0
    sample, whole = read(tmp_path / "sample"), read(tmp_path / "whole")
    for head, rows in sample.items():
        everything = {key[:2]: vector for key, vector in whole[head].items()}
        assert all(everything[key[:2]] == vector for key, vector in rows.items())


def test_head_sampling_writes_the_files_of_the_same_heads_each_time(
    predict: Predict, tmp_path: Path
) -> None:
    capture = {"head_sampling": {"count": 5, "seed": 1}}
    assert predict("one", sniffer={"capture": capture}) == 0
    assert predict("two", data={"batch_size": 7}, sniffer={"capture": capture}) == 0
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert one.keys() == two.keys()
    queries = {name for name in one if name.endswith("q")}
    assert len(queries) == 5
    expected = {f"{name[:4]}{int(name[4:6]) // 2:02d}k" for name in queries}
    assert {name for name in one if name.endswith("k")} == expected
