"""Selectors: block scores → bool masks, and masks → `BlockIndex`.

Scores are fp32 `[B, H, nq, nk]` with −inf for invisible blocks, so visibility comes before every
selection. Thresholds are numbers or one value per head, `[H]`. Ties go to the lower block id. A
selected mask passes through `force`, which adds what must be kept and leaves no visible row empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from accelkit.errors import InvalidInputError
from accelkit.kernels import dispatch
from accelkit.kernels.index import BlockIndex, Inputs
from accelkit.kernels.positions import (
    bare_inputs,
    bounds,
    in_place,
    key_places,
    row_limits,
    row_places,
    visible_blocks,
)
from accelkit.kernels.select_lines import (
    Runs,
    compact,
    compact_levels,
    compact_runs,
    lines,
    vertical_slash,
)
from accelkit.kernels.select_stats import density, pair_counts, recall

__all__ = [
    "Runs",
    "compact",
    "compact_levels",
    "compact_runs",
    "density",
    "force",
    "global_prefix",
    "global_top_p",
    "levels",
    "lines",
    "nucleus",
    "pair_counts",
    "probabilities",
    "pyramid",
    "ratio_of_max",
    "recall",
    "routed",
    "threshold",
    "top_k",
    "top_p",
    "vertical_slash",
    "visible_blocks",
]


LONGEST_ROW = 8192
"""Entries of a row that one program of a kernel holds."""
SORTED = 1 << 16
"""Entries up to which one sort costs a GPU less than many passes."""


def probabilities(scores: Tensor) -> Tensor:
    """Softmax of each row, fp32 `[B, H, nq, nk]`; invisible blocks stay −inf, rows without a
    visible block too.
    """
    return scores.softmax(-1).masked_fill_(scores == -float("inf"), -float("inf"))


def _per_head(value: float | Tensor, scores: Tensor) -> float | Tensor:
    """A number as it is, `[H]` so that it broadcasts against `[B, H, nq, nk]`."""
    if isinstance(value, Tensor):
        return value.to(scores.device).view(1, -1, 1, 1)
    return value


def top_k(scores: Tensor, k: int | float | Tensor) -> Tensor:
    """The k best visible blocks of each row, bool `[B, H, nq, nk]`.

    An integer (or integer tensor `[H]`) is a count; a float in 0 … 1 (or float tensor) a fraction
    of the row's visible blocks, rounded up, at least one; `InvalidInputError` for any other.
    """
    if isinstance(k, float) and not 0 <= k <= 1:
        raise InvalidInputError(f"top_k: fraction {k} is outside 0 … 1; pass an int for a count")
    number = _per_head(k, scores)
    seen = (scores != -float("inf")).sum(-1, keepdim=True)
    if (isinstance(number, Tensor) and number.is_floating_point()) or isinstance(number, float):
        # 0.3 · 10 is a little above 3 in fp32; a block more than asked for would be wrong.
        number = torch.ceil(number * seen - 1e-4).clamp_(min=1)
    return _prefix(scores, seen.clamp(max=number).float(), by_mass=False)


def top_p(probs: Tensor, p: float | Tensor) -> Tensor:
    """The shortest prefix of each row's descending order whose sum reaches `p` of the row's total;
    the block that crosses is kept. Bool `[B, H, nq, nk]`.

    `probs` are non-negative, −inf where invisible; rows need not sum to one. `p ≥ 1` keeps every
    visible block, however small.
    """
    share = _per_head(p, probs)
    total = probs.clamp(min=0).sum(-1, keepdim=True, dtype=torch.float32)
    return _or_all(probs, share, _prefix(probs, share * total, by_mass=True))


def _or_all(probs: Tensor, share: float | Tensor, mask: Tensor) -> Tensor:
    """`mask`, and every visible block where the share is 1 or more."""
    if isinstance(share, Tensor):
        return torch.where(share >= 1, probs != -float("inf"), mask)
    return probs != -float("inf") if share >= 1 else mask


def _prefix(scores: Tensor, target: Tensor, by_mass: bool) -> Tensor:
    """Greatest visible entries of each row until their number or their sum reaches `target`
    `[B, H, nq, 1]`.
    """
    shape = (*scores.shape[:-1], 1)
    if dispatch.fast_device(scores) and scores.shape[-1] <= LONGEST_ROW:
        from accelkit.kernels._triton import select as fast

        return fast.prefix(scores, target.expand(shape), by_mass)
    order = scores.sort(dim=-1, descending=True, stable=True)
    if by_mass:
        mass = order.values.clamp(min=0)
        keep = mass.cumsum(-1) - mass < target
    else:
        keep = torch.arange(scores.shape[-1], device=scores.device) < target
    keep = keep & (order.values != -float("inf"))
    return torch.zeros_like(keep).scatter_(-1, order.indices, keep)


def global_top_p(probs: Tensor, p: float | Tensor) -> Tensor:
    """FlexPrefill's query-aware selection (2502.20766): one prefix over all rows of a head, so rows
    compete, until the sum reaches `p` of the head's total (`p · nq` for rows that sum to one). The
    block that crosses is kept. Bool `[B, H, nq, nk]`.
    """
    share = _per_head(p, probs)
    total = probs.clamp(min=0).sum((-2, -1), keepdim=True, dtype=torch.float32)
    mask = global_prefix(probs, share * total)
    return _or_all(probs, share, mask)


def global_prefix(scores: Tensor, mass: Tensor) -> Tensor:
    """The greatest entries of all rows of a head together until their sum reaches `mass`
    `[B|1, H|1, 1, 1]`, the entry that crosses included. Scores are non-negative, −inf is never
    taken. Bool `[B, H, nq, nk]`.
    """
    flat, mass = scores.flatten(2)[:, :, None], mass.expand(*scores.shape[:2], 1, 1)
    if dispatch.fast_device(flat) and flat.numel() > SORTED:
        from accelkit.kernels._triton import select as fast

        return fast.long_prefix(flat, mass).view_as(scores)
    order = flat.sort(dim=-1, descending=True, stable=True)
    value = order.values.clamp(min=0)
    # A million small terms: the running sum is kept in fp64.
    keep = value.cumsum(-1, dtype=torch.float64) - value < mass
    keep &= order.values != -float("inf")
    return torch.zeros_like(keep).scatter_(-1, order.indices, keep).view_as(scores)


def routed(gate: Tensor, own: Tensor, coverage: float) -> Tensor:
    """VMoBA's budget of a head (2506.23858): gates `[B, H, nq, n]` are scaled to 0 … 1 over a head,
    and its greatest ones are chosen until they hold `coverage` of their sum together with those of
    `own` (bool `[nq, n]`). Bool `[B, H, nq, n]` without the own ones.
    """
    if dispatch.fast_device(gate) and gate[0, 0].numel() > SORTED:
        from accelkit.kernels._triton import runs as fast

        return fast.routed(gate, own, coverage)
    low, high = gate.amin((-2, -1), keepdim=True), gate.amax((-2, -1), keepdim=True)
    gate = (gate - low) / (high - low).clamp(min=1e-6)
    need = coverage * gate.sum((-2, -1), keepdim=True)
    need = need - (gate * own).sum((-2, -1), keepdim=True)
    return global_prefix(gate.masked_fill(own, -float("inf")), need)


def nucleus(
    logits: Tensor,
    share: float | Tensor,
    keys: Tensor | None,
    rows: Tensor | None,
    kept: Tensor,
    size: tuple[int, int],
) -> BlockIndex:
    """Lists of the shortest prefix of each row whose softmax holds `share` of it (`top_p` of
    `probabilities`), with what is kept anyhow: key blocks `keys` `[B, H, nk]`, which stay out of
    the softmax, whole rows `rows` `[B, H, nq]` (None: none), and `kept` `[B|1, H|1, nq, nk]`. All
    bool; blocks with a logit of −inf are never listed. On a GPU all of it is one launch.
    """
    if keys is None:
        keys = logits.new_zeros((*logits.shape[:2], logits.shape[3]), dtype=torch.bool)
    if rows is None:
        rows = logits.new_zeros(logits.shape[:3], dtype=torch.bool)
    if dispatch.fast_device(logits) and logits.shape[-1] <= LONGEST_ROW:
        from accelkit.kernels._triton import nucleus as fast

        most = share if isinstance(share, Tensor) else _number(share, logits.device)
        return fast.nucleus(logits, most.float(), keys, rows, kept, size)
    judged = probabilities(logits.masked_fill(keys[..., None, :], -float("inf")))
    mask = top_p(judged, share) | keys[..., None, :] | rows[..., :, None] | kept
    return compact(mask & (logits != -float("inf")), size)


@lru_cache(maxsize=64)
def _number(value: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([value], device=device)


def levels(scores: Tensor, ends: Sequence[float], *, by_energy: bool, least: float = 0.0) -> Tensor:
    """A level for each block from nested selections: the first of `ends` bounds level 0, the next
    level 1 …; what is beyond the last gets −1. Int8 `[B, H, nq, nk]`.

    Ends are shares of the row's visible blocks by rank, or of its total score; then level 0 has at
    least the share `least` of the blocks.
    """
    chosen = [top_p(scores, e) if by_energy else top_k(scores, float(e)) for e in ends]
    if least:
        chosen[0] = chosen[0] | top_k(scores, float(least))
        chosen = [m | chosen[0] for m in chosen]
    inside = torch.stack(chosen).sum(0)
    return torch.where(inside > 0, len(chosen) - inside, -1).to(torch.int8)


def pyramid(
    scores: Tensor,
    ends: Sequence[float],
    kept: Tensor,
    tokens: int,
    size: tuple[int, int],
    unit: int,
    *,
    by_energy: bool = False,
    least: float = 0.0,
) -> BlockIndex:
    """Lists over a pyramid of `tokens` keys: `compact_levels` of `levels`, where the blocks of
    `kept` (bool `[B|1, H|1, nq, nk]`) are read key by key. On a GPU all of it is one launch.
    """
    if dispatch.fast_device(scores) and scores.shape[-1] <= LONGEST_ROW // 4:
        from accelkit.kernels._triton import pyramid as fast

        return fast.listed(scores, ends, kept, tokens, size, unit, by_energy, least)
    level = levels(scores, ends, by_energy=by_energy, least=least).masked_fill_(kept, 0)
    return compact_levels(level, tokens, size, unit)


def ratio_of_max(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """Blocks with at least `alpha` (a number or `[H]`) of their row's greatest score, bool
    `[B, H, nq, nk]` (FlashPrefill). One pass, no sort. Scores are non-negative, −inf where
    invisible.
    """
    top = scores.amax(-1, keepdim=True)
    return (scores >= _per_head(alpha, scores) * top) & (scores != -float("inf"))


def threshold(scores: Tensor, value: float | Tensor) -> Tensor:
    """Visible blocks whose score is at least `value` (a number or `[H]`), bool `[B, H, nq, nk]`."""
    return (scores >= _per_head(value, scores)) & (scores != -float("inf"))


def force(
    mask: Tensor,
    call: Inputs,
    size: tuple[int, int],
    *,
    sink: int = 1,
    local: int = 1,
    last: int = 0,
) -> Tensor:
    """A selection with what must be kept, without what nobody sees; bool `[B, H, nq, nk]`.

    `sink` blocks from the first real token on (key blocks), `local` blocks up to and including the
    tile's own (both sides where the call is not causal), and the `last` query tiles wholly. Then
    every row that sees anything has a block it sees: where the tile's first such row would be left
    empty, the nearest block that it sees is added.
    """
    seen = visible_blocks(call, size)
    if in_place(call):
        kept = _kept_in_place(
            call.n_q, call.n_k, call.q_start, call.causal, call.q.device, size, sink, local, last
        )
    else:
        kept = _kept(call, size, sink, local, last)
    keep = (mask | kept) & seen
    own = local > 0 and call.q_start + call.n_q <= call.n_k
    if in_place(call) and (own or (sink > 0 and not call.causal)):
        return keep  # every row has a block that it sees
    first, _ = bounds(key_places(call), size[1])
    limit_low, _ = bounds(row_limits(call), size[0])
    limit_low, first = limit_low[..., :, None], first[..., None, :]
    # The first row of the tile that sees anything is the hardest to please.
    row = torch.maximum(limit_low, first.amin(-1, keepdim=True))
    candidate = seen & (first <= row)
    empty = ~(keep & candidate).any(-1, keepdim=True)
    nearest = torch.where(candidate, first, -1)
    best = nearest.amax(-1, keepdim=True)
    one = candidate & (nearest == best) & (best >= 0)
    # Permuted keys may share a nearest position only by being the same block.
    return keep | (empty & one)


def _kept(call: Inputs, size: tuple[int, int], sink: int, local: int, last: int) -> Tensor:
    """What `force` adds, bool `[B|1, H|1, nq, nk]`, as far as it is visible or further."""
    bk, (nq, nk) = size[1], call.tiles(size)
    first, final = bounds(key_places(call), bk)
    low, high = bounds(row_places(call), size[0])
    low, high = low[..., :, None], high[..., :, None]
    first, final = first[..., None, :], final[..., None, :]
    keep = torch.zeros((1, 1, nq, nk), dtype=torch.bool, device=call.q.device)
    if sink > 0:
        # In sixty-four bits: FAR stands for a block without a key.
        keep = keep | (first.long() <= first.amin(-1, keepdim=True).long() + (sink - 1) * bk)
    if local > 0:
        begin = low // bk * bk - (local - 1) * bk
        end = high if call.causal else (high.long() // bk + local) * bk - 1
        keep = keep | ((final >= begin) & (first <= end))
    if last > 0:
        keep = keep | (torch.arange(nq, device=keep.device) >= nq - last)[:, None]
    return keep


@lru_cache(maxsize=32)
def _kept_in_place(
    n_q: int, n_k: int, q_start: int, causal: bool, device: torch.device, size: tuple[int, int],
    sink: int, local: int, last: int,
) -> Tensor:  # fmt: skip
    with torch.inference_mode(False):
        return _kept(bare_inputs(n_q, n_k, q_start, causal, device), size, sink, local, last)
