"""What a reader of captured vectors must know about an architecture, told from its attention calls."""

from collections.abc import Iterable, Iterator

from qk_sniffer.models.calls import AttentionCall

_EXTRA_ARGUMENTS = {
    "s_aux": "a learned sink takes part in each head's softmax",
    "sinks": "a learned sink takes part in each head's softmax",
    "position_bias": "a relative-position bias is added to the scaled scores",
}

_BY_CLASS = {
    "DogeAttention": "a bias computed from the values is added to each key's scores, and of long texts "
    "each head attends only to the keep_window_size keys with the largest"
}


def in_layers(text: str, layers: Iterable[int]) -> str:
    """A note that holds in some layers only."""
    return f"{text} (layers {', '.join(map(str, sorted(set(layers))))})"


def picks_keys(call: AttentionCall) -> bool:
    """Whether something beside q and k decides which keys a query attends to, and how much."""
    module = call.module
    picks = hasattr(module, "indexer") or call.arguments.get("block_indices") is not None
    return picks or type(module).__name__ in _BY_CLASS


def call_notes(call: AttentionCall) -> Iterator[str]:
    """The notes that one attention call gives rise to."""
    module, arguments = call.module, call.arguments
    for name, note in _EXTRA_ARGUMENTS.items():
        if call.adapter is None and arguments.get(name) is not None:
            yield note
    if hasattr(module, "indexer") or arguments.get("block_indices") is not None:
        yield "each query attends only to the keys that an indexer picks"
    if type(module).__name__ in _BY_CLASS:
        yield _BY_CLASS[type(module).__name__]
    if softcap := arguments.get("softcap"):
        yield f"scores are capped: {softcap:g} · tanh(scores / {softcap:g})"
    if call.window[1]:
        yield "the window is a chunk: position p attends from p - p % sliding_window on"
    if hasattr(module, "qk_rope_head_dim"):
        yield "MLA: q and k are the full vectors, the qk_nope part first, then the qk_rope part"
    if call.adapter is not None:
        if call.bias is not None:
            yield "ALiBi: a bias linear in the distance is added to the scaled scores"
        if call.adapter.note:
            yield call.adapter.note
    if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
        yield "queries are stored as scaled by their position (attention temperature)"
    rope = getattr(getattr(module, "config", None), "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("llama_4_scaling_beta"):
        yield "queries are scaled by their position after RoPE; vectors after RoPE are stored so scaled"
