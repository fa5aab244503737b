"""How a model is loaded and its attention reached; the one room that knows transformers' insides."""

from qk_sniffer.models.attention import (
    AttentionMap,
    capture_attention,
    decoder_backbone,
    probe_attention,
)
from qk_sniffer.models.check import check_capture
from qk_sniffer.models.loading import ModelSource, load_config, load_model
from qk_sniffer.models.overlay import model_overlays

__all__ = [
    "AttentionMap",
    "ModelSource",
    "capture_attention",
    "check_capture",
    "decoder_backbone",
    "load_config",
    "load_model",
    "model_overlays",
    "probe_attention",
]
