"""Hands the attention calls of a forward to the active sniffer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from qk_sniffer.capture import compute_positions, get_active_sniffer, own_keys
from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.attention import watch_attention
from qk_sniffer.models.calls import AttentionCall
from qk_sniffer.models.probe import AttentionMap, probe_attention
from qk_sniffer.models.results import on_result_of
from qk_sniffer.models.rotary import RotaryTrace
from qk_sniffer.models.scores import softmax_input


@contextmanager
def capture_attention(backbone: nn.Module) -> Iterator[None]:
    """Report every self-attention call of ``backbone`` to the active sniffer, within a block.

    The backbone may read its tokens in one forward or, with a cache, in several, and ``generate`` may
    run it. Calls of modules outside its text decoder pass through. Without an active sniffer nothing
    is wrapped.

    Raises:
        UserError: As ``probe_attention`` does; or, in a forward, the batch is padded on the left.
    """
    sniffer = get_active_sniffer()
    if sniffer is None:
        yield
        return
    traces_rotary = sniffer.pre_rope or sniffer.both_stages
    attention = probe_attention(backbone, sniffer.parts, pre_rope=traces_rotary)
    layers = {layer.layer_idx: layer for layer in attention.layers}
    wants_softmax, wants_result = "softmax" in sniffer.parts, not {"v", "o"}.isdisjoint(sniffer.parts)

    def report(
        layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> OnResult | None:
        if layer_idx in attention.captures_itself:
            return None
        layer = layers[layer_idx]
        positions = _positions(past_length, call.query.shape[2], call.key.shape[2])
        before = states_of(layer_idx, call, past_length, trace, attention)
        query, key = before if sniffer.pre_rope else (call.query, call.key)
        softmax = softmax_input(call, layer, past_length) if wants_softmax else None
        sniffer.capture(layer_idx, query, key, positions, layer.sliding_window, softmax)
        if sniffer.both_stages:
            own = call.query, own_keys(call.key, past_length, call.query.shape[2])
            sniffer.capture_other_stage(layer_idx, *(own if sniffer.pre_rope else before))
        if not wants_result:
            return None
        take = partial(sniffer.capture_result, layer_idx, sliding_window=layer.sliding_window)
        return on_result_of(call.module, take)

    with watch_attention(
        backbone, report, numbered_by_call=attention.numbered_by_call, rotary=traces_rotary
    ):
        yield


def states_of(
    layer_idx: int,
    call: AttentionCall,
    past_length: int,
    trace: RotaryTrace | None,
    attention: AttentionMap,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of an attention call, before RoPE where it was traced.

    Args:
        layer_idx: The layer.
        call: The call.
        past_length: Tokens in the cache before it.
        trace: Rotations of the layer; None gives the call's own.
        attention: What a probe saw in the model.
    """
    if trace is None:
        return call.query, call.key
    key = own_keys(call.key, past_length, call.query.shape[2])
    return trace.unrotated(layer_idx, call.query, key, attention.rotary)


@lru_cache(maxsize=1)
def _positions(past_length: int, query_length: int, key_length: int) -> Tensor:
    """Positions of the queries of a call; those of all layers of a forward are mostly the same."""
    queries = torch.arange(past_length, past_length + query_length)
    return compute_positions(query_length, key_length, cache_position=queries)[0]
