"""Block-sparse attention forward in 8 bits: int8 or fp8 QK, fp8 or native PV.

The loop of `block_sparse` over the same work lists: probabilities of the previous tile are carried
as integers while the next scores are computed. Scales cost nothing inside: each query row has its
own, each tile of keys one, and both fold into the factor of the softmax; V has one per channel,
applied once at the end. P is scaled by 2⁸ inside the exponent, which fills fp8's range; its product
with V starts from fresh accumulators in every tile and is added in fp32, because the 8-bit tensor
cores add with few bits.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from accelkit.kernels._triton.listed import key0, masked, opened, tables, weighed
from accelkit.kernels._triton.lower import Work, lower
from accelkit.kernels._triton.tile import (
    LN2,
    LOG2E,
    Tile,
    add_bias,
    common_refusal,
    describable,
    finish,
    query_tile,
    row_limits,
)
from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import Operands, block_of, quantize, rounding_of


@triton.jit
def _carry(p, PV8: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Probabilities as integers, columns in the order in which fp8 products read them."""
    if PV8:
        # A thread holds columns 2t, 2t + 1 of each 8; the 8-bit product wants 4t … 4t + 3 of each
        # 16. V is stored in this order, so nothing moves between threads.
        p = p.reshape(BM, BN // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BM, BN)
        bits = _pack(_pack(p.to(tl.float8e4nv).to(tl.uint8, bitcast=True), tl.uint16), tl.uint32)
    else:
        bits = p.to(DTYPE).to(tl.int16, bitcast=True)
    return bits


@triton.jit
def _pack(x, wider: tl.constexpr):
    """Neighbours of the last dimension as one integer of twice the width."""
    low, high = x.reshape(x.shape[0], x.shape[1] // 2, 2).split()
    return (high.to(wider) << (wider.primitive_bitwidth // 2)) | low.to(wider)


@triton.jit
def _unpack(x, narrow: tl.constexpr):
    high = (x >> narrow.primitive_bitwidth).to(narrow)
    return tl.join(x.to(narrow), high).reshape(x.shape[0], x.shape[1] * 2)


@triton.jit
def _fp8(carried):
    return _unpack(_unpack(carried, tl.uint16), tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _add_product(acc, alpha, carried, v, PV8: tl.constexpr, DTYPE: tl.constexpr):
    """acc · α + P · V. Both forms use the product within the iteration that starts it: Triton would
    leave it under way otherwise, while the registers that hold P are written anew.
    """
    if PV8:
        acc = acc * alpha[:, None] + tl.dot(_fp8(carried), v.T, out_dtype=tl.float32)
    else:
        acc = tl.dot(carried.to(DTYPE, bitcast=True), v, acc, out_dtype=tl.float32)
    return acc


@triton.jit
def _values(V, b, h, n0, BN: tl.constexpr, D: tl.constexpr, PV8: tl.constexpr):
    if PV8:
        v = V.load([b, h, 0, n0]).reshape(D, BN)
    else:
        v = V.load([b, h, n0, 0]).reshape(BN, D)
    return v


_SIZES = ["n_heads", "n_kv", "n_q", "n_k", "n_kb", "q_start", "capacity"]


@triton.jit(do_not_specialize=_SIZES)
def _eight_bit(
    Q, K, V, OUT, LSE, Q_SCALE, K_SCALE, V_SCALE, V_MEAN, SHIFT, LISTS, ITEMS,
    KV_HEADS, OUT_HEADS, Q_POS, K_POS, BIAS,
    s_ob, s_oh, s_on, s_lb, s_lh, s_ln, s_qpb, s_qph, s_qpn, s_kpb, s_kph, s_kpn, s_bb, s_bh, s_bn,
    n_heads, n_kv, n_q, n_k, n_kb, q_start, capacity, factor,
    BQ: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PER_ROW: tl.constexpr,
    D: tl.constexpr, DTYPE: tl.constexpr, PV8: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_Q_POS: tl.constexpr, HAS_K_POS: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXTRA_MASKED: tl.constexpr, SMOOTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, slot, m0, rows, keep, at, n_masked, n = opened(ITEMS, n_q, capacity, BQ, BK, BM, BN, PER_ROW)
    hk, ho = tl.load(KV_HEADS + slot), tl.load(OUT_HEADS + slot)
    b64, h64 = b.to(tl.int64), slot.to(tl.int64)
    limit = row_limits(
        Q_POS, b64 * s_qpb + h64 * s_qph, s_qpn, rows, n_q, q_start, CAUSAL, HAS_Q_POS
    )
    kp_at, bias_at = b64 * s_kpb + h64 * s_kph, b64 * s_bb + h64 * s_bh
    R: tl.constexpr = BK // BN
    cols = tl.arange(0, BN)
    limit = tl.where(n > 0, limit, -1)
    FULL: tl.constexpr = 8.0 if PV8 else 0.0

    q = Q.load([b, slot, m0, 0]).reshape(BM, D)
    q_at = (b64 * n_heads + h64) * n_q + rows
    by_row = tl.load(Q_SCALE + q_at, mask=rows < n_q, other=0.0) * factor
    scales = K_SCALE + (b64 * n_kv + hk) * n_kb
    m = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)

    lead = tl.maximum(n_masked - 1, 0)
    if EXTRA_MASKED:
        for j in tl.range(0, lead, num_stages=1):
            k0 = key0(LISTS, at, j, BK, BN)
            k = K.load([b, hk, k0, 0]).reshape(BN, D)
            c = by_row * tl.load(scales + k0 // BN)
            s = tl.dot(q, k.T).to(tl.float32) * c[:, None]
            s = masked(s, k0 + cols, limit, n_k, BIAS, bias_at, s_bn, K_POS, kp_at, s_kpn,
                       HAS_BIAS, HAS_K_POS)  # fmt: skip
            p, m, alpha, total = weighed(s, m, total, FULL)
            v = _values(V, b, hk, k0, BN, D, PV8)
            if not PV8:
                acc = acc * alpha[:, None]
            acc = _add_product(acc, alpha, _carry(p, PV8, DTYPE, BM, BN), v, PV8, DTYPE)
    v0 = tl.load(LISTS + at + lead // R, mask=n > 0, other=0) * BK + (lead % R) * BN
    k = K.load([b, hk, v0, 0]).reshape(BN, D)
    c = by_row * tl.load(scales + v0 // BN)
    s = tl.dot(q, k.T).to(tl.float32) * c[:, None]
    s = masked(s, v0 + cols, limit, n_k, BIAS, bias_at, s_bn, K_POS, kp_at, s_kpn,
               HAS_BIAS, HAS_K_POS)  # fmt: skip
    p, m, alpha, total = weighed(s, m, total, FULL)
    if not PV8:
        acc = acc * alpha[:, None]
    carried = _carry(p, PV8, DTYPE, BM, BN)
    for j in tl.range(lead + 1, n, num_stages=STAGES):
        k0 = key0(LISTS, at, j, BK, BN)
        c = by_row * tl.load(scales + k0 // BN)
        k = K.load([b, hk, k0, 0]).reshape(BN, D)
        v = _values(V, b, hk, v0, BN, D, PV8)
        s = tl.dot(q, k.T).to(tl.float32)
        acc = _add_product(acc, alpha, carried, v, PV8, DTYPE)
        if HAS_BIAS:
            s = add_bias(s * c[:, None], k0 + cols, BIAS, bias_at, s_bn, n_k, HAS_BIAS)
            p, m, alpha, total = weighed(s, m, total, FULL)
        else:
            m_new = tl.maximum(m, tl.max(s, 1) * c)
            p = tl.exp2(s * c[:, None] - (m_new - FULL)[:, None])
            alpha = tl.exp2(m - m_new)
            total = total * alpha + tl.sum(p, 1)
            m = m_new
        if not PV8:
            acc = acc * alpha[:, None]
        carried = _carry(p, PV8, DTYPE, BM, BN)
        v0 = k0
    v = _values(V, b, hk, v0, BN, D, PV8)
    acc = _add_product(acc, alpha, carried, v, PV8, DTYPE)

    if PV8:
        channel = (b64 * n_kv + hk) * D + tl.arange(0, D)
        acc = acc * tl.load(V_SCALE + channel)[None, :]
        acc += total[:, None] * tl.load(V_MEAN + channel)[None, :]
    m -= FULL
    if SMOOTH:
        m += tl.load(SHIFT + q_at, mask=rows < n_q, other=0.0) / LN2
    out_at, lse_at = b64 * s_ob + ho.to(tl.int64) * s_oh, b64 * s_lb + ho.to(tl.int64) * s_lh
    finish(OUT, LSE, out_at, lse_at, s_on, s_ln, rows, keep, m, total, acc, D, D)


_TILES = {  # head size → bm, warps, stages; keys of a tile follow from the unit
    64: (64, 4, 2),
    128: (128, 8, 3),
}


def choose_tile(size: tuple[int, int], head_size: int) -> Tile | None:
    """Tile for units `size`, or None where the unit does not fit one."""
    bm, warps, stages = _TILES[head_size]
    rows = query_tile(size[0], bm)
    if rows is None or rows[0] < 64 or block_of(size[1]) < 32:
        return None
    return Tile(rows[0], block_of(size[1]), rows[1], warps if rows[0] == bm else 4, stages)


def refusal(launch: Launch) -> str | None:
    """Why this kernel cannot serve a launch, or None."""
    reason = common_refusal(launch)
    if reason:
        return reason
    d, dv = launch.q.shape[3], launch.v.shape[3]
    if d != dv or d not in _TILES:
        return f"8-bit kernels have head sizes 64 and 128, and this call {d} (values {dv})"
    if launch.q.dtype == torch.float32:
        return "8-bit kernels take fp16 and bf16"
    if choose_tile(launch.index.size, d) is None:
        return f"units of {launch.index.size} tokens do not divide into tiles of 64 × 32 or more"
    return None


def eight_bit(launch: Launch) -> None:
    """Quantise, then write `launch.out` and `launch.lse`."""
    with torch.cuda.device_of(launch.q):
        start(launch, operands(launch), lower(launch))


def operands(launch: Launch) -> Operands:
    """The launch's inputs in 8 bits; a native V as the copy engine can read it."""
    v = launch.v if launch.pv != "native" or describable(launch.v) else launch.v.contiguous()
    return quantize(launch.q, launch.k, v, rounding_of(launch))


def start(launch: Launch, ops: Operands, work: Work) -> None:
    """Start the kernel that serves the launch best, over operands and lowered work."""
    if _warps_of_trades(launch) is None:
        from accelkit.kernels._triton import gluon_eight_bit

        gluon_eight_bit.run(launch, ops, work)
    else:
        run(launch, ops, work, choose_tile(launch.index.size, launch.q.shape[3]))


def _warps_of_trades(launch: Launch) -> str | None:
    """Why the warp-specialised form cannot serve a launch, or None."""
    if not launch.q.is_cuda or torch.cuda.get_device_capability(launch.q.device) != (9, 0):
        return "it is written for Hopper"
    if launch.q_pos is not None or launch.k_pos is not None:
        return "positions are permuted"
    if isinstance(launch.bias, torch.Tensor):
        return "keys have a bias"
    if launch.q.shape[3] != 128:
        return "heads of 64 run faster as three programs on a multiprocessor"
    if launch.index.size[0] % 128 or block_of(launch.index.size[1]) < 64:
        return f"units of {launch.index.size} tokens do not divide into 128 × 64"
    return None if find_spec("triton.experimental.gluon") else "this triton has no gluon"


def describe(t: torch.Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """What the copy engine needs to know to read tiles `box` of the last two dimensions."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, *box])


def run(launch: Launch, ops: Operands, work: Work, tile: Tile) -> None:
    """Start the kernel over lowered work with a given tile."""
    (bq, bk), d, pv8 = launch.index.size, launch.q.shape[3], ops.v_scale is not None
    boxes = ((tile.bm, d), (tile.bn, d), (d, tile.bn) if pv8 else (tile.bn, d))
    tensors = (describe(t, box) for t, box in zip((ops.q, ops.k, ops.v), boxes, strict=True))
    some = ops.q_scale
    pointers, steps, there = tables(launch, tile.bn, work.items)
    _eight_bit[(work.items.shape[0] * tile.per_row,)](
        *tensors, launch.out, launch.lse, ops.q_scale, ops.k_scale,
        *(some if t is None else t for t in (ops.v_scale, ops.v_mean, ops.shift)),
        work.lists, work.items, launch.kv_heads, launch.out_heads, *pointers,
        *launch.out.stride()[:3], *launch.lse.stride(), *steps,
        launch.heads, ops.k.shape[1], launch.n_q, launch.n_k,
        ops.k_scale.shape[2], launch.q_start, work.capacity, launch.scale * LOG2E,
        BQ=bq, BK=bk, BM=tile.bm, BN=tile.bn, PER_ROW=tile.per_row, D=d,
        DTYPE=getattr(tl, str(launch.v.dtype).removeprefix("torch.")), PV8=pv8, **there,
        SMOOTH=ops.shift is not None, STAGES=tile.stages, num_warps=tile.warps,
        num_stages=tile.stages, enable_fp_fusion=True,
    )  # fmt: skip
