"""Data roots as independent readers see them."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
import yaml

from conftest import LENGTHS
from qk_sniffer.ids import example_id
from qk_sniffer.storage import journal, nothing_kept, reader
from qk_sniffer.storage.non_finite import NonFinite
from readers import assert_readers_agree, schema

Predict = Callable[..., int]


def test_datasets_duckdb_and_pyarrow_read_the_same_rows(predict: Predict, tmp_path: Path) -> None:
    assert predict(sniffer={"capture": {"capture_token_strings": True}}) == 0
    for head in ("l00h00q", "l03h03q", "l03h01k"):
        table = assert_readers_agree(tmp_path / "root", head, head_dim=16)
        assert table.num_rows == sum(LENGTHS)


def test_rows_are_sorted_and_unique(predict: Predict, tmp_path: Path) -> None:
    assert predict(data={"batch_size": 2}) == 0
    files = sorted((tmp_path / "root").glob("l*/data.parquet"))
    assert len(files) == 4 * (4 + 2)
    for file in files:
        table = pq.read_table(file)
        keys = list(zip(table["example_id"].to_pylist(), table["position"].to_pylist(), strict=True))
        assert keys == sorted(set(keys))


def test_the_examples_table_maps_ids(predict: Predict, texts: list[dict], tmp_path: Path) -> None:
    assert predict(data={"tokenizer": {"max_length": 40}}) == 0
    examples = datasets.load_dataset(str(tmp_path / "root"), "examples", split="train").to_list()
    expected = [
        {
            "example_id": example_id(row["id"]),
            "source_id": row["id"],
            "n_tokens": min(40, len(row["text"])),
            "truncated": len(row["text"]) > 40,
        }
        for row in texts
    ]
    assert examples == sorted(expected, key=lambda row: row["example_id"])


def test_token_strings_are_those_of_the_positions(
    predict: Predict, texts: list[dict], tmp_path: Path
) -> None:
    capture = {"capture_token_strings": True, "sampler": {"type": "uniform"}, "min_bucket_size": 4}
    assert predict(sniffer={"capture": capture}) == 0
    by_id = {example_id(row["id"]): row["text"] for row in texts}
    seen = 0
    for file in (tmp_path / "root").glob("l*/data.parquet"):
        for row in pq.read_table(file).to_pylist():
            character = by_id[row["example_id"]][row["position"]]
            assert row["token_str"] == {" ": "Ġ", "\n": "Ċ"}.get(character, character)
            seen += 1
    assert seen > 500


def test_token_strings_are_null_unless_asked_for(predict: Predict, tmp_path: Path) -> None:
    assert predict() == 0
    column = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")["token_str"]
    assert column.null_count == sum(LENGTHS)


def test_vectors_are_split_into_bytes_and_compressed(predict: Predict, tmp_path: Path) -> None:
    assert predict() == 0
    metadata = pq.read_metadata(tmp_path / "root" / "l00h00q" / "data.parquet")
    columns = [metadata.row_group(0).column(i) for i in range(6)]
    assert {column.compression for column in columns} == {"ZSTD"}
    assert "BYTE_STREAM_SPLIT" in columns[3].encodings


def test_the_manifest_describes_every_file(predict: Predict, tmp_path: Path) -> None:
    assert predict() == 0
    root = tmp_path / "root"
    manifest = json.loads((root / "manifest.json").read_text())
    heads = {path.parent.name for path in root.glob("l*/data.parquet")}
    assert set(manifest["heads"]) == heads
    for name, facts in {**manifest["heads"], "examples": manifest["examples"]}.items():
        file = root / name / "data.parquet"
        assert facts["bytes"] == file.stat().st_size
        assert facts["xxh3_128"] == xxhash.xxh3_128_hexdigest(file.read_bytes())
        assert facts["rows"] == pq.read_metadata(file).num_rows
    assert manifest["complete"] is True
    assert manifest["settings"]["capture"]["sampler"]["type"] == "all"
    assert manifest["settings"]["data"]["batch_size"] == 3
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_card_lists_every_head_as_a_config(predict: Predict, tmp_path: Path) -> None:
    assert predict() == 0
    root = tmp_path / "root"
    _, front_matter, body = (root / "README.md").read_text().split("---\n", 2)
    configs = yaml.safe_load(front_matter)["configs"]
    listed = {config["config_name"]: config["data_files"] for config in configs}
    assert set(listed) == {path.parent.name for path in root.glob("*/data.parquet")}
    assert listed["l00h00q"] == [{"split": "train", "path": "l00h00q/data.parquet"}]
    assert 'load_dataset("PATH_OR_REPO", "l00h00q", split="train")' in body


def test_nothing_but_the_layout_is_left(predict: Predict, tmp_path: Path) -> None:
    before = set(Path.cwd().iterdir())
    assert predict() == 0
    names = {path.name for path in (tmp_path / "root").iterdir() if not path.name.startswith("l0")}
    assert names == {"README.md", "config.yaml", "examples", "manifest.json"}
    assert not list((tmp_path / "root").rglob("*.tmp"))
    assert set(Path.cwd().iterdir()) == before


def test_load_dataset_never_serves_another_data_root_of_the_same_name(
    predict: Predict, tmp_path: Path
) -> None:
    def first_vector() -> list[float]:
        return datasets.load_dataset(str(tmp_path / "root"), "l00h00q", split="train")[0]["vector"]

    assert predict() == 0
    before = first_vector()
    output = {"overwrite": True}
    assert predict(family="qwen2", sniffer={"output": output}) == 0
    assert first_vector() != before
    (stored,) = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")["vector"].slice(0, 1)
    assert first_vector() == stored.as_py()


def test_a_sample_that_keeps_nothing_says_so(
    predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = {"sampler": {"type": "uniform", "base_rate": 1e-6}}
    assert predict(sniffer={"capture": capture}) == 0
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    assert table.num_rows == 0
    assert [(field.name, field.type) for field in table.schema] == schema(16)
    assert "no rows were kept; set sniffer.capture.sampler.type: all" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "root" / "manifest.json").read_text())
    manifest["examples"]["rows"] = 0
    assert "no text was read to its end; run the same command again" in nothing_kept(manifest)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_vectors_are_widened_exactly(
    predict: Predict, tmp_path: Path, dtype: str
) -> None:
    assert predict(model={"dtype": dtype}) == 0
    table = pq.read_table(tmp_path / "root" / "l00h00q" / "data.parquet")
    vectors = torch.from_numpy(np.stack(table["vector"].to_numpy()))
    assert torch.equal(vectors, vectors.to(getattr(torch, dtype)).float())
    assert vectors.abs().max() > 0.1


def test_pieces_of_a_file_do_not_depend_on_how_its_journal_was_written(
    predict: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer's pages end with its pieces, so that files would have other bytes."""
    found: list[list[int]] = []

    def noting(self: NonFinite, example_ids: Any, pieces: Any) -> None:
        found.append([len(piece) for piece in pieces])

    monkeypatch.setattr(NonFinite, "count", noting)
    monkeypatch.setattr(reader, "_LONG_STRETCH", 1)

    def pieces_of(name: str, *, heads: list[int] | None, passage: int | None, seconds: float) -> Any:
        found.clear()
        monkeypatch.setattr(journal, "SYNC_SECONDS", seconds)
        capture = {"sampler": {"type": "all"}, "layers": [1], "heads": heads, "capture_keys": False}
        run = {"sniffer": {"capture": capture}, "model": {"prefill_chunk_size": passage}}
        assert predict(name, **run) == 0
        return sorted(found)

    for heads in ([2], None):
        whole = pieces_of(f"whole-{heads}", heads=heads, passage=None, seconds=0)
        assert max(len(pieces) for pieces in whole) > 2
        assert whole == pieces_of(f"together-{heads}", heads=heads, passage=None, seconds=3600)
        assert whole == pieces_of(f"passages-{heads}", heads=heads, passage=7, seconds=0)
        assert whole == pieces_of(f"both-{heads}", heads=heads, passage=7, seconds=3600)
