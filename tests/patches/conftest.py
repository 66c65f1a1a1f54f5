"""Tiny models of every family, built from their configs; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def tiny(family: str, **changes):
    """A random model of `family`, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, 300), generator=torch.Generator().manual_seed(1))


def attributes(model) -> dict[str, dict]:
    """`vars()` of every module, to prove that nothing was left behind."""
    return {name: dict(vars(module)) for name, module in model.named_modules()}
