"""Queries and keys of all layers, by qk-sniffer."""

import torch
from transformers import AutoModelForCausalLM

from qk_sniffer import sniff
from qk_sniffer.reading import Head


def load(directory: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory)


def capture(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[list, list]:
    """(layers, heads, S, head_dim) queries and keys, as the attention uses them."""
    # begin
    with sniff(model) as captured:
        model(tokens)
    vectors = {head: head.torch()["vector"] for head in captured.heads}
    # end
    return _by_layer(vectors, "q"), _by_layer(vectors, "k")


def _by_layer(vectors: dict[Head, torch.Tensor], kind: str) -> list[torch.Tensor]:
    layers: dict[int, list[torch.Tensor]] = {}
    for head, values in vectors.items():
        if head.kind == kind:
            layers.setdefault(head.layer.layer_idx, []).append(values)
    return [torch.stack(heads) for heads in layers.values()]
