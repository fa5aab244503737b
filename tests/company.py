"""Whether a text's rows are those of a fresh model that reads it alone, whatever is read with it.

``python tests/company.py NAME…`` walks some architectures, and without a name all of them, with each
kind of RoPE that transformers has, and prints where it differs.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from examine import sniff_all
from qk_sniffer.capture import active_sniffer
from qk_sniffer.data.batches import plan_batches
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import PARTS, SOFTMAX_COLUMNS
from qk_sniffer.models import check_passages, decoder_backbone, probe_attention
from qk_sniffer.models.refusals import REFUSED, refuse_unsupported
from qk_sniffer.module import SnifferModule
from tiny import ARCHITECTURES, VOCABULARY, WINDOW, tiny_causal_lm, tiny_config

BORDER = 24
"""Tokens of the original length, where frequencies change; the window and chunks have 8."""

LENGTHS = (40, WINDOW - 1, BORDER + 1, BORDER)
"""A shorter text comes after a longer one, a longer after a shorter, and each border has two sides."""

TOLERANCE = 1e-5
ROUNDING_OF_PASSAGES = 1e-4
"""Other frequencies than those of the text are off by 1e-2 and more."""

BUDGET = 60
PASSAGE = 5
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)

Rows = dict[int, dict[tuple[int, str], torch.Tensor]]
"""(heads, S, head_dim) of each layer and kind, by text."""


class NotApplicable(Exception):
    """An architecture does not take a kind of RoPE."""


def differences(name: str, rope_type: str) -> dict[str, float]:
    """The worst difference of a text's vectors from those it has alone, by way of reading.

    In units of the largest vector component; "passages" is absent where a run refuses them.

    Raises:
        NotApplicable: The architecture is refused, or has no such RoPE.
    """
    texts = _texts()
    try:
        model = model_with(name, rope_type)
        with torch.inference_mode():
            fresh(model)(input_ids=texts[0][None], use_cache=False)
    except (RuntimeError, ValueError) as error:
        # As where RoPE turns part of a head and `proportional` gives frequencies for the whole.
        raise NotApplicable from error
    alone: Rows = {}
    for number in range(len(texts)):
        alone |= read(fresh(model), texts, [[number]])
    ways: dict[str, Callable[[], Rows]] = {
        "in company": lambda: read(fresh(model), texts, [range(len(texts))]),
        "one after another": lambda: read(fresh(model), texts, [[i] for i in range(len(texts))]),
        "backwards": lambda: read(fresh(model), texts, [[i] for i in reversed(range(len(texts)))]),
        "under a budget": lambda: read(
            fresh(model), texts, plan_batches(np.array(LENGTHS), len(texts), BUDGET)
        ),
    }
    backbone = fresh(model)
    try:
        check_passages(backbone, texts[0][None])
        ways["in passages"] = lambda: read(backbone, texts, [range(len(texts))], passage=PASSAGE)
    except UserError:
        pass
    return {way: _worst(run(), alone) for way, run in ways.items()}


def model_with(name: str, rope_type: str) -> PreTrainedModel:
    """The tiny model of an architecture with a kind of RoPE in every layer.

    Raises:
        NotApplicable: The architecture is refused, or has no such RoPE.
    """
    if name.removesuffix(" (multimodal)") in REFUSED:
        raise NotApplicable
    config = tiny_config(name)
    try:
        refuse_unsupported(name, config)
    except UserError as error:
        raise NotApplicable from error
    found = list(_rope_parameters(config))
    if not found and rope_type != "default":
        raise NotApplicable
    for owner, layer_type in found:
        if rope_type != "default":
            _set_rope(owner, layer_type, rope_type)
    return tiny_causal_lm(name, config)


def _rope_parameters(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, str | None]]:
    """Each config that has RoPE's parameters, and the type of layer that they are for."""
    decoder = config.get_text_config(decoder=True)
    parameters = getattr(decoder, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield decoder, None
    else:
        yield from ((decoder, key) for key, value in parameters.items() if isinstance(value, dict))


def _set_rope(config: PreTrainedConfig, layer_type: str | None, rope_type: str) -> None:
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    if getattr(config, "head_dim", 0) is None:
        # Some kinds of RoPE take it from the config alone.
        config.head_dim = config.hidden_size // config.num_attention_heads
    n = _n_frequencies(config, layer_type, parameters)
    # Each kind takes of these what it knows; Phi-3.5-MoE asks for its scales with all.
    parameters |= {
        "rope_type": rope_type,
        "factor": 4.0,
        "original_max_position_embeddings": BORDER,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1.0] * n,
        "long_factor": [1.0 + i for i in range(n)],
        "short_mscale": 1.0,
        "long_mscale": 1.2,
    }
    if rope_type == "dynamic":
        config.max_position_embeddings = BORDER
    if rope_type == "longrope":
        config.original_max_position_embeddings = BORDER


def _n_frequencies(config: PreTrainedConfig, layer_type: str | None, parameters: dict[str, Any]) -> int:
    with suppress(ValueError):
        # Without layers of several widths there is nothing to ask for by type.
        config = config.per_layer_config[layer_type] if layer_type else config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return math.ceil(int(head_dim * parameters.get("partial_rotary_factor", 1.0)) / 2)


def fresh(model: PreTrainedModel) -> nn.Module:
    """The backbone of a model that has read nothing."""
    return decoder_backbone(copy.deepcopy(model))


def _texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(7, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def read(backbone: nn.Module, texts: list[torch.Tensor], batches: Any, passage: int = 0) -> Rows:
    """All rows of some texts, read batch by batch."""
    module = SnifferModule("tiny", prefill_chunk_size=passage or None)
    module.backbone = backbone
    rows: Rows = {}
    for batch in batches:
        lengths = [len(texts[number]) for number in batch]
        problems = probe_attention(backbone).results.problems
        parts = [part for part in PARTS if part not in problems]
        sniffer, chunks = sniff_all(backbone, lengths, parts=parts)
        input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, number in enumerate(batch):
            input_ids[row, : lengths[row]] = texts[number]
        with active_sniffer(sniffer), torch.inference_mode():
            module.predict_step({"input_ids": input_ids, "sequence_lengths": torch.tensor(lengths)}, 0)
        sniffer.flush_batch()
        for row, number in enumerate(batch):
            rows[number] = _joined(chunks, row)
    return rows


def _joined(chunks: Any, row: int) -> dict[tuple[int, str], torch.Tensor]:
    """The vectors of one sequence of a batch, its passages put together."""
    parts: dict[tuple[int, str], list[torch.Tensor]] = {}
    for chunk in chunks:
        mine = chunk.example_ids == row
        vectors = chunk.vectors[:, mine]
        if chunk.kind == "softmax":
            # The key with the largest score is no number to compare by its size.
            vectors = vectors[..., [name != "argmax_position" for name in SOFTMAX_COLUMNS]]
        parts.setdefault((chunk.layer_idx, chunk.kind), []).append(vectors)
    return {key: torch.cat(found, dim=1) for key, found in parts.items()}


def _worst(rows: Rows, alone: Rows) -> float:
    worst = 0.0
    for number, states in alone.items():
        assert rows[number].keys() == states.keys()
        for key, expected in states.items():
            scale = max(1.0, float(expected.abs().max()))
            worst = max(worst, float((rows[number][key] - expected).abs().max()) / scale)
    return worst


def main(names: list[str]) -> None:
    """Print each architecture and kind of RoPE, and the ways that differ."""
    logging.set_verbosity_error()
    for name in names or ARCHITECTURES:
        for rope_type in ROPE_TYPES:
            try:
                found = differences(name, rope_type)
            except NotApplicable:
                continue
            except Exception as error:
                print(name, rope_type, f"{type(error).__name__}: {error}"[:160], flush=True)
                continue
            odd = {way: f"{value:.2g}" for way, value in found.items() if not value <= TOLERANCE}
            missing = "" if "in passages" in found else "no passages"
            print(name, rope_type, odd or "exact", missing, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
