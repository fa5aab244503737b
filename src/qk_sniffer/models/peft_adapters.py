"""Adapters of PEFT: changes to the weights of a base model, which they name."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_safetensors_file_metadata
from safetensors import safe_open
from transformers import PreTrainedModel

from qk_sniffer.config import absent
from qk_sniffer.errors import UserError, first_line
from qk_sniffer.models.checkpoint import checkpoint_file, require_whole
from qk_sniffer.models.source import ModelSource

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PICKLED = "adapter_model.bin"
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")
_MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_BESIDE_THE_DECODER = ("XLORA", "POLY")
"""Types that need more of a forward than the tokens."""


def base_of(source: ModelSource) -> ModelSource:
    """The source of an adapter's base, with the adapter, where a name is that of an adapter.

    It is one where there is no model beside it.

    Raises:
        UserError: It names no base, a second adapter is given, or there is none to merge.
    """
    if source.gguf_file is None and _is_adapter(source.name, source.revision):
        if source.adapter is not None:
            raise UserError(
                f"model.adapter: {source.name} in model.name is an adapter itself; name its base model "
                "there, or leave model.adapter out"
            )
        settings = _settings(source.name, source.revision) or {}
        if not (base := settings.get("base_model_name_or_path")):
            raise UserError(
                f"model.name: the adapter {source.name} does not say of which model it is; name that, "
                "and the adapter in model.adapter"
            )
        source = replace(
            source,
            name=base,
            revision=settings.get("revision") or "main",
            adapter=source.name,
            adapter_revision=source.revision,
            named_by=f"{source.name}/{_ADAPTER_CONFIG}",
        )
    if source.merge_adapter and source.adapter is None:
        raise UserError(
            "model.merge_adapter: there is no adapter; name one in model.adapter, or set it to false"
        )
    return source


def _is_adapter(name: str, revision: str) -> bool:
    path = Path(name)
    if path.is_dir():
        has_model = (path / "config.json").exists() and any(
            next(path.glob(pattern), None) for pattern in _MODEL_WEIGHTS
        )
        return (path / _ADAPTER_CONFIG).exists() and not has_model
    # An id of one word is that of a model; the cache has the config of one that was loaded before.
    if "/" not in name or checkpoint_file(name, revision, "config.json", local_files_only=True):
        return False
    is_model = checkpoint_file(name, revision, "config.json") is not None
    return not is_model and checkpoint_file(name, revision, _ADAPTER_CONFIG) is not None


def _settings(name: str, revision: str) -> dict[str, Any] | None:
    """What the config of an adapter says; None where there is none.

    Raises:
        UserError: It is damaged.
    """
    file = checkpoint_file(name, revision, _ADAPTER_CONFIG)
    if file is None:
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{name}/{_ADAPTER_CONFIG}: damaged, it is no JSON object ({first_line(error)}); copy it "
            "again"
        ) from error


def tokenizer_source(source: ModelSource) -> ModelSource:
    """Where the tokenizer of a model is: with its adapter, if that has one."""
    adapter, revision = source.adapter, source.adapter_revision
    if adapter is None or not any(checkpoint_file(adapter, revision, file) for file in _TOKENIZER):
        return source
    return replace(source, name=adapter, revision=revision, gguf_file=None, adapter=None)


def require_adapter(source: ModelSource) -> None:
    """See that the adapter of a source, if it has one, can be loaded and read with.

    Raises:
        UserError: It is not there, peft is not installed, or it works beside the weights.
    """
    if source.adapter is None:
        return
    settings = _settings(source.adapter, source.adapter_revision)
    if settings is None:
        found = absent("model.adapter", source.adapter, "directory", OSError("no such adapter"))
        raise found or UserError(
            f"model.adapter: {source.adapter} has no {_ADAPTER_CONFIG}; name the directory or the Hub "
            "id of an adapter of peft"
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "model.adapter: peft is not installed; install it with `pip install 'qk-sniffer[adapters]'`"
        )
    kind = str(settings.get("peft_type"))
    if _works_beside_the_weights(kind, settings):
        raise UserError(
            f"model.adapter: {source.adapter} is a {kind} adapter, which does not work by weights "
            "alone; name one that does, such as LoRA"
        )


def _works_beside_the_weights(kind: str, settings: dict[str, Any]) -> bool:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.config import PromptLearningConfig

    known: dict[str, Any] = {
        str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    config = known.get(kind)
    return (
        config is None
        or issubclass(config, PromptLearningConfig)
        or kind in ("ADAPTION_PROMPT", *_BESIDE_THE_DECODER)
        or bool(settings.get("alora_invocation_tokens"))
    )


def foreign_base(source: ModelSource) -> str | None:
    """The model that an adapter was trained on, where it has another name than the one of a source."""
    if source.adapter is None:
        return None
    base = (_settings(source.adapter, source.adapter_revision) or {}).get("base_model_name_or_path")
    # The same model may be elsewhere.
    if not base or Path(base).name.lower() == Path(source.name).name.lower():
        return None
    return str(base)


def with_adapter(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """A model with its adapter, as layers of their own beside its weights or merged into them.

    Args:
        model: The base, which is changed in place.
        source: Names the adapter.

    Raises:
        UserError: The adapter is damaged, does not fit the model, or can't be merged.
    """
    from peft import PeftConfig, PeftModel

    class Watched(PeftModel):  # type: ignore[misc]
        """Keeps which weights were not found on either side, of which peft at most warns."""

        def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
            self.found = super().load_adapter(*args, **kwargs)
            return self.found

    name, revision = str(source.adapter), source.adapter_revision
    _require_weights(name, revision)
    device = next(model.parameters()).device
    try:
        config = PeftConfig.from_pretrained(name, revision=revision)
        # Otherwise a class of peft's own is made.
        config.task_type = None
        adapted = Watched.from_pretrained(
            model, name, config=config, revision=revision, torch_device=str(device)
        )
    except torch.OutOfMemoryError:
        raise
    # What peft raises depends on the type of the adapter.
    except Exception as error:
        raise _misfit(source, first_line(error)) from error
    if strange := [*adapted.found.unexpected_keys, *adapted.found.missing_keys]:
        raise _misfit(source, f"{len(strange)} weights have no counterpart, such as {strange[0]}")
    if not source.merge_adapter:
        return adapted.get_base_model()
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"model.merge_adapter: {name} can't be merged into these weights ({first_line(error)}); "
            "set it to false"
        ) from error


def _require_weights(name: str, revision: str) -> None:
    if file := checkpoint_file(name, revision, _ADAPTER_WEIGHTS):
        require_whole(file)
    elif checkpoint_file(name, revision, _ADAPTER_PICKLED) is None:
        raise UserError(
            f"model.adapter: {name} has no {_ADAPTER_WEIGHTS}; download or copy the adapter again"
        )


def _misfit(source: ModelSource, reason: str) -> UserError:
    base = foreign_base(source)
    remedy = "name the model that it was trained on" if base is None else f"name its base, {base}"
    return UserError(
        f"model.adapter: {source.adapter} does not fit the model {source.name} ({reason}); {remedy}, "
        "in model.name"
    )


def adapter_bytes(source: ModelSource) -> int:
    """Memory of the weights of an adapter beside those of its base, which peft keeps in float32.

    Those that are not here are told by the Hub; 0 where they can't be told.
    """
    if source.adapter is None or source.merge_adapter:
        return 0
    name, revision = source.adapter, source.adapter_revision
    file = checkpoint_file(name, revision, _ADAPTER_WEIGHTS, local_files_only=True)
    try:
        if file is not None:
            with safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
        else:
            header = parse_safetensors_file_metadata(name, _ADAPTER_WEIGHTS, revision=revision)
            shapes = [tensor.shape for tensor in header.tensors.values()]
    # A figure that is not to be had is left out, whatever the reason.
    except Exception:
        return 0
    return sum(4 * torch.Size(shape).numel() for shape in shapes)
