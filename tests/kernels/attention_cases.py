"""Small attention calls that every backend must agree on."""

from __future__ import annotations

import torch

from accelkit.kernels.index import ALL, BlockIndex, ceil_div


def tensors(batch, heads, kv_heads, n_q, n_k, size, dtype=torch.float32, value_size=None, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_q, heads, size, generator=g).to(device, dtype).transpose(1, 2)
    k = torch.randn(batch, n_k, kv_heads, size, generator=g).to(device, dtype).transpose(1, 2)
    v = torch.randn(batch, n_k, kv_heads, value_size or size, generator=g).to(device, dtype).transpose(1, 2)
    return q, k, v


def random_index(batch, heads, n_q, n_k, size, density=0.4, dense_heads=(), empty_rows=(), device="cpu", seed=0):
    """Random blocks in random order; block 0 of each row is likely kept so that few rows are empty by chance."""
    g = torch.Generator().manual_seed(seed)
    nq, nk = ceil_div(n_q, size[0]), ceil_div(n_k, size[1])
    starts, counts, blocks, at = [], [], [], 0
    for _ in range(batch):
        for h in range(heads):
            for i in range(nq):
                order = torch.randperm(nk, generator=g)
                n = 0 if i in empty_rows else max(1, int(round(density * nk)))
                starts.append(at)
                counts.append(ALL if h in dense_heads else n)
                blocks.append(order[:n])
                at += n
    shape = (batch, heads, nq)
    return BlockIndex(
        torch.tensor(starts).view(shape).to(device), torch.tensor(counts, dtype=torch.int32).view(shape).to(device),
        torch.cat(blocks).to(torch.int32).to(device), size,
    )


def permutation(batch, heads, n, holes=0, device="cpu", seed=0):
    """Positions of permuted tokens, int32 [B, H, n], the given number of them holes."""
    g = torch.Generator().manual_seed(seed)
    pos = torch.stack([torch.randperm(n, generator=g) for _ in range(batch * heads)])
    for row in pos:
        row[torch.randperm(n, generator=g)[:holes]] = -1
    return pos.view(batch, heads, n).to(device, torch.int32)
