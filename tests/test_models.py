"""Loading, overlays, attention implementations, caches and generation, and what is refused."""

import gc
import importlib
import inspect
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from examine import TOLERANCE, assert_same, capture, sniff_all, states_of
from families import FAMILIES, tiny_model
from qk_sniffer.capture import (
    CapturesAttention,
    active_sniffer,
)
from qk_sniffer.errors import UserError
from qk_sniffer.models import (
    ModelSource,
    capture_attention,
    decoder_backbone,
    load_model,
    probe_attention,
)
from readers import error_line
from tiny import ARCHITECTURES, MULTIMODAL, tiny_causal_lm

Predict = Callable[..., int]


class Received(CapturesAttention):
    """Takes attention calls and keeps nothing."""

    pre_rope = False

    def __init__(self) -> None:
        self.n_calls = 0

    def capture(self, *_: Any) -> None:
        self.n_calls += 1


INPUT_IDS = torch.arange(7, 7 + 2 * 19).reshape(2, 19)


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in ARCHITECTURES, reason=f"this transformers has no {name}")


def head_files(root: Path) -> list[Path]:
    return sorted(root.glob("l*/data.parquet"))


def assert_equal_rows(root: Path, other: Path, *, vectors: float = TOLERANCE) -> None:
    names = [file.parent.name for file in head_files(root)]
    assert names == [file.parent.name for file in head_files(other)] != []
    for name in names:
        one, two = (pq.read_table(path / name / "data.parquet") for path in (root, other))
        assert one.drop_columns("vector").equals(two.drop_columns("vector"))
        assert one["vector"].type == two["vector"].type
        difference = [torch.tensor(t["vector"].combine_chunks().values.to_numpy()) for t in (one, two)]
        torch.testing.assert_close(*difference, atol=vectors, rtol=0)


@pytest.mark.parametrize("name", [*MULTIMODAL, "gemma3"])
def test_the_text_decoder_of_a_multimodal_checkpoint_is_loaded(name: str, tmp_path: Path) -> None:
    saved = tiny_causal_lm(name)
    saved.save_pretrained(tmp_path)
    loaded = load_model(ModelSource(str(tmp_path)), dtype="float32", attn_implementation="eager")
    assert_same(
        capture(decoder_backbone(loaded), INPUT_IDS), capture(decoder_backbone(saved), INPUT_IDS), name
    )


def test_the_vision_tower_of_a_model_passes_through() -> None:
    model = tiny_causal_lm("gemma3")
    backbone = decoder_backbone(model)
    vision = model.config.vision_config
    pixels = torch.rand(1, 3, vision.image_size, vision.image_size)
    image_token = model.config.image_token_id
    input_ids = torch.tensor([[5, image_token, *range(9, 21)]])
    sniffer, chunks = sniff_all(backbone, [input_ids.shape[1]])
    with torch.inference_mode(), active_sniffer(sniffer), capture_attention(backbone):
        backbone(
            input_ids=input_ids,
            pixel_values=pixels,
            token_type_ids=(input_ids == image_token).long(),
            use_cache=False,
        )
    sniffer.flush_batch()
    assert sorted({chunk.layer_idx for chunk in chunks}) == [0, 1, 2, 3]
    assert {chunk.vectors.shape[1] for chunk in chunks} == {input_ids.shape[1]}


def test_another_model_passes_through() -> None:
    backbone, other = (decoder_backbone(tiny_model(FAMILIES[name])) for name in ("llama", "qwen3"))
    sniffer, chunks = sniff_all(backbone, [INPUT_IDS.shape[1]] * 2)
    with torch.inference_mode(), active_sniffer(sniffer), capture_attention(backbone):
        backbone(input_ids=INPUT_IDS, use_cache=False)
        other(input_ids=INPUT_IDS, use_cache=False)
    sniffer.flush_batch()
    assert len(chunks) == 2 * 4


def test_a_checkpoint_that_lacks_weights_is_refused(
    predict: Predict,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model(FAMILIES["llama"])
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.2.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    tokenizer = {"name": str(model_dir("llama"))}
    assert predict(model={"name": str(tmp_path / "model")}, data={"tokenizer": tokenizer}) == 2
    line = error_line(capsys)
    assert "lacks 1 weights of LlamaForCausalLM, such as model.layers.2.self_attn.q_proj.weight" in line


# --- reading in passages, and generation


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "smollm3", "gpt2"])
def test_a_run_in_passages_gives_the_rows_of_a_run_at_once(
    family: str, pre_rope: bool, predict: Predict, tmp_path: Path
) -> None:
    capture_settings = {
        "capture_pre_rope": pre_rope,
        "sampler": {"type": "uniform"},
        "min_bucket_size": 4,
    }
    sniffer = {"capture": capture_settings}
    assert predict("whole", family=family, sniffer=sniffer) == 0
    assert predict("passages", family=family, sniffer=sniffer, model={"prefill_chunk_size": 7}) == 0
    assert_equal_rows(tmp_path / "whole", tmp_path / "passages")


@pytest.mark.parametrize(("size", "message"), [(0, "must be at least 1"), (-3, "must be at least 1")])
def test_a_passage_has_tokens(
    size: int, message: str, predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model={"prefill_chunk_size": size}) == 2
    line = error_line(capsys)
    assert line.startswith("model.prefill_chunk_size: ") and message in line


def test_a_model_that_does_not_read_on_is_refused_passages(
    predict: Predict,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_causal_lm("openai-gpt").save_pretrained(tmp_path / "model")
    model = {"name": str(tmp_path / "model"), "prefill_chunk_size": 7}
    data = {"tokenizer": {"name": str(model_dir("llama")), "max_length": 20}}
    assert predict(model=model, data=data, trainer={"limit_predict_batches": 1}) == 2
    assert "model.prefill_chunk_size: OpenAIGPTModel keeps no cache" in error_line(capsys)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_generating_gives_the_rows_of_one_forward(family: str, cache: str) -> None:
    model = tiny_model(FAMILIES[family])
    backbone = decoder_backbone(model)
    prompt, new_tokens = INPUT_IDS, 12
    sniffer, chunks = sniff_all(backbone, [prompt.shape[1] + 100] * 2)
    arguments: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    with torch.inference_mode(), active_sniffer(sniffer), capture_attention(backbone):
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            disable_compile=True,
            eos_token_id=None,
            **arguments,
        )
    read = text.shape[1] - 1  # the last token is never fed back
    sniffer.flush_batch([read, read])
    generated = states_of(chunks, 2)
    assert_same(generated, capture(backbone, text[:, :read]), "generation")


def test_left_padding_is_refused_in_generation() -> None:
    backbone = decoder_backbone(tiny_model(FAMILIES["llama"]))
    sniffer, _ = sniff_all(backbone, [19, 19])
    mask = torch.ones_like(INPUT_IDS)
    mask[1, 0] = 0
    with (
        pytest.raises(UserError, match=r"^attention_mask: .* padded on the left"),
        active_sniffer(sniffer),
        capture_attention(backbone),
    ):
        backbone(input_ids=INPUT_IDS, attention_mask=mask)


# --- attention implementations and compiled models


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_attention_implementation_gives_the_same_rows(
    family: str, predict: Predict, tmp_path: Path
) -> None:
    for implementation in ("eager", "sdpa", "flex_attention"):
        model = {"attn_implementation": implementation}
        # To compile flex attention takes a minute, and one of the families is enough for that.
        with torch.compiler.set_stance("default" if family == "llama" else "force_eager"):
            assert predict(implementation, family=family, model=model) == 0
    assert_equal_rows(tmp_path / "eager", tmp_path / "sdpa", vectors=1e-4)
    assert_equal_rows(tmp_path / "eager", tmp_path / "flex_attention", vectors=1e-4)


def test_an_attention_implementation_that_is_not_installed(
    predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(model={"attn_implementation": "flash_attention_2"}) == 2
    line = error_line(capsys)
    assert line.startswith("model.") and "flash" in line.lower()


@pytest.mark.parametrize("how", ["torch.compile", "compile method", "compiled layer"])
def test_a_compiled_backbone_is_refused_with_the_remedy(how: str) -> None:
    backbone = decoder_backbone(tiny_model(FAMILIES["llama"]))
    if how == "torch.compile":
        backbone = torch.compile(backbone)
    elif how == "compile method":
        backbone.compile()
    else:
        backbone.layers[1].compile()
    with pytest.raises(UserError, match="compiled backbone"):
        probe_attention(backbone)


# --- heads of layers that differ


@needs("laguna")
def test_heads_of_layers_with_different_head_counts(
    predict: Predict, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_causal_lm("laguna").save_pretrained(tmp_path / "model")  # 4 and 8 query heads, 2 key heads
    data = {"tokenizer": {"name": str(model_dir("llama")), "max_length": 9}}
    model = {"name": str(tmp_path / "model")}
    assert predict(model=model, data=data, sniffer={"capture": {"heads": [5]}}) == 0
    names = [file.parent.name for file in head_files(tmp_path / "root")]
    assert names == ["l01h01k", "l01h05q", "l03h01k", "l03h05q"]


@needs("gemma4_text")
def test_head_sampling_over_layers_with_different_widths(
    predict: Predict, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_causal_lm("gemma4_text").save_pretrained(tmp_path / "model")
    data = {"tokenizer": {"name": str(model_dir("llama")), "max_length": 9}}
    sampling = {"capture": {"head_sampling": {"count": 9, "seed": 1}}}
    assert predict(model={"name": str(tmp_path / "model")}, data=data, sniffer=sampling) == 0
    files = head_files(tmp_path / "root")
    assert sum(file.parent.name.endswith("q") for file in files) == 9
    layers = probe_attention(decoder_backbone(tiny_causal_lm("gemma4_text"))).layers
    for file in files:
        layer = layers[int(file.parent.name[1:3])]
        assert pq.read_schema(file).field("vector").type.list_size == layer.head_dim


# --- what the card says


@pytest.mark.parametrize(
    ("name", "pre_rope", "note"),
    [
        ("deepseek_v3", False, "MLA: q and k are the full vectors, the qk_nope part first"),
        ("llama4_text", False, "(layers 0, 2)"),
        ("hunyuan_v1_dense", True, "the model normalizes after RoPE"),
    ],
)
def test_the_card_and_the_manifest_carry_the_notes(
    name: str,
    pre_rope: bool,
    note: str,
    predict: Predict,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tiny_causal_lm(name).save_pretrained(tmp_path / "model")
    data = {"tokenizer": {"name": str(model_dir("llama")), "max_length": 9}}
    sniffer = {"capture": {"capture_pre_rope": pre_rope}}
    assert predict(model={"name": str(tmp_path / "model")}, data=data, sniffer=sniffer) == 0
    notes = json.loads((tmp_path / "root" / "manifest.json").read_text())["notes"]
    assert any(note in text for text in notes)
    card = (tmp_path / "root" / "README.md").read_text()
    assert all(f"- {text}\n" in card for text in notes)


def test_full_attention_only_leaves_out_chunks(
    predict: Predict, model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_causal_lm("llama4_text").save_pretrained(tmp_path / "model")
    data = {"tokenizer": {"name": str(model_dir("llama")), "max_length": 20}}
    model = {"name": str(tmp_path / "model")}
    assert predict("all", model=model, data=data) == 0
    assert (
        predict("full", model=model, data=data, sniffer={"capture": {"full_attention_only": True}}) == 0
    )
    assert {file.parent.name[:3] for file in head_files(tmp_path / "full")} == {"l01", "l03"}
    windows = pq.read_table(tmp_path / "all" / "l00h00q" / "data.parquet")["sliding_window"]
    assert set(windows.to_pylist()) == {8}
    layers = json.loads((tmp_path / "all" / "manifest.json").read_text())["layers"]
    assert [layer["chunked"] for layer in layers] == [True, False, True, False]


# --- overlays

ATTENTION_CALL = "        attention_interface: Callable = "
SELF_CAPTURE = """\
        from qk_sniffer.capture import get_active_sniffer
        if (sniffer := get_active_sniffer()) is not None:
            positions = torch.arange(query_states.shape[2])
            sniffer.capture(self.layer_idx, {query}, key_states, positions, {window})
"""


@pytest.fixture
def overlay(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """A models_dir whose llama has some lines before its attention call."""

    def write(lines: str) -> dict[str, str]:
        modeling = importlib.import_module("transformers.models.llama.modeling_llama")
        source = inspect.getsource(modeling)
        assert source.count(ATTENTION_CALL) == 1
        file = tmp_path / "models" / "llama" / "modeling_llama.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source.replace(ATTENTION_CALL, lines + ATTENTION_CALL))
        return {"models_dir": str(tmp_path / "models")}

    return write


def test_an_overlay_takes_the_place_of_the_modeling_file(
    predict: Predict, overlay: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    original = importlib.import_module("transformers.models.llama.modeling_llama").LlamaAttention
    assert predict("plain") == 0
    assert predict("doubled", model=overlay("        query_states = query_states * 2\n")) == 0
    plain, doubled = (
        pq.read_table(tmp_path / root / "l00h01q" / "data.parquet")["vector"].combine_chunks().values
        for root in ("plain", "doubled")
    )
    assert (doubled.to_numpy() == 2 * plain.to_numpy()).all()
    assert (
        importlib.import_module("transformers.models.llama.modeling_llama").LlamaAttention is original
    )
    assert transformers.models.llama.LlamaForCausalLM.__module__ == original.__module__
    assert predict("after") == 0
    assert_equal_rows(tmp_path / "plain", tmp_path / "after", vectors=0)


def test_pre_rope_vectors_are_found_in_an_overlay(
    predict: Predict, overlay: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    sniffer = {"capture": {"capture_pre_rope": True}}
    assert predict("plain", sniffer=sniffer) == 0
    assert predict("overlaid", sniffer=sniffer, model=overlay("")) == 0
    assert_equal_rows(tmp_path / "plain", tmp_path / "overlaid", vectors=0)


def test_an_overlay_may_capture_itself(
    predict: Predict, overlay: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    assert predict("plain") == 0
    model = overlay(SELF_CAPTURE.format(query="query_states", window=77))
    assert predict("own", model=model) == 0
    for file in head_files(tmp_path / "own"):
        own, plain = (
            pq.read_table(file),
            pq.read_table(tmp_path / "plain" / file.relative_to(tmp_path / "own")),
        )
        assert set(own["sliding_window"].to_pylist()) == {77}
        assert own.drop_columns("sliding_window").equals(plain.drop_columns("sliding_window"))


def test_an_overlay_that_captures_itself_tells_one_stage(
    predict: Predict, overlay: Callable[[str], dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = overlay(SELF_CAPTURE.format(query="query_states", window=77))
    moments = {"enabled": True, "pre_rope": True}
    assert predict(model=model, sniffer={"moments": moments}) == 2
    message = "sniffer.moments.pre_rope: this architecture reports its vectors itself"
    assert message in error_line(capsys)


def test_the_check_stops_a_run_whose_vectors_are_not_those_of_the_attention(
    predict: Predict,
    overlay: Callable[[str], dict[str, str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    model = overlay(SELF_CAPTURE.format(query="query_states * 1.02", window=None))
    assert predict("checked", model=model) == 2
    line = error_line(capsys)
    assert line.startswith(
        "sniffer.check: attention recomputed from the captured vectors of layer 0 of Llama"
    )
    assert not head_files(tmp_path / "checked")
    assert predict("unchecked", model=model, sniffer={"check": False}) == 0
    assert head_files(tmp_path / "unchecked")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a directory; name one"),
        ({}, "has no <arch>/modeling_<arch>.py"),
        ({"llama/modeling_mistral.py": ""}, "has no <arch>/modeling_<arch>.py"),
        ({"llama/modeling_llama.py": "def broken(:\n"}, "modeling_llama.py, line 1: "),
        (
            {"llama/modeling_llama.py": "import no_such_module\n"},
            "(ModuleNotFoundError: No module named",
        ),
        ({"lama/modeling_lama.py": ""}, "is for lama, which this transformers does not have"),
    ],
)
def test_a_wrong_overlay_is_one_line(
    files: dict[str, str] | None,
    message: str,
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "models"
    if files is not None:
        directory.mkdir()
        for name, text in files.items():
            (directory / name).parent.mkdir()
            (directory / name).write_text(text)
    assert predict(model={"models_dir": str(directory)}) == 2
    line = error_line(capsys)
    assert line.startswith("model.models_dir: ") and message in line


def test_a_model_that_was_captured_can_be_freed() -> None:
    model = tiny_model(FAMILIES["llama"])
    backbone = decoder_backbone(model)
    with active_sniffer(Received()), capture_attention(backbone):
        backbone(input_ids=torch.arange(5)[None], use_cache=False)
    freed = weakref.ref(backbone)
    del model, backbone
    gc.collect()
    assert freed() is None


def test_modules_are_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward on a GPU waits for its host, which walking thousands of modules would take long."""
    backbone = decoder_backbone(tiny_model(FAMILIES["llama"]))
    received = Received()
    with active_sniffer(received):
        with capture_attention(backbone):
            pass
        monkeypatch.setattr(nn.Module, "named_modules", None)
        with capture_attention(backbone):
            backbone(input_ids=torch.arange(5)[None], use_cache=False)
    assert received.n_calls == len(probe_attention(backbone).layers)
