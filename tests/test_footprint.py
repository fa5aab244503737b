"""The memory of a forward as it is told without weights, against forwards that were measured."""

import copy
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, PreTrainedConfig

from families import FAMILIES, QWEN3_8B, SMOLLM2_135M, tiny_model
from qk_sniffer.models import decoder_backbone, forward_footprint
from qk_sniffer.models.footprint import _Held
from qk_sniffer.models.loading import auto_class


def skeleton(config: PreTrainedConfig, attention: str = "sdpa", dtype: Any = torch.bfloat16) -> Any:
    with torch.device("meta"):
        model = auto_class(config).from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation=attention
        )
    return decoder_backbone(model.eval())


@pytest.mark.parametrize(
    ("config", "batch_size", "length", "measured"),
    [
        (QWEN3_8B, 1, 16_384, 15.76),
        (QWEN3_8B, 1, 131_072, 27.19),
        (SMOLLM2_135M, 16, 1024, 0.49),
    ],
)
def test_the_peaks_of_a_gpu(
    config: PreTrainedConfig, batch_size: int, length: int, measured: float
) -> None:
    """Of an H100 in bfloat16 with sdpa, in GiB, weights included."""
    backbone = skeleton(config)
    weights = sum(weight.nbytes for weight in backbone.parameters())
    total = weights + forward_footprint(backbone, batch_size, length).n_bytes
    assert total / 2**30 == pytest.approx(measured, rel=0.1)


def measured_bytes(backbone: torch.nn.Module, batch_size: int, length: int) -> int:
    """The peak of a forward with real tensors."""
    held = _Held(backbone)
    with torch.no_grad(), held:
        backbone(input_ids=torch.ones((batch_size, length), dtype=torch.int64), use_cache=False)
    return held.peak


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_with_real_tensors(family: str, attention: str) -> None:
    model = tiny_model(FAMILIES[family])
    model.set_attn_implementation(attention)
    told = forward_footprint(skeleton(FAMILIES[family], attention, torch.float32), 3, 100)
    assert told.n_bytes == pytest.approx(measured_bytes(decoder_backbone(model), 3, 100), rel=0.15)


def test_a_mask_of_every_pair_is_named() -> None:
    config = Gemma3TextConfig(num_hidden_layers=6)
    whole = forward_footprint(skeleton(config), 1, 131_072)
    assert whole.is_mask and whole.largest >= 131_072**2
    passages = forward_footprint(skeleton(config), 1, 131_072, 4096)
    assert passages.n_bytes < whole.n_bytes / 10
    assert not forward_footprint(skeleton(SMOLLM2_135M), 1, 131_072).is_mask


def test_passages_hold_the_cache_of_all_tokens() -> None:
    told = forward_footprint(skeleton(SMOLLM2_135M), 2, 8192, 512)
    cache = 2 * 8192 * 30 * 3 * 64 * 2 * 2
    assert cache < told.n_bytes < forward_footprint(skeleton(SMOLLM2_135M), 2, 8192).n_bytes + cache
