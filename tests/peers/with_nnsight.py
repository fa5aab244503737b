"""Queries and keys of all layers, by nnsight."""

from typing import Any

import torch
from nnsight import LanguageModel


def load(directory: str) -> Any:
    return LanguageModel(directory, device_map="cpu", dispatch=True)


def capture(model: Any, tokens: torch.Tensor) -> tuple[list, list]:
    """(layers, heads, S, head_dim) queries and keys, as the attention uses them."""
    if model.config.model_type == "gpt2":
        return _of_gpt2(model, tokens)
    queries, keys = [], []
    # begin
    with model.trace(tokens):
        for layer in model.model.layers:
            rotated = layer.self_attn.source.apply_rotary_pos_emb_0.output.save()
            queries.append(rotated[0][0].save())
            keys.append(rotated[1][0].save())
    # end
    return queries, keys


def _of_gpt2(model: Any, tokens: torch.Tensor) -> tuple[list, list]:
    queries, keys = [], []
    with model.trace(tokens):
        for layer in model.transformer.h:
            query, key, _ = layer.attn.c_attn.output.split(model.config.n_embd, dim=2)
            queries.append(query[0].save())
            keys.append(key[0].save())
    heads = model.config.n_head
    return (
        [query.unflatten(1, (heads, -1)).transpose(0, 1) for query in queries],
        [key.unflatten(1, (heads, -1)).transpose(0, 1) for key in keys],
    )
