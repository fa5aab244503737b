"""A model without its weights: how large they are, and the geometry of its attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from qk_sniffer.errors import UserError, first_line
from qk_sniffer.models.checkpoint import Quantization, stored_quantization
from qk_sniffer.models.explaining import explained_settings
from qk_sniffer.models.loading import auto_class, explained, load_config
from qk_sniffer.models.probe import AttentionGeometry, see_geometry
from qk_sniffer.models.quantization import method_of, quantized_bytes
from qk_sniffer.models.source import ModelSource


def load_skeleton(
    source: ModelSource,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    config_overrides: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The model that ``load_model`` gives, on the meta device: its weights have shapes and no values.

    Args:
        source: Where its config is; no weights need to be there.
        dtype: As ``load_model`` takes it; where auto finds none in the config, float32.
        attn_implementation: As ``load_model`` takes it.
        config_overrides: As ``load_model`` takes them.

    Raises:
        UserError: The config can't be found or used.
    """
    config = load_config(source, config_overrides)
    kwargs: dict[str, Any] = {
        "dtype": (config.dtype or torch.float32) if dtype == "auto" else dtype,
        "trust_remote_code": source.trust_remote_code,
    }
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    with (
        explained(source, "see the model section of the config"),
        explained_settings(config, attn_implementation),
        torch.device("meta"),
    ):
        model: PreTrainedModel = auto_class(config).from_config(config, **kwargs)
    return model.eval()


def quantization_of(source: ModelSource, skeleton: PreTrainedModel) -> Quantization | None:
    """How the weights of a model are quantized, and what they take; None where they are plain numbers.

    Args:
        source: Where it comes from.
        skeleton: The model, as ``load_skeleton`` gives it.
    """
    if source.quantization is None:
        return stored_quantization(source.name, source.revision, skeleton.config)
    n_bytes = quantized_bytes(skeleton, source.quantization)
    return Quantization(method_of(source.quantization), n_bytes)


def attention_geometry(backbone: nn.Module) -> AttentionGeometry:
    """The self-attention layers of a backbone, which may be one without weights.

    Args:
        backbone: As ``decoder_backbone`` gives it.

    Raises:
        UserError: No attention is reached, or the way to it depends on the weights' values.
    """
    if not next(backbone.parameters()).is_meta:
        return see_geometry(backbone)
    try:
        with NoData():  # type: ignore[no-untyped-call]
            return see_geometry(backbone)
    except UserError:
        raise
    # A forward may do anything with a value that isn't there.
    except Exception as error:
        raise UserError(
            f"model.name: the layers of {type(backbone).__name__} can't be told without its weights "
            f"({type(error).__name__}: {first_line(error)}); add --time, which loads them"
        ) from error


class NoData(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs what depends on values as if each were zero: nothing is selected, no expert has a token.

    What is said of all of some values is taken to hold: no token is padding, positions rise by one.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._said_of_all: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if first is None:
            return func(*args, **kwargs)
        if func is aten.all.default:
            result = func(*args, **kwargs)
            self._said_of_all[result] = True
            return result
        if func is aten._local_scalar_dense.default:
            if first in self._said_of_all:
                return True
            return torch.zeros((), dtype=first.dtype, device="cpu").item()
        if func is aten.nonzero.default:
            return torch.empty((0, first.dim()), dtype=torch.int64, device="meta")
        # The kernel for meta tensors takes bfloat16 alone.
        if func is aten._grouped_mm.default:
            return first.new_empty((*first.shape[:-1], args[1].shape[-1]))
        if func is aten.index.Tensor:
            return func(first, [index for mask in args[1] for index in _selected(mask)])
        return func(*args, **kwargs)


def _selected(index: Tensor | None) -> list[Tensor | None]:
    """An index without masks: one of them selects nothing."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [torch.empty(0, dtype=torch.int64, device="meta")] * index.dim()
