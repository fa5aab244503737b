"""Queries and keys of all layers, by TransformerLens."""

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge


def load(directory: str) -> Any:
    return TransformerBridge.boot_transformers(directory, device="cpu")


def capture(model: Any, tokens: torch.Tensor) -> tuple[list, list]:
    """(layers, heads, S, head_dim) queries and keys, as the attention uses them."""
    # begin
    _, cache = model.run_with_cache(tokens)
    names = (
        ("hook_rot_q", "hook_rot_k") if "blocks.0.attn.hook_rot_q" in cache else ("hook_q", "hook_k")
    )
    queries, keys = (
        [cache[f"blocks.{i}.attn.{name}"][0] for i in range(model.cfg.n_layers)] for name in names
    )
    # end
    return [q.transpose(0, 1) for q in queries], [k.transpose(0, 1) for k in keys]
