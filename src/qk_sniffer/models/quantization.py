"""Weights in few bits: what ``model.quantization`` asks for, and the memory that they take."""

import copy
import importlib.util
import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)

from qk_sniffer.errors import UserError, did_you_mean, first_line
from qk_sniffer.models.checkpoint import quantization_method
from qk_sniffer.models.source import ModelSource

_FIELD = "model.quantization"
_BITSANDBYTES = ("load_in_4bit", "load_in_8bit")
_EXTRAS = {"bitsandbytes": "quantization", "torchao": "torchao"}
"""Methods that are packages of the same name, and their extras; transformers names what others need."""

_BLOCK, _BLOCKS_OF_CONSTANTS = 64, 256
"""Weights of bitsandbytes that share a constant, and constants that share one of their own."""


def quantization_config(settings: Mapping[str, Any]) -> Any:
    """What ``from_pretrained`` takes as its ``quantization_config``.

    Args:
        settings: The mapping ``model.quantization``.

    Raises:
        UserError: It names no method, a setting that the method has not or can't take, or a method
            whose package is not installed.
    """
    method = method_of(settings)
    if method in _EXTRAS and importlib.util.find_spec(method) is None:
        raise UserError(
            f"{_FIELD}: {method} is not installed; install it with `pip install "
            f"'qk-sniffer[{_EXTRAS[method]}]'`"
        )
    is_bitsandbytes = method == "bitsandbytes"
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING["bitsandbytes_4bit" if is_bitsandbytes else method]
    is_torchao = kind is TorchAoConfig and isinstance(settings.get("quant_type"), str)
    try:
        if is_torchao:
            return _torchao_config(settings)
        _require_known(kind, settings, ("quant_method", *_arguments(kind)))
        return AutoQuantizationConfig.from_dict(dict(settings))
    except UserError:
        raise
    except ImportError as error:
        raise _unusable(method, error) from error
    # Each method checks its settings in its own way.
    except Exception as error:
        raise UserError(
            f"{_FIELD}: {kind.__name__} does not take these settings ({first_line(error)}); see its "
            "documentation in transformers"
        ) from error


def method_of(settings: Mapping[str, Any]) -> str:
    """The method that a mapping asks for, by the name that checkpoints have it under.

    Raises:
        UserError: It asks for none, or one that transformers has not.
    """
    method = settings.get("quant_method")
    if any(settings.get(name) is True for name in _BITSANDBYTES):
        method = method or "bitsandbytes"
    known = {"bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING} - {
        "bitsandbytes_4bit",
        "bitsandbytes_8bit",
    }
    if method is None or (
        method == "bitsandbytes" and not any(settings.get(name) is True for name in _BITSANDBYTES)
    ):
        raise UserError(
            f"{_FIELD}: no method is named; set load_in_4bit or load_in_8bit to true, or quant_method "
            "to another, such as torchao"
        )
    if method not in known:
        remedy = did_you_mean(str(method), known, f"choose {', '.join(sorted(known))}")
        raise UserError(f"{_FIELD}.quant_method: transformers has no {method}; {remedy}")
    return str(method)


def require_quantizable(source: ModelSource, config: PreTrainedConfig) -> None:
    """See that the weights of a model can be quantized as a source says.

    Raises:
        UserError: They are quantized already, or the settings are wrong.
    """
    if source.quantization is None:
        return
    if source.gguf_file is not None:
        raise UserError(
            f"{_FIELD}: the weights of a GGUF file can't be quantized anew; set it to null, or name a "
            "checkpoint without model.gguf_file"
        )
    if (method := quantization_method(config)) is not None:
        raise UserError(
            f"{_FIELD}: {source.name} is quantized already, by {method}; set it to null, or name the "
            "checkpoint that it was made of"
        )
    quantization_config(source.quantization)


@contextmanager
def explained_quantization(settings: Mapping[str, Any] | None) -> Iterator[None]:
    """Turn what a method raises while it quantizes weights into a ``UserError``."""
    if settings is None:
        yield
        return
    # It tells of a cast in each layer of each forward.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        yield
    except (torch.OutOfMemoryError, UserError, OSError):
        raise
    except Exception as error:
        raise _unusable(method_of(settings), error) from error


def _unusable(method: str, error: Exception) -> UserError:
    return UserError(
        f"{_FIELD}: {method} can't quantize this model here ({first_line(error)}); install what it "
        "needs, or choose another method"
    )


def quantized_bytes(skeleton: PreTrainedModel, settings: Mapping[str, Any]) -> int | None:
    """Memory of the weights of a model when they are quantized; None where that can't be told.

    Args:
        skeleton: The model without its weights, as it is before.
        settings: The mapping ``model.quantization``.

    Raises:
        UserError: The settings are wrong.
    """
    config = quantization_config(settings)
    sizes: dict[str, int] = {name: weight.nbytes for name, weight in skeleton.named_parameters()}
    # A method may need a package or a device that this host has not.
    with suppress(Exception):
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        model = copy.deepcopy(skeleton)
        quantizer.preprocess_model(model, dtype=model.dtype, device_map={"": "cpu"})
        for name, weight in model.named_parameters():
            if quantizer.param_needs_quantization(model, name):
                sizes[name] = _bytes_in_few_bits(weight, quantizer)
        return sum(sizes.values())
    return None


def tensors_of(weight: Tensor) -> list[Tensor]:
    """What a weight consists of: several tensors where torchao has packed it, else itself."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [tensor for name in names for tensor in tensors_of(getattr(weight, name))]


def _bytes_in_few_bits(weight: Tensor, quantizer: Any) -> int:
    config: Any = quantizer.quantization_config
    numel = weight.numel()
    if getattr(config, "load_in_8bit", False):
        return numel + 4 * weight.shape[0]
    if getattr(config, "load_in_4bit", False):
        n_blocks = math.ceil(numel / _BLOCK)
        is_nested = config.bnb_4bit_use_double_quant
        constants = n_blocks + 4 * math.ceil(n_blocks / _BLOCKS_OF_CONSTANTS)
        return math.ceil(numel / 2) + (constants if is_nested else 4 * n_blocks)
    if isinstance(config, TorchAoConfig):
        # Some of its methods need a device.
        with suppress(Exception):
            return _torchao_bytes(weight, config.quant_type)
    element_size: float = quantizer.quantized_element_size
    return math.ceil(numel * element_size)


def _torchao_bytes(weight: Tensor, quant_type: Any) -> int:
    from torchao.quantization import quantize_

    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=weight.dtype)
    quantize_(nn.Sequential(linear), quant_type)
    return sum(tensor.nbytes for tensor in tensors_of(linear.weight))


def _torchao_config(settings: Mapping[str, Any]) -> TorchAoConfig:
    """The config of torchao that names a class; what TorchAoConfig does not take goes to that."""
    import torchao.quantization

    name = settings["quant_type"]
    kind: Any = getattr(torchao.quantization, name, None)
    if not isinstance(kind, type) or not name.endswith("Config"):
        known = [name for name in dir(torchao.quantization) if name.endswith("Config")]
        remedy = did_you_mean(name, known, "name a class, such as Int8WeightOnlyConfig")
        raise UserError(f"{_FIELD}.quant_type: torchao has no {name}; {remedy}")
    own = {key: settings[key] for key in _arguments(TorchAoConfig) if key in settings}
    more = {key: settings[key] for key in settings if key not in {*own, "quant_method"}}
    fields = _arguments(kind)
    _require_known(kind, more, fields)
    values = {key: _dtype(value) for key, value in more.items()}
    return TorchAoConfig(**own | {"quant_type": kind(**values)})


def _dtype(value: Any) -> Any:
    """A dtype of torch where a string names one."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return found if isinstance(found, torch.dtype) else value


def _arguments(kind: Any) -> list[str]:
    """Names of what a class is made with."""
    return [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _require_known(kind: Any, given: Iterable[str], known: Iterable[str]) -> None:
    """See that a class takes each argument; those of transformers leave out what they don't know."""
    known = list(known)
    for name in given:
        if name not in known:
            remedy = did_you_mean(name, known, f"it takes {', '.join(known)}")
            raise UserError(f"{_FIELD}.{name}: {kind.__name__} takes no such setting; {remedy}")
