"""A plain checkpoint that a run loads in few bits: rows, files, estimate and mistakes."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qk_sniffer.demo
from conftest import WriteRun
from qk_sniffer import Captures, sniff
from qk_sniffer.cli import main
from qk_sniffer.models import decoder_backbone, weights_digest
from readers import error_line
from test_estimate import bytes_before

DEMO = Path(qk_sniffer.demo.__file__).parent / "model"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
NESTED = NF4 | {"bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
TORCHAO = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
TORCHAO_4 = {
    "quant_method": "torchao",
    "quant_type": "IntxWeightOnlyConfig",
    "weight_dtype": "int4",
}


def quantized(settings: dict[str, Any]) -> Any:
    """The demo model as transformers loads it with such a config."""
    if settings.get("quant_method") == "torchao":
        from torchao import quantization
        from transformers import TorchAoConfig

        kind = getattr(quantization, settings["quant_type"])
        options = {"weight_dtype": torch.int4} if "weight_dtype" in settings else {}
        config: Any = TorchAoConfig(kind(**options))
    else:
        config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=config, device_map={"": "cpu"}, attn_implementation="eager"
    )


def weight_bytes(model: nn.Module) -> int:
    """Memory of all weights, and of the constants that packed ones have beside them."""
    n_bytes = 0
    for weight in model.parameters():
        if hasattr(weight, "__tensor_flatten__"):
            n_bytes += sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])
            continue
        n_bytes += weight.nbytes
        state = getattr(weight, "quant_state", None)
        while state is not None:
            n_bytes += state.absmax.nbytes
            state = getattr(state, "state2", None)
        if (scales := getattr(weight, "SCB", None)) is not None:
            n_bytes += scales.nbytes
    return n_bytes


@pytest.mark.parametrize("settings", [NF4, NESTED, INT8, TORCHAO, TORCHAO_4])
def test_a_checkpoint_in_few_bits(
    settings: dict[str, Any],
    write_run: WriteRun,
    texts: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows are those of the model that transformers quantizes, each text read alone."""
    if "quant_method" in settings:
        pytest.importorskip(settings["quant_method"])
    # What bitsandbytes rounds makes more of the last bits by which sdpa differs.
    section = {"name": str(DEMO), "quantization": settings, "attn_implementation": "eager"}
    assert main(write_run(model=section, data={"max_samples": 4})) == 0
    run = write_run(model=section)
    assert main(run) == 0
    root = tmp_path / "root"
    assert main(["verify", str(root), "--against-model"]) == 0
    model, captures = quantized(settings), Captures(root)
    # Before a forward, in which some CPUs pack weights anew.
    n_bytes = weight_bytes(model)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for text in texts:
        tokens = tokenizer(text["text"], return_tensors="pt")
        with torch.no_grad(), sniff(model) as alone:
            attentions = model(**tokens, output_attentions=True).attentions
        attention = captures.attention(2, 3, text["id"])
        torch.testing.assert_close(attention.probabilities, attentions[2][0, 3], atol=2e-5, rtol=0)
        for name in ("l03h05q", "l03h01k"):
            found = captures.head(3, 5) if name.endswith("q") else captures.key_head(3, 5)
            rows = found.where(example=text["id"]).numpy()["vector"]
            expected = alone.head(3, 5) if name.endswith("q") else alone.key_head(3, 5)
            np.testing.assert_allclose(rows, expected.numpy()["vector"], atol=1e-4)
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["fingerprint"]["model.quantization"] == settings
    assert manifest["fingerprint"]["model.weights"] == weights_digest(decoder_backbone(model))
    plain = AutoModelForCausalLM.from_pretrained(DEMO)
    assert weights_digest(decoder_backbone(plain)) != weights_digest(decoder_backbone(model))
    assert "weights quantized with `" in (root / "README.md").read_text()

    capsys.readouterr()
    assert main(["estimate", *run[1:]]) == 0
    told = capsys.readouterr().out
    # Figures have one digit behind the point.
    size = bytes_before(told, "weights of each process")
    assert size == pytest.approx(n_bytes, abs=6e4)
    method = settings.get("quant_method", "bitsandbytes")
    assert f"1,672,896 quantized by {method}" in told
    assert main(write_run(model={"name": str(DEMO)})) == 2
    assert "model.quantization is {" in (line := error_line(capsys)) and "not set here" in line


def test_8_bits_in_passages(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Outliers of a passage are not those of the whole text; without a threshold there are none."""
    section = {"name": str(DEMO), "quantization": INT8, "prefill_chunk_size": 8}
    assert main(write_run(model=section)) == 2
    line = error_line(capsys)
    assert line.startswith("model.prefill_chunk_size: LlamaModel quantizes the tokens of a forward")
    section["quantization"] = INT8 | {"llm_int8_threshold": 0.0}
    assert main(write_run("other", model=section)) == 0


FIELD = "model.quantization"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, f"{FIELD}: no method is named; set load_in_4bit or load_in_8bit to true, or"),
        ({"load_in_4bit": False}, f"{FIELD}: no method is named; set load_in_4bit"),
        ({"quant_method": "bitsandbytes"}, f"{FIELD}: no method is named; set load_in_4bit"),
        (
            {"load_in_4bit": True, "bnb_4bit_qaunt_type": "nf4"},
            f"{FIELD}.bnb_4bit_qaunt_type: BitsAndBytesConfig takes no such setting; did you mean "
            "bnb_4bit_quant_type?",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat17"},
            f"{FIELD}: BitsAndBytesConfig does not take these settings (module 'torch' has no",
        ),
        (
            {"load_in_8bit": True, "llm_int8_threshold": "high"},
            f"{FIELD}: BitsAndBytesConfig does not take these settings (llm_int8_threshold must be a",
        ),
        (
            {"load_in_8bit": True, "load_in_4bit": True},
            f"{FIELD}: BitsAndBytesConfig does not take these settings (load_in_4bit and load_in_8bit",
        ),
        ({"quant_method": "torcha"}, f"{FIELD}.quant_method: transformers has no torcha; did you mean"),
        ({"quant_method": "magic"}, f"{FIELD}.quant_method: transformers has no magic; choose aqlm,"),
        ({"quant_method": "hqq"}, f"{FIELD}: hqq can't quantize this model here (A valid HQQ version"),
        (
            {"quant_method": "awq"},
            f"{FIELD}: awq can't quantize this model here (The quantization method ",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    settings: dict[str, Any], message: str, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(model={"name": str(DEMO)} | {"quantization": settings})
    assert main(run) == 2
    assert error_line(capsys).startswith(message)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_missing_package_is_named(
    method: str,
    write_run: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, method, None)
    settings = TORCHAO if method == "torchao" else NF4
    run = write_run(model={"name": str(DEMO), "quantization": settings})
    assert main(run) == 2
    extra = {"bitsandbytes": "quantization"}.get(method, method)
    line = f"{FIELD}: {method} is not installed; install it with `pip install 'qk-sniffer[{extra}]'`"
    assert error_line(capsys) == line
    assert main(["estimate", *run[1:]]) == 2
    assert error_line(capsys) == line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            TORCHAO | {"quant_type": "Int8WeightOnly"},
            f"{FIELD}.quant_type: torchao has no Int8WeightOnly; did you mean Int8WeightOnlyConfig?",
        ),
        (
            TORCHAO | {"gruop_size": 32},
            f"{FIELD}.gruop_size: Int8WeightOnlyConfig takes no such setting; did you mean group_size?",
        ),
    ],
)
def test_a_mistake_about_torchao(
    settings: dict[str, Any], message: str, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    assert main(write_run(model={"name": str(DEMO), "quantization": settings})) == 2
    assert error_line(capsys) == message
