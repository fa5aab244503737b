"""What a run was made with: versions and settings, and the part of them that decides its rows."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning.pytorch as pl
import xxhash
from torch import nn

from qk_sniffer.capture import CapturedHeads, Stream, captured_streams, described_layers
from qk_sniffer.config import CaptureConfig, MomentsConfig
from qk_sniffer.kinds import parts_of
from qk_sniffer.models import AttentionMap, covered_positions, weights_digest
from qk_sniffer.storage import SCHEMA_VERSION

_PACKAGES = ("qk-sniffer", "torch", "transformers", "lightning", "datasets", "pyarrow")
_DECISIVE = {
    "model": (
        "name",
        "revision",
        "gguf_file",
        "dtype",
        "attn_implementation",
        "config_overrides",
        "models_dir",
        "generate",
        "quantization",
        "adapter",
        "adapter_revision",
        "merge_adapter",
    ),
    "data": (
        "path",
        "name",
        "revision",
        "split",
        "data_files",
        "text_column",
        "id_column",
        "messages_column",
        "messages_format",
        "tools_column",
        "chat_template",
        "chat_template_kwargs",
        "positions_column",
        "tokenizer",
    ),
}
"""Fields that decide which rows there are and what is in them; the others may change from run to run:
devices, how many share a model, batches, passages, and how many texts are read."""

_LATER_MODEL_FIELDS = {
    "generate": None,
    "quantization": None,
    "adapter": None,
    "adapter_revision": "main",
    "merge_adapter": False,
    "tensor_parallel": 1,
}
_LATER_DATA_FIELDS = {
    "data_files": None,
    "messages_column": None,
    "messages_format": "messages",
    "tools_column": None,
    "chat_template": None,
    "chat_template_kwargs": None,
    "positions_column": None,
}
_LATER_TOKENIZER_FIELDS = {"add_special_tokens": None}
"""Fields that came later, with their defaults: settings have them only where used, so that earlier data
roots go on."""

_WHOLE = (
    "config_overrides",
    "head_sampling",
    "generate",
    "quantization",
    "data_files",
    "chat_template_kwargs",
)
"""Fields that are null or a mapping: one setting each."""


def settings(
    module: pl.LightningModule,
    data: pl.LightningDataModule | None,
    capture: CaptureConfig,
    moments: MomentsConfig,
) -> dict[str, Any]:
    """The sections model, data, capture, and moments where they are summed, as JSON takes them."""
    texts = _without_unused(_plain(getattr(data, "hparams", {})), _LATER_DATA_FIELDS)
    if isinstance(texts.get("tokenizer"), dict):
        texts["tokenizer"] = _without_unused(texts["tokenizer"], _LATER_TOKENIZER_FIELDS)
    return {
        "model": _without_unused(_plain(module.hparams), _LATER_MODEL_FIELDS),
        "data": texts,
        "capture": capture.as_settings(),
        **({"moments": summed} if (summed := moments.as_settings()) else {}),
    }


def _without_unused(section: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """A section without those fields of later versions that have their defaults."""
    return {name: value for name, value in section.items() if name not in later or value != later[name]}


def fingerprint(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the rows of a run, by the names that they have in a config.

    Two runs of one fingerprint may share a data root.
    """
    decisive = {
        section: {name: settings[section][name] for name in names if name in settings[section]}
        for section, names in _DECISIVE.items()
    }
    of_sniffer = ("capture", "moments")
    decisive["sniffer"] = {name: settings[name] for name in of_sniffer if name in settings}
    flat = {"schema_version": SCHEMA_VERSION} | dict(_flatten("", decisive))
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain


def described_streams(
    capture: Mapping[str, Any], heads: Mapping[int, CapturedHeads]
) -> list[dict[str, Any]]:
    """The captured heads of each layer and part, with their width, as JSON takes them.

    Args:
        capture: The section capture.
        heads: What is captured, by layer.
    """
    return [
        {
            "layer_idx": stream.layer.layer_idx,
            "kind": stream.kind,
            "heads": list(stream.heads),
            "head_dim": stream.width,
        }
        for stream in captured_streams(heads, parts_of(capture))
    ]


def stream_keys(streams: Iterable[Mapping[str, Any]]) -> list[Stream]:
    """Layer and part of what ``described_streams`` gives."""
    return [(stream["layer_idx"], stream["kind"]) for stream in streams]


def describe(
    settings: Mapping[str, Any],
    backbone: nn.Module,
    attention: AttentionMap,
    heads: Mapping[int, CapturedHeads],
    chat_template: str | None = None,
) -> dict[str, Any]:
    """What is known of a run before its first batch, and kept with its rows.

    Args:
        settings: The sections model, data, capture, and moments where they are summed.
        backbone: The model that runs.
        attention: What a probe saw in it.
        heads: What is captured, by layer.
        chat_template: What makes texts of conversations; None where there are none.

    Returns:
        Its fingerprint, versions, settings, the geometry of all layers, notes, the captured heads of
        each layer and kind, and the positions that the model covers.
    """
    capture = settings["capture"]
    streams = described_streams(capture, heads)
    layers = described_layers(attention.layers, capture)
    shapes = [{name: layer[name] for name in layer if name != "scores"} for layer in layers]
    geometry = json.dumps([streams, shapes], sort_keys=True)
    template = {}
    if chat_template is not None:
        # A file, or a tokenizer's own, may have changed under its name.
        template["data.chat_template.text"] = xxhash.xxh3_64_hexdigest(chat_template.encode())
    return {
        "fingerprint": fingerprint(settings)
        | {
            "model.weights": weights_digest(backbone),
            "model.heads": xxhash.xxh3_64_hexdigest(geometry.encode()),
        }
        | template,
        "versions": _versions(),
        "settings": settings,
        "layers": layers,
        "notes": attention.notes_of(
            parts_of(capture),
            pre_rope=capture["capture_pre_rope"] or settings.get("moments", {}).get("pre_rope", False),
        ),
        "streams": streams,
        "n_positions": covered_positions(getattr(backbone, "config", None)),
    }


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}


def _flatten(prefix: str, section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in section.items():
        if isinstance(value, Mapping) and name not in _WHOLE:
            flat += _flatten(f"{prefix}{name}.", value)
        else:
            flat.append((prefix + name, value))
    return flat


def _plain(hparams: Any) -> dict[str, Any]:
    """Hyperparameters as JSON takes them, without what Lightning's command line adds."""
    return {
        key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for key, value in dict(hparams).items()
        if not key.startswith("_")
    }
