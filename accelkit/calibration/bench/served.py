"""What a plan would run, without running it: heads by policy, and the backend that serves them."""

from __future__ import annotations

from typing import Any

import torch

from accelkit.errors import AccelkitError
from accelkit.kernels import dispatch
from accelkit.kernels.index import BlockIndex
from accelkit.patches.adapters import sites
from accelkit.patches.call import Clock
from accelkit.patches.plan import Component, Plan


def heads_by_policy(model: Any, plan: Plan, tokens: int, clock: Clock) -> dict[str, int]:
    """How many heads run what, over all sites."""
    component = next(iter(plan.fingerprint.components.values()))
    heads: dict[str, int] = {}
    for site in sites(model):
        groups = plan.groups(site.path, tokens, clock)
        for group in groups:
            label = group.policy.label()
            heads[label] = heads.get(label, 0) + len(group.heads)
        if not groups:
            heads["dense"] = heads.get("dense", 0) + component.q_heads
    return heads


def serves(
    size: Component, dtype: torch.dtype, device: torch.device, causal: bool
) -> dict[str, str]:
    """The backend that would run lists of 128 × 128 blocks for heads of this size, and why."""
    q = torch.zeros(1, size.q_heads, 128, size.head_dim, dtype=dtype, device=device)
    kv = q[:, : size.kv_heads]
    try:
        index = BlockIndex.dense(size.q_heads, 1, (128, 128), device)
        choice = dispatch.explain(q, kv, kv, index, causal=causal)
    except AccelkitError as error:
        return {"backend": "none", "reason": str(error)}
    return {"backend": choice.backend, "reason": choice.reason}
