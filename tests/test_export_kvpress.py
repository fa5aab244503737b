"""``qk-sniffer export-kvpress``: what it writes, and kvpress itself on it (``make kvpress``)."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conftest import LENGTHS, Run, byte_tokenizer, write_jsonl
from moments_of_rows import expected, part
from qk_sniffer import Captures
from qk_sniffer.cli import main
from readers import error_line
from smollm2 import CHECKPOINT
from tiny import tiny_causal_lm

REPOSITORY = Path(__file__).parents[1]
KVPRESS = REPOSITORY / ".cache" / "kvpress" / "bin" / "python"
BUCKETS = {"sampler": {"type": "all"}, "min_bucket_size": 4}
TEXTS = [
    {"id": name, "text": topics[name][:600].encode("ascii", "replace").decode()}
    for name in ("assert", "class", "for")
]
"""Within the characters that kvpress takes of a text."""


def with_moments(
    predict: Run, tmp_path: Path, *, by_bucket: bool = False, capture: Any = None, **sections: Any
) -> Path:
    """A data root with moments of the queries before RoPE too."""
    moments = {"enabled": True, "pre_rope": True, "by_bucket": by_bucket}
    sniffer = {"capture": {**BUCKETS, **(capture or {})}, "moments": moments}
    assert predict(sniffer=sniffer, **sections) == 0
    return tmp_path / "root"


@pytest.mark.parametrize("n_sink", [0, 4])
def test_the_statistics_are_those_of_all_heads(
    n_sink: int, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = with_moments(predict, tmp_path, by_bucket=n_sink > 0)
    assert predict("before", sniffer={"capture": BUCKETS | {"capture_pre_rope": True}}) == 0
    capsys.readouterr()
    out = tmp_path / "statistics"
    assert main(["export-kvpress", str(root), str(out), *(["--n_sink", "4"] * (n_sink > 0))]) == 0
    captures = Captures(tmp_path / "before")
    arrays = load_file(out / "model.safetensors")
    assert {name: a.shape for name, a in arrays.items()} == {
        "query_mean": (4, 4, 16),
        "query_cov": (4, 4, 16, 16),
    }
    for layer, head in np.ndindex(4, 4):
        rows = captures.head(layer, head).numpy()
        rows = part(rows, rows["position"] >= n_sink)
        np.testing.assert_allclose(
            arrays["query_mean"][layer, head], expected([rows])["mean"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            arrays["query_cov"][layer, head], np.cov(rows["vector"].T), rtol=1e-5, atol=1e-6
        )
    assert capsys.readouterr().out == f"kvpress  {out}, of {len(rows['vector']):,} tokens\n"
    config = json.loads((out / "config.json").read_text())
    settings = captures.settings
    assert config == {
        "num_layers": 4,
        "num_heads": 4,
        "head_dim": 16,
        "num_samples": 7,
        "sample_seq_len": 61,
        "n_sink": n_sink,
        "dataset_name": settings["data"]["path"],
        "model_name": settings["model"]["name"],
    }


def test_what_can_not_be_exported(
    predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "statistics")

    def refused(root: Path, *options: str) -> str:
        capsys.readouterr()
        assert main(["export-kvpress", str(root), out, *options]) == 2
        assert not (tmp_path / "statistics").exists()
        return error_line(capsys)

    assert predict("none") == 0
    every = "kvpress takes the queries of all layers and heads before RoPE"
    assert f"{every}; {tmp_path}/none: no moments were summed" in refused(tmp_path / "none")
    assert predict("after", sniffer={"moments": {"enabled": True}}) == 0
    assert f"{every}; moments: there are none of queries before RoPE" in refused(tmp_path / "after")
    root = with_moments(predict, tmp_path, capture={"heads": [0, 2]}, by_bucket=True)
    assert f"{every}; moments: the queries of layer 0 have no head 1" in refused(root)
    assert "don't tell the first 5 positions of a text" in refused(root, "--n_sink", "5")
    assert "don't tell the first 64 positions of a text" in refused(root, "--n_sink", "64")
    assert "invalid int value" in refused(root, "--n_sink", "few")
    assert "--n_sink: must be at least 0, got -1" in refused(root, "--n_sink", "-1")


def test_moments_alone_leave_out_what_a_bucket_holds(
    predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = {"sampler": {"type": "none"}}
    root, out = with_moments(predict, tmp_path, by_bucket=True, capture=none), tmp_path / "statistics"
    n_tokens = sum(max(0, length - 7) for length in LENGTHS)
    assert main(["export-kvpress", str(root), str(out), "--n_sink", "7"]) == 0
    assert capsys.readouterr().out.endswith(f"kvpress  {out}, of {n_tokens:,} tokens\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma4_text", "the layers differ in their heads or head_dim"),
        ("lfm2", "layer 0 has no attention"),
    ],
)
def test_models_without_a_place_in_kvpress(
    name: str, message: str, predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_causal_lm(name).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model = {"name": str(tmp_path / "model")}
    assert predict(model=model, sniffer={"capture": {"full_attention_only": False}}) == 0
    assert main(["export-kvpress", str(tmp_path / "root"), str(tmp_path / "statistics")]) == 2
    assert f"export-kvpress: {message}" in error_line(capsys)


def test_a_directory_that_holds_something_is_left_alone(
    predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = with_moments(predict, tmp_path)
    out = tmp_path / "statistics"
    out.mkdir()
    assert main(["export-kvpress", str(root), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["export-kvpress", str(root), str(out)]) == 2
    assert "statistics: it holds something already; name a new directory" in error_line(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(not KVPRESS.exists(), reason="make kvpress installs it")
@pytest.mark.parametrize(
    ("model", "n_sink"), [("llama", 0), ("llama", 4), ("qwen3", 4), ("smollm2", 0)]
)
def test_kvpress_compresses_as_by_its_own_statistics(
    model: str,
    n_sink: int,
    predict: Run,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """It loads the file by its own loader, and collects its own of the same tokens by its own code."""
    if model == "smollm2" and not CHECKPOINT.exists():
        pytest.skip("make weights brings them")
    directory = CHECKPOINT if model == "smollm2" else model_dir(model)
    (tmp_path / "texts").mkdir()
    data = write_jsonl(tmp_path / "texts" / "train.jsonl", TEXTS)
    sections = {"model": {"name": str(directory)}, "data": {"path": str(data)}}
    few = {"sampler": {"type": "positions", "positions": [0]}}
    root = with_moments(predict, tmp_path, by_bucket=n_sink > 0, capture=few, **sections)
    statistics = tmp_path / "statistics"
    assert main(["export-kvpress", str(root), str(statistics), "--n_sink", str(n_sink)]) == 0
    out = tmp_path / "compressed"
    script = Path(__file__).with_name("expected_attention") / "in_kvpress.py"
    subprocess.run(
        [KVPRESS, script, directory, data.parent, statistics, str(n_sink), out],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        check=True,
    )
    found = torch.load(out, weights_only=True)
    ours, theirs = found["ours"], found["theirs"]
    assert ours["config"]["num_samples"] == theirs["config"]["num_samples"] == len(TEXTS)
    assert ours["config"]["n_sink"] == n_sink
    for name in ("mean", "covariance"):
        scale = theirs[name].abs().max()
        torch.testing.assert_close(ours[name] / scale, theirs[name] / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours["scores"], theirs["scores"], atol=0, rtol=1e-4)
    d = (ours["scores"] - theirs["scores"]).abs()
    print(
        "scores", d.max().item(), (d / theirs["scores"]).max().item(), theirs["scores"].median().item()
    )
    # Keys whose scores are as good as equal may change places.
    assert (ours["is_kept"] != theirs["is_kept"]).float().mean() < 1e-3
