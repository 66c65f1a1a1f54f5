"""Runs of keys: gates scaled over a head, and lists of the blocks that chosen runs touch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.select import long_prefix, starts
from accelkit.kernels._triton.tile import table
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.select_lines import Runs

_CHUNK = 2048


@triton.jit(do_not_specialize=["n", "n_chunks"])
def _scale(GATE, LOW, HIGH, OWN, REST, NEED, n, n_chunks, coverage, CHUNK: tl.constexpr):
    """Scaled gates, −inf where they are a tile's own, and the chunk's part of what is needed."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    low, high = tl.load(LOW + row), tl.load(HIGH + row)
    x = tl.load(GATE + row * n + at, mask=at < n, other=0.0)
    own = tl.load(OWN + at, mask=at < n, other=0) > 0
    x = tl.where(at < n, tl.div_rn(x - low, tl.maximum(high - low, 1e-6)), 0.0)
    tl.store(REST + row * n + at, tl.where(own, -float("inf"), x), mask=at < n)
    need = coverage * tl.sum(x, 0) - tl.sum(tl.where(own, x, 0.0), 0)
    tl.store(NEED + row * n_chunks + chunk, need)


def routed(gate: Tensor, own: Tensor, coverage: float) -> Tensor:
    """`kernels.select.routed`."""
    (batch, heads), n = gate.shape[:2], gate[0, 0].numel()
    gate = gate.contiguous()
    low, high = torch.aminmax(gate.view(batch * heads, n), dim=-1)
    rest, n_chunks = torch.empty_like(gate), triton.cdiv(n, _CHUNK)
    need = gate.new_empty((batch * heads, n_chunks))
    _scale[(n_chunks, batch * heads)](
        gate, low, high, own.contiguous().view(torch.uint8), rest, need, n, n_chunks, coverage,
        CHUNK=_CHUNK, num_warps=4,
    )  # fmt: skip
    need = need.sum(-1, dtype=torch.float64)
    return long_prefix(rest.view(batch * heads, n), need).view(gate.shape)


@triton.jit(do_not_specialize=["n_heads", "nq", "nk", "n_runs"])
def _compact(
    CHOSEN, BEGIN, END, KEPT, s_tb, s_th, s_tn, BLOCKS, COUNT, n_heads, nq, nk, n_runs,
    MOST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    bh, tile = row // nq, row % nq
    kept = KEPT + (bh // n_heads) * s_tb + (bh % n_heads) * s_th + tile * s_tn
    done = 0
    for j in range(0, nk, CHUNK):
        block = j + tl.arange(0, CHUNK)
        begin = tl.load(BEGIN + block, mask=block < nk, other=0)
        end = tl.load(END + block, mask=block < nk, other=0)
        keep = tl.load(kept + block, mask=block < nk, other=0).to(tl.int32)
        for i in range(MOST):
            run = CHOSEN + row * n_runs + begin + i
            keep |= tl.load(run, mask=begin + i < end, other=0).to(tl.int32)
        tl.store(BLOCKS + row * nk + done + tl.cumsum(keep, 0) - 1, block, mask=keep > 0)
        done += tl.sum(keep, 0)
    tl.store(COUNT + row, done)


def compact(chosen: Tensor, runs: Runs, kept: Tensor, size: tuple[int, int]) -> BlockIndex:
    """`kernels.select.compact_runs`."""
    (batch, heads, nq, n_runs), nk, device = chosen.shape, runs.begin.numel(), chosen.device
    blocks = torch.empty(batch * heads * nq * nk, dtype=torch.int32, device=device)
    count = torch.empty((batch, heads, nq), dtype=torch.int32, device=device)
    if kept.stride(-1) != 1:
        kept = kept.contiguous()
    if count.numel():
        chunk = min(1024, max(16, triton.next_power_of_2(nk)))
        _compact[(count.numel(),)](
            chosen.contiguous().view(torch.uint8), runs.begin, runs.end,
            *table(kept.view(torch.uint8)[..., 0], count), blocks, count, heads, nq, nk, n_runs,
            MOST=runs.most, CHUNK=chunk, num_warps=4 if chunk > 256 else 1,
        )  # fmt: skip
    return BlockIndex(starts(batch, heads, nq, nk, device), count, blocks, size)
