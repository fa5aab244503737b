"""What is captured is what the attention used: the oracle is the model's own eager attention."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examine import sniff_all
from families import FAMILIES, tiny_model
from qk_sniffer.capture import active_sniffer
from qk_sniffer.ids import example_id
from qk_sniffer.models import capture_attention, decoder_backbone

TOLERANCE = 1e-5
SLIDING_LAYERS = {"mistral": {0, 1, 2, 3}, "gemma3": {0, 2}}
WINDOW = 8
UNROTATED_LAYERS = {"smollm3": {1, 3}, "gpt2": {0, 1, 2, 3}}


def read_head(root: Path, name: str, source_id: str) -> Tensor:
    """(S, head_dim) vectors of one text, in order of position."""
    table = pq.read_table(root / name / "data.parquet")
    rows = table.filter(pc.equal(table["example_id"], example_id(source_id)))
    assert rows["position"].to_pylist() == list(range(rows.num_rows))
    return torch.from_numpy(np.stack(rows["vector"].to_numpy()))


def read_layer(root: Path, layer: int, heads: int, kind: str, source_id: str) -> Tensor:
    """(heads, S, head_dim) vectors of one text."""
    return torch.stack(
        [read_head(root, f"l{layer:02d}h{head:02d}{kind}", source_id) for head in range(heads)]
    )


def attention_scalings(model: PreTrainedModel) -> list[float]:
    """The factor of q·k in each layer; GPT-2 of older releases does not keep it on the module."""
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return [getattr(module, "scaling", None) or module.head_dim**-0.5 for module in modules]


def probabilities(query: Tensor, key: Tensor, scaling: float, window: int | None) -> Tensor:
    """(heads, S, S) softmax of the captured vectors under a causal or sliding mask."""
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scores = query @ key.transpose(1, 2) * scaling
    distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_reproduce_the_attention_probabilities(
    family: str,
    attn_implementation: str,
    predict: Callable[..., int],
    model_dir: Callable[[str], Path],
    texts: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    assert predict(family=family, model={"attn_implementation": attn_implementation}) == 0
    model = AutoModelForCausalLM.from_pretrained(model_dir(family), attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(model_dir(family))
    heads = model.config.num_attention_heads
    key_heads = getattr(model.config, "num_key_value_heads", heads)
    for row in texts:
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.inference_mode():
            attentions = model(input_ids=inputs["input_ids"], output_attentions=True).attentions
        scalings = attention_scalings(model)
        for layer, (expected, scaling) in enumerate(zip(attentions, scalings, strict=True)):
            window = WINDOW if layer in SLIDING_LAYERS.get(family, set()) else None
            actual = probabilities(
                read_layer(tmp_path / "root", layer, heads, "q", row["id"]),
                read_layer(tmp_path / "root", layer, key_heads, "k", row["id"]),
                scaling,
                window,
            )
            torch.testing.assert_close(actual, expected[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_of_each_layer_is_stored(
    family: str, predict: Callable[..., int], tmp_path: Path
) -> None:
    assert predict(family=family, sniffer={"capture": {"heads": [0]}}) == 0
    for layer in range(4):
        for kind in "qk":
            table = pq.read_table(tmp_path / "root" / f"l{layer:02d}h00{kind}" / "data.parquet")
            window = WINDOW if layer in SLIDING_LAYERS.get(family, set()) else None
            assert set(table["sliding_window"].to_pylist()) == {window}


@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_capturing_changes_no_bit_of_the_output(
    family: str, attn_implementation: str, pre_rope: bool
) -> None:
    model = tiny_model(FAMILIES[family])
    model.set_attn_implementation(attn_implementation)
    backbone = decoder_backbone(model)
    input_ids = torch.arange(2, 2 + 3 * 40).reshape(3, 40)
    sniffer, chunks = sniff_all(backbone, [40, 40, 40], pre_rope=pre_rope)
    with torch.inference_mode():
        plain = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        with active_sniffer(sniffer), capture_attention(backbone):
            captured = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        sniffer.flush_batch()
        after = backbone(input_ids=input_ids, use_cache=False).last_hidden_state
    assert len(chunks) == 2 * 4
    assert torch.equal(plain, captured)
    assert torch.equal(plain, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_rotation_of_pre_rope_vectors_gives_the_post_rope_ones(
    family: str,
    predict: Callable[..., int],
    model_dir: Callable[[str], Path],
    texts: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    assert predict("post", family=family) == 0
    assert predict("pre", family=family, sniffer={"capture": {"capture_pre_rope": True}}) == 0
    model = AutoModelForCausalLM.from_pretrained(model_dir(family))
    heads = model.config.num_attention_heads
    key_heads = getattr(model.config, "num_key_value_heads", heads)
    source_id = texts[2]["id"]
    for layer in range(4):
        pre, post = (
            (
                read_layer(tmp_path / root, layer, heads, "q", source_id),
                read_layer(tmp_path / root, layer, key_heads, "k", source_id),
            )
            for root in ("pre", "post")
        )
        if layer in UNROTATED_LAYERS.get(family, set()):
            assert torch.equal(pre[0], post[0])
            assert torch.equal(pre[1], post[1])
            continue
        assert not torch.equal(pre[0], post[0])
        query, key = rotate(model, layer, *pre)
        torch.testing.assert_close(query, post[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(key, post[1], atol=TOLERANCE, rtol=0)


def rotate(model: PreTrainedModel, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the modeling file's own rotary function at positions 0, 1, 2, …"""
    position_ids = torch.arange(query.shape[1])[None]
    layer_types = getattr(model.config, "layer_types", None)
    per_type = layer_types is not None and layer_types[layer] in model.config.rope_parameters
    labels = [layer_types[layer]] if per_type else []
    cos, sin = model.model.rotary_emb(query[None], position_ids, *labels)
    modeling = sys.modules[type(model).__module__]
    rotated_query, rotated_key = modeling.apply_rotary_pos_emb(query[None], key[None], cos, sin)
    return rotated_query[0], rotated_key[0]


def test_config_overrides_rescale_rope_and_keep_its_base(
    predict: Callable[..., int], model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert predict("plain") == 0
    assert predict("yarn", model={"config_overrides": {"rope_scaling": yarn}}) == 0

    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    theta = model.config.rope_parameters["rope_theta"]
    model.config.rope_parameters = yarn | {"rope_theta": theta}
    expected = type(model)(model.config)
    expected.load_state_dict(model.state_dict())
    expected_cos, _ = expected.model.rotary_emb(torch.zeros(1), torch.arange(61)[None])
    pre = predict("pre", sniffer={"capture": {"capture_pre_rope": True}})
    assert pre == 0
    query = read_layer(tmp_path / "pre", 0, 4, "q", "topic-2")
    key = read_layer(tmp_path / "pre", 0, 2, "k", "topic-2")
    assert expected_cos.shape[1] == query.shape[1]
    rotated, _ = rotate(expected, 0, query, key)
    stored = read_layer(tmp_path / "yarn", 0, 4, "q", "topic-2")
    torch.testing.assert_close(rotated, stored, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(read_layer(tmp_path / "plain", 0, 4, "q", "topic-2"), stored)
