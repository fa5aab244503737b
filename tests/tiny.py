"""A tiny random model of every causal language model that transformers has, from its real config.

A default config is walked and every field that makes a model big is set to a small size; what an
architecture needs beyond that stands in ``SPECIAL``.
"""

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 300
LAYERS = 4
WINDOW = 8

MULTIMODAL = {
    f"{name} (multimodal)": cls
    for name, cls in {
        "llama4": "Llama4ForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration",
        "mistral3": "Mistral3ForConditionalGeneration",
        "mllama": "MllamaForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
    }.items()
    if hasattr(transformers, cls)
}
"""Multimodal models whose text decoder is a causal language model and that are not one by name."""

ARCHITECTURES: dict[str, str] = dict(
    sorted({**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MULTIMODAL}.items())
)

_BY_SIZE = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size "
    "decoder_vocab_size unpadded_vocab_size",
    128: "intermediate_size intermediate_size_mlp "
    "dense_intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff "
    "dff d_ff d_inner feed_forward_size mamba_d_ssm",
    64: "hidden_size hidden_size_global attention_hidden_size backbone_hidden_size out_hidden_size "
    "d_model n_embd emb_dim embed_dim embedding_dim embedding_size input_embedding_size "
    "output_embedding_size word_embed_proj_dim lru_width mlp_dim projection_dim projector_input_dim "
    "projector_output_dim vision_output_dim dim_model_base ext_pw_out_channel "
    "depthwise_separable_out_channel max_position_embeddings max_target_positions max_seq_len "
    "context_length n_positions n_ctx keep_window_size ngram_vocab_size_base "
    "encoder_hash_byte_group_vocab",
    32: "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "q_lora_rank max_source_positions audio_vocab_size codebook_size base_channels",
    24: "qk_head_dim",
    16: "head_dim attention_head_dim attention_head_size swa_head_dim dim_head d_kv d_head kv_channels "
    "qk_nope_head_dim v_head_dim kv_lora_rank o_lora_rank index_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_state mamba_d_head mamba_head_dim mamba_headdim "
    "ssm_state_size state_size hidden_size_per_layer_input pronunciation_embed_dim shape_embed_dim "
    "ple_embed_dim num_mel_bins router_hidden_size num_position_embeddings output_channels rel_extent "
    "index_n_heads input_feat_size nemo_conv_channels input_size",
    WINDOW: "sliding_window sliding_window_size attention_window_size window_size "
    "attention_chunk_size local_attention local_attention_window_len qk_rope_head_dim rotary_dim "
    "mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size mamba_dt_rank time_step_rank "
    "adapter_rank laurel_rank gated_norm_rank hc_lowrank d_rel num_centroids",
    LAYERS: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_decoder_layers "
    "encoder_layers num_encoder_layers "
    "num_attention_heads num_heads n_head n_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "swa_num_attention_heads conf_num_attention_heads linear_num_value_heads linear_num_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts index_topk index_block_size "
    "block_size local_attn_chunk_length lsh_attn_chunk_length prompt_length floor_scale "
    "log_scaling_n_floor vision_soft_tokens_per_image",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_query_groups "
    "linear_num_key_heads n_mamba_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num n_groups "
    "o_groups num_blocks depth max_num_tiles type_vocab_size max_window_layers layer_group_size "
    "index_topk_blocks split_ngram_parts centroid_intermediate_top_k attn_layer_period "
    "expert_layer_period no_rope_layer_interval sliding_window_pattern "
    "global_attn_every_n_layers n_layers_per_attn_res_block",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts "
    "moe_num_shared_experts index_local_blocks mamba_n_groups mamba_ngroups num_mem_blocks "
    "num_dense_layers first_k_dense_replace num_global_layers num_random_blocks attn_layer_offset "
    "expert_layer_offset interleave_moe_layer_step conf_num_hidden_layers mm_tokens_per_image n_langs",
    0: "num_kv_shared_layers num_nextn_predict_layers",
    28: "image_size",
    14: "patch_size",
}
_SIZES: dict[str, Any] = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_SIZES["encoder_hash_byte_group_size"] = [3]

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "video_token_id": 4}
_HALF_LINEAR = ["linear_attention", "full_attention"] * 2
_SLIDING_FIRST = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3N = {
    "num_kv_shared_layers": 2,
    "layer_types": _SLIDING_FIRST,
    "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
}
_GEMMA4 = {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
_INDEXED = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
}
_CROSS = {
    "text_config": {"cross_attention_layers": [1, 3]},
    "vision_config": {
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 192,
        "num_hidden_layers": 2,
        "attention_heads": 4,
    },
}
_ZAMBA = {"attention_hidden_size": 128, "attention_head_dim": 32}
_DOTS3 = {
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_qk_rope_head_dim": 8,
    "swa_v_head_dim": 16,
}

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _SLIDING_FIRST,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "layer_types": _SLIDING_FIRST,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note": {
        "num_key_value_heads": 4,
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
    },
    "dots3_note_text": _DOTS3,
    "gemma2": {"attn_logit_softcapping": 3.0},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "ministral": {"head_dim": 16},
    "mistral3 (multimodal)": {"text_config": {"sliding_window": WINDOW}},
    "mllama": _CROSS,
    "mllama (multimodal)": _CROSS,
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "qwen2": {"use_sliding_window": True},
    "qwen2_5_vl (multimodal)": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
    },
    "qwen2_moe": {"use_sliding_window": True},
    "qwen3_vl (multimodal)": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
        "vision_config": {"deepstack_visual_indexes": [0], "num_heads": 4},
    },
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": {**_INDEXED, "ple_layer_ids": []},
    "vaultgemma": {"attn_logit_softcapping": 3.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {
        **_ZAMBA,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1, 3],
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}

_CAUSAL: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full", "is_decoder": True},
    "xlm": {"causal": True},
}


def tiny_causal_lm(name: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The tiny model of one of ``ARCHITECTURES``, eager, in float32 and in evaluation mode."""
    cls = getattr(transformers, ARCHITECTURES[name])
    config = _config_for(cls, config or tiny_config(name))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    with without_timm(config):
        model: PreTrainedModel = cls(config).eval().float()
    _spread_weights(model)
    return model


def tiny_config(name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    """A small config of an architecture, with windows, experts and head groups where it has any.

    Args:
        name: Of the architecture.
        changes: Fields that are to have other values.
    """
    config_class = CONFIG_MAPPING[name.removesuffix(" (multimodal)")]
    small = _merged(_merged(_small(config_class()), SPECIAL.get(name, {})), dict(changes))
    return config_class(**small | causal_overrides(name))


def causal_overrides(name: str) -> dict[str, Any]:
    """What a user sets to make a causal language model of an architecture that is none by default."""
    if name in _CAUSAL:
        return _CAUSAL[name]
    config = CONFIG_MAPPING[name.removesuffix(" (multimodal)")]()
    return {} if getattr(config, "is_decoder", True) else {"is_decoder": True}


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make ``config`` small."""
    fields = vars(config)
    mla = "qk_rope_head_dim" in fields
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _small(value) | {"model_type": value.model_type}
        elif name == "head_dim" and (mla or value is None):
            continue
        elif name in _SIZES and _is_size(name, value):
            small[name] = _SIZES[name]
        elif (
            name.endswith(("token_id", "token_index"))
            and isinstance(value, int)
            and value >= VOCABULARY
        ):
            small[name] = _TOKENS.get(name, 3 if "image" in name else 6)
        elif name == "eos_token_id" and isinstance(value, list):
            small[name] = _TOKENS[name]
        elif isinstance(value, list) and len(value) == _depth(config) != LAYERS:
            small |= _fewer_layers(name, value)
    if mla and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _is_size(name: str, value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, list) and not isinstance(_SIZES[name], list)):
        return False
    return value is not None or name == "num_key_value_heads"


def _depth(config: PreTrainedConfig) -> int | None:
    for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"):
        if isinstance(depth := getattr(config, name, None), int):
            return depth
    return None


def _fewer_layers(name: str, values: list[Any]) -> dict[str, Any]:
    """Values for each layer, cut so that every kind is still there."""
    kinds = list(dict.fromkeys(map(str, values)))
    if len(kinds) > LAYERS:
        return {}
    first = {str(value): value for value in reversed(values)}
    return {name: [first[kinds[i % len(kinds)]] for i in range(LAYERS)]}


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(values[k], v) for k, v in changes.items() if isinstance(v, dict) and k in values}
    return values | changes | both


def _config_for(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a multimodal config that a text-only class takes."""
    if cls.config_class is None or isinstance(config, cls.config_class):
        return config
    candidates = [config.get_text_config(decoder=True), getattr(config, "decoder", None)]
    return next((part for part in candidates if isinstance(part, cls.config_class)), config)


@contextmanager
def without_timm(config: PreTrainedConfig) -> Iterator[None]:
    """Gemma 3n's vision tower comes from timm; text never enters it, so an empty module will do."""
    if config.model_type != "gemma3n":
        yield
        return
    modeling = importlib.import_module("transformers.models.gemma3n.modeling_gemma3n")
    build = modeling.AutoModel.from_config

    def from_config(config: PreTrainedConfig) -> nn.Module:
        return nn.Module() if "vision" in config.model_type else build(config)

    with patch.object(modeling.AutoModel, "from_config", from_config):
        yield


def _spread_weights(model: PreTrainedModel) -> None:
    """Weights that make attention far from uniform, where the usual small ones would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and weight.dim() == 2:
            nn.init.normal_(weight, std=1.3 / math.sqrt(weight.shape[1]), generator=generator)
        elif type(module).__name__ == "Conv1D":
            nn.init.normal_(weight, std=1.3 / math.sqrt(weight.shape[0]), generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(weight, generator=generator)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        largest = float(parameter.detach().abs().max())
        if "sink" in name:
            nn.init.normal_(parameter, generator=generator)
        elif not math.isfinite(largest) or largest > 1e4:
            nn.init.normal_(parameter, std=0.1, generator=generator)
        elif largest == 0:
            nn.init.normal_(parameter, std=0.3, generator=generator)
