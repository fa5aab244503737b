"""Tiny random models of eight families, from their real config classes, and shapes of real models."""

import math

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.pytorch_utils import Conv1D

_SIZE = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=1,
)
_MIXED = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZE),
    "mistral": MistralConfig(**_SIZE, sliding_window=8),
    "qwen2": Qwen2Config(**_SIZE),
    "qwen3": Qwen3Config(**_SIZE, head_dim=24),
    "gemma3": Gemma3TextConfig(**_SIZE, head_dim=16, sliding_window=8, layer_types=_MIXED),
    "smollm3": SmolLM3Config(**_SIZE, no_rope_layers=[1, 0, 1, 0]),
    "glm4": Glm4Config(**_SIZE, head_dim=16, partial_rotary_factor=0.5),
    "gpt2": GPT2Config(
        vocab_size=300, n_embd=64, n_layer=4, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1
    ),
}

MANY_HEADS = LlamaConfig(
    **_SIZE | dict(num_hidden_layers=20, num_attention_heads=32, num_key_value_heads=32, head_dim=8)
)
"""1,280 heads, as a model of eight billion parameters has."""

MOST_HEADS = LlamaConfig(
    **_SIZE
    | dict(
        num_hidden_layers=80,
        hidden_size=60,
        num_attention_heads=60,
        num_key_value_heads=15,
        head_dim=4,
    )
)
"""6,000 heads, somewhat more than a model of seventy billion parameters has."""

HOST_BOUND = LlamaConfig(
    vocab_size=256,
    hidden_size=36,
    intermediate_size=64,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
"""As many layers as SmolLM2-135M, and so small that the host's own work is most of a batch."""

UNEVEN = LlamaConfig(
    **_SIZE | dict(num_hidden_layers=2, hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
)
"""As many heads as SmolLM2-135M has: two processes can't halve its key heads."""

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
LLAMA_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
)
"""Shapes of real models, for measures that need no trained weights."""


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose attention is far from uniform, as the usual small initial weights would make it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.3 / math.sqrt(module.in_features))
        elif isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=1.3 / math.sqrt(module.nx))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return model
