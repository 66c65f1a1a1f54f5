"""What the attention kernels share: masks, position tables, head tables and tile choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels.launch import END, Launch

LAST = tl.constexpr(END)
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_limits(
    Q_POS, pos_at, pos_step, rows, n_q, q_start, CAUSAL: tl.constexpr, HAS_Q_POS: tl.constexpr
):
    """Last position that each row may see, int32 [BM]; −1: nothing."""
    if HAS_Q_POS:
        limit = tl.load(Q_POS + pos_at + rows.to(tl.int64) * pos_step, mask=rows < n_q, other=-1)
        if not CAUSAL:
            limit = tl.where(limit < 0, -1, LAST)
    elif CAUSAL:
        limit = rows + q_start
    else:
        limit = tl.zeros_like(rows) + LAST
    return limit


@triton.jit
def hide(s, col, limit, K_POS, pos_at, pos_step, n_k, HAS_K_POS: tl.constexpr):
    """Scores [BM, BN] with −inf where row and key do not see each other."""
    if HAS_K_POS:
        place = tl.load(
            K_POS + pos_at + col.to(tl.int64) * pos_step, mask=(col >= 0) & (col < n_k), other=-1
        )
    else:
        place = tl.where(col < n_k, col, -1)
    seen = (place >= 0)[None, :] & (place[None, :] <= limit[:, None])
    return tl.where(seen, s, -float("inf"))


@triton.jit
def add_bias(s, col, BIAS, bias_at, bias_step, n_k, HAS_BIAS: tl.constexpr):
    """Base-2 scores plus the per-key bias."""
    if HAS_BIAS:
        value = tl.load(
            BIAS + bias_at + col.to(tl.int64) * bias_step, mask=(col >= 0) & (col < n_k), other=0.0
        )
        s += (value * 1.4426950408889634)[None, :]
    return s


@triton.jit
def finish(
    OUT,
    LSE,
    out_at,
    lse_at,
    s_om,
    s_lm,
    rows,
    keep,
    m,
    total,
    acc,
    DV: tl.constexpr,
    BDV: tl.constexpr,
):
    """Normalise and store a tile; `keep` [BM] are the rows that belong to it."""
    alive = total > 0.0
    acc = acc / tl.where(alive, total, 1.0)[:, None]
    lse = tl.where(alive, (m + tl.log2(tl.where(alive, total, 1.0))) * LN2, -float("inf"))
    d = tl.arange(0, BDV)
    at = OUT + out_at + rows.to(tl.int64)[:, None] * s_om + d[None, :]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=keep[:, None] & (d < DV)[None, :])
    tl.store(LSE + lse_at + rows.to(tl.int64) * s_lm, lse, mask=keep)


def table(t: Tensor | None, dummy: Tensor) -> tuple[Tensor, int, int, int]:
    """A `[B|1, H|1, N]` table as pointer and strides, broadcast dimensions with stride 0."""
    if t is None:
        return dummy, 0, 0, 0
    sb, sh, sn = t.stride()
    return t, (sb if t.shape[0] > 1 else 0), (sh if t.shape[1] > 1 else 0), sn


def power_of_two_part(n: int, most: int) -> int:
    """Greatest power of two that divides n, at most `most`."""
    return min(n & -n, most)


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """Tile `(bm, bn)`, the query tiles that one index row gives, and how to compile it."""

    bm: int
    bn: int
    per_row: int
    warps: int
    stages: int


def query_tile(bq: int, most: int) -> tuple[int, int] | None:
    """`(bm, tiles per index row)`: a divisor of bq with at least 16 rows, or one padded tile for
    odd small units.
    """
    bm = power_of_two_part(bq, most)
    if bm >= 16:
        return bm, bq // bm
    if bq <= most:
        return max(16, next_power_of_two(bq)), 1
    return None


def common_refusal(launch: Launch) -> str | None:
    """What no Triton attention kernel takes."""
    if launch.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {launch.q.dtype} is not one of fp16, bf16, fp32"
    if max(launch.q.shape[3], launch.v.shape[3]) > 256:
        return f"head size {max(launch.q.shape[3], launch.v.shape[3])} is above 256"
    if any(t.stride(-1) != 1 for t in (launch.q, launch.k, launch.v)):
        return "the last dimension of q, k or v is strided"
    if launch.n_k == 0:
        return "there are no keys"
    if query_tile(launch.index.size[0], 128) is None:
        return f"query units of {launch.index.size[0]} rows have no divisor of 16 rows or more"
    return None


def one_masked(launch: Launch, bn: int) -> bool:
    """Whether rows have one partly visible block at most, as aligned square units have: the loop
    over further ones need not exist.
    """
    (bq, bk), end = launch.index.size, launch.q_start + launch.n_q
    one = launch.q_pos is None and launch.k_pos is None and bk == bn
    if launch.causal:
        covered = launch.n_k % bk == 0 or launch.n_k >= end
        one = one and covered and bk % bq == 0 and launch.q_start % bq == 0
    return one


def precision(dtype: torch.dtype) -> str:
    """fp32 inputs keep fp32 products; half inputs have only one way."""
    return "ieee" if dtype == torch.float32 else "tf32"


def describable(t: Tensor) -> bool:
    """Whether the bulk copy engine can read a tensor: 16-byte base and strides, at most 2³¹ per
    dimension.
    """
    size = t.element_size()
    for step in t.stride()[:-1]:
        if step <= 0 or step * size % 16 or step * size >= 2**40:
            return False
    return t.data_ptr() % 16 == 0
