"""How a model is loaded and its attention reached; the one room that knows transformers' insides."""

from qk_sniffer.models.adapters import OnResult
from qk_sniffer.models.apart import must_be_read_alone
from qk_sniffer.models.attention import (
    cache_of,
    decoder_backbone,
    name_of,
    text_decoder,
    transformers_model,
    watch_attention,
)
from qk_sniffer.models.caches import watch_caches
from qk_sniffer.models.calls import AttentionCall
from qk_sniffer.models.capturing import capture_attention, states_of
from qk_sniffer.models.check import check_capture
from qk_sniffer.models.checkpoint import Quantization
from qk_sniffer.models.continuing import (
    Continuation,
    generate_options,
    require_room,
    text_seed,
)
from qk_sniffer.models.digest import weights_digest
from qk_sniffer.models.footprint import Footprint, forward_footprint
from qk_sniffer.models.frequencies import (
    begin_batch_of_like_frequencies,
    depends_on_length,
    frequencies_for,
    spans_of_like_frequencies,
)
from qk_sniffer.models.generating import watch_stopping
from qk_sniffer.models.limits import (
    config_vocabulary,
    covered_positions,
    require_known_tokens,
    vocabulary_size,
)
from qk_sniffer.models.loading import load_config, load_model
from qk_sniffer.models.overlay import model_overlays
from qk_sniffer.models.passages import check_passages, read_in_passages
from qk_sniffer.models.peft_adapters import adapter_bytes, base_of, foreign_base, tokenizer_source
from qk_sniffer.models.probe import (
    AttentionGeometry,
    AttentionMap,
    is_probing,
    probe_attention,
    probe_quietly,
    require_unrotated,
)
from qk_sniffer.models.results import on_result_of
from qk_sniffer.models.rotary import RotaryTrace
from qk_sniffer.models.scores import softmax_input
from qk_sniffer.models.sequences import CallSequences, keeps_texts_apart, sequences_of
from qk_sniffer.models.skeleton import attention_geometry, load_skeleton, quantization_of
from qk_sniffer.models.source import ModelSource
from qk_sniffer.models.tensor_parallel import (
    SharedModel,
    plan_of,
    require_plan,
    too_large_to_share,
    whole_layers,
)

__all__ = [
    "AttentionCall",
    "AttentionGeometry",
    "AttentionMap",
    "CallSequences",
    "Continuation",
    "Footprint",
    "ModelSource",
    "OnResult",
    "Quantization",
    "RotaryTrace",
    "SharedModel",
    "adapter_bytes",
    "attention_geometry",
    "base_of",
    "begin_batch_of_like_frequencies",
    "cache_of",
    "capture_attention",
    "check_capture",
    "check_passages",
    "config_vocabulary",
    "covered_positions",
    "decoder_backbone",
    "depends_on_length",
    "foreign_base",
    "forward_footprint",
    "frequencies_for",
    "generate_options",
    "is_probing",
    "keeps_texts_apart",
    "load_config",
    "load_model",
    "load_skeleton",
    "model_overlays",
    "must_be_read_alone",
    "name_of",
    "on_result_of",
    "plan_of",
    "probe_attention",
    "probe_quietly",
    "quantization_of",
    "read_in_passages",
    "require_known_tokens",
    "require_plan",
    "require_room",
    "require_unrotated",
    "sequences_of",
    "softmax_input",
    "spans_of_like_frequencies",
    "states_of",
    "text_decoder",
    "text_seed",
    "tokenizer_source",
    "too_large_to_share",
    "transformers_model",
    "vocabulary_size",
    "watch_attention",
    "watch_caches",
    "watch_stopping",
    "weights_digest",
    "whole_layers",
]
