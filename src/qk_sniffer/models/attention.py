"""How a model's queries and keys are reached: through the attention interface of transformers.

Each attention module asks ``AttentionInterface.get_interface`` for the function that computes its
attention. For the length of a forward the answer is wrapped, on the class: the wrapper reports the
call to the active sniffer and then calls the very function that the model would have called. No
implementation is registered and no mask changes, so outputs stay as they are.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.capture import (
    AttentionLayer,
    AttentionProbe,
    active_sniffer,
    compute_positions,
    get_active_sniffer,
)
from qk_sniffer.errors import UserError
from qk_sniffer.models.rotary import trace_rotary

_OnAttention = Callable[[nn.Module, Tensor, Tensor, int | None], None]


def decoder_backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model below its head.

    ``model.model`` where there is one: ``base_model`` is the whole language model for a few.
    """
    backbone = getattr(model, "model", None)
    return backbone if isinstance(backbone, nn.Module) else model.base_model


@contextmanager
def capture_attention(backbone: nn.Module) -> Iterator[None]:
    """Report every self-attention call of ``backbone`` to the active sniffer, within a block.

    Calls of modules outside the backbone pass through. Without an active sniffer nothing is wrapped.
    """
    sniffer = get_active_sniffer()
    if sniffer is None:
        yield
        return
    layer_indices = _layer_indices(backbone)
    with ExitStack() as stack:
        trace = stack.enter_context(trace_rotary(backbone)) if sniffer.pre_rope else None

        def report(module: nn.Module, query: Tensor, key: Tensor, window: int | None) -> None:
            layer_idx = layer_indices.get(module)
            if layer_idx is None:
                return
            if trace is not None:
                query, key = trace.unrotated(query, key)
            positions, _ = compute_positions(query.shape[2], key.shape[2])
            sniffer.capture(layer_idx, query, key, positions, window)

        stack.enter_context(_intercept_attention(report))
        yield


@torch.inference_mode()
def probe_attention(backbone: nn.Module, *, pre_rope: bool = False) -> list[AttentionLayer]:
    """The self-attention layers of a backbone, seen in a forward of two tokens.

    Raises:
        UserError: No attention is reached, or a layer runs more than once in a forward.
    """
    probe = AttentionProbe(pre_rope)
    device = next(backbone.parameters()).device
    with active_sniffer(probe), capture_attention(backbone):
        backbone(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    name = type(backbone).__name__
    if not probe.layers:
        raise UserError(
            f"model.name: {name} calls no attention through transformers' attention interface, so "
            "there are no queries and keys to capture; choose another model"
        )
    layer_idx, calls = Counter(layer.layer_idx for layer in probe.layers).most_common(1)[0]
    if calls > 1:
        raise UserError(
            f"model.name: {name} runs attention {calls} times in layer {layer_idx}, so its rows would "
            "not be unique; choose another model"
        )
    return sorted(probe.layers, key=lambda layer: layer.layer_idx)


def _layer_indices(backbone: nn.Module) -> dict[nn.Module, int]:
    """Modules inside a numbered decoder layer, by the layer's number in their name.

    A module's own ``layer_idx`` is missing in some architectures and repeated in others.
    """
    return {
        module: int(number.group())
        for name, module in backbone.named_modules()
        if (number := re.search(r"\d+", name))
    }


@contextmanager
def _intercept_attention(on_attention: _OnAttention) -> Iterator[None]:
    original = AttentionInterface.get_interface

    @wraps(original)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        attention = original(self, *args, **kwargs)

        @wraps(attention)
        def reporting(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            on_attention(module, query, key, kwargs.get("sliding_window"))
            return attention(module, query, key, *args, **kwargs)

        return reporting

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original
