"""The operator behind a patched language model, with tensors on a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import accelkit
from accelkit.patches.methods.window import Window

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("padded", [False, True])
def test_the_operator_keeps_its_contract(padded: bool) -> None:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().to("cuda", torch.bfloat16)
    tokens = 1000
    mask = None
    if padded:
        mask = torch.arange(tokens, device="cuda") >= torch.tensor([[0], [130]], device="cuda")
    method = Window(sink_tokens=128, window_tokens=256)
    with accelkit.patch(model, method) as handle, torch.no_grad():
        number = model.model.layers[0].self_attn.accelkit_site
        q, k, v = (
            torch.randn(2, tokens, heads, 64, device="cuda").bfloat16().transpose(1, 2)
            for heads in (4, 2, 2)
        )
        call = torch.ops.accelkit.attention.default
        torch.library.opcheck(call, (q, k, v, mask, 0.125, number))
        assert handle.report().sparse_calls > 0
