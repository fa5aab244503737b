"""Independent readers of a head's file, its types, the line of a mistake, and eager attention."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qk_sniffer.kinds import SOFTMAX_COLUMNS
from qk_sniffer.reading import Head


def schema(head_dim: int, softmax: bool = False) -> list[tuple[str, pa.DataType]]:
    columns = [
        ("bucket", pa.int32()),
        ("example_id", pa.int32()),
        ("position", pa.int32()),
        ("vector", pa.list_(pa.field("element", pa.float32()), head_dim)),
        ("sliding_window", pa.int32()),
        ("token_str", pa.string()),
    ]
    statistics = [(name, pa.float32()) for name in SOFTMAX_COLUMNS]
    statistics[3] = ("argmax_position", pa.int32())
    return columns + (statistics if softmax else [])


def assert_readers_agree(root: Path, head: str, head_dim: int, *, softmax: bool = False) -> pa.Table:
    """pyarrow, datasets, DuckDB and Polars see the same rows, in the exact types of the schema."""
    table = pq.read_table(sorted(map(str, (root / head).glob("*.parquet"))))
    assert [(field.name, field.type) for field in table.schema] == schema(head_dim, softmax)

    statistics = dict.fromkeys(SOFTMAX_COLUMNS, datasets.Value("float32"))
    statistics["argmax_position"] = datasets.Value("int32")
    loaded = datasets.load_dataset(str(root), head, split="train")
    assert loaded.features == datasets.Features(
        bucket=datasets.Value("int32"),
        example_id=datasets.Value("int32"),
        position=datasets.Value("int32"),
        vector=datasets.List(datasets.Value("float32"), length=head_dim),
        sliding_window=datasets.Value("int32"),
        token_str=datasets.Value("string"),
        **(statistics if softmax else {}),
    )
    assert loaded.to_list() == table.to_pylist()

    columns = ", ".join(table.column_names)
    queried = duckdb.sql(f"SELECT {columns} FROM '{root}/{head}/*.parquet'")
    types = ["INTEGER"] * 3 + ["FLOAT[]", "INTEGER", "VARCHAR"]
    types += [*["FLOAT"] * 3, "INTEGER", *["FLOAT"] * 2] if softmax else []
    assert [str(t) for t in queried.types] == types
    rows = [dict(zip(table.column_names, row, strict=True)) for row in queried.fetchall()]
    assert rows == table.to_pylist()
    assert polars.read_parquet(root / head / "*.parquet").to_dicts() == table.to_pylist()
    return table


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake prints, which ends the output and is no traceback."""
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    prefix = "qk-sniffer: error: "
    assert last.startswith(prefix)
    assert stderr.count(prefix) == 1
    return last.removeprefix(prefix)


def files_of(root: Path) -> dict[str, bytes]:
    """The bytes of every Parquet file, by its directory."""
    return {path.parent.name: path.read_bytes() for path in sorted(root.glob("*/data.parquet"))}


def assert_same_rows(root: Path, other: Path) -> None:
    """The same rows in the same order; vectors to the last bits of a model that batches otherwise."""
    names = sorted(path.parent.name for path in other.glob("*/data.parquet"))
    assert names == sorted(path.parent.name for path in root.glob("*/data.parquet"))
    for name in names:
        mine, theirs = (pq.read_table(place / name / "data.parquet") for place in (root, other))
        if name != "examples":
            vectors = [
                np.stack(table["vector"].to_numpy(zero_copy_only=False)) for table in (mine, theirs)
            ]
            np.testing.assert_allclose(*vectors, atol=1e-5, rtol=0)
            statistics = [column for column in SOFTMAX_COLUMNS if column in mine.column_names]
            for column in statistics:
                np.testing.assert_allclose(mine[column], theirs[column], atol=1e-5, rtol=1e-5)
            dropped = ["vector", *statistics]
            mine, theirs = mine.drop_columns(dropped), theirs.drop_columns(dropped)
        assert mine.equals(theirs), name


def assert_same_moments(root: Path, other: Path, rtol: float = 1e-10) -> None:
    """Two runs have the same moments, but for the order in which they were summed."""
    for path in sorted((root / "moments").glob("*.parquet")):
        table, same = (pq.read_table(run / "moments" / path.name) for run in (root, other))
        assert table.schema == same.schema
        for name in table.column_names:
            values = table[name].combine_chunks()
            if not pa.types.is_fixed_size_list(values.type):
                assert values.equals(same[name].combine_chunks()), (path.name, name)
                continue
            numbers = values.values.to_numpy().reshape(len(table), -1)
            found = same[name].combine_chunks().values.to_numpy().reshape(len(table), -1)
            sizes = np.linalg.norm(numbers, axis=1)
            assert np.all(
                np.linalg.norm(numbers - found, axis=1) <= (rtol * sizes + 1e-15 * (rtol > 0))
            ), name


def eager_attention(model_dir: Path, texts: list[dict[str, Any]]) -> dict[str, list[torch.Tensor]]:
    """The model's own probabilities in each text, by its id: (heads, N, N) for each layer."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    found = {}
    for text in texts:
        tokens = tokenizer(text["text"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            layers = model(input_ids=tokens, output_attentions=True).attentions
        found[text["id"]] = [layer[0] for layer in layers]
    return found


def softmax_means_of(
    head: Head, source_ids: Mapping[int, str], eager: dict[str, list[torch.Tensor]], n_local: int
) -> dict[str, float]:
    """The means of the statistics over the rows of a query head, a row at a time."""
    rows = head.numpy()
    found: dict[str, list[float]] = defaultdict(list)
    for example, position in zip(rows["example_id"].tolist(), rows["position"].tolist(), strict=True):
        p = eager[source_ids[example]][head.layer.layer_idx][head.head, position].numpy()
        attended = p[p > 0]
        found["entropy"].append(-(attended * np.log(attended)).sum())
        found["max_prob"].append(p.max())
        found["sink_prob"].append(p[0])
        found["local_prob"].append(p[max(0, position - n_local + 1) : position + 1].sum())
        if position:
            found["previous"].append(p.argmax() == position - 1)
    return {name: float(np.mean(values)) for name, values in found.items()}
