"""Values, outputs and statistics of whole runs, against the model's own eager attention."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import REPO, Run, directory_of, write_jsonl
from families import FAMILIES
from loopback import LoopbackHub
from qk_sniffer import Captures
from qk_sniffer.cli import main
from readers import assert_readers_agree, assert_same_rows, error_line, files_of
from test_verify import faults, rewrite, set_column

EVERYTHING = {f"capture_{name}": True for name in ("values", "outputs", "softmax")}
SAMPLED: dict[str, Any] = EVERYTHING | {
    "sampler": {"type": "uniform", "base_rate": 3.0},
    "min_bucket_size": 8,
    "local_positions": 4,
}
ALL: dict[str, Any] = EVERYTHING | {"sampler": {"type": "all"}, "local_positions": 4}
WITH_OTHERS = ("bloom", "gpt_oss", "gemma2", "deepseek_v3", "llama4", "mpt")


def eager(directory: Path, text: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """(heads, S, S) probabilities of each layer, as eager attention gives them for one text alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=dtype)
    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        attentions = model(input_ids=tokens, output_attentions=True).attentions
    return tuple(layer[0].float() for layer in attentions)


@pytest.mark.parametrize("read", ["batches", "passages", "budget"])
@pytest.mark.parametrize("family", [*FAMILIES, *WITH_OTHERS])
def test_samples_have_the_probabilities_of_the_model(
    family: str,
    read: str,
    predict: Run,
    model_dir: Callable[[str], Path],
    texts: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Of every stored pair, from a sample; texts are read with others, or a part at a time."""
    directory = directory_of(family, model_dir, tmp_path)
    model: dict[str, Any] = {"name": str(directory)}
    data: dict[str, Any] = {"batch_size": 3}
    if read == "passages":
        model["prefill_chunk_size"] = 10
    if read == "budget":
        data |= {"batch_size": 4, "max_tokens_per_batch": 130}
    assert predict(model=model, data=data, sniffer={"capture": SAMPLED}) == 0
    captures = Captures(tmp_path / "root")
    n_pairs = 0
    for row in texts:
        expected = eager(directory, row["text"])
        for head in captures.heads:
            layer = head.layer
            if head.kind != "q" or not len(own := head.where(example=row["id"])):
                continue
            p = expected[layer.layer_idx][head.head]
            assert_statistics(own.numpy(), p, 4)
            attention = captures.attention(layer.layer_idx, head.head, row["id"])
            pairs = p[attention.query_positions][:, attention.key_positions]
            torch.testing.assert_close(attention.probabilities, pairs, atol=1e-5, rtol=0)
            n_pairs += pairs.numel()
    assert n_pairs > 10_000
    assert main(["verify", str(tmp_path / "root")]) == 0


def assert_statistics(
    rows: dict[str, np.ndarray], p: Tensor, n_local: int, tolerance: float = 1e-5
) -> None:
    """The columns of some queries against the probabilities of a text, (S, S)."""
    own = p[rows["position"]]
    distance = torch.from_numpy(rows["position"])[:, None] - torch.arange(p.shape[1])
    expected = {
        "entropy": torch.special.entr(own).sum(-1),
        "max_prob": own.amax(-1),
        "sink_prob": own[:, 0] + 1 - own.sum(-1),
        "local_prob": (own * (distance < n_local)).sum(-1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(rows[name], values, atol=tolerance, rtol=tolerance, err_msg=name)
    chosen = own.gather(1, torch.from_numpy(rows["argmax_position"]).long()[:, None]).squeeze(1)
    np.testing.assert_allclose(chosen, own.amax(-1), atol=tolerance)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gpt2"])
def test_all_positions_give_the_whole_attention(
    family: str, predict: Run, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Probabilities sum to 1, and times the values they are the outputs."""
    assert predict(family=family, sniffer={"capture": ALL}) == 0
    captures = Captures(tmp_path / "root")
    for head in captures.heads:
        if head.kind != "o":
            continue
        layer, text = head.layer, texts[2]["id"]
        attention = captures.attention(layer.layer_idx, head.head, text)
        p = attention.probabilities
        torch.testing.assert_close(p.sum(-1), torch.ones(len(p)), atol=1e-5, rtol=0)
        value = captures.head(layer.layer_idx, layer.key_head(head.head), "v").where(example=text)
        output = head.where(example=text).torch()["vector"]
        torch.testing.assert_close(p @ value.torch()["vector"], output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_in_half_precision_they_are_right_within_its_rounding(
    implementation: str,
    predict: Run,
    model_dir: Callable[[str], Path],
    texts: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Scores of some 10 are rounded to 2^-5 by a model in bfloat16, and probabilities by as much."""
    model = {"dtype": "bfloat16", "attn_implementation": implementation}
    assert predict(model=model, sniffer={"capture": ALL}, data={"batch_size": 1}) == 0
    captures = Captures(tmp_path / "root")
    for row in texts:
        expected = eager(model_dir("llama"), row["text"], torch.bfloat16)
        for head in captures.heads:
            if head.kind == "q" and head.layer.layer_idx == 0:
                rows = head.where(example=row["id"]).numpy()
                assert_statistics(rows, expected[0][head.head], 4, tolerance=0.05)
                scores = captures.attention(0, head.head, row["id"]).scores
                lse = scores.double().logsumexp(-1).numpy()
                np.testing.assert_allclose(rows["lse"], lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_readers_see_the_new_files(family: str, predict: Run, tmp_path: Path) -> None:
    assert predict(family=family, sniffer={"capture": SAMPLED | {"capture_token_strings": True}}) == 0
    for name in ("l01h00q", "l01h01k", "l01h01v", "l01h03o"):
        table = assert_readers_agree(tmp_path / "root", name, 16, softmax=name.endswith("q"))
        assert table.num_rows > 20
        assert ("lse" in table.column_names) == name.endswith("q")


def test_rows_are_shared_by_keys_and_values_and_by_queries_and_outputs(
    predict: Run, tmp_path: Path
) -> None:
    """They are those of a run without the new kinds, also where the others are not captured."""
    plain = {"sampler": SAMPLED["sampler"], "min_bucket_size": 8}
    alone = plain | {
        "capture_queries": False,
        "capture_keys": False,
        "capture_values": True,
        "capture_outputs": True,
    }
    assert predict("plain", sniffer={"capture": plain}) == 0
    assert predict("both", sniffer={"capture": SAMPLED}) == 0
    assert predict("alone", sniffer={"capture": alone}) == 0
    columns = ["bucket", "example_id", "position", "sliding_window"]
    both = Captures(tmp_path / "both")
    for head in both.heads:
        layer, twin = head.layer.layer_idx, {"v": "k", "o": "q"}.get(head.kind, head.kind)
        other = Captures(tmp_path / "plain").head(layer, head.head, twin)  # type: ignore[arg-type]
        assert head.arrow(columns).equals(other.arrow(columns))
        if head.kind == twin:
            assert head.arrow(["vector"]).equals(other.arrow(["vector"]))
        else:
            found = Captures(tmp_path / "alone").head(layer, head.head, head.kind)
            assert found.arrow().equals(head.arrow())
    assert {name[-1] for name in files_of(tmp_path / "alone")} == {"v", "o", "s"}


def test_a_finished_run_goes_on_with_more_texts(
    predict: Run, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Statistics of the earlier files are merged with those of the journal, head by head."""
    for number, some in enumerate((texts[::2], texts)):
        path = write_jsonl(tmp_path / "some.jsonl", some)
        data = {"path": str(path), "batch_size": 1}
        assert predict("merged", data=data, sniffer={"capture": SAMPLED}) == 0
        if number == 0:
            # Finished files of fewer texts are there now.
            assert json.loads((tmp_path / "merged" / "manifest.json").read_text())["complete"]
    assert predict("whole", data=data, sniffer={"capture": SAMPLED}) == 0
    assert_same_rows(tmp_path / "merged", tmp_path / "whole")
    for name in ("l02h01q", "l02h01v"):
        merged, whole = (Captures(tmp_path / root).head(2, 1, name[-1]) for root in ("merged", "whole"))
        assert merged.arrow().equals(whole.arrow())


def test_a_branch_is_pulled_and_merged(
    predict: Run, hub: LoopbackHub, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = {"hf_repo_id": REPO, "hf_branch": "tiny"}
    path = tmp_path / "some.jsonl"
    data = {"path": str(path), "batch_size": 1}
    run = {"data": data, "sniffer": {"capture": SAMPLED, "output": output}}
    write_jsonl(path, texts[:4])
    assert predict(**run) == 0
    shutil.rmtree(tmp_path / "root")
    write_jsonl(path, texts)
    assert predict(**run) == 0
    del run["sniffer"]["output"]
    assert predict("whole", **run) == 0
    assert_same_rows(tmp_path / "root", tmp_path / "whole")
    pulled = Captures(REPO, revision="tiny")
    assert pulled.head(1, 2).arrow().equals(Captures(tmp_path / "root").head(1, 2).arrow())
    assert "`l00h01v`" in (tmp_path / "root" / "README.md").read_text() or pulled.head(0, 1, "v")


def test_a_root_with_statistics_refuses_a_run_without(
    predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture = {"capture_softmax": True}
    assert predict(sniffer={"capture": capture}) == 0
    assert predict() == 2
    line = error_line(capsys)
    assert "sniffer.capture.capture_softmax is true there and not set here" in line
    capture["local_positions"] = 5  # type: ignore[assignment]
    assert predict(sniffer={"capture": capture}) == 2
    assert "sniffer.capture.local_positions is not set there and 5 here" in error_line(capsys)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": (
        {"capture_queries": False, "capture_keys": False},
        "sniffer.capture.capture_queries: set it, capture_keys, capture_values or capture_outputs",
    ),
    "no queries": (
        {"capture_queries": False, "capture_softmax": True},
        "sniffer.capture.capture_softmax: the statistics are columns of the queries",
    ),
    "no position": ({"local_positions": 0}, "sniffer.capture.local_positions: must be at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, predict: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capture, message = MISTAKES[mistake]
    assert predict(sniffer={"capture": capture}) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("architecture", "setting", "reason"),
    [
        ("diffllama", "capture_values", "computes each attention twice"),
        ("diffllama", "capture_outputs", "computes each attention twice"),
        ("prophetnet", "capture_softmax", "adds terms to its scores"),
    ],
)
def test_what_a_model_does_not_have_is_refused_by_name(
    architecture: str,
    setting: str,
    reason: str,
    predict: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = directory_of(architecture, lambda name: tmp_path / name, tmp_path)
    model = {"name": str(directory)}
    assert predict(model=model, sniffer={"capture": {setting: True}}) == 2
    line = error_line(capsys)
    assert f"sniffer.capture.{setting}: this architecture {reason}" in line
    assert not list((tmp_path / "root").glob("l*"))
    assert predict(model=model) == 0


def test_gates_are_noted_where_outputs_are_captured(predict: Run, tmp_path: Path) -> None:
    directory = directory_of("qwen3_next", lambda name: tmp_path / name, tmp_path)
    for root, capture in (("plain", {}), ("outputs", {"capture_outputs": True})):
        sniffer = {"capture": capture}
        assert predict(root, model={"name": str(directory)}, sniffer=sniffer) == 0
    notes = [Captures(tmp_path / root).manifest["notes"] for root in ("plain", "outputs")]
    assert len(notes[1]) == len(notes[0]) + 1
    assert "come between them and the output projection" in notes[1][-1]


TAMPERED = {
    "max_prob": 1.5,
    "entropy": -1.0,
    "argmax_position": 1000,
    "sink_prob": -0.2,
    "local_prob": 7.0,
}


def test_verify_finds_statistics_that_are_none_and_others_than_the_models(
    predict: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(sniffer={"capture": SAMPLED}) == 0
    good = tmp_path / "root"
    assert faults(good, capsys, "--against-model") == []
    for column, value in TAMPERED.items():
        root = Path(shutil.copytree(good, tmp_path / column))
        rewrite(root, "l02h01q/data.parquet", set_column(column, value))
        assert faults(root, capsys) == [f"l02h01q/data.parquet: {column} is what no softmax gives"]
    for name, column, words in (
        ("l01h00q", "lse", "lse is off by"),
        ("l01h00v", "vector", "a vector is off by"),
        ("l03h00o", "vector", "a vector is off by"),
    ):
        root = Path(shutil.copytree(good, tmp_path / name))
        value = 0.5 if column == "lse" else [0.5] * 16
        rewrite(root, f"{name}/data.parquet", set_column(column, value))
        assert faults(root, capsys) == []
        found = faults(root, capsys, "--against-model")
        assert found and all(f"{name}/data.parquet" in line and words in line for line in found)
