"""Runs of a model with an adapter of PEFT, beside its weights or merged into them."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qk_sniffer.demo
from conftest import WriteRun, byte_tokenizer
from qk_sniffer import Captures
from qk_sniffer.cli import main
from qk_sniffer.models import decoder_backbone, weights_digest
from readers import error_line
from test_estimate import bytes_before

DEMO = Path(qk_sniffer.demo.__file__).parent / "model"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def demo_model(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, attn_implementation="eager", **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on every linear layer of the demo model, trained a few steps."""
    directory = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(demo_model(), config)
    tokens = AutoTokenizer.from_pretrained(DEMO)(
        "A list is mutable, a tuple is not.", return_tensors="pt"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def configure(adapter: Path, **changes: Any) -> None:
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | changes))


def assert_attends_as(
    model: Any, root: Path, texts: list[dict[str, Any]], tolerance: float = 2e-5
) -> None:
    """Attention of some heads, from the rows of a run, is that of a model's own eager forward."""
    captures, tokenizer = Captures(root), AutoTokenizer.from_pretrained(DEMO)
    for text in texts:
        with torch.no_grad():
            tokens = tokenizer(text["text"], return_tensors="pt")
            expected = model(**tokens, output_attentions=True).attentions
        for layer, head in ((0, 0), (1, 3), (3, 5)):
            found = captures.attention(layer, head, text["id"]).probabilities
            torch.testing.assert_close(found, expected[layer][0, head], atol=tolerance, rtol=0)


def vectors(root: Path) -> Any:
    return Captures(root).head(3, 5).numpy()["vector"]


def test_a_run_with_an_adapter(
    write_run: WriteRun,
    adapter: Path,
    texts: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows are those of PEFT's model, also in a run that goes on; base and adapter are told apart."""
    section = {"name": str(DEMO), "adapter": str(adapter)}
    assert main(write_run(model=section, data={"max_samples": 3})) == 0
    run = write_run(model=section)
    assert main(run) == 0
    root = tmp_path / "root"
    assert main(["verify", str(root), "--against-model"]) == 0
    assert_attends_as(PeftModel.from_pretrained(demo_model(), adapter), root, texts)
    assert f"dtype `auto`, with the adapter `{adapter}`\n" in (root / "README.md").read_text()

    assert main(write_run("base", model={"name": str(DEMO)})) == 0
    assert np.abs(vectors(root) - vectors(tmp_path / "base")).max() > 0.1
    capsys.readouterr()
    assert main(["estimate", *run[1:]]) == 0
    n_bytes = sum(weight.nbytes for weight in load_file(adapter / WEIGHTS).values())
    assert f" and {n_bytes / 1000:.1f} KB of an adapter" in (told := capsys.readouterr().out)
    assert bytes_before(told, "weights of each process") == pytest.approx(6.69e6 + n_bytes, abs=5e4)

    refused = "holds a run with other settings: "
    assert main(write_run(model={"name": str(DEMO)})) == 2
    assert f'{refused}model.adapter is "{adapter}" there and not set here' in error_line(capsys)
    assert main(write_run("base", model=section)) == 2
    assert f'{refused}model.adapter is not set there and "{adapter}" here' in error_line(capsys)
    # Trained anew under the same name.
    weights = load_file(adapter / WEIGHTS)
    next(weight for name, weight in weights.items() if "layers.2" in name).mul_(1.5)
    save_file(weights, adapter / WEIGHTS, {"format": "pt"})
    assert main(write_run(model=section)) == 2
    assert f"{refused}model.weights is " in error_line(capsys)


def test_a_merged_adapter(
    write_run: WriteRun,
    adapter: Path,
    texts: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = {"name": str(DEMO), "adapter": str(adapter), "merge_adapter": True}
    assert main(write_run(model=section)) == 0
    root = tmp_path / "root"
    assert main(["verify", str(root), "--against-model"]) == 0
    merged = PeftModel.from_pretrained(demo_model(), adapter).merge_and_unload()
    assert_attends_as(merged, root, texts)
    fingerprint = json.loads((root / "manifest.json").read_text())["fingerprint"]
    assert fingerprint["model.weights"] == weights_digest(decoder_backbone(merged))
    assert f"the adapter `{adapter}`, merged into the weights\n" in (root / "README.md").read_text()
    assert main(write_run(model=section | {"merge_adapter": False})) == 2
    assert "model.merge_adapter is true there and not set here" in error_line(capsys)


@pytest.mark.parametrize("is_merged", [False, True])
def test_an_adapter_of_a_quantized_model(
    is_merged: bool, write_run: WriteRun, adapter: Path, texts: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    # What bitsandbytes rounds makes more of the last bits by which sdpa or a batch differs.
    section = {"name": str(DEMO), "adapter": str(adapter), "attn_implementation": "eager"}
    section |= {"quantization": settings, "merge_adapter": is_merged}
    assert main(write_run(model=section)) == 0
    assert main(["verify", str(tmp_path / "root"), "--against-model"]) == 0
    model = demo_model(quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"})
    adapted = PeftModel.from_pretrained(model, adapter)
    model = adapted.merge_and_unload() if is_merged else adapted
    assert_attends_as(model, tmp_path / "root", texts, tolerance=5e-4)


def test_values_and_outputs_beside_an_adapter(
    write_run: WriteRun, adapter: Path, tmp_path: Path
) -> None:
    """Layers of the adapter stand around the projections by which values are found."""
    everything = {"capture_values": True, "capture_outputs": True, "capture_softmax": True}
    section = {"name": str(DEMO), "adapter": str(adapter), "attn_implementation": "sdpa"}
    assert main(write_run(model=section, sniffer={"capture": everything})) == 0
    merged = section | {"merge_adapter": True}
    assert main(write_run("merged", model=merged, sniffer={"capture": everything})) == 0
    for name in ("l02h01v", "l02h04o"):
        beside, inside = (
            np.stack(pq.read_table(tmp_path / root / name / "data.parquet")["vector"].to_numpy())
            for root in ("root", "merged")
        )
        np.testing.assert_allclose(beside, inside, atol=1e-4)


def test_an_adapter_as_the_model(
    write_run: WriteRun,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[dict[str, Any]],
) -> None:
    """It is short for its base and itself; a path of the base starts from the working directory."""
    monkeypatch.chdir(DEMO.parent)
    configure(adapter, base_model_name_or_path=DEMO.name)
    assert main(write_run(model={"name": str(adapter)})) == 0
    root = tmp_path / "root"
    assert_attends_as(PeftModel.from_pretrained(demo_model(), adapter), root, texts)
    settings = json.loads((root / "manifest.json").read_text())["settings"]["model"]
    assert (settings["name"], settings["adapter"]) == (DEMO.name, str(adapter))
    assert main(["verify", str(root), "--against-model"]) == 0
    assert main(write_run(model={"name": DEMO.name, "adapter": str(adapter)})) == 0


@pytest.mark.parametrize("field", ["name", "adapter"])
def test_the_tokenizer_of_an_adapter(
    field: str, write_run: WriteRun, adapter: Path, tmp_path: Path, texts: list[dict[str, Any]]
) -> None:
    byte_tokenizer().save_pretrained(adapter)
    section = {"name": str(DEMO)} | {field: str(adapter)}
    assert main(write_run(model=section)) == 0
    lengths = pq.read_table(tmp_path / "root" / "examples" / "data.parquet")["n_tokens"].to_pylist()
    assert sorted(lengths) == sorted(len(text["text"]) for text in texts)


def test_a_base_of_another_name_is_warned_of(
    write_run: WriteRun, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configure(adapter, base_model_name_or_path="someone/other-model")
    with caplog.at_level(logging.WARNING):
        assert main(write_run(model={"name": str(DEMO), "adapter": str(adapter)})) == 0
    line = (
        f"model.adapter: {adapter} was trained on someone/other-model, and its weights fit {DEMO} too; "
        "see that these are the same model"
    )
    assert caplog.messages.count(line) == 1


def without(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


def renamed(**settings: Any) -> Callable[[Path], None]:
    return lambda adapter: configure(adapter, **settings)


def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(adapter: Path) -> None:
        weights = load_file(adapter / WEIGHTS)
        change(weights)
        save_file(weights, adapter / WEIGHTS, {"format": "pt"})

    return rewrite


LAST = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"


def of_a_wider_model(weights: dict[str, torch.Tensor]) -> None:
    weights[LAST] = torch.zeros(4, 256)


def of_a_deeper_model(weights: dict[str, torch.Tensor]) -> None:
    weights[LAST.replace("layers.3", "layers.4")] = torch.zeros(4, 192)


def damaged(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:9999])


def no_json(adapter: Path) -> None:
    (adapter / CONFIG).write_text("[")


def prompt(adapter: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(demo_model(), config).save_pretrained(adapter)


MISFIT = f"model.adapter: {{}} does not fit the model {DEMO} ("


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(CONFIG), "model.adapter: {} has no adapter_config.json; name the directory or"),
        (shutil.rmtree, "model.adapter: no directory {} is here; mend the path"),
        (no_json, "{}/adapter_config.json: damaged, it is no JSON object (Expecting value"),
        (without(WEIGHTS), "model.adapter: {} has no adapter_model.safetensors; download or copy"),
        (damaged, "{}/adapter_model.safetensors: damaged, it is no whole safetensors file"),
        (prompt, "model.adapter: {} is a PROMPT_TUNING adapter, which does not work by weights alone"),
        (renamed(peft_type="MAGIC"), "model.adapter: {} is a MAGIC adapter, which does not work by"),
        (renamed(target_modules=["c_attn"]), MISFIT + "Target modules {{'c_attn'}} not found"),
        (changed(of_a_wider_model), MISFIT),
        (changed(of_a_deeper_model), MISFIT + "1 weights have no counterpart, such as base_model."),
        (changed(lambda weights: weights.pop(LAST)), MISFIT + "1 weights have no counterpart, such as"),
    ],
)  # fmt: skip
def test_an_adapter_that_can_not_be_used(
    change: Callable[[Path], None],
    message: str,
    write_run: WriteRun,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(adapter)
    assert main(write_run(model={"name": str(DEMO), "adapter": str(adapter)})) == 2
    assert error_line(capsys).startswith(message.format(adapter))


def test_what_contradicts_an_adapter(
    write_run: WriteRun,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(**section: Any) -> str:
        assert main(write_run(model=section)) == 2
        return error_line(capsys)

    line = told(name=str(adapter), adapter=str(adapter))
    assert line.startswith(
        f"model.adapter: {adapter} in model.name is an adapter itself; name its base"
    )
    assert told(merge_adapter=True).startswith("model.merge_adapter: there is no adapter; name one in")
    configure(adapter, base_model_name_or_path=None)
    line = told(name=str(adapter))
    assert line.startswith(f"model.name: the adapter {adapter} does not say of which model it is; name")
    monkeypatch.setitem(sys.modules, "peft", None)
    line = told(name=str(DEMO), adapter=str(adapter))
    assert line == (
        "model.adapter: peft is not installed; install it with `pip install 'qk-sniffer[adapters]'`"
    )
