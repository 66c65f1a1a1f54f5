"""Small attention calls that every backend must agree on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex, ceil_div


def tensors(
    batch,
    heads,
    kv_heads,
    n_q,
    n_k,
    size,
    dtype=torch.float32,
    value_size=None,
    device="cpu",
    seed=0,
):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_q, heads, size, generator=g).to(device, dtype).transpose(1, 2)
    k = torch.randn(batch, n_k, kv_heads, size, generator=g).to(device, dtype).transpose(1, 2)
    v = (
        torch.randn(batch, n_k, kv_heads, value_size or size, generator=g)
        .to(device, dtype)
        .transpose(1, 2)
    )
    return q, k, v


def random_index(
    batch, heads, n_q, n_k, size, density=0.4, dense_heads=(), empty_rows=(), device="cpu", seed=0
):
    """Random blocks in random order; block 0 of each row is likely kept so that few rows are empty
    by chance.
    """
    g = torch.Generator().manual_seed(seed)
    nq, nk = ceil_div(n_q, size[0]), ceil_div(n_k, size[1])
    starts, counts, blocks, at = [], [], [], 0
    for _ in range(batch):
        for h in range(heads):
            for i in range(nq):
                order = torch.randperm(nk, generator=g)
                n = 0 if i in empty_rows else max(1, round(density * nk))
                starts.append(at)
                counts.append(ALL if h in dense_heads else n)
                blocks.append(order[:n])
                at += n
    shape = (batch, heads, nq)
    return BlockIndex(
        torch.tensor(starts).view(shape).to(device),
        torch.tensor(counts, dtype=torch.int32).view(shape).to(device),
        torch.cat(blocks).to(torch.int32).to(device),
        size,
    )


def permutation(batch, heads, n, holes=0, device="cpu", seed=0):
    """Positions of permuted tokens, int32 [B, H, n], the given number of them holes."""
    g = torch.Generator().manual_seed(seed)
    pos = torch.stack([torch.randperm(n, generator=g) for _ in range(batch * heads)])
    for row in pos:
        row[torch.randperm(n, generator=g)[:holes]] = -1
    return pos.view(batch, heads, n).to(device, torch.int32)


def check_call(
    backend,
    batch,
    heads,
    lengths,
    head_size,
    size,
    causal,
    option="plain",
    dtype=None,
    value_size=None,
):
    """One call by a backend against the reference in fp64, outputs poisoned, one dense head, one
    empty row.
    """
    n_q, n_k, q_start = lengths
    dtype = dtype or torch.float32
    q, k, v = tensors(batch, *heads, n_q, n_k, head_size, dtype, value_size)
    index = random_index(batch, heads[0], n_q, n_k, size, dense_heads=(1,), empty_rows=(1,))
    options = {"causal": causal, "q_start": q_start}
    if option == "key_mask":
        options["key_mask"] = torch.ones(batch, n_k, dtype=torch.bool)
        options["key_mask"][0, : n_k // 3] = False
    elif option == "positions":
        options["k_pos"] = permutation(1, heads[0], n_k, 5)
        options["q_pos"] = permutation(batch, 1, n_q, 3) + q_start
    elif option == "q_pos":
        options["q_pos"] = permutation(1, heads[0], n_q, 0) + q_start
    elif option == "rows":
        options["rows"] = [0, index.rows - 1]
    elif option == "bias":
        index = replace(index, bias=torch.randn(1, heads[0], n_k))
    elif option == "skip":
        options["skip"] = torch.linspace(0.1, 0.7, heads[0])
    width = v.shape[-1]
    out = torch.full((batch, n_q, heads[0], width), math.nan, dtype=dtype).transpose(1, 2)
    want = torch.full((batch, heads[0], n_q, width), math.nan, dtype=torch.float64)
    lse, want_lse = (torch.full((batch, heads[0], n_q), math.nan) for _ in range(2))
    attend(q, k, v, index, **options, out=out, lse=lse, backend=backend)
    wide = (t.double() for t in (q, k, v))
    attend(*wide, index, **options, out=want, lse=want_lse, backend="reference")
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), want, atol=limit, rtol=limit, equal_nan=True)
    torch.testing.assert_close(lse, want_lse, atol=limit, rtol=limit, equal_nan=True)
