"""Checkpoints that are broken, that are no model, or whose weights are quantized."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.bitnet import pack_weights

from conftest import WriteRun, byte_tokenizer
from families import FAMILIES, tiny_model
from qk_sniffer.cli import main
from qk_sniffer.models import decoder_backbone, weights_digest
from readers import error_line
from test_estimate import bytes_before
from tiny import tiny_causal_lm

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    directory = tmp_path_factory.mktemp("sharded")
    tiny_model(FAMILIES["llama"]).save_pretrained(directory, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(directory)
    return directory


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).write_bytes((model / name).read_bytes()[:size])

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        (model / name).write_text(text)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def adapter(*removed: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        for name in removed:
            (model / name).unlink()
        (model / "adapter_config.json").write_text(json.dumps(ADAPTER))

    return change


def garbage_of_pickle(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"garbage")


def other_shapes(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))


SECOND = "model-00002-of-00004.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"
NO_BASE = "{}/adapter_config.json: no directory meta-llama/Llama-3.1-8B is here or in the cache, and"


@pytest.mark.parametrize(
    ("is_sharded", "change", "message"),
    [
        (False, cut(WEIGHTS, 99_999), "{}/model.safetensors: damaged, it is no whole safetensors file"),
        (False, cut(WEIGHTS, 0), "{}/model.safetensors: damaged, it is no whole safetensors file"),
        (False, written(WEIGHTS, POINTER), "{}/model.safetensors: damaged, it is no whole safetensors"),
        (True, cut(SECOND, 5000), f"{{}}/{SECOND}: damaged, it is no whole safetensors file (Error"),
        (True, without(SECOND), f"{{}}/{SECOND}: missing, though {INDEX} names it; download or copy"),
        (True, written(INDEX, "[]"), f"{{}}/{INDEX}: damaged, it does not say which file has which"),
        (True, cut(INDEX, 100), f"{{}}/{INDEX}: damaged, it does not say which file has which weight"),
        (False, garbage_of_pickle, "model.name: a file of {} is damaged, torch can't read it"),
        (False, other_shapes, "model.name: some weights of {} have other shapes than its config gives"),
        (False, adapter("config.json", WEIGHTS), NO_BASE),
        (False, adapter(WEIGHTS), NO_BASE),
        (False, without(WEIGHTS), "model.name: {} can't be loaded (Error no file named model.safetens"),
    ],
)  # fmt: skip
def test_a_broken_checkpoint_is_one_line(
    write_run: WriteRun,
    model_dir: Callable[[str], Path],
    sharded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_sharded: bool,
    change: Callable[[Path], None],
    message: str,
) -> None:
    source = sharded if is_sharded else model_dir("llama")
    model = Path(shutil.copytree(source, tmp_path / "model"))
    change(model)
    assert main(write_run(model={"name": str(model)})) == 2
    assert error_line(capsys).startswith(message.format(model))


@pytest.mark.parametrize("has_peft", [False, True])
def test_an_adapter_without_weights_beside_a_whole_model(
    has_peft: bool,
    write_run: WriteRun,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is none where PEFT is not installed, and where it is, PEFT misses the weights."""
    model = Path(shutil.copytree(model_dir("llama"), tmp_path / "model"))
    adapter()(model)
    if not has_peft:
        for module in ("integrations.peft", "models.auto.auto_factory"):
            monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda *_, **__: False)
    assert main(write_run(model={"name": str(model)})) == (2 if has_peft else 0)
    if has_peft:
        assert error_line(capsys).startswith(f"model.name: {model} can't be loaded")


def test_an_adapter_is_told_by_estimate_too(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    adapter()(tmp_path / "model")
    run = write_run(model={"name": str(tmp_path / "model")})
    assert main(["estimate", *run[1:]]) == 2
    assert error_line(capsys).startswith(NO_BASE.format(tmp_path / "model"))


# --- quantized weights


@pytest.fixture
def bitnet(model_dir: Callable[[str], Path], tmp_path: Path) -> Iterator[Path]:
    """The tiny Llama in the format of BitNet, the one whose packed layers run without a GPU."""
    model = Path(shutil.copytree(model_dir("llama"), tmp_path / "bitnet"))
    weights = load_file(model / WEIGHTS)
    for name, weight in list(weights.items()):
        if "_proj" in name:
            scale = 1 / weight.abs().mean()
            weights[name] = pack_weights((weight * scale).round().clamp(-1, 1))
            weights[f"{name}_scale"] = scale.reshape(1)
    save_file(weights, model / WEIGHTS, {"format": "pt"})
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "modules_to_not_convert": ["lm_head"],
    }
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    # Its layers are compiled, which takes a minute.
    torch.compiler.set_stance("force_eager")
    yield model
    torch.compiler.set_stance("default")


def test_weights_in_buffers_are_part_of_what_names_a_model(
    write_run: WriteRun, bitnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(model={"name": str(bitnet)})
    assert main(run) == 0
    assert main(run) == 0
    weights = load_file(bitnet / WEIGHTS)
    weights["model.layers.2.mlp.up_proj.weight"] ^= 1
    save_file(weights, bitnet / WEIGHTS, {"format": "pt"})
    capsys.readouterr()
    assert main(run) == 2
    assert "holds a run with other settings: model.weights is " in error_line(capsys)


def test_buffers_of_other_models_are_not(tmp_path: Path) -> None:
    backbone = decoder_backbone(tiny_causal_lm("deepseek_v3"))
    before = weights_digest(backbone)
    biases = [b for name, b in backbone.named_buffers() if name.endswith("e_score_correction_bias")]
    assert biases
    biases[0].fill_(3)
    assert weights_digest(backbone) == before
    next(backbone.parameters()).data.fill_(3)
    assert weights_digest(backbone) != before


def test_an_estimate_counts_weights_as_they_are_stored(
    write_run: WriteRun, bitnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(bitnet / WEIGHTS)
    run = write_run(model={"name": str(bitnet)})
    assert main(["estimate", *run[1:]]) == 0
    text = capsys.readouterr().out
    stored = sum(weight.numel() * weight.element_size() for weight in weights.values())
    assert bytes_before(text, "weights of each process") == pytest.approx(stored, abs=50)
    assert "161,856 quantized by bitnet, beside activations" in text
    (bitnet / WEIGHTS).unlink()
    assert main(["estimate", *run[1:]]) == 0
    text = capsys.readouterr().out
    assert bytes_before(text, "weights of each process") == pytest.approx(4 * 161_856, abs=50)
    assert "less, since they are quantized by bitnet" in text


def test_a_quantized_checkpoint_is_not_quantized_anew(
    write_run: WriteRun, bitnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"load_in_8bit": True}
    assert main(write_run(model={"name": str(bitnet), "quantization": settings})) == 2
    assert error_line(capsys).startswith(
        f"model.quantization: {bitnet} is quantized already, by bitnet; set it to null"
    )
