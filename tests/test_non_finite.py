"""Rows with an infinity or a NaN: a run goes on, and every place names them."""

import json
import re
from collections import Counter
from collections.abc import Callable
from csv import DictReader
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from conftest import LENGTHS, byte_tokenizer, write_jsonl
from families import FAMILIES, tiny_model
from killing import BEFORE, Death, Processes
from qk_sniffer.cli import main
from qk_sniffer.storage import count_rows
from test_ranks import Run

Predict = Callable[..., int]
WriteRun = Callable[..., list[str]]
LOUD = "~"
"""A token whose embedding float16 holds, and what the layers add to it not."""


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model in float16 that overflows at ``LOUD``."""
    directory = tmp_path_factory.mktemp("overflowing")
    model, tokenizer = tiny_model(FAMILIES["llama"]), byte_tokenizer()
    loud: Any = tokenizer.convert_tokens_to_ids(LOUD)
    with torch.no_grad():
        model.get_input_embeddings().weight[loud] = 65_000.0
        model.model.layers[1].mlp.down_proj.weight *= 1_000.0
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def loud_texts(texts: list[dict[str, Any]], tmp_path: Path) -> str:
    """The texts, of which one has the loud token in its middle; it begins no batch, to be checked."""
    rows = [dict(row) for row in texts]
    rows[2]["text"] = rows[2]["text"][:12] + LOUD + rows[2]["text"][13:]
    return str(write_jsonl(tmp_path / "loud.jsonl", rows))


def counted(root: Path) -> tuple[dict[str, int], set[int]]:
    """Rows that are not finite in each head's file, where there are any, and the texts they are of."""
    rows: Counter[str] = Counter()
    texts: set[int] = set()
    for file in root.glob("l*/data.parquet"):
        table = pq.read_table(file)
        broken = ~np.isfinite(np.stack(table["vector"].to_numpy(zero_copy_only=False))).all(axis=1)
        rows[file.parent.name] += int(broken.sum())
        texts |= set(table["example_id"].to_numpy()[broken].tolist())
    return {name: n for name, n in rows.items() if n}, texts


def stored(root: Path) -> dict[str, int]:
    manifest = json.loads((root / "manifest.json").read_text())
    return {
        name: facts["non_finite"] for name, facts in manifest["heads"].items() if "non_finite" in facts
    }


def test_a_text_that_overflows_is_named_everywhere(
    predict: Predict,
    overflowing: str,
    loud_texts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "root"
    changed: dict[str, Any] = {"model": {"name": overflowing}, "data": {"path": loud_texts}}
    assert predict(**changed) == 0
    rows, texts = counted(root)
    assert len(texts) == 1
    layers = sorted({int(name[1:3]) for name in rows})
    assert layers == [2, 3]
    total = sum(rows.values())
    line = f"{total:,} rows of 1 text hold inf or NaN, in layers 2-3"
    remedy = "; set model.dtype to bfloat16, or to float32, and capture them anew"
    assert capsys.readouterr().out.splitlines()[-1] == line + remedy
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["non_finite"] == {"rows": total, "texts": 1, "layers": layers}
    assert stored(root) == rows
    assert f"- {line}\n" in (root / "README.md").read_text()
    assert main(["verify", str(root)]) == 0
    assert f" rows, but {line}{remedy}\n" in capsys.readouterr().out
    assert main(["report", str(root)]) == 0
    assert line in (root / "report" / "index.html").read_text()
    # In float32 the same texts are numbers all through, and nothing speaks of it.
    capsys.readouterr()
    changed["model"]["dtype"] = "float32"
    assert predict("wide", **changed) == 0
    assert "NaN" not in capsys.readouterr().out
    assert counted(tmp_path / "wide") == ({}, set())
    for name in ("manifest.json", "README.md"):
        assert not re.search("non_finite|NaN", (tmp_path / "wide" / name).read_text())
    assert main(["verify", str(tmp_path / "wide")]) == 0
    assert "all is well" in capsys.readouterr().out


def test_counts_are_those_of_all_that_is_there(
    write_run: WriteRun, overflowing: str, loud_texts: str, tmp_path: Path, processes: Processes
) -> None:
    """Whether files are written at once, after a death before the manifest, by two
    processes, or joined with those of an earlier run."""
    changed: dict[str, Any] = {"model": {"name": overflowing}, "data": {"path": loud_texts}}
    assert main(write_run("whole", **changed)) == 0
    expected = json.loads((tmp_path / "whole" / "manifest.json").read_text())

    ended = processes.run(
        write_run("killed", **changed), sync_seconds=0.0, death=Death("manifest", BEFORE, 1)
    )
    assert ended.exitcode == -9
    assert main(["finalize", str(tmp_path / "killed")]) == 0

    (tmp_path / "shared").mkdir()
    config = yaml.safe_load((tmp_path / "whole.yaml").read_text())
    config["sniffer"]["output"]["data_root"] = str(tmp_path / "shared" / "root")
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "logs"}}
    Run(processes, tmp_path / "shared", config).succeed(2, logger=logger)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        assert [float(row["rows_kept"]) for row in DictReader(file)] == [count_rows(expected)]

    for max_samples in (4, len(LENGTHS)):
        changed["data"]["max_samples"] = max_samples
        assert main(write_run("grown", **changed)) == 0

    for name in ("killed", "shared/root", "grown"):
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["non_finite"] == expected["non_finite"], name
        assert stored(tmp_path / name) == counted(tmp_path / name)[0] == stored(tmp_path / "whole")
