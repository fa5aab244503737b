"""Attention calls as they happen: through the attention interface of transformers, or an adapter.

Each attention module asks ``AttentionInterface.get_interface`` for the function that computes its
attention. For the length of a forward the answer is wrapped, on the class: the wrapper reports the
call and then calls the very function that the model would have called. No implementation is
registered and no mask changes, so outputs stay as they are. Modules that do their own arithmetic are
met by the adapters, in the same way.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial, wraps
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from qk_sniffer.models.adapters import ADAPTERS, Adapter, OnResult, ScoreTrace, adapter_name
from qk_sniffer.models.decoder import DecoderModules
from qk_sniffer.models.wrapping import wrapped


class AttentionCall(NamedTuple):
    """One attention of one module, before it is computed.

    Attributes:
        module: The attention module.
        query: (B, num_attention_heads, Q, head_dim).
        key: (B, num_key_value_heads, K, head_dim).
        arguments: What else the module passed, by name: value, attention_mask, scaling and more.
        adapter: How a module outside the attention interface is read.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    arguments: Mapping[str, Any] = MappingProxyType({})
    adapter: Adapter | None = None

    @property
    def scaling(self) -> float:
        """The factor of q·k."""
        if self.adapter is not None:
            return self.adapter.scaling(self.module)
        scaling = self.arguments.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else float(scaling)

    @property
    def bias(self) -> Tensor | None:
        """What is added to the scaled and capped scores, (B or 1, H, Q or 1, K)."""
        if self.adapter is not None:
            return self.adapter.bias(self.module, self.arguments)
        bias: Tensor | None = self.arguments.get("position_bias")
        return bias

    @property
    def sinks(self) -> Tensor | None:
        """Scores of a key without a value, (H,) or broadcast against (B, H, Q, 1)."""
        sinks: Tensor | None = self.arguments.get("sinks", self.arguments.get("s_aux"))
        if sinks is None and self.adapter is None:
            sinks = getattr(self.module, "sinks", None)
        return sinks

    @property
    def window(self) -> tuple[int | None, bool]:
        """The sliding window or chunk that the layer uses, and whether it is a chunk."""
        if self.adapter is not None:
            return self.adapter.window(self.module), False
        if "sliding_window" in self.arguments:
            return self.arguments["sliding_window"], False
        return _unpassed_window(self.module)

    @property
    def mask(self) -> Tensor | None:
        """What says of each query and key whether the one attends to the other, or what is added.

        (B or 1, H or 1, Q, K); None where the call leaves that to its kernel or its module.
        """
        mask = self.arguments.get("attention_mask")
        is_whole = self.adapter is None and isinstance(mask, Tensor) and mask.dim() == 4
        return mask if is_whole else None


def _unpassed_window(module: nn.Module) -> tuple[int | None, bool]:
    """The window of a module that leaves it to the mask, and whether it is a chunk."""
    config = getattr(module, "config", None)
    layer_types, layer_idx = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    layer_type = layer_types[layer_idx] if layer_types and layer_idx is not None else None
    if layer_type == "chunked_attention":
        return getattr(config, "attention_chunk_size", None), True
    # Some have the field and make no such mask.
    makes_mask = "create_sliding_window_causal_mask" in modeling_globals(type(module))
    if layer_type == "full_attention" or not makes_mask:
        return None, False
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None)), False


def modeling_globals(kind: type) -> dict[str, Any]:
    """The names of a class's modeling file, which ``sys.modules`` may know another version of."""
    for member in vars(kind).values():
        function = inspect.unwrap(member) if inspect.isfunction(member) else None
        if function is not None and function.__globals__["__name__"] == kind.__module__:
            names: dict[str, Any] = function.__globals__
            return names
    return vars(sys.modules[kind.__module__])


OnCall = Callable[[AttentionCall], OnResult | None]


@contextmanager
def intercept_attention(modules: DecoderModules, on_call: OnCall) -> Iterator[None]:
    """Report every attention of a decoder, within a block.

    Args:
        modules: Those of the decoder; others pass through.
        on_call: Called before each attention; what it returns is called with the result.
    """
    with ExitStack() as stack:
        reporting = partial(_reporting_interface, modules.all, on_call)
        stack.enter_context(wrapped(AttentionInterface, "get_interface", reporting))
        for kind in modules.kinds:
            if adapter := ADAPTERS.get(adapter_name(kind)):
                reporting = partial(_reporting_forward, adapter, modules.all, on_call)
                stack.enter_context(wrapped(kind, "forward", reporting))
        yield


def _reporting_interface(
    modules: Set[nn.Module], on_call: OnCall, original: Callable[..., Callable[..., Any]]
) -> Callable[..., Callable[..., Any]]:
    """``get_interface``, whose functions report their calls."""

    # Every layer asks, mostly for the same.
    @lru_cache(maxsize=8)
    def reporting_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(attention)
        def reporting(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any = None,
            **kwargs: Any,
        ) -> Any:
            on_result = None
            if module in modules:
                arguments = {"value": value, "attention_mask": attention_mask, **kwargs}
                on_result = on_call(AttentionCall(module, query, key, arguments))
            result = attention(module, query, key, value, attention_mask, **kwargs)
            if on_result is not None:
                on_result(result[0], result[1], value)
            return result

        return reporting

    @wraps(original)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return reporting_attention(original(self, *args, **kwargs))

    return get_interface


def _reporting_forward(
    adapter: Adapter, modules: Set[nn.Module], on_call: OnCall, original: Callable[..., Any]
) -> Callable[..., Any]:
    """The forward of a class of attention modules, which reports its calls."""
    signature = inspect.signature(original)

    @wraps(original)
    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module not in modules:
            return original(module, *args, **kwargs)
        arguments = signature.bind(module, *args, **kwargs).arguments

        def on_scores(query: Tensor, key: Tensor, extra: dict[str, Any]) -> OnResult | None:
            return on_call(AttentionCall(module, query, key, {**arguments, **extra}, adapter))

        batch_size = next(a for a in arguments.values() if isinstance(a, Tensor)).shape[0]
        with ScoreTrace(batch_size, on_scores):
            return original(module, *args, **kwargs)

    return forward
