"""Block-sparse attention forward for Hopper, in warps of different trades.

A producer warp reads the lists and copies Q, K and V tiles into rings in shared memory; two
consumer warpgroups of 64 query rows each multiply them. A program stays on its multiprocessor and
walks over rows in a fixed order. The last product of a row runs together with the first scores of
the next, whose tiles are already there.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from accelkit.kernels._triton.gluon_parts import load, normalised
from accelkit.kernels._triton.gluon_scores import (
    bias_of,
    biases_at,
    entries_of,
    hide_half,
    hide_keys,
    softmax,
)
from accelkit.kernels._triton.gluon_scores import hide as _hide
from accelkit.kernels._triton.gluon_scores import limits as _limits
from accelkit.kernels._triton.gluon_tiles import entry, fetch, ring, tiles
from accelkit.kernels._triton.lower import FIELDS

_load = load
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_sync = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _item(ITEMS, place, n_items, BM: gl.constexpr, PER_ROW: gl.constexpr):
    """Row, first query, batch, slot, masked and clean blocks of an item; zeros behind the last."""
    there = place < n_items
    item = ITEMS + (place // PER_ROW).to(gl.int64) * FIELDS
    row, first = gl.load(item, there, 0), gl.load(item + 1, there, 0)
    b, slot = gl.load(item + 2, there, 0), gl.load(item + 3, there, 0)
    masked, clean = gl.load(item + 4, there, 0), gl.load(item + 5, there, 0)
    return row, first + (place % PER_ROW) * BM, b, slot, masked, clean


@gluon.jit
def _place(round):
    """This program's item of a round, which every warp works out for itself. Places go back and
    forth: who has the longest row of one round has the shortest of the next. Taking them from a
    counter in global memory lost rows where several processes took turns on the GPU.
    """
    width, mine = gl.num_programs(0), gl.program_id(0)
    return round * width + mine + (round & 1) * (width - 1 - 2 * mine)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _flat(tile, ROWS: gl.constexpr, D: gl.constexpr):
    return tile.reshape([ROWS, D])


@gluon.jit
def _first_blocks(at, entries, BK: gl.constexpr, BN: gl.constexpr):
    """Blocks of a row's first tile; what it lacks is read from its first block, and hidden."""
    block = gl.load(at, mask=entries > 0, other=0)
    other = block
    if BK < BN:
        other = gl.load(at + 1, mask=(entries > 0) & (entries % 2 == 0), other=0)
        other = gl.where(entries % 2 == 0, other, block)
    return block, other


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, n_items, capacity, q, k, v,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BM // 2
    PER_ROW: gl.constexpr = BQ // BM
    place, round = _place(0), 0
    row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, PER_ROW)
    block, other = _first_blocks(LISTS + row.to(gl.int64) * capacity, masked + clean, BK, BN)
    hq, hk = gl.load(Q_HEADS + slot), gl.load(KV_HEADS + slot)
    stage, phase = 0, 1
    while place < n_items:
        # What a row needs is asked for a row early.
        place = _place(round + 1)
        next_row, next_q_row, next_b, next_slot, next_masked, next_clean = _item(
            ITEMS, place, n_items, BM, PER_ROW
        )
        next_hq, next_hk = hq, hk
        next_block, next_other = block, other
        half = round % Q_STAGES
        at = LISTS + row.to(gl.int64) * capacity
        n, lacks = tiles(masked + clean, BK, BN)
        for j in range(n):
            k0, k1 = block * BK, other * BK
            if BK >= BN:
                k0 += (j % (BK // BN)) * BN
            then = at + entry(j + 1, lacks, BK, BN)
            block = gl.load(then, mask=j + 1 < n, other=0)
            if BK < BN:
                other = gl.load(then + 1, mask=j + 1 < n, other=0)
            mbarrier.wait(k_empty.index(stage), phase)
            fetch(k_desc, k_full.index(stage), k, stage, b, hk, k0, k1, BK, BN, BD)
            if j == 0:
                mbarrier.wait(q_empty.index(half), ((round // Q_STAGES) & 1) ^ 1)
                mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes * 2)
                _load(q_desc, [b, hq, q_row, 0], q_full.index(half), q.index(half * 2))
                _load(q_desc, [b, hq, q_row + ROWS, 0], q_full.index(half), q.index(half * 2 + 1))
            mbarrier.wait(v_empty.index(stage), phase)
            fetch(v_desc, v_full.index(stage), v, stage, b, hk, k0, k1, BK, BN, BDV)
            stage, phase = _next(stage, phase, STAGES)
            if j == 0:
                next_hq, next_hk = gl.load(Q_HEADS + next_slot), gl.load(KV_HEADS + next_slot)
                next_block, next_other = _first_blocks(
                    LISTS + next_row.to(gl.int64) * capacity, next_masked + next_clean, BK, BN
                )
        row, q_row, b, hq, hk = next_row, next_q_row, next_b, next_hq, next_hk
        masked, clean, block, other = next_masked, next_clean, next_block, next_other
        round += 1


@gluon.jit
def _tiles(masked, clean, BK: gl.constexpr, BN: gl.constexpr):
    """Masked tiles of a row, all of them, and how many entries the first lacks; an empty row reads
    one tile and hides all of it. Rows of single keys count masked keys, not blocks.
    """
    if BK == 1:
        lead, lacks = gl.cdiv(masked, BN), masked * 0
        n = gl.maximum(lead + clean, 1)
    else:
        lead = masked * (BK // BN)
        n, lacks = tiles(masked + clean, BK, BN)
    return gl.maximum(lead, 1), n, lacks


@gluon.jit
def _first_block(at, masked, clean, BK: gl.constexpr):
    """First block of a row's list, asked for early; rows of single keys need none."""
    block = masked * 0
    if BK > 1:
        block = gl.load(at, mask=masked + clean > 0, other=0)
    return block


@gluon.jit
def _copied(BK: gl.constexpr):
    """Keys that threads have copied one by one are made visible to the tensor cores."""
    if BK == 1:
        fence_async_shared()


@gluon.jit
def _products(
    q, k_tile, v_tile, p, acc, zero, k_full, k_empty, k_phase, k_there, v_full, v_empty, v_phase,
    my_turn, next_turn, turn, MODE: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """Scores of the next tile, and the product of the present probabilities with V.

    "turns": both are started, then both are awaited; the other warpgroup's softmax covers their
    time. "lag": the scores come first, and their softmax runs under the second product.
    """
    mbarrier.wait(k_full, k_phase, pred=k_there)
    _copied(BK)
    if MODE == "turns":
        mbarrier.wait(my_turn, turn)
    s = warpgroup_mma(
        q, _flat(k_tile, BN, D).permute((1, 0)), zero, use_acc=False, is_async=True
    )  # fmt: skip
    mbarrier.wait(v_full, v_phase)
    _copied(BK)
    if MODE == "turns":
        acc = warpgroup_mma(p, _flat(v_tile, BN, DV), acc, is_async=True)
        mbarrier.arrive(next_turn)
        s, acc, p = warpgroup_mma_wait(0, deps=[s, acc, p])
        mbarrier.arrive(k_empty, pred=k_there)
        mbarrier.arrive(v_empty)
    else:
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty, pred=k_there)
        acc = warpgroup_mma(p, _flat(v_tile, BN, DV), acc, is_async=True)
    return s, acc


@gluon.jit
def _finished(p, acc, v_empty, MODE: gl.constexpr):
    """The second product, done; until then it reads the registers of p."""
    if MODE == "lag":
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty)
    return acc


@gluon.jit
def _first_bias(
    BIAS, LISTS, masked, clean, n_k, BK: gl.constexpr, BN: gl.constexpr, sl: gl.constexpr,
    BIAS_BY: gl.constexpr,
):  # fmt: skip
    """What the scores of a row's first tile get besides."""
    lacks = _tiles(masked, clean, BK, BN)[2]
    return bias_of(BIAS, LISTS, 0, masked + clean, lacks, n_k, BK, BN, sl, BIAS_BY)


@gluon.jit
def _begin(
    s, bias, block, places, there, phase, more, limit, masked, clean, factor, BK: gl.constexpr,
    dtype: gl.constexpr, sl: gl.constexpr, pl: gl.constexpr, BIAS_BY: gl.constexpr,
):  # fmt: skip
    """Probabilities, maximum and sum of a row's first tile."""
    ROWS: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[1]
    row: gl.constexpr = gl.SliceLayout(1, sl)
    lacks = _tiles(masked, clean, BK, BN)[2]
    if BK == 1:
        if (masked > 0) | (clean == 0):
            s = hide_keys(s, places, there, phase, more, limit, sl)
    elif BK < BN:
        if (masked > 0) | (lacks > 0):
            s = hide_half(s, block * BK, limit, lacks, BK, BN, sl)
    elif (masked > 0) | (clean == 0):
        s = _hide(s, block * BK, limit, BN, sl)
    m = gl.full([ROWS], -1e30, gl.float32, row)  # finite: an empty row meets no inf − inf
    p, m, _, total = softmax(s, m, gl.zeros([ROWS], gl.float32, row), factor, bias, BK, BIAS_BY)
    return gl.convert_layout(p.to(dtype), pl), m, total


@gluon.jit
def _finish(
    o_desc, staged, LSE, s_lb, s_lh, s_ln, b, ho, q_row, rows, n_q, m, total, acc,
    ROWS: gl.constexpr, BDV: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Normalise and store a row; the copy to global memory may still read `staged` afterwards."""
    acc = normalised(acc, LSE, s_lb, s_lh, s_ln, b, ho, rows, n_q, m, total)
    tma.store_wait(0)
    _sync()
    _flat(staged, ROWS, BDV).store(acc.to(dtype))
    fence_async_shared()
    _sync()
    _store(o_desc, [b, ho, q_row, 0], staged)


@gluon.jit
def _consume(
    WHO: gl.constexpr, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, BIAS, s_lb, s_lh, s_ln, s_bb, s_bh,
    n_items, n_q, n_k, q_start, capacity, factor, q, k, v, places, o, q_full, q_empty, k_full,
    k_empty, v_full, v_empty, turns,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, MODE: gl.constexpr, BIAS_BY: gl.constexpr,
):  # fmt: skip
    PER_ROW: gl.constexpr = BQ // BM
    ROWS: gl.constexpr = BM // 2
    dtype: gl.constexpr = v.dtype
    sl: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BDV, 16])
    pl: gl.constexpr = gl.DotOperandLayout(0, ol, 2)
    o_row: gl.constexpr = gl.SliceLayout(1, ol)
    mine, other = turns.index(WHO), turns.index(1 - WHO)
    lane = WHO * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sl))
    zero = gl.zeros([ROWS, BN], gl.float32, sl)
    stage, phase, turn = 0, 0, 1 - WHO
    place, round = _place(0), 0
    row, q_row, b, slot, masked, clean = _item(ITEMS, place, n_items, BM, PER_ROW)
    at = LISTS + row.to(gl.int64) * capacity
    block = _first_block(at, masked, clean, BK)
    bias_at = BIAS + b.to(gl.int64) * s_bb + slot.to(gl.int64) * s_bh
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    _copied(BK)
    s = warpgroup_mma(
        _flat(q.index(WHO), ROWS, BD), _flat(k.index(0), BN, BD).permute((1, 0)), zero,
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0))
    limit = _limits(q_row + lane, masked + clean, n_k, q_start, CAUSAL)
    bias = _first_bias(bias_at, at, masked, clean, n_k, BK, BN, sl, BIAS_BY)
    p16, m, total = _begin(
        s, bias, block, places.index(0), v_full.index(0), 0, True, limit, masked, clean, factor,
        BK, dtype, sl, pl, BIAS_BY,
    )  # fmt: skip
    while place < n_items:
        place = _place(round + 1)
        more = place < n_items
        next_row, next_q_row, next_b, next_slot, next_masked, next_clean = _item(
            ITEMS, place, n_items, BM, PER_ROW
        )
        ho = gl.load(OUT_HEADS + slot)
        half = round % Q_STAGES
        lead, n, lacks = _tiles(masked, clean, BK, BN)
        acc = gl.zeros([ROWS, BDV], gl.float32, ol)
        own = _flat(q.index(half * 2 + WHO), ROWS, BD)
        first_clean = 1
        if EXTRA_MASKED:
            first_clean = lead
            limit = _limits(q_row + lane, masked + clean, n_k, q_start, CAUSAL)
            for j in range(1, first_clean):
                k0 = 0
                if BK > 1:
                    R: gl.constexpr = BK // BN
                    k0 = gl.load(at + j // R) * BK + (j % R) * BN
                k_stage, k_phase = _next(stage, phase, STAGES)
                s, acc = _products(
                    own, k.index(k_stage), v.index(stage), p16, acc, zero, k_full.index(k_stage),
                    k_empty.index(k_stage), k_phase, True, v_full.index(stage),
                    v_empty.index(stage), phase, mine, other, turn, MODE, BK, BN, BD, BDV,
                )  # fmt: skip
                if BK == 1:
                    s = hide_keys(
                        s, places.index(k_stage), v_full.index(k_stage), k_phase, True, limit, sl
                    )
                else:
                    s = _hide(s, k0, limit, BN, sl)
                bias = bias_of(bias_at, at, j, masked, lacks, n_k, BK, BN, sl, BIAS_BY)
                p, m, alpha, total = softmax(s, m, total, factor, bias, BK, BIAS_BY)
                acc = _finished(p16, acc, v_empty.index(stage), MODE)
                acc = acc * gl.convert_layout(alpha, o_row)[:, None]
                p16 = gl.convert_layout(p.to(dtype), pl)
                stage, phase, turn = k_stage, k_phase, turn ^ 1
        if BIAS_BY == "entry":
            one, two = entries_of(at, first_clean, masked + clean, lacks, first_clean < n, BK, BN)
            first, second = biases_at(bias_at, one, two)
            there = first_clean + 1 < n
            one, two = entries_of(at, first_clean + 1, masked + clean, lacks, there, BK, BN)
        for j in range(first_clean, n):
            k_stage, k_phase = _next(stage, phase, STAGES)
            if BIAS_BY == "entry":
                bias = first, second, 0.0
            else:
                bias = bias_of(bias_at, at, j, masked + clean, lacks, n_k, BK, BN, sl, BIAS_BY)
            s, acc = _products(
                own, k.index(k_stage), v.index(stage), p16, acc, zero, k_full.index(k_stage),
                k_empty.index(k_stage), k_phase, True, v_full.index(stage), v_empty.index(stage),
                phase, mine, other, turn, MODE, BK, BN, BD, BDV,
            )  # fmt: skip
            p, m, alpha, total = softmax(s, m, total, factor, bias, BK, BIAS_BY)
            if BIAS_BY == "entry":
                # Asked for a tile early, and where it lies two: nothing would cover the way from
                # a list to a number in front of a product. Here the second product does.
                first, second = biases_at(bias_at, one, two)
                one, two = entries_of(at, j + 2, masked + clean, lacks, j + 2 < n, BK, BN)
            acc = _finished(p16, acc, v_empty.index(stage), MODE)
            acc = acc * gl.convert_layout(alpha, o_row)[:, None]
            p16 = gl.convert_layout(p.to(dtype), pl)
            stage, phase, turn = k_stage, k_phase, turn ^ 1
        # The last product of this row goes with the first tile of the next.
        at = LISTS + next_row.to(gl.int64) * capacity
        block = _first_block(at, next_masked, next_clean, BK)
        bias_at = BIAS + next_b.to(gl.int64) * s_bb + next_slot.to(gl.int64) * s_bh
        if BIAS_BY == "entry":
            bias = _first_bias(bias_at, at, next_masked, next_clean, n_k, BK, BN, sl, BIAS_BY)
        limit = _limits(next_q_row + lane, next_masked + next_clean, n_k, q_start, CAUSAL)
        mbarrier.arrive(q_empty.index(half))
        next_half = (round + 1) % Q_STAGES
        mbarrier.wait(q_full.index(next_half), ((round + 1) // Q_STAGES) & 1, pred=more)
        k_stage, k_phase = _next(stage, phase, STAGES)
        s, acc = _products(
            _flat(q.index(next_half * 2 + WHO), ROWS, BD), k.index(k_stage), v.index(stage), p16,
            acc, zero, k_full.index(k_stage), k_empty.index(k_stage), k_phase, more,
            v_full.index(stage), v_empty.index(stage), phase, mine, other, turn, MODE, BK, BN, BD,
            BDV,
        )  # fmt: skip
        if BIAS_BY != "entry":  # registers for keys are there only now
            bias = _first_bias(bias_at, at, next_masked, next_clean, n_k, BK, BN, sl, BIAS_BY)
        next_p16, next_m, next_total = _begin(
            s, bias, block, places.index(k_stage), v_full.index(k_stage), k_phase, more, limit,
            next_masked, next_clean, factor, BK, dtype, sl, pl, BIAS_BY,
        )  # fmt: skip
        acc = _finished(p16, acc, v_empty.index(stage), MODE)
        stage, phase, turn = k_stage, k_phase, turn ^ 1
        _finish(
            o_desc, o.index(WHO), LSE, s_lb, s_lh, s_ln, b, ho, q_row + WHO * ROWS, q_row + lane,
            n_q, m, total, acc, ROWS, BDV, dtype,
        )  # fmt: skip
        p16, m, total = next_p16, next_m, next_total
        row, q_row, b, slot = next_row, next_q_row, next_b, next_slot
        masked, clean, round = next_masked, next_clean, round + 1
    tma.store_wait(0)


@gluon.jit
def _barriers(N: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit(do_not_specialize=["n_items", "n_q", "n_k", "q_start", "capacity"])
def block_sparse(
    q_desc, k_desc, v_desc, o_desc, LSE, ITEMS, LISTS, Q_HEADS, KV_HEADS, OUT_HEADS, BIAS,
    s_lb, s_lh, s_ln, s_bb, s_bh, n_items, n_q, n_k, q_start, capacity, factor,
    BQ: gl.constexpr, BK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr,
    BDV: gl.constexpr, CAUSAL: gl.constexpr, EXTRA_MASKED: gl.constexpr, BIAS_BY: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, MODE: gl.constexpr,
):  # fmt: skip
    """The kernel. Descriptors have boxes `[1, 1, rows, head size]`, ITEMS and LISTS are lowered
    work, strides count elements, `factor` is the scale in base 2. A bias is there for each "key",
    or the same for all keys of an "entry".
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2 * Q_STAGES, 1, 1, BM // 2, BD], q_desc.layout)
    k, k_parts = ring(k_desc, STAGES, BK, BN, BD)
    v, v_parts = ring(v_desc, STAGES, BK, BN, BDV)
    o = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, BM // 2, BDV], o_desc.layout)
    q_full, q_empty, turns = _barriers(Q_STAGES, 1), _barriers(Q_STAGES, 2), _barriers(2, 1)
    k_full, k_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                0, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, BIAS, s_lb, s_lh, s_ln, s_bb, s_bh,
                n_items, n_q, n_k, q_start, capacity, factor, q, k, v, v, o, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, turns, BQ, BK, BM, BN, BD, BDV, CAUSAL,
                EXTRA_MASKED, STAGES, Q_STAGES, MODE, BIAS_BY,
            )),
            (_consume, (
                1, o_desc, LSE, ITEMS, LISTS, OUT_HEADS, BIAS, s_lb, s_lh, s_ln, s_bb, s_bh,
                n_items, n_q, n_k, q_start, capacity, factor, q, k, v, v, o, q_full, q_empty,
                k_full, k_empty, v_full, v_empty, turns, BQ, BK, BM, BN, BD, BDV, CAUSAL,
                EXTRA_MASKED, STAGES, Q_STAGES, MODE, BIAS_BY,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, ITEMS, LISTS, Q_HEADS, KV_HEADS, n_items,
                capacity, q, k_parts, v_parts, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                BQ, BK, BM, BN, BD, BDV, STAGES, Q_STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
