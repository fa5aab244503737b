"""Moments of whole runs, against float64 over the rows that the very run captured."""

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from conftest import Run, byte_tokenizer, directory_of, write_jsonl
from families import FAMILIES, tiny_model
from qk_sniffer.callback import SnifferCallback
from qk_sniffer.capture import moments
from qk_sniffer.cli import main
from qk_sniffer.config import CaptureConfig, MomentsConfig, OutputConfig, SamplerConfig
from qk_sniffer.data import TextDataModule
from qk_sniffer.module import SnifferModule
from readers import assert_same_moments, assert_same_rows, error_line

Floats = npt.NDArray[np.float64]
Rows = dict[tuple[int, int, bool, int | None], dict[str, Any]]

ALL_KINDS = {"capture_values": True, "capture_outputs": True}
WITH_OTHERS = ("bloom", "gpt_oss", "gemma2", "deepseek_v3", "llama4", "mpt", "gemma4_text")


def moments_of(root: Path, kind: str) -> Rows:
    """The rows of a file of moments, as any reader of Parquet sees them."""
    table = pq.read_table(root / "moments" / f"{kind}.parquet")
    rows = {}
    for row in table.to_pylist():
        key = row["layer_idx"], row["head"], row["pre_rope"], row["bucket"]
        assert key not in rows
        rows[key] = row
    assert list(rows) == sorted(rows, key=lambda key: (*key[:3], -1 if key[3] is None else key[3]))
    return rows


def vectors_of(root: Path, head: str) -> tuple[Floats, Floats, npt.NDArray[np.int32]]:
    """(N, D) vectors, positions and buckets of all rows of a head."""
    table = pq.read_table(root / head / "data.parquet")
    values = table["vector"].combine_chunks().values.to_numpy().astype(np.float64)
    positions = table["position"].to_numpy().astype(np.float64)
    return values.reshape(len(table), -1), positions, table["bucket"].to_numpy()


def off(found: Any, expected: Floats, scale: float | None = None) -> float:
    """How far off some numbers are, beside the size of all of them."""
    difference = np.linalg.norm(np.ravel(found) - np.ravel(expected))
    return float(difference / (np.linalg.norm(expected) if scale is None else scale))


def assert_moments(row: dict[str, Any], vectors: Floats, positions: Floats, within: float) -> None:
    assert row["count"] == len(vectors)
    assert row["position_sum"] == positions.sum()
    assert row["position_square_sum"] == (positions**2).sum()
    mean = vectors.mean(axis=0)
    about, places = vectors - mean, positions - positions.mean()
    covariance = about.T @ about / len(vectors)
    # A covariance of one token is nothing, and that with positions may be little.
    smallest = 1e-12 * np.linalg.norm(mean) ** 2
    size = float(np.sqrt(np.trace(covariance)))
    assert off(row["mean"], mean, np.linalg.norm(vectors) / len(vectors) ** 0.5) <= within
    assert off(row["covariance"], covariance, np.linalg.norm(covariance) + smallest) <= within
    link = places @ about / len(vectors)
    assert off(row["position_covariance"], link, size * places.std() + smallest) <= within
    square = np.reshape(row["covariance"], covariance.shape)
    assert np.array_equal(square, square.T)


@pytest.mark.parametrize("dtype, within", [("float32", 1e-5), ("bfloat16", 1e-3)])
@pytest.mark.parametrize("family", [*FAMILIES, *WITH_OTHERS])
def test_moments_are_those_of_all_rows(
    family: str,
    dtype: str,
    within: float,
    predict: Run,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Of every kind, and of both stages, whichever of them rows have."""
    model = {"name": str(directory_of(family, model_dir, tmp_path)), "dtype": dtype}
    for pre_rope in (False, True):
        sniffer = {
            "capture": ALL_KINDS | {"capture_pre_rope": pre_rope},
            "moments": {"enabled": True, "pre_rope": True},
        }
        root = f"root-{pre_rope}"
        assert predict(root, model=model, sniffer=sniffer) == 0
        n_rows = 0
        for kind in "qkvo":
            rows = moments_of(tmp_path / root, kind)
            stages = {key[2] for key in rows}
            assert stages == ({False, True} if kind in "qk" else {False})
            for (layer_idx, head, stage, bucket), row in rows.items():
                assert bucket is None
                if stage == (pre_rope and kind in "qk"):
                    name = f"l{layer_idx:02d}h{head:02d}{kind}"
                    vectors, positions, _ = vectors_of(tmp_path / root, name)
                    assert_moments(row, vectors, positions, within)
                    n_rows += 1
        manifest = json.loads((tmp_path / root / "manifest.json").read_text())
        assert n_rows == len(manifest["heads"]) > 0
        assert main(["verify", str(tmp_path / root)]) == 0


def test_by_bucket_and_with_the_keys(predict: Run, tmp_path: Path) -> None:
    capture = {"min_bucket_size": 16, "heads": [1, 2]}
    moments = {"enabled": True, "by_bucket": True, "cross": True}
    assert predict(sniffer={"capture": capture, "moments": moments}) == 0
    root = tmp_path / "root"
    heads = {(layer, head) for layer in range(4) for head in (1, 2)}
    rows = moments_of(root, "q")
    assert {key[:2] for key in rows} == heads and {key[3] for key in rows} == {0, 1, 2, 3}
    for (layer_idx, head, _, bucket), row in rows.items():
        vectors, positions, buckets = vectors_of(root, f"l{layer_idx:02d}h{head:02d}q")
        keys, _, _ = vectors_of(root, f"l{layer_idx:02d}h{head // 2:02d}k")
        inside = buckets == bucket
        assert_moments(row, vectors[inside], positions[inside], 1e-5)
        mean = keys[inside].mean(axis=0)
        about = vectors[inside] - vectors[inside].mean(axis=0)
        together = about.T @ (keys[inside] - mean) / inside.sum()
        assert off(row["key_mean"], mean) <= 1e-5
        assert off(row["key_covariance"], together) <= 1e-5
    assert "key_mean" not in next(iter(moments_of(root, "k").values()))


def test_moments_change_no_row_and_rows_no_moment(predict: Run, tmp_path: Path) -> None:
    capture: dict[str, Any] = {
        "sampler": {"type": "uniform", "base_rate": 4.0},
        "min_bucket_size": 16,
    }
    moments = {"enabled": True, "pre_rope": True}
    assert predict("rows", sniffer={"capture": capture}) == 0
    assert predict("both", sniffer={"capture": capture, "moments": moments}) == 0
    alone = {"sampler": {"type": "none"}, "min_bucket_size": 16}
    assert predict("moments", sniffer={"capture": alone, "moments": moments}) == 0
    assert_same_rows(tmp_path / "rows", tmp_path / "both")
    assert not (tmp_path / "rows" / "moments").exists()
    assert "oment" not in (tmp_path / "rows" / "README.md").read_text()
    assert "moments" not in json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert_same_moments(tmp_path / "both", tmp_path / "moments", rtol=0)


def test_datasets_reads_them(predict: Run, tmp_path: Path) -> None:
    assert predict(sniffer={"moments": {"enabled": True}}) == 0
    loaded = load_dataset(str(tmp_path / "root"), "moments_q", split="train")
    stored = moments_of(tmp_path / "root", "q")
    assert len(loaded) == len(stored) == 16
    for row in loaded:
        assert row == stored[row["layer_idx"], row["head"], row["pre_rope"], row["bucket"]]


@pytest.fixture
def run_in_float64(tmp_path: Path, text_file: Path) -> Iterator[Callable[..., Path]]:
    """A run in a notebook, of a model in float64, where no rounding shows what was read together."""
    model = tiny_model(FAMILIES["qwen3"]).to(torch.float64)
    made = 0

    def run(capture: dict[str, Any], batch_size: int, passages: int | None = None) -> Path:
        nonlocal made
        made += 1
        root = tmp_path / f"run-{made}"
        module = SnifferModule.of(model, byte_tokenizer(), prefill_chunk_size=passages)
        data = TextDataModule(str(text_file), id_column="id", batch_size=batch_size)
        sniffer = SnifferCallback(
            OutputConfig(str(root)),
            CaptureConfig(sampler=SamplerConfig(type="none"), **capture),
            moments=MomentsConfig(enabled=True, by_bucket=True, pre_rope=True, cross=True),
        )
        trainer = pl.Trainer(callbacks=[sniffer], accelerator="cpu", logger=False)
        trainer.predict(module, data, return_predictions=False)
        return root

    yield run


def test_batches_and_passages_do_not_matter(run_in_float64: Callable[..., Path]) -> None:
    capture = {"min_bucket_size": 16} | ALL_KINDS
    alone = run_in_float64(capture, 1)
    for batch_size, passages in ((4, None), (7, None), (1, 10), (3, 7), (7, 1)):
        assert_same_moments(alone, run_in_float64(capture, batch_size, passages))


def test_texts_are_read_again_until_they_are_counted(
    predict: Run, write_run: Callable[..., list[str]], tmp_path: Path
) -> None:
    """More texts later, and a state that was lost: rows stay, and each text counts once."""
    sniffer = {"moments": {"enabled": True}}
    assert predict("whole", data={"batch_size": 1}, sniffer=sniffer) == 0
    data: dict[str, Any] = {"batch_size": 1, "max_samples": 3}
    assert predict(data=data, sniffer=sniffer) == 0
    assert predict(data=data | {"max_samples": None}, sniffer=sniffer) == 0
    assert_same_moments(tmp_path / "whole", tmp_path / "root")
    assert_same_rows(tmp_path / "whole", tmp_path / "root")
    for path in (tmp_path / "root" / "moments").iterdir():
        path.unlink()
    assert predict(data=data | {"max_samples": None}, sniffer=sniffer) == 0
    assert_same_moments(tmp_path / "whole", tmp_path / "root")
    assert_same_rows(tmp_path / "whole", tmp_path / "root")


@pytest.mark.parametrize("n_calls", [1, 5, 30])
def test_ctrl_c_while_a_batch_is_counted_waits_for_it(
    n_calls: int, predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of the sums; the texts that are named are those that count."""
    sniffer = {"moments": {"enabled": True, "by_bucket": True}}
    data = {"batch_size": 1}
    assert predict("whole", data=data, sniffer=sniffer) == 0
    count, calls = moments._add, itertools.count()

    def interrupted(*args: Any) -> None:
        if next(calls) == n_calls:
            os.kill(os.getpid(), signal.SIGINT)
        count(*args)

    with monkeypatch.context() as patch:
        patch.setattr(moments, "_add", interrupted)
        assert predict(data=data, sniffer=sniffer) == 130
    assert predict(data=data, sniffer=sniffer) == 0
    assert_same_moments(tmp_path / "whole", tmp_path / "root")
    assert_same_rows(tmp_path / "whole", tmp_path / "root")
    assert main(["verify", str(tmp_path / "root")]) == 0


def test_texts_without_tokens_count_nothing(predict: Run, tmp_path: Path) -> None:
    rows = [{"id": f"text-{i}", "text": text} for i, text in enumerate(["", "", "def", "", "class"])]
    data = {"path": str(write_jsonl(tmp_path / "texts.jsonl", rows)), "batch_size": 2}
    tokenizer = {"add_special_tokens": False}
    sniffer = {"moments": {"enabled": True}}
    assert predict(data=data | {"tokenizer": tokenizer}, sniffer=sniffer) == 0
    assert {row["count"] for row in moments_of(tmp_path / "root", "k").values()} == {8}
    assert main(["verify", str(tmp_path / "root")]) == 0


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "cross": (
        {"capture": {"capture_keys": False}, "moments": {"enabled": True, "cross": True}},
        "sniffer.moments.cross: queries and keys are summed together",
    ),
    "nothing that is rotated": (
        {
            "capture": {
                "capture_queries": False,
                "capture_keys": False,
                "capture_values": True,
            },
            "moments": {"enabled": True, "pre_rope": True},
        },
        "sniffer.moments.pre_rope: values and outputs are not rotated",
    ),
    "not enabled": (
        {"moments": {"by_bucket": True}},
        "sniffer.moments.by_bucket: no moments are summed",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, predict: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sniffer, words = MISTAKES[mistake]
    assert predict(sniffer=sniffer) == 2
    assert words in error_line(capsys)


def test_other_moments_are_another_run(predict: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(sniffer={"moments": {"enabled": True}}) == 0
    assert predict(sniffer={"moments": {"enabled": True, "by_bucket": True}}) == 2
    assert "sniffer.moments.by_bucket is false there and true here" in error_line(capsys)
    assert predict() == 2
    assert "sniffer.moments.enabled is true there and not set here" in error_line(capsys)
