"""Attention calls whose mass lies in known places, and what a method makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels import BlockIndex, pyramid
from accelkit.kernels.index import equal_groups
from accelkit.patches.call import AttentionCall, Clock, Geometry, Span
from accelkit.patches.method import AttentionMethod
from accelkit.patches.parts import visiting
from accelkit.patches.plan import Policy
from accelkit.patches.sites import attention

HEADS, KV_HEADS, WIDTH = 4, 2, 64
COLUMNS = (700, 1303, 1929)
"""Single keys that every row reads."""
RUN = (1024, 1152)
"""A whole block of keys that every row reads."""


def make_call(
    q: Tensor, k: Tensor, v: Tensor, *, q_start: int = 0, key_mask: Tensor | None = None
) -> AttentionCall:
    """A causal call over all heads of bare tensors."""
    heads = q.shape[1]
    kv = equal_groups(heads, k.shape[1])
    return AttentionCall(
        q, k, v, q.shape[-1] ** -0.5, True, q_start, key_mask, tuple(range(heads)), kv
    )


def noise(n: int, *, batch: int = 1, width: int = 32, seed: int = 0, n_q: int | None = None):
    """Plain Gaussian q, k, v: nothing to find."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, HEADS, n_q or n, width, generator=g)
    k, v = (torch.randn(batch, KV_HEADS, n, width, generator=g) for _ in range(2))
    return q, k, v


def planted(n: int, *, everywhere: bool = True, seed: int = 0) -> AttentionCall:
    """Sink, local decay and, unless `everywhere` is off, columns, a run of keys and topics.

    Logits in nats, before noise of deviation about ½: 4 sink keys 15 · own neighbourhood up to 15,
    falling with the distance as sums of waves do under rotary positions · 3 columns 15 · a run of
    128 keys 11 · topics (each quarter of the rows reads its own 128 keys) 10 · all else −5.
    """
    g = torch.Generator().manual_seed(seed)
    root = WIDTH**0.5
    q = 0.09 * root * torch.randn(1, HEADS, n, WIDTH, generator=g)
    k = 0.09 * root * torch.randn(1, KV_HEADS, n, WIDTH, generator=g)
    q[..., :8], k[..., :8] = 0.0, 0.0
    angle = torch.arange(n)[:, None] * torch.logspace(-3.3, -1.1, 24)
    wave = torch.cat([angle.cos(), angle.sin()], -1) * (20 * root / 24) ** 0.5
    q[..., 16:], k[..., 16:] = q[..., 16:] / 2 + wave, k[..., 16:] / 2 + wave
    q[..., 0], k[..., 0] = 4.0, -5 * root / 4  # the background

    def plant(at: int, rows: slice, keys: Any, nats: float) -> None:
        q[:, :, rows, at] = 4.0
        k[:, :, keys, at] = (nats + 5) * root / 4

    every = slice(None)
    plant(1, every, slice(0, 4), 15)
    if everywhere:
        plant(2, every, list(COLUMNS), 15)
        plant(3, every, slice(*RUN), 11)
        for topic in range(1, 4):
            at = topic * n // 4 - 128 * (topic + 1)
            plant(4 + topic, slice(topic * n // 4, (topic + 1) * n // 4), slice(at, at + 128), 10)
    v = torch.randn(1, KV_HEADS, n, WIDTH, generator=g)
    return make_call(q, k, v)


GRID, TEXT = (8, 16, 20), 45
"""Of the planted video: long enough for every default to run sparse, and a multiple of no block."""


def video_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int, int],
    text_first: bool = True,
    step: int = 10,
) -> AttentionCall:
    """A denoising call at some step of 50, visual tokens on a grid and the rest text."""
    n, visual = q.shape[2], math.prod(grid)
    start = n - visual if text_first else 0
    text = (0, start) if text_first else (visual, n)
    spans = (Span("text", *text), Span("video", start, start + visual))
    call = make_call(q, k, v)
    clock = Clock("denoise", step, 50)
    return replace(call, causal=False, clock=clock, geometry=Geometry(spans, grid))


def video(
    text_first: bool = True, grid: tuple[int, int, int] = GRID, seed: int = 0
) -> AttentionCall:
    """Four kinds of heads of a video transformer, as logits that fall with the distance on each
    axis of the grid (waves, as rotary positions make them), and text that all rows read a little.

    Head 0 looks around in its own frame, 1 at its place in all frames, 2 around in space and
    time, 3 along its row.
    """
    g = torch.Generator().manual_seed(seed)
    n, root = math.prod(grid) + TEXT, WIDTH**0.5
    q, k = (0.05 * root * torch.randn(1, 4, n, WIDTH, generator=g) for _ in range(2))
    places = torch.cartesian_prod(*(torch.arange(x) for x in grid))
    wave = torch.logspace(-1.3, 0.2, 9)
    nats = torch.tensor([(9.0, 9, 9), (0, 12, 12), (7, 9, 9), (7, 14, 2)])
    visual = slice(TEXT, n) if text_first else slice(0, n - TEXT)
    for axis in range(3):
        angle = places[:, axis, None] * wave
        both = torch.cat([angle.cos(), angle.sin()], -1)
        size = (nats[:, axis] * root / len(wave)).sqrt()[:, None, None]
        at = slice(18 * axis, 18 * axis + 18)
        q[0, :, visual, at] = k[0, :, visual, at] = both * size
    q[..., 60], k[..., 60] = root, 0.0
    text = slice(0, TEXT) if text_first else slice(n - TEXT, n)
    k[:, :, text, 60] = nats.sum(-1)[:, None] * 0.7
    v = torch.randn(1, 4, n, WIDTH, generator=g)
    return video_call(q, k, v, grid, text_first)


def later(method: AttentionMethod, call: AttentionCall) -> AttentionCall:
    """The same call one step after `method` has seen it: methods with a memory search or measure
    in their first step.
    """
    call = replace(call, memory={}, _shared={})
    found = ask(method, call)
    if found is not None:
        attention.compute(found)
    return replace(call, clock=replace(call.clock, step=call.clock.step + 1), _shared={})


@dataclass(frozen=True)
class Selected:
    """What a method selects, pair by pair, in token order.

    `pairs` counts how often each (row, key) is listed, int32 `[B, H, Nq, Nk]`; `visible` is bool
    and broadcasts to it. `pieces` are as the method gave them, `call` is in kernel order.
    """

    pairs: Tensor
    visible: Tensor
    pieces: tuple[BlockIndex, ...]
    call: AttentionCall

    @property
    def seen(self) -> Tensor:
        """Pairs that attention really reads."""
        return (self.pairs > 0) & self.visible

    @property
    def density(self) -> float:
        return float(self.seen.sum() / self.visible.expand_as(self.pairs).sum())


def visible_pairs(call: AttentionCall) -> Tensor:
    """Not in the future of a causal call and not padding, bool `[B, 1, Nq, Nk]`."""
    row = torch.arange(call.n_q)[:, None] + call.q_start
    seen = (torch.arange(call.n_k) <= row)[None, None]
    seen = seen if call.causal else torch.ones_like(seen)
    return seen if call.key_mask is None else seen & call.key_mask[:, None, None]


def ask(method: AttentionMethod, call: AttentionCall) -> attention.Answer | None:
    """The house's answer for one method alone."""
    found = attention.answer(call, Policy(methods=(method,)))
    return found[0] if found else None


def select(method: AttentionMethod, call: AttentionCall, rows: slice = slice(None)) -> Selected:
    """Expand a method's lists to pairs of `rows`, without what its softmax skip drops. Whatever
    stands behind a mean key counts as read.
    """
    found = ask(method, call)
    assert found is not None, f"{type(method).__name__} stayed dense"
    ids = torch.arange(call.n_q)[rows]
    shape = (call.q.shape[0], len(call.heads), len(ids), call.n_k)
    pairs = torch.zeros(shape, dtype=torch.int32)
    pieces = tuple(p for p in found.pieces if isinstance(p, BlockIndex))
    for piece in pieces:
        skip = found.execution.skip
        kept = piece if skip is None else without_skipped(piece, found.call, skip)
        pairs += expand(kept, found, ids, call.n_k)
    return Selected(pairs, visible_pairs(call)[:, :, rows], pieces, found.call)


def without_skipped(piece: BlockIndex, call: AttentionCall, skip: float | Tensor) -> BlockIndex:
    """The visits that survive the skip rule, which `test_blasst` holds against the reference."""
    gaps = visiting.peak_gaps(call, piece, range(piece.rows))
    least = torch.as_tensor(skip, dtype=torch.float32).log().view(1, -1, 1, 1)
    wide = (gaps.shape[0], gaps.shape[1], -1)
    start, count = piece.start.expand(wide), piece.count.expand(wide)
    mask = torch.zeros((*start.shape, -(-call.n_k // piece.size[1])), dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in start.shape)).tolist():
        b, h, i = at
        ids = piece.blocks[start[b, h, i] : start[b, h, i] + count[b, h, i]].long()
        mask[b, h, i, ids] = (gaps >= least)[b, h, i, : len(ids)]
    return BlockIndex.from_mask(mask, piece.size)


def expand(piece: BlockIndex, found: attention.Answer, rows: Tensor, n_k: int) -> Tensor:
    """How often a piece lists each key for some rows, int32 `[B, H, rows, Nk]`, in token order."""
    (bq, bk), call = piece.size, found.call
    nk = -(-call.n_k // bk)
    batch, heads = call.q.shape[0], len(call.heads)
    place = token_ids(found, "q", batch, heads, rows.max() + 1).argsort(-1)
    holes = (token_ids(found, "q", batch, heads, rows.max() + 1) < 0).sum(-1)
    out = torch.zeros(batch, heads, len(rows), n_k + 1, dtype=torch.int32)
    ids = token_ids(found, "k", batch, heads, call.n_k)
    ids = torch.where(ids < 0, n_k, ids)
    for b in range(batch):
        counts = listed(piece, call, b, nk)
        for h in range(heads):
            at = place[b, h][holes[b, h] + rows]  # rows of the kernel
            keys = counts[h, at // bq]
            if not piece.pyramid:
                keys = keys.repeat_interleave(bk, -1)
            keys = keys[:, : call.n_k]
            out[b, h].scatter_add_(-1, ids[b, h].expand_as(keys), keys)
    return out[..., :n_k]


def token_ids(found: attention.Answer, side: str, batch: int, heads: int, n: int) -> Tensor:
    """Token at each place of the kernel, int64 `[B, H, n]`, −1 for holes."""
    table = None if found.order is None else getattr(found.order, f"{side}_table")
    if table is None:
        return torch.arange(n).expand(batch, heads, -1)
    row = found.order.row.long() if table.shape[0] > 1 else torch.zeros(heads, dtype=torch.long)
    return table[row].long().expand(batch, -1, -1)


def listed(piece: BlockIndex, call: AttentionCall, b: int, nk: int) -> Tensor:
    """How often each key block is listed, int32 `[H, nq, nk]`; in a pyramid, each key."""
    if piece.pyramid:
        return covered(piece, call, b)
    b = b if piece.count.shape[0] > 1 else 0
    heads, nq = piece.count.shape[1:]
    out = torch.zeros((heads, nq, nk), dtype=torch.int32)
    for h in range(heads):
        for i in range(nq):
            start, count = int(piece.start[b, h, i]), int(piece.count[b, h, i])
            if count < 0:
                out[h, i] = 1
                continue
            ids = piece.blocks[start : start + count].long()
            inside = ids[(ids >= 0) & (ids < nk)]
            out[h, i].index_add_(0, inside, torch.ones_like(inside, dtype=torch.int32))
    return out


def covered(piece: BlockIndex, call: AttentionCall, b: int) -> Tensor:
    """How often each key is listed, itself or behind a mean, int32 `[H, nq, Nk]`."""
    heads, nq = piece.count.shape[1:]
    firsts = pyramid.firsts(call.n_k, piece.size[1])
    out = torch.zeros((heads, nq, call.n_k), dtype=torch.int32)
    for h in range(heads):
        for i in range(nq):
            start, count = int(piece.start[b, h, i]), int(piece.count[b, h, i])
            for e in range(start, start + count):
                entry = int(piece.blocks[e])
                level = next(i for i, f in enumerate(firsts) if f <= entry)
                span = piece.size[1] << level
                first = (entry - firsts[level]) * span
                out[h, i, first : first + span] += 1
    return out


def probabilities(call: AttentionCall, rows: slice = slice(None)) -> Tensor:
    """Dense attention of some rows, fp32 `[B, H, rows, Nk]`; rows that see nothing are zero."""
    q, k = call.q[:, list(call.heads)][:, :, rows].float(), call.k[:, call.kv_of_head].float()
    s = (q @ k.transpose(-1, -2)) * call.scale
    s = s.masked_fill(~visible_pairs(call)[:, :, rows], -math.inf)
    return s.softmax(-1).nan_to_num(0.0)


def dense(call: AttentionCall) -> Tensor:
    """Dense attention's output `[B, H, Nq, Dv]`."""
    return probabilities(call) @ call.v[:, call.kv_of_head].float()


def recall(selected: Selected, p: Tensor) -> float:
    """Attention mass that the selection covers, mean over heads and rows."""
    return float((p * selected.seen).sum() / p.sum())
