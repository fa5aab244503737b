"""Layers whose numbers for a text depend on what else is read with it, as some quantized ones do."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def must_be_read_alone(backbone: nn.Module) -> bool:
    """Whether a text has other vectors in a batch than alone, beyond rounding.

    LLM.int8() of bitsandbytes computes a column in 16 bits where any token has an outlier in it, and
    torchao may scale the activations of all tokens by the largest.

    Args:
        backbone: As ``decoder_backbone`` gives it; the answer is kept for as long as it lives.
    """
    if backbone not in _found:
        _found[backbone] = any(_mixes_tokens(module) for module in backbone.modules())
    return _found[backbone]


def _mixes_tokens(module: Any) -> bool:
    state = getattr(module, "state", None)
    if type(module).__name__ == "Linear8bitLt" and getattr(state, "threshold", 0) > 0:
        return True
    activations = getattr(getattr(module, "weight", None), "act_quant_kwargs", None)
    return type(getattr(activations, "granularity", None)).__name__ == "PerTensor"
