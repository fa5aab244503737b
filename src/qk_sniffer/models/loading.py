"""Loads a causal language model with its config changed as the user asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from qk_sniffer.config import explained_loading
from qk_sniffer.errors import UserError, did_you_mean, last_line
from qk_sniffer.models.attention import decoder_backbone
from qk_sniffer.models.checkpoint import refuse_broken
from qk_sniffer.models.digest import remember_weights
from qk_sniffer.models.explaining import explained_settings, require_files
from qk_sniffer.models.peft_adapters import require_adapter, with_adapter
from qk_sniffer.models.quantization import (
    explained_quantization,
    quantization_config,
    require_quantizable,
)
from qk_sniffer.models.refusals import refuse_unsupported
from qk_sniffer.models.source import ModelSource
from qk_sniffer.models.tensor_parallel import SharedModel


def load_config(
    source: ModelSource, config_overrides: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """The config of ``source`` with some fields changed.

    Raises:
        UserError: It can't be found or read, an override names no field of it, its architecture can't
            be captured, or the weights can't be quantized or adapted as the source says.
    """
    require_adapter(source)
    with explained(source, "give a local directory with a config.json or a Hub id that you can reach"):
        require_files(source.name, source.gguf_file)
        config = AutoConfig.from_pretrained(**source.kwargs())
    for name, value in (config_overrides or {}).items():
        override_config(config, name, value)
    refuse_unsupported(source.name, config)
    require_quantizable(source, config)
    return config


def load_model(
    source: ModelSource,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    device_map: str | dict[str, str] | None = None,
    config_overrides: dict[str, Any] | None = None,
    shared: SharedModel | None = None,
) -> PreTrainedModel:
    """The model of ``source`` in evaluation mode; of a multimodal one, all of it.

    Its weights are quantized and adapted as the source says.

    Args:
        source: Where it comes from.
        dtype: Number format of weights and activations.
        attn_implementation: Attention of transformers; None lets it choose.
        device_map: Placement, as accelerate takes it.
        config_overrides: Changes of its config.
        shared: Loads the part of this process instead, where several share the model.

    Raises:
        UserError: The model can't be found or loaded, some of its decoder's weights are missing, or
            its adapter does not fit it.
    """
    config = load_config(source, config_overrides)
    kwargs = source.kwargs() | {"config": config, "dtype": dtype}
    if shared is None:
        kwargs["device_map"] = device_map
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    # Before it had GgufConfig, transformers always dequantized.
    if source.gguf_file is not None and hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if source.quantization is not None:
        kwargs["quantization_config"] = quantization_config(source.quantization)
    with (
        explained(source, "see the model section of the config"),
        explained_quantization(source.quantization),
        explained_settings(config, attn_implementation, device_map),
    ):
        load = auto_class(config).from_pretrained
        if shared is not None:
            load = partial(shared.load, auto_class(config))
        model, info = load(**kwargs, output_loading_info=True)
    _refuse_missing_weights(source, model, info["missing_keys"])
    if shared is not None:
        # Which is the same for a process that has all of the model.
        remember_weights(decoder_backbone(model))
        shared.cut(model)
    return model if source.adapter is None else with_adapter(model, source)


@contextmanager
def explained(source: ModelSource, remedy: str) -> Iterator[None]:
    """Turn what transformers raises for ``source`` into a ``UserError``."""
    try:
        problem = f"{source.named_by}: {source.name} can't be loaded"
        with explained_loading(problem, remedy, source.name):
            yield
    except Exception as error:
        refuse_broken(source.name, source.revision, error)
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(
                f"model.name: some weights of {source.name} have other shapes than its config gives "
                "them, see the report above; undo the change in model.config_overrides, or give a "
                "checkpoint that fits its config"
            ) from error
        raise


def auto_class(config: PreTrainedConfig) -> Any:
    """The class that loads a config's model.

    Some multimodal models are no causal language model by name, though their decoder is one.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _refuse_missing_weights(source: ModelSource, model: PreTrainedModel, missing: set[str]) -> None:
    """A weight that a checkpoint lacks is random, which transformers only warns of."""
    backbone = decoder_backbone(model)
    prefix = next(name for name, module in model.named_modules() if module is backbone)
    lacking = sorted(key for key in missing if key.startswith(prefix))
    if lacking:
        raise UserError(
            f"model.name: the checkpoint {source.name} lacks {len(lacking)} weights of "
            f"{type(model).__name__}, such as {lacking[0]}, which would be random; give a complete one"
        )


def override_config(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Set one field of a model's config; a mapping changes only the keys that it names.

    ``rope_scaling`` is the older name of ``rope_parameters``, and merging keeps the model's own
    ``rope_theta`` where the override doesn't give one.

    Raises:
        UserError: The config has no such field.
    """
    name = "rope_parameters" if name == "rope_scaling" else name
    if not hasattr(config, name):
        known = (*config.to_dict(), "rope_scaling")
        remedy = did_you_mean(name, known, "see the model's config.json")
        raise UserError(
            f"model.config_overrides.{name}: {type(config).__name__} has no such field; {remedy}"
        )
    current = getattr(config, name)
    if isinstance(current, PreTrainedConfig):
        if not isinstance(value, dict):
            raise UserError(
                f"model.config_overrides.{name}: expected a mapping, got {value}; see the model's "
                "config.json"
            )
        for key, nested in value.items():
            override_config(current, key, nested)
        return
    if isinstance(current, dict) and isinstance(value, dict):
        value = _merge(current, value)
    try:
        setattr(config, name, value)
    except StrictDataclassError as error:
        raise UserError(
            f"model.config_overrides.{name}: {last_line(error)}; see the model's config.json"
        ) from error


def _merge(current: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return current | {
        key: _merge(current[key], value)
        if isinstance(value, dict) and isinstance(current.get(key), dict)
        else value
        for key, value in changes.items()
    }
