"""Small calls with every trait that an estimator must honour, and the same done densely."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from accelkit.kernels.index import Inputs, plain_inputs

NAMES = (
    "plain", "grouped", "chunk", "some heads", "left padding", "right padding", "not causal",
    "permuted keys",
)  # fmt: skip


def case(name: str, n: int = 150, d: int = 16, seed: int = 0, device: str = "cpu", dtype=None):
    """A call by name: ragged, peaked enough that scores differ."""
    g = torch.Generator().manual_seed(seed)
    heads, kv_heads = (2, 2) if name == "plain" else (4, 2)
    start = 64 if name == "chunk" else 0
    shape = (2, heads, n, d), (2, kv_heads, n + start, d)
    q, k, v = (torch.randn(s, generator=g) * 1.5 for s in (*shape, shape[1]))
    # Tokens drift, so that neighbours and far blocks differ.
    k = k + torch.linspace(0, 2, k.shape[2])[:, None] * torch.randn(d, generator=g)
    q, k, v = (t.to(device, dtype or torch.float32) for t in (q, k, v))
    mask = None
    if "padding" in name:
        at = torch.arange(n)
        lengths = torch.tensor([[n], [n - 37]])
        mask = at < lengths if name == "right padding" else at >= n - lengths
        mask = mask.to(device)
    call = plain_inputs(q, k, v, causal=name != "not causal", q_start=start, key_mask=mask)
    if name == "some heads":
        call = replace(call, heads=(3, 0), kv_heads=(call.kv_heads[3], call.kv_heads[0]))
    if name == "permuted keys":
        return permuted(call, seed)
    return call


def permuted(call: Inputs, seed: int = 0) -> Inputs:
    """Keys in another order for each head, inside segments of 32."""
    g = torch.Generator().manual_seed(seed)
    n, heads = call.n_k, len(call.heads)
    noise = torch.rand(call.q.shape[0], heads, n, generator=g)
    segment = torch.arange(n) // 32
    order = (segment + noise * 0.999).argsort(-1)
    at = order[..., None].expand(-1, -1, -1, call.k.shape[3])
    k, v = (t[:, call.kv_of_head].gather(2, at) for t in (call.k, call.v))
    return replace(call, k=k, v=v, kv_heads=tuple(range(heads)), k_pos=order.int())


def seen(call: Inputs) -> Tensor:
    """Which row sees which key, bool [B, H, Nq, Nk]."""
    rows = call.q_start + torch.arange(call.n_q, device=call.q.device)
    keys = (
        torch.arange(call.n_k, device=call.q.device)[None, None]
        if call.k_pos is None
        else call.k_pos
    )
    ok = keys[..., None, :] <= rows[:, None] if call.causal else keys[..., None, :] >= 0
    if call.key_mask is not None:
        ok = ok & call.key_mask[:, None, None]
    return ok.expand(call.q.shape[0], len(call.heads), call.n_q, call.n_k)


def voting(call: Inputs) -> Tensor:
    """Rows that are tokens, bool [B, H, Nq]."""
    mask = torch.ones(call.q.shape[0], call.n_q, dtype=torch.bool, device=call.q.device)
    if call.key_mask is not None:
        mask = call.key_mask[:, call.q_start :]
    return mask[:, None].expand(-1, len(call.heads), -1)


def dense_logits(call: Inputs) -> Tensor:
    q, k = call.q[:, list(call.heads)].float(), call.k[:, call.kv_of_head].float()
    s = q @ k.transpose(-1, -2) * call.scale
    return s.masked_fill(~seen(call), -float("inf"))


def dense_softmax(call: Inputs) -> Tensor:
    return dense_logits(call).softmax(-1).nan_to_num(0.0)


def blocks(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def visible_by_hand(call: Inputs, size: tuple[int, int]) -> Tensor:
    ok = seen(call)
    rows = [
        torch.stack([ok[:, :, r, c].any(-1).any(-1) for c in blocks(call.n_k, size[1])], -1)
        for r in blocks(call.n_q, size[0])
    ]
    return torch.stack(rows, 2)


def close(found: Tensor, expected: Tensor, atol: float = 1e-4, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=rtol)
