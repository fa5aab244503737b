"""What a reader of stored vectors needs to compute the layer's attention from them."""

import torch
from torch import Tensor

from qk_sniffer.capture import AttentionLayer, ScoreFunction, SoftmaxInput
from qk_sniffer.models.adapters import adapter_name
from qk_sniffer.models.calls import AttentionCall
from qk_sniffer.models.notes import picks_keys

_ROUNDED_BIAS = ("modeling_falcon.FalconAttention",)
"""Whose ALiBi is slope · position rounded to bfloat16, which shows in long texts only."""


def softmax_problem(call: AttentionCall) -> str | None:
    """Why the softmax of a call can't be told, to follow "this architecture"; None where it can."""
    if call.adapter is not None and not call.adapter.complete:
        return "adds terms to its scores that its queries and keys don't tell"
    if call.arguments.get("block_indices") is not None:
        return "attends to blocks of keys that an indexer picks"
    return None


def softmax_input(call: AttentionCall, layer: AttentionLayer, past_length: int) -> SoftmaxInput:
    """What the softmax of a call takes.

    Args:
        call: The call.
        layer: Its layer.
        past_length: Places of the cache before it.
    """
    sinks, bias = call.sinks, call.bias
    if bias is not None and layer.scores is not None and layer.scores.alibi_slopes is not None:
        # Some count the positions of ALiBi from the last key, which the softmax does not feel.
        bias = bias - bias[..., :1]
    return SoftmaxInput(
        call.query,
        call.key,
        past_length,
        call.scaling,
        call.arguments.get("softcap") or None,
        bias,
        call.mask,
        None if sinks is None else sinks.view(1, -1, 1, 1) if sinks.dim() == 1 else sinks,
        layer.sliding_window,
        layer.chunked,
    )


def score_function(call: AttentionCall) -> ScoreFunction | None:
    """How an attention call turns q·kᵀ into scores; None where q and k alone don't explain it.

    Args:
        call: A call whose keys are those of the positions from 0 on.
    """
    if picks_keys(call) or (call.adapter is not None and not call.adapter.complete):
        return None
    n_heads = call.query.shape[1]
    slopes, sinks = None, None
    if (bias := call.bias) is not None:
        slopes = _slopes(bias, n_heads)
        if slopes is None or adapter_name(type(call.module)) in _ROUNDED_BIAS:
            return None
    if (sink := call.sinks) is not None:
        if sink.numel() != n_heads:
            return None
        sinks = sink.float().reshape(-1).tolist()
    return ScoreFunction(call.scaling, call.arguments.get("softcap") or None, slopes, sinks)


def _slopes(bias: Tensor, n_heads: int) -> list[float] | None:
    """Slopes of a bias that is linear in the key's position and exact; None for any other."""
    if bias.dtype != torch.float32 or bias.shape[-3:-1] != (n_heads, 1):
        return None
    bias = bias[0, :, 0]
    slopes = bias[:, 1] - bias[:, 0]
    linear = bias[:, :1] + slopes[:, None] * torch.arange(bias.shape[-1], device=bias.device)
    return slopes.tolist() if torch.allclose(bias, linear, atol=1e-5) else None
