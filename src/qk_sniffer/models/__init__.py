"""How a model is loaded and its attention reached; the one room that knows transformers' insides."""

from qk_sniffer.models.attention import capture_attention, decoder_backbone, probe_attention
from qk_sniffer.models.loading import ModelSource, load_model

__all__ = [
    "ModelSource",
    "capture_attention",
    "decoder_backbone",
    "load_model",
    "probe_attention",
]
