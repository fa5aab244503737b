"""The attention calls of one decoder, each with the layer that it belongs to."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, cast
from weakref import ref

from torch import Tensor, nn
from transformers import PreTrainedModel

from qk_sniffer.errors import UserError
from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.calls import AttentionCall, intercept_attention
from qk_sniffer.models.decoder import decoder_modules
from qk_sniffer.models.refusals import refuse_compiled, refuse_unsupported
from qk_sniffer.models.rotary import RotaryTrace, trace_rotary
from qk_sniffer.models.tensor_parallel import n_sharing


def transformers_model(model: Any) -> PreTrainedModel:
    """The causal language model of transformers inside a loaded model, which may be wrapped.

    Raises:
        UserError: There is none, or its architecture can't be captured.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: expected a loaded model of transformers, got {type(model).__name__}; load one "
            "with AutoModelForCausalLM.from_pretrained"
        )
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if inner is None:
        raise UserError(
            f"model: {type(model).__name__} holds no model of transformers; load one of those"
        )
    if inner.config.is_encoder_decoder or inner.main_input_name != "input_ids":
        raise UserError(
            f"model: {type(inner).__name__} is no causal language model, which reads a text from its "
            "start; load one with AutoModelForCausalLM.from_pretrained"
        )
    refuse_compiled(model)
    refuse_unsupported(name_of(inner), inner.config)
    if (count := n_sharing(inner)) > 1:
        raise UserError(
            f"model: {type(inner).__name__} is shared by {count} processes, and the numbers of the "
            "heads that this one has can't be told; load it without a distributed_config, or let "
            f"SnifferModule load it with tensor_parallel={count}"
        )
    return inner


def name_of(model: PreTrainedModel) -> str:
    """Where a model was loaded from; its class where it was not."""
    return model.config.name_or_path or type(model).__name__


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


OnLayer = Callable[[int, AttentionCall, int, RotaryTrace | None], OnResult | None]
"""Takes layer, call, number of tokens that a cache holds already, and rotations of the layer."""

OnBegin = Callable[[Mapping[str, Any]], None]
"""Takes the arguments of a forward, by their names."""


def refuse_left_padding(arguments: Mapping[str, Any]) -> None:
    """See that a forward has no sequence that is padded on the left.

    Args:
        arguments: The forward's, by their names.

    Raises:
        UserError: It has.
    """
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, 0].all():
        raise UserError(
            "attention_mask: a sequence is padded on the left, so positions can't be counted; pad "
            "on the right, or generate for one sequence at a time"
        )


@contextmanager
def watch_attention(
    backbone: nn.Module,
    on_layer: OnLayer,
    *,
    numbered_by_call: bool = False,
    rotary: bool = False,
    on_begin: OnBegin = refuse_left_padding,
    on_end: Callable[[Any], None] | None = None,
    on_repeat: Callable[[], None] | None = None,
    callers: Iterable[nn.Module] = (),
) -> Iterator[None]:
    """Call ``on_layer`` before every self-attention of the text decoder, within a block.

    What a backward computes again is not reported. Threads may run the backbone at the same time.

    Args:
        backbone: As ``decoder_backbone`` gives it.
        on_layer: What it returns is called with the attention's result.
        numbered_by_call: Number the calls of a forward instead of the decoder's layers.
        rotary: Trace rotations.
        on_begin: Called before each forward.
        on_end: Called behind it with its output; with None where it has failed.
        on_repeat: Called where a module attends again with the query of its last call, which
            ``on_layer`` is not told.
        callers: Modules that may run the decoder without the backbone; the outermost of them and the
            backbone that is called makes the forward.
    """
    decoder = text_decoder(backbone)
    with ExitStack() as stack:
        trace = stack.enter_context(trace_rotary(decoder)) if rotary else None
        forward = _Forward(decoder, on_layer, numbered_by_call, trace, on_begin, on_end, on_repeat)
        for module in {backbone, *callers}:
            hook = module.register_forward_pre_hook(_Hook(forward.begin), with_kwargs=True)
            stack.callback(hook.remove)
            hook = module.register_forward_hook(_Hook(forward.end), always_call=True)
            stack.callback(hook.remove)
        # Hooks take time, and a first forward shows where each module attends.
        for layer_idx, layer in [] if forward.layer_of else forward.modules.layers:
            hook = layer.register_forward_pre_hook(_Hook(forward.entering(layer_idx)))
            stack.callback(hook.remove)
        stack.enter_context(intercept_attention(forward.modules, forward.on_call))
        yield


def _nothing(*_: Any) -> None:
    return None


class _Hook:
    """A hook that does nothing in a copy of its module: a copy is not watched."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


class _Forward(threading.local):
    """Where a forward is: its decoder layer, its attention calls and the tokens before it."""

    def __init__(
        self,
        decoder: nn.Module,
        on_layer: OnLayer,
        numbered_by_call: bool,
        trace: RotaryTrace | None,
        on_begin: OnBegin,
        on_end: Callable[[Any], None] | None,
        on_repeat: Callable[[], None] | None,
    ) -> None:
        self.modules = decoder_modules(decoder)
        self.layer_of = dict(self.modules.layer_of)
        self._on_layer = on_layer
        self._numbered_by_call = numbered_by_call
        self._trace = trace
        self._on_begin, self._on_end, self._on_repeat = on_begin, on_end, on_repeat
        self._entered: list[nn.Module] = []
        self._restart()

    def _restart(self) -> None:
        self._past_length = 0
        self._has_cache = False
        self._layer_idx: int | None = None
        self._n_calls = 0
        self._last_query: Callable[[], Tensor | None] = lambda: None

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module in self._entered:
            # The hooks behind a forward are not called where a KeyboardInterrupt has left it.
            self._entered = []
            self._end(None)
        self._entered.append(module)
        if len(self._entered) > 1:
            return
        self._restart()
        arguments = {**dict(zip(_parameters(cast(Any, type(module))), args, strict=False)), **kwargs}
        self._on_begin(arguments)
        if (cache := cache_of(arguments)) is not None:
            self._past_length = int(cache.get_seq_length())
            self._has_cache = True
        if self._trace is not None:
            self._trace.begin_forward()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._entered.remove(module)
        if not self._entered:
            self._end(output)

    def _end(self, output: Any) -> None:
        if self._on_end is not None:
            self._on_end(output)

    def entering(self, layer_idx: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._layer_idx = layer_idx

        return enter

    def on_call(self, call: AttentionCall) -> OnResult | None:
        layer_idx = self.layer_of.get(call.module, self._layer_idx)
        if not self._entered or layer_idx is None or call.module in self.modules.cross_attention:
            return None
        if not self.layer_of:
            self.modules.attends(call.module, layer_idx)
        # Differential attention calls once for each half of the values, with the same query and key.
        if self._last_query() is call.query:
            if self._on_repeat is not None:
                self._on_repeat()
            return None
        self._last_query = ref(call.query)
        layer_idx = self._n_calls if self._numbered_by_call else layer_idx
        n_tokens, n_keys = call.query.shape[2], call.key.shape[2]
        if n_keys != n_tokens and not self._has_cache:
            raise UserError(
                f"model.name: {type(call.module).__name__} of layer {layer_idx} attends to {n_keys} "
                f"keys for {n_tokens} tokens, so its keys have no token position; choose another model"
            )
        self._n_calls += 1
        return self._on_layer(layer_idx, call, self._past_length, self._trace)


@lru_cache
def _parameters(kind: Any) -> list[str]:
    """Names of what a forward takes."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def cache_of(values: Mapping[str, Any]) -> Any:
    """The cache among the arguments or the outputs of a forward; None where there is none.

    Its name depends on the architecture and on the release of transformers.
    """
    return next((value for value in values.values() if hasattr(value, "get_seq_length")), None)


def text_decoder(backbone: nn.Module) -> nn.Module:
    """The part that reads text, without the vision and audio towers of a multimodal model."""
    for name in ("language_model", "text_model"):
        if isinstance(decoder := getattr(backbone, name, None), nn.Module):
            return decoder
    return backbone
