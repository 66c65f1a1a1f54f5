"""A tiny model with planted patterns, prompts for it, and a device on which skipping pays."""

from __future__ import annotations

from typing import Any

import torch
from tiny_cases import tiny_model

from accelkit.calibration.fit import fit
from accelkit.calibration.prefill import prices
from accelkit.calibration.prefill.check import Checker
from accelkit.kernels.cost import CostTable, Kernel, MethodCost

LENGTH = 1024
DIFFUSE = 3
"""The head of every layer that looks everywhere."""


def unclocked(call: Any, runs: Any) -> tuple[list[Any], list[None]]:
    """What runs give; no clock decides."""
    return [run() for run in runs], [None for _ in runs]


def toy_costs(monkeypatch: Any) -> None:
    """A device on which skipping pays and choosing is nearly free."""
    table = CostTable(
        "toy", "float32", 4, 2, 16, ((256, 1.0), (1024, 16.0)), ((256, 1.0), (1024, 16.0)),
        {"64x64": Kernel(0.01, 0.001, 7.0), "128x128": Kernel(0.01, 0.001, 7.0)},
        {"probe_window": MethodCost(((256, 0.01), (1024, 0.04)))},
    )  # fmt: skip
    monkeypatch.setattr(fit, "fit", lambda *a, **k: table)
    monkeypatch.setattr(prices, "beside_table", lambda *a: {})  # no clock decides
    monkeypatch.setattr(prices, "beside_dense", unclocked)
    speed = {"dense_ms": 2.0, "ms": 1.0, "tokens": LENGTH}
    monkeypatch.setattr(Checker, "speed", lambda self, plan: speed)


def planted(diffuse: int | slice = DIFFUSE) -> Any:
    """Constant queries and keys: rotary positions alone make the logits, highest at distance 0."""
    model = tiny_model(attention_bias=True)
    for layer in model.model.layers:
        attention = layer.self_attn
        for part in (attention.q_proj, attention.k_proj):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
            part.bias.data.view(-1, 16)[:, :8] = 8.0
        attention.q_proj.bias.data.view(-1, 16)[diffuse] = 0.0
        # Averages over many tokens are small; the model shall need them all the same.
        attention.v_proj.weight.data *= 20.0
        attention.o_proj.weight.data[:, DIFFUSE * 16 :] *= 20.0
    return model


def prompts(count: int = 4, length: int = LENGTH) -> list[torch.Tensor]:
    """Token ids, the same at every call."""
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=g) for _ in range(count)]
