"""What short forwards of a few tokens show of a backbone's attention."""

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qk_sniffer.capture import AttentionLayer, CapturesAttention, SoftmaxInput, active_sniffer
from qk_sniffer.errors import UserError
from qk_sniffer.kinds import Part
from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.attention import text_decoder, watch_attention
from qk_sniffer.models.calls import AttentionCall
from qk_sniffer.models.decoder import decoder_modules, forget_modules
from qk_sniffer.models.notes import call_notes, in_layers
from qk_sniffer.models.refusals import refuse_compiled
from qk_sniffer.models.results import ProjectionTrace, ResultMap, own_width
from qk_sniffer.models.rotary import RotaryMap, RotaryTrace
from qk_sniffer.models.scores import score_function

_PROBED_TOKENS = 11


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
        results: Which values, outputs and statistics can be captured.
    """

    layers: list[AttentionLayer]
    notes: list[str]
    captures_itself: frozenset[int]
    numbered_by_call: bool
    rotary: RotaryMap
    results: ResultMap

    def notes_of(self, parts: Collection[Part], *, pre_rope: bool) -> list[str]:
        """What a reader of some parts must know, with vectors before RoPE or behind it."""
        return [*self.notes, *(self.rotary.notes() if pre_rope else []), *self.results.notes(parts)]


@dataclass(frozen=True)
class AttentionGeometry:
    """What the shapes of one short forward show, whatever the values are.

    Attributes:
        layers: Every self-attention layer, in order, without its ``scores``.
        dtype: Number format of the vectors, which is not always that of the weights.
    """

    layers: list[AttentionLayer]
    dtype: torch.dtype


_thread = threading.local()
_signatures: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_CHANGING = ("training", "max_seq_len_cached", "_is_hf_initialized")
"""What calls set on modules by themselves."""

_maps: WeakKeyDictionary[nn.Module, AttentionMap] = WeakKeyDictionary()


def probe_attention(
    backbone: nn.Module, parts: Collection[Part] = ("q", "k"), *, pre_rope: bool = False
) -> AttentionMap:
    """The self-attention layers of a backbone, seen in two forwards of a few tokens.

    The answer is kept for as long as the backbone lives.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        parts: What is wanted of an attention call.
        pre_rope: The vectors before RoPE are wanted.

    Raises:
        UserError: No attention is reached, it is not causal, or what is wanted can't be told.
    """
    if backbone not in _maps:
        refuse_compiled(backbone)
        _maps[backbone] = _Probe(backbone).run()
    attention = _maps[backbone]
    if pre_rope:
        require_unrotated(attention, "sniffer.capture.capture_pre_rope")
    attention.results.require(parts)
    return attention


def require_unrotated(attention: AttentionMap, setting: str) -> None:
    """See that the vectors before RoPE can be captured.

    Args:
        attention: What a probe saw in the model.
        setting: What asks for them.

    Raises:
        UserError: They can't.
    """
    if attention.rotary.problem:
        raise UserError(
            f"{setting}: this architecture {attention.rotary.problem}, so its vectors before RoPE "
            "can't be told; set it to false"
        )


def is_probing() -> bool:
    """Whether this thread runs a model ``quietly``, which nobody is to capture."""
    return getattr(_thread, "is_probing", False)


def _forget_if_changed(backbone: nn.Module) -> None:
    """Forget a backbone of which somebody has exchanged a module or set a number."""
    signature = _signature(backbone)
    if _signatures.get(backbone) != signature:
        _maps.pop(backbone, None)
        forget_modules(text_decoder(backbone))
        _signatures[backbone] = signature


def _signature(backbone: nn.Module) -> int:
    """Of the modules of a backbone, and of what is set on them."""
    owners = [*backbone.named_modules(), ("config", getattr(backbone, "config", None))]
    plain = (int, float, str, type(None), list, tuple)
    return hash(
        tuple(
            (name, id(owner), key, repr(value))
            for name, owner in owners
            for key, value in vars(owner).items()
            if isinstance(value, plain) and key not in _CHANGING
        )
    )


def probe_quietly(
    backbone: nn.Module, parts: Collection[Part], *, pre_rope: bool = False
) -> AttentionMap:
    """Do as ``probe_attention`` does with a model that somebody is using.

    Its modes, the state of RoPE, and the random numbers that follow stay as they were. Where the model
    was changed since it was last seen, it is probed anew.
    """
    _forget_if_changed(backbone)
    if backbone in _maps:
        return probe_attention(backbone, parts, pre_rope=pre_rope)
    with quietly(backbone):
        return probe_attention(backbone, parts, pre_rope=pre_rope)


@contextmanager
def quietly(backbone: nn.Module) -> Iterator[None]:
    """Leave a backbone's modes, the state of RoPE and random numbers as they are, behind a block.

    Nobody captures what it reads in there.
    """
    modules = list(backbone.modules())
    training = [module for module in modules if module.training]
    rotary = [module for module in modules if "Rotary" in type(module).__name__]
    states = [(dict(vars(module)), dict(module._buffers)) for module in rotary]
    devices = {weight.device for weight in backbone.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        _thread.is_probing = True
        try:
            for module in training:
                module.training = False
            yield
        finally:
            _thread.is_probing = False
            for module in training:
                module.training = True
            for module, (attributes, buffers) in zip(rotary, states, strict=True):
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)


def see_geometry(backbone: nn.Module) -> AttentionGeometry:
    """The geometry of a backbone's attention, in a forward of a few tokens that compares no values.

    Args:
        backbone: As ``decoder_backbone`` gives it.

    Raises:
        UserError: No attention is reached.
    """
    geometry = _Geometry(backbone)
    return AttentionGeometry(geometry.layers(), geometry.dtype)


class _Geometry(CapturesAttention):
    """A short forward, and the shapes of the attention calls that it makes; no value matters."""

    pre_rope = False
    traces_rotary = False

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._name = type(backbone).__name__
        self._layers: list[AttentionLayer] = []
        self._own_layers: dict[int, AttentionLayer] = {}
        self._numbered_by_call = False
        self.dtype = torch.float32

    def layers(self) -> list[AttentionLayer]:
        """Every self-attention layer, in order."""
        self._forward()
        calls = Counter(layer.layer_idx for layer in self._layers)
        if calls and max(calls.values()) > 1:
            self._numbered_by_call = True
            self._forward()
        layers = {layer.layer_idx: layer for layer in self._layers} | self._own_layers
        if not layers:
            raise UserError(self._unreached())
        return sorted(layers.values(), key=lambda layer: layer.layer_idx)

    # In inference mode a value that is asked for goes past a dispatch mode, as a skeleton needs one.
    @torch.no_grad()
    def _forward(self, later_token: int = 4) -> None:
        self._layers.clear()
        weight = next(self._backbone.parameters())
        # As many tokens as no model has heads, so that the axes can be told apart.
        input_ids = torch.full((1, _PROBED_TOKENS), later_token, device=weight.device)
        input_ids[0, 0] = 3
        input_ids[0, 2::2] += 1
        watch = watch_attention(
            self._backbone,
            self._on_layer,
            numbered_by_call=self._numbered_by_call,
            rotary=self.traces_rotary,
            on_repeat=self._on_repeat,
        )
        with active_sniffer(self), watch:
            output = self._backbone(input_ids=input_ids, use_cache=False)
        self._first_output = output[0][:, 0]

    def _on_layer(
        self, layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> OnResult:
        number = len(self._layers)
        self._layers.append(_layer(layer_idx, call.query, call.key, *call.window))
        self.dtype = call.query.dtype

        def on_result(output: Tensor | None, _: Tensor | None, value: Tensor | None) -> None:
            self._on_result(number, call, output, own_width(call.module, value))

        return on_result

    def _on_result(
        self, number: int, call: AttentionCall, output: Tensor | None, value: Tensor | None
    ) -> None:
        if value is not None and value.shape[3] != call.key.shape[3]:
            self._layers[number] = replace(self._layers[number], value_head_dim=value.shape[3])

    def _on_repeat(self) -> None:
        pass

    def capture(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        positions: Tensor,
        sliding_window: int | None = None,
        softmax: SoftmaxInput | None = None,
    ) -> None:
        """Note a layer that a modeling file reports itself; the arguments are the sniffer's."""
        self._own_layers[layer_idx] = _layer(layer_idx, query, key, sliding_window)
        self.dtype = query.dtype

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


class _Probe(_Geometry):
    """Two short forwards that differ in all tokens but the first, and what they show."""

    traces_rotary = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self._notes: dict[str, list[int]] = {}
        self._rotary, self._results = RotaryMap(), ResultMap()
        self._projections = ProjectionTrace(self._results)
        self._first_query: Tensor | None = None

    def run(self) -> AttentionMap:
        layers = self.layers()
        first_query, first_output = self._first_query, self._first_output.float()
        self._forward(later_token=6)
        # The queries of one layer alone do not feel what it attends to.
        attends_ahead = len(layers) == 1 and _differs(first_output, self._first_output.float())
        if attends_ahead or (first_query is not None and _differs(first_query, self._first_query)):
            raise UserError(
                f"model.name: {self._name} attends to later tokens, so its vectors would depend on "
                "padding and batch; choose a causal language model, or make it one with "
                "model.config_overrides (is_decoder: true for BERT and its kin, causal: true for XLM)"
            )
        if self._numbered_by_call:
            self._notes["a decoder layer attends more than once: layers count its calls in order"] = []
        return AttentionMap(
            layers,
            [_note(text, indices, len(layers)) for text, indices in self._notes.items()],
            frozenset(self._own_layers),
            self._numbered_by_call,
            self._rotary_map(),
            self._result_map(),
        )

    def _forward(self, later_token: int = 4) -> None:
        self._notes.clear()
        modules = decoder_modules(text_decoder(self._backbone)).all
        with self._projections.watching(modules):
            super()._forward(later_token)

    def _on_layer(
        self, layer_idx: int, call: AttentionCall, past_length: int, trace: RotaryTrace | None
    ) -> OnResult:
        on_result = super()._on_layer(layer_idx, call, past_length, trace)
        self._layers[-1] = replace(self._layers[-1], scores=score_function(call))
        self._first_query = call.query[:, :, 0].float()
        for note in call_notes(call):
            self._notes.setdefault(note, []).append(layer_idx)
        if trace is not None:
            trace.learn(layer_idx, call.query, call.key, self._rotary)
        self._results.learn_call(layer_idx, call)
        return on_result

    def _on_result(
        self, number: int, call: AttentionCall, output: Tensor | None, value: Tensor | None
    ) -> None:
        super()._on_result(number, call, output, value)
        self._results.learn_result(call, output, value)
        self._projections.see(self._layers[number].layer_idx, output)

    def _on_repeat(self) -> None:
        self._results.learn_repeat()

    def _result_map(self) -> ResultMap:
        results = self._results
        if self._own_layers:
            text = "reports its vectors itself"
            results.problems = dict.fromkeys(("v", "o", "softmax"), text)
        return results

    def _rotary_map(self) -> RotaryMap:
        rotary = self._rotary
        has_rotary = any("Rotary" in type(m).__name__ for m in self._backbone.modules())
        if self._own_layers:
            rotary.problem = "reports its vectors itself"
        elif not rotary.query and has_rotary and not rotary.problem:
            rotary.problem = "rotates by no function of its own"
        return rotary


def _layer(
    layer_idx: int, query: Tensor, key: Tensor, window: int | None, chunked: bool = False
) -> AttentionLayer:
    return AttentionLayer(layer_idx, query.shape[1], key.shape[1], query.shape[3], window, chunked)


def _note(text: str, layers: list[int], n_layers: int) -> str:
    return text if len(set(layers)) in (0, n_layers) else in_layers(text, layers)


def _differs(states: Tensor, others: Tensor | None) -> bool:
    """Whether the query of the first token felt a change of the others, beyond rounding."""
    return others is None or bool((states - others).norm() > 0.02 * states.norm())
