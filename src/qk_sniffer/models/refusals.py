"""Architectures that can't be captured, and why, told from the config before anything is loaded."""

from torch import nn
from transformers import PreTrainedConfig

from qk_sniffer.errors import UserError

_NO_ATTENTION = "it has no softmax attention, so no queries and keys"
_DRAFTER = "it drafts for another model and attends to that model's keys, not to a text of its own"

REFUSED: dict[str, str] = {
    "blt": "it attends to bytes in some layers and to patches of bytes in others, and a patch has no "
    "token position",
    "cpmant": "it attends to learned prompt tokens before the text, which have no position in it",
    "deepseek_v4": "its layers also attend to compressed entries that stand for several tokens and "
    "have no position of their own",
    "falcon_mamba": _NO_ATTENTION,
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "mamba": _NO_ATTENTION,
    "mamba2": _NO_ATTENTION,
    "reformer": "it attends within buckets of hashed vectors (LSH), queries and keys being one vector",
    "rwkv": _NO_ATTENTION,
    "xlnet": "its attention is not causal but follows permutations in two streams",
    "xlstm": _NO_ATTENTION,
}


def refuse_unsupported(name: str, config: PreTrainedConfig) -> None:
    """Stop before the weights of a model that can't be captured are loaded.

    Args:
        name: The model, as the user named it.
        config: Its config, with the user's overrides.

    Raises:
        UserError: The architecture is one of those, or a setting makes its attention sparse.
    """
    if reason := REFUSED.get(config.model_type):
        raise UserError(f"model.name: {name} is a {config.model_type} model: {reason}; choose another")
    if config.model_type == "big_bird" and config.attention_type != "original_full":
        raise UserError(
            f"model.config_overrides.attention_type: {name} attends to random blocks "
            f"({config.attention_type}); set it to original_full"
        )


def refuse_compiled(model: nn.Module) -> None:
    """See that no part of a model is compiled.

    Raises:
        UserError: One is.
    """
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise UserError(
                "model: a compiled backbone runs kernels in which queries and keys are not to be seen; "
                "capture the plain one (compiled._orig_mod, or without calling .compile())"
            )
