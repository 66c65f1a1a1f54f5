"""What kernels over work lists share: their item, its tiles of keys, the step of the softmax."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from accelkit.kernels._triton.lower import FIELDS
from accelkit.kernels._triton.tile import add_bias, hide, one_masked, table
from accelkit.kernels.launch import Launch


@triton.jit
def opened(
    ITEMS, n_q, capacity,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """What this program serves: batch, slot, first row, rows, which of them are its own, where its
    list begins, how many tiles of keys are masked and how many there are.
    """
    R: tl.constexpr = BK // BN
    pid = tl.program_id(0)
    item = ITEMS + (pid // PER_ROW).to(tl.int64) * FIELDS
    row, first, b, slot = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    m0 = first + (pid % PER_ROW) * BM
    rows = m0 + tl.arange(0, BM)
    keep = (rows < n_q) & (rows < first + BQ)
    n_masked = tl.load(item + 4) * R
    n = n_masked + tl.load(item + 5) * R
    return b, slot, m0, rows, keep, row.to(tl.int64) * capacity, n_masked, n


@triton.jit
def key0(LISTS, at, tile, BK: tl.constexpr, BN: tl.constexpr):
    """First key of the tile-th tile of a list; an entry has BK // BN tiles."""
    R: tl.constexpr = BK // BN
    return tl.load(LISTS + at + tile // R) * BK + (tile % R) * BN


@triton.jit
def masked(
    s, col, limit, n_k, BIAS, bias_at, bias_step, K_POS, pos_at, pos_step,
    HAS_BIAS: tl.constexpr, HAS_K_POS: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of a partly visible tile with their bias."""
    s = add_bias(s, col, BIAS, bias_at, bias_step, n_k, HAS_BIAS)
    return hide(s, col, limit, K_POS, pos_at, pos_step, n_k, HAS_K_POS)


@triton.jit
def weighed(s, m, total, FULL: tl.constexpr):
    """Probabilities of base-2 scores [BM, BN], whose maximum stands for 2^FULL; maximum, rescaling
    factor and sum of the rows after them.
    """
    m_new = tl.maximum(m, tl.max(s, 1))
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s - (m_new - FULL)[:, None])
    return p, m_new, alpha, total * alpha + tl.sum(p, 1)


def tables(launch: Launch, bn: int, dummy: Tensor) -> tuple[list[Any], list[int], dict[str, bool]]:
    """Position and bias tables of a launch: pointers, strides, and which there are."""
    bias = launch.bias if isinstance(launch.bias, torch.Tensor) else None
    found = [table(t, dummy) for t in (launch.q_pos, launch.k_pos, bias)]
    there = {
        "CAUSAL": launch.causal,
        "HAS_Q_POS": launch.q_pos is not None,
        "HAS_K_POS": launch.k_pos is not None,
        "HAS_BIAS": bias is not None,
        "EXTRA_MASKED": not one_masked(launch, bn),
    }
    return [t[0] for t in found], [s for t in found for s in t[1:]], there
