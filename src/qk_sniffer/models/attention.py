"""The attention of one decoder: which layers it has, and how their calls reach the active sniffer."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qk_sniffer.capture import (
    AttentionLayer,
    active_sniffer,
    compute_positions,
    first_new_key,
    get_active_sniffer,
)
from qk_sniffer.errors import UserError
from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.calls import AttentionCall, intercept_attention
from qk_sniffer.models.notes import call_notes, in_layers
from qk_sniffer.models.rotary import RotaryMap, RotaryTrace, trace_rotary

_CROSS_ATTENTION = re.compile(r"cross|encoder_?attn", re.IGNORECASE)
_LAYER_NAME = re.compile(r"\D*(\d+)")
_PROBED_TOKENS = 11


def decoder_backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model below its head.

    ``model.model`` where there is one, also that of the language model inside a multimodal one:
    ``base_model`` is the whole language model for a few.
    """
    for owner in (model, getattr(model, "language_model", None)):
        backbone: Any = getattr(owner, "model", None)
        if isinstance(backbone, nn.Module):
            return backbone
    return cast(nn.Module, model.base_model)


@dataclass(frozen=True)
class AttentionMap:
    """What one short forward shows of a backbone's attention.

    Attributes:
        layers: Every self-attention layer, in order.
        notes: What a reader of the vectors must know beyond scale, mask and window.
        captures_itself: Layers whose modeling file calls the active sniffer.
        numbered_by_call: Layers are numbered by the order of their calls, because a decoder layer
            attends more than once.
        rotary: How vectors before RoPE are found.
    """

    layers: list[AttentionLayer]
    notes: list[str]
    captures_itself: frozenset[int]
    numbered_by_call: bool
    rotary: RotaryMap


_maps: WeakKeyDictionary[nn.Module, AttentionMap] = WeakKeyDictionary()


def probe_attention(backbone: nn.Module, *, pre_rope: bool = False) -> AttentionMap:
    """The self-attention layers of a backbone, seen in two forwards of a few tokens.

    The answer is kept for as long as the backbone lives.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        pre_rope: The vectors before RoPE are wanted.

    Raises:
        UserError: No attention is reached, it is not causal, or the vectors before RoPE can't be told.
    """
    if backbone not in _maps:
        _refuse_compiled(backbone)
        _maps[backbone] = _Probe(backbone).run()
    attention = _maps[backbone]
    if pre_rope and attention.rotary.problem:
        raise UserError(
            f"sniffer.capture.capture_pre_rope: this architecture {attention.rotary.problem}, so its "
            "vectors before RoPE can't be told; set it to false"
        )
    return attention


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
    attention = probe_attention(backbone, pre_rope=sniffer.pre_rope)
    windows = {layer.layer_idx: layer.sliding_window for layer in attention.layers}

    def report(
        layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> None:
        if layer_idx in attention.captures_itself:
            return
        query, key = call.query, call.key
        length = query.shape[2]
        token_positions = torch.arange(past_length, past_length + length)
        positions, _ = compute_positions(length, key.shape[2], cache_position=token_positions)
        if trace is not None:
            first = first_new_key(past_length, length, key.shape[2])
            key = key[:, :, first : first + length]
            query, key = trace.unrotated(layer_idx, query, key, attention.rotary)
        sniffer.capture(layer_idx, query, key, positions, windows[layer_idx])

    with watch_attention(
        backbone, report, numbered_by_call=attention.numbered_by_call, rotary=sniffer.pre_rope
    ):
        yield


OnLayer = Callable[[int, AttentionCall, int, RotaryTrace | None], OnResult | None]
"""Takes layer, call, number of tokens that a cache holds already, and rotations of the layer."""


@contextmanager
def watch_attention(
    backbone: nn.Module, on_layer: OnLayer, *, numbered_by_call: bool = False, rotary: bool = False
) -> Iterator[None]:
    """Call ``on_layer`` before every self-attention of the text decoder, within a block.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        on_layer: What it returns is called with the attention's result.
        numbered_by_call: Number the calls of a forward instead of the decoder's layers.
        rotary: Trace rotations.
    """
    decoder = _text_decoder(backbone)
    forward = _Forward(decoder, on_layer, numbered_by_call)
    with ExitStack() as stack:
        if rotary:
            forward.trace = stack.enter_context(trace_rotary(decoder))
        hook = backbone.register_forward_pre_hook(forward.begin, with_kwargs=True)
        stack.callback(hook.remove)
        for layer_idx, layer in forward.numbered_layers:
            hook = layer.register_forward_pre_hook(forward.entering(layer_idx))
            stack.callback(hook.remove)
        stack.enter_context(intercept_attention(decoder, forward.on_call))
        yield


class _Forward:
    """Where a forward is: its decoder layer, its attention calls and the tokens before it."""

    trace: RotaryTrace | None = None

    def __init__(self, decoder: nn.Module, on_layer: OnLayer, numbered_by_call: bool) -> None:
        names = decoder.named_modules(remove_duplicate=False)
        self.numbered_layers = [
            (int(number[1]), module)
            for name, module in names
            if (number := _LAYER_NAME.fullmatch(name))
        ]
        self._cross_attention = {
            module
            for name, module in decoder.named_modules()
            if _CROSS_ATTENTION.search(name) or _CROSS_ATTENTION.search(type(module).__name__)
        }
        self._on_layer = on_layer
        self._numbered_by_call = numbered_by_call
        self._restart()

    def _restart(self) -> None:
        self._past_length = 0
        self._has_cache = False
        self._layer_idx: int | None = None
        self._n_calls = 0
        self._last_query: Callable[[], Tensor | None] = lambda: None

    def begin(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._restart()
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, 0].all():
            raise UserError(
                "attention_mask: a sequence is padded on the left, so positions can't be counted; pad "
                "on the right, or generate for one sequence at a time"
            )
        # The argument's name depends on the release of transformers.
        for cache in kwargs.values():
            if hasattr(cache, "get_seq_length"):
                self._past_length = int(cache.get_seq_length())
                self._has_cache = True
        if self.trace is not None:
            self.trace.begin_forward()

    def entering(self, layer_idx: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._layer_idx = layer_idx

        return enter

    def on_call(self, call: AttentionCall) -> OnResult | None:
        if self._layer_idx is None or call.module in self._cross_attention:
            return None
        # Differential attention calls once for each half of the values, with the same query and key.
        if self._last_query() is call.query:
            return None
        self._last_query = ref(call.query)
        layer_idx = self._n_calls if self._numbered_by_call else self._layer_idx
        n_tokens, n_keys = call.query.shape[2], call.key.shape[2]
        if n_keys != n_tokens and not self._has_cache:
            raise UserError(
                f"model.name: {type(call.module).__name__} of layer {layer_idx} attends to {n_keys} "
                f"keys for {n_tokens} tokens, so its keys have no token position; choose another model"
            )
        self._n_calls += 1
        return self._on_layer(layer_idx, call, self._past_length, self.trace)


class _Probe:
    """Two short forwards that differ in all tokens but the first, and what they show."""

    pre_rope = False

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._name = type(backbone).__name__
        self._layers: list[AttentionLayer] = []
        self._own_layers: dict[int, AttentionLayer] = {}
        self._notes: dict[str, list[int]] = {}
        self._rotary = RotaryMap()
        self._numbered_by_call = False
        self._first_query: Tensor | None = None

    def run(self) -> AttentionMap:
        self._forward(later_token=4)
        calls = Counter(layer.layer_idx for layer in self._layers)
        if calls and max(calls.values()) > 1:
            self._numbered_by_call = True
            self._forward(later_token=4)
        first_query = self._first_query
        layers = {layer.layer_idx: layer for layer in self._layers} | self._own_layers
        if not layers:
            raise UserError(self._unreached())
        self._forward(later_token=6)
        if first_query is not None and _differs(first_query, self._first_query):
            raise UserError(
                f"model.name: {self._name} attends to later tokens, so its vectors would depend on "
                "padding and batch; choose a causal language model, or make it one with "
                "model.config_overrides (is_decoder: true for BERT and its kin, causal: true for XLM)"
            )
        if self._numbered_by_call:
            self._notes["a decoder layer attends more than once: layers count its calls in order"] = []
        return AttentionMap(
            sorted(layers.values(), key=lambda layer: layer.layer_idx),
            [_note(text, indices, len(layers)) for text, indices in self._notes.items()],
            frozenset(self._own_layers),
            self._numbered_by_call,
            self._rotary_map(),
        )

    @torch.inference_mode()
    def _forward(self, later_token: int) -> None:
        self._layers.clear()
        self._notes.clear()
        weight = next(self._backbone.parameters())
        # As many tokens as no model has heads, so that the axes can be told apart.
        input_ids = torch.full((1, _PROBED_TOKENS), later_token, device=weight.device)
        input_ids[0, 0] = 3
        input_ids[0, 2::2] += 1
        watch = watch_attention(
            self._backbone, self._on_layer, numbered_by_call=self._numbered_by_call, rotary=True
        )
        with active_sniffer(self), watch:
            self._backbone(input_ids=input_ids, use_cache=False)

    def _on_layer(
        self, layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> None:
        query, key = call.query, call.key
        window, chunked = call.window
        self._layers.append(_layer(layer_idx, query, key, window, chunked))
        self._first_query = query[:, :, 0].float()
        for note in call_notes(call):
            self._notes.setdefault(note, []).append(layer_idx)
        if trace is not None:
            trace.learn(layer_idx, query, key, self._rotary)

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        sliding_window: int | None = None,
    ) -> None:
        """Note a layer that a modeling file reports itself; the arguments are the sniffer's."""
        self._own_layers[layer_idx] = _layer(layer_idx, query, key, sliding_window)

    def _rotary_map(self) -> RotaryMap:
        rotary = self._rotary
        has_rotary = any("Rotary" in type(m).__name__ for m in self._backbone.modules())
        if self._own_layers:
            rotary.problem = "reports its vectors itself"
        elif not rotary.query and has_rotary and not rotary.problem:
            rotary.problem = "rotates by no function of its own"
        return rotary

    def _unreached(self) -> str:
        implementation = getattr(self._backbone.config, "_attn_implementation", None)
        if implementation not in ("eager", "sdpa", None):
            return (
                f"model.attn_implementation: the attention of {self._name} is not reached with "
                f"{implementation}; set it to sdpa or eager"
            )
        return (
            f"model.name: {self._name} calls no attention that could be captured; choose another "
            "model, or see docs/adding-a-model.md"
        )


def _layer(
    layer_idx: int, query: Tensor, key: Tensor, window: int | None, chunked: bool = False
) -> AttentionLayer:
    return AttentionLayer(layer_idx, query.shape[1], key.shape[1], query.shape[3], window, chunked)


def _note(text: str, layers: list[int], n_layers: int) -> str:
    return text if len(set(layers)) in (0, n_layers) else in_layers(text, layers)


def _differs(states: Tensor, others: Tensor | None) -> bool:
    """Whether the query of the first token felt a change of the others, beyond rounding."""
    return others is None or bool((states - others).norm() > 0.02 * states.norm())


def _text_decoder(backbone: nn.Module) -> nn.Module:
    """The part that reads text, without the vision and audio towers of a multimodal model."""
    for name in ("language_model", "text_model"):
        if isinstance(decoder := getattr(backbone, name, None), nn.Module):
            return decoder
    return backbone


def _refuse_compiled(backbone: nn.Module) -> None:
    for module in backbone.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UserError(
                "model: a compiled backbone runs kernels in which queries and keys are not to be seen; "
                "capture the plain one (compiled._orig_mod, or without calling .compile())"
            )
