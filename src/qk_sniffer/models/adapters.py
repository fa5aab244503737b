"""Attention modules that multiply queries by keys themselves, outside the attention interface.

An adapter names a class and says what happens between q·kᵀ and the softmax. The operands need no
word: they are those of the first product of two batched tensors in the module's forward, or those of
``scaled_dot_product_attention``.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _inverse_sqrt_head_dim(module: Any) -> float:
    head_dim = getattr(module, "attention_head_size", None) or module.head_dim
    return 1 / math.sqrt(head_dim)


def _none(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Adapter:
    """How one class of attention modules turns q·kᵀ into probabilities.

    Attributes:
        scaling: Factor of q·k, from the module.
        bias: What is added to the scaled scores, (B or 1, H, Q or 1, K), from the module and the
            arguments of its forward; None where nothing is.
        window: The module's sliding window.
        note: What a reader of the vectors must know beyond scaling, mask and window.
        complete: Whether scaling and bias are all there is, so that attention can be recomputed.
    """

    scaling: Callable[[Any], float] = _inverse_sqrt_head_dim
    bias: Callable[[Any, Mapping[str, Any]], Tensor | None] = _none
    window: Callable[[Any], int | None] = _none
    note: str | None = None
    complete: bool = True


def _one(_: Any) -> float:
    return 1.0


def _attribute(name: str) -> Callable[[Any], float]:
    return lambda module: float(getattr(module, name))


def _inverse(name: str) -> Callable[[Any], float]:
    return lambda module: 1 / float(getattr(module, name))


def _openai_scaling(module: Any) -> float:
    return float(module.split_size / module.n_head) ** -0.5 if module.scale else 1.0


def _bloom_alibi(module: Any, arguments: Mapping[str, Any]) -> Tensor:
    return _by_head(module, arguments["alibi"]) * float(module.beta)


def _falcon_alibi(module: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    if arguments.get("alibi") is None:
        return None
    return _by_head(module, arguments["alibi"]) * float(module.inv_norm_factor)


def _by_head(module: Any, alibi: Tensor) -> Tensor:
    return alibi.reshape((-1, module.num_heads, 1, alibi.shape[-1]))


def _mpt_alibi(module: Any, arguments: Mapping[str, Any]) -> Tensor:
    bias: Tensor = arguments["position_bias"]
    return bias[None]


def _gpt_neo_window(module: Any) -> int | None:
    return int(module.config.window_size) if module.attention_type == "local" else None


_BERT = Adapter()
_PRESCALED = Adapter(scaling=_one, note="queries are stored as scaled by head_dim^-0.5 already")

ADAPTERS: dict[str, Adapter] = {
    "modeling_big_bird.BigBirdSelfAttention": _BERT,
    "modeling_bloom.BloomAttention": Adapter(_attribute("inv_norm_factor"), _bloom_alibi),
    "modeling_codegen.CodeGenAttention": Adapter(_inverse("scale_attn")),
    "modeling_falcon.FalconAttention": Adapter(_attribute("inv_norm_factor"), _falcon_alibi),
    "modeling_git.GitSelfAttention": _BERT,
    "modeling_gpt_neo.GPTNeoSelfAttention": Adapter(_one, window=_gpt_neo_window),
    "modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": Adapter(_inverse("norm_factor")),
    "modeling_gptj.GPTJAttention": Adapter(_inverse("scale_attn")),
    "modeling_megatron_bert.MegatronBertSelfAttention": _BERT,
    "modeling_mpt.MptAttention": Adapter(_attribute("softmax_scale"), _mpt_alibi),
    "modeling_mvp.MvpAttention": _PRESCALED,
    "modeling_openai.Attention": Adapter(_openai_scaling),
    "modeling_prophetnet.ProphetNetNgramSelfAttention": Adapter(
        _one,
        note="q and k are those of the main stream, queries scaled by head_dim^-0.5 already; a "
        "relative-position term computed from the hidden states is added to the scores",
        complete=False,
    ),
    "modeling_rembert.RemBertSelfAttention": _BERT,
    "modeling_roformer.RoFormerSelfAttention": _BERT,
    "modeling_trocr.TrOCRAttention": _PRESCALED,
    "modeling_xglm.XGLMAttention": _PRESCALED,
    "modeling_xlm.MultiHeadAttention": _PRESCALED,
}


def adapter_name(kind: type) -> str:
    """Key of a class in ``ADAPTERS``: its modeling file and its name."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


OnResult = Callable[[Tensor | None, Tensor | None, Tensor | None], None]
"""Takes an attention's output (B, Q, H, D), its probabilities (B, H, Q, K) and its values
(B, Hkv, K, D), where there are any."""

OnScores = Callable[[Tensor, Tensor, dict[str, Any]], OnResult | None]


_PRODUCTS: tuple[Any, ...] = (
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
    torch.baddbmm,
    torch.Tensor.baddbmm,
    torch.einsum,
)
_SOFTMAXES: tuple[Any, ...] = (F.softmax, torch.softmax, torch.Tensor.softmax)


class ScoreTrace(TorchFunctionMode):
    """Reports the operands of q·kᵀ, and the product of probabilities and values, within its block.

    Args:
        batch_size: Sequences in the batch, B, for operands that merge it with the heads.
        on_scores: Called with (B, H, Q, D) queries, (B, H, K, D) keys and, where the whole attention
            is one call, its value; what it returns is called with the result.
    """

    def __init__(self, batch_size: int, on_scores: OnScores) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._on_scores = on_scores
        self._on_result: OnResult | None = None
        self._reported = False
        self._probabilities: Tensor | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if error[0] is None:
            # No product of two batched tensors has followed.
            self._end(None, self._probabilities, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        whole = func is F.scaled_dot_product_attention
        if not whole and func not in _PRODUCTS:
            result = func(*args, **kwargs)
            if self._on_result is not None and func in _SOFTMAXES:
                self._probabilities = self._split(result)
            return result
        operands = [a for a in _flat((*args, *kwargs.values())) if isinstance(a, Tensor)]
        if not self._reported:
            self._report(whole, operands)
        result = func(*args, **kwargs)
        if whole:
            self._end(result.transpose(1, 2), None, operands[2])
        elif self._probabilities is not None and _are_batched(operands):
            output, value = self._split(result), self._split(operands[-1])
            self._end(output.transpose(1, 2), self._probabilities, value)
        return result

    def _report(self, whole: bool, operands: list[Tensor]) -> None:
        if whole:
            query, key, value = operands[:3]
            extra = {"value": value}
        else:
            if not _are_batched(operands):
                return
            query, key_transposed = operands[-2:]
            query, key = self._split(query), self._split(key_transposed.transpose(-1, -2))
            extra = {}
        self._reported = True
        self._on_result = self._on_scores(query, key, extra)

    def _end(self, output: Tensor | None, probabilities: Tensor | None, value: Tensor | None) -> None:
        on_result, self._on_result, self._probabilities = self._on_result, None, None
        if on_result is not None:
            on_result(output, probabilities, value)

    def _split(self, states: Tensor) -> Tensor:
        """(B·H, S, D) as (B, H, S, D)."""
        if states.dim() > 3:
            return states
        return states.reshape((self._batch_size, -1, *states.shape[1:]))


def _are_batched(operands: list[Tensor]) -> bool:
    """Whether a product is of two batched tensors, and not a projection by a weight."""
    return min(operand.dim() for operand in operands[-2:]) >= 3


def _flat(args: tuple[Any, ...]) -> Iterator[Any]:
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from arg
        else:
            yield arg
