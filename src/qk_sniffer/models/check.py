"""The self-check: attention recomputed from captured vectors against what the model computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qk_sniffer.capture import (
    AttentionLayer,
    CapturesAttention,
    SoftmaxInput,
    active_sniffer,
    attends,
    capped,
    softmax_with_sinks,
)
from qk_sniffer.errors import UserError
from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.attention import watch_attention
from qk_sniffer.models.calls import AttentionCall
from qk_sniffer.models.capturing import capture_attention
from qk_sniffer.models.probe import probe_attention
from qk_sniffer.models.rotary import RotaryTrace

_CHECKED_TOKENS = 512
_CHECKED_LAYERS = 4
_CHECKED_HEADS = 4


def attention_probabilities(
    layer: AttentionLayer,
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    *,
    passed_mask: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Attention as the captured vectors give it: softmax of q·kᵀ with scale, bias, cap, mask and sink.

    Args:
        layer: The layer's geometry, as it is stored with the vectors.
        call: Where scaling, cap, bias and sinks come from.
        query: (B, num_attention_heads, S, head_dim), from position 0.
        key: (B, num_key_value_heads, S, head_dim).
        passed_mask: Take the mask that the model passed, where it is a tensor, instead of the causal
            mask with the layer's window.
        dtype: In which scores are computed, before the softmax in float32.

    Returns:
        (B, num_attention_heads, S, S) float32. With a sink a row sums to less than 1.
    """
    arguments = call.arguments
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.to(dtype) @ key.transpose(-1, -2) * call.scaling
    scores = capped(scores, arguments.get("softcap"))
    if (bias := call.bias) is not None:
        scores = scores + bias[..., : scores.shape[-1]]
    scores = scores.float()
    mask = arguments.get("attention_mask")
    if passed_mask and call.adapter is None and isinstance(mask, Tensor):
        mask = mask[..., : scores.shape[-1]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    else:
        positions = torch.arange(scores.shape[-1], device=scores.device)
        allowed = attends(positions, positions, layer.sliding_window, chunked=layer.chunked)
        scores = scores.masked_fill(~allowed, -torch.inf)
    sinks = call.sinks
    if sinks is not None and sinks.dim() == 1:
        sinks = sinks[:, None, None]
    return softmax_with_sinks(scores, sinks)


@dataclass
class _Seen:
    """What the model did in one layer."""

    call: AttentionCall
    output: Tensor | None = None
    probabilities: Tensor | None = None


@dataclass
class _Collector(CapturesAttention):
    """Stands in for the sniffer and keeps some layers whole."""

    layers: set[int]
    pre_rope: bool = False
    captured: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: dict[int, _Seen] = field(default_factory=dict)

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        sliding_window: int | None = None,
        softmax: SoftmaxInput | None = None,
    ) -> None:
        if layer_idx in self.layers:
            self.captured[layer_idx] = query.clone(), key.clone()

    def on_layer(
        self, layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> OnResult | None:
        if layer_idx not in self.layers:
            return None
        seen = self.seen[layer_idx] = _Seen(call)

        def on_result(
            output: Tensor | None, probabilities: Tensor | None, value: Tensor | None
        ) -> None:
            seen.output, seen.probabilities = output, probabilities

        return on_result


def opening(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    """What a check reads of a text: the first 512 tokens, no more than the model has positions."""
    limit: Any = getattr(backbone.config, "max_position_embeddings", None) or _CHECKED_TOKENS
    return input_ids[:, : min(limit, _CHECKED_TOKENS)]


@torch.inference_mode()
def check_capture(backbone: nn.Module, input_ids: Tensor, layers: Sequence[int]) -> None:
    """Recompute attention in a few layers and heads, and compare it with what the model computed.

    One extra forward of the first 512 tokens, in the attention implementation that the run uses.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        input_ids: (1, S) tokens of a real text.
        layers: Layers that are captured; a few of them, far apart, are checked.

    Raises:
        UserError: The vectors that would be captured do not explain the model's attention.
    """
    attention = probe_attention(backbone)
    input_ids = opening(backbone, input_ids)
    layers = layers[:: max(1, -(-len(layers) // _CHECKED_LAYERS))]
    chosen = [layer for layer in attention.layers if layer.layer_idx in layers]
    collector = _Collector({layer.layer_idx for layer in chosen})
    # The watch comes second, so that it is told of a call before the capture is.
    with (
        active_sniffer(collector),
        capture_attention(backbone),
        watch_attention(backbone, collector.on_layer, numbered_by_call=attention.numbered_by_call),
    ):
        backbone(input_ids=input_ids, use_cache=False)
    for layer in chosen:
        error = _error(layer, collector)
        if error is not None and not error < _tolerance(collector.captured[layer.layer_idx][0]):
            raise UserError(
                f"sniffer.check: attention recomputed from the captured vectors of layer "
                f"{layer.layer_idx} of {type(backbone).__name__} is off by {error:.1%} from the "
                "model's own; the captured vectors are not all that it attends with. Choose another "
                "model or layers, or set check to false to capture them all the same"
            )


def _error(layer: AttentionLayer, collector: _Collector) -> float | None:
    """Relative error of the worst head, None where the layer's attention can't be seen."""
    seen = collector.seen.get(layer.layer_idx)
    if seen is None or (seen.call.adapter is not None and not seen.call.adapter.complete):
        return None
    query, key = collector.captured[layer.layer_idx]
    # A fused kernel keeps scores in float32, eager attention in the model's dtype.
    errors = [_error_in(dtype, layer, seen, query, key) for dtype in {torch.float32, query.dtype}]
    return min((error for error in errors if error is not None), default=None)


def _error_in(
    dtype: torch.dtype, layer: AttentionLayer, seen: _Seen, query: Tensor, key: Tensor
) -> float | None:
    expected: Any = attention_probabilities(layer, seen.call, query, key, passed_mask=True, dtype=dtype)
    if seen.output is not None and "value" in seen.call.arguments:
        value = seen.call.arguments["value"].float()
        expected = expected @ value.repeat_interleave(expected.shape[1] // value.shape[1], dim=1)
        actual = seen.output.transpose(1, 2)
    elif seen.probabilities is not None:
        actual = seen.probabilities
    else:
        return None
    heads = torch.arange(0, expected.shape[1], max(1, expected.shape[1] // _CHECKED_HEADS))
    expected, actual = expected[0, heads], actual[0, heads].float()
    norms = expected.flatten(1).norm(dim=1)
    return float(((expected - actual).flatten(1).norm(dim=1) / norms.clamp_min(1e-30)).max())


def _tolerance(states: Tensor) -> float:
    """Rounding of probabilities and outputs in the model's dtype, with room."""
    return max(1e-3, 8 * torch.finfo(states.dtype).eps)
