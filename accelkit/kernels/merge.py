"""Join disjoint pieces of one attention call by their log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from accelkit.errors import InvalidInputError
from accelkit.kernels.index import Partial


def merge(parts: Sequence[Partial]) -> Partial:
    """Softmax over the union of disjoint key sets, from what each set gave alone.

    `parts` hold `out` `[B, H, N, Dv]` and natural-log `lse` fp32 `[B, H, N]`, all of one shape.
    Rows that a piece left empty (−inf) take nothing from it, and rows empty in all pieces give
    zeros and −inf. The result has the first piece's dtype; one piece is handed back as it is.
    Raises `InvalidInputError` for no pieces or unequal shapes.
    """
    if not parts:
        raise InvalidInputError("merge: no pieces were given, expected at least one Partial")
    first = parts[0]
    for i, part in enumerate(parts):
        if part.out.shape != first.out.shape or part.lse.shape != first.out.shape[:-1]:
            found = f"out {tuple(part.out.shape)} and lse {tuple(part.lse.shape)}"
            raise InvalidInputError(
                f"merge: piece {i} has {found}, expected out {tuple(first.out.shape)} as piece 0"
            )
    if len(parts) == 1:
        return first
    from accelkit.kernels.dispatch import fast_device

    if fast_device(first.out):
        from accelkit.kernels._triton.merge import MOST, merge_some

        left = list(parts)
        while len(left) > MOST:  # folded in fp32, so that only the last step rounds
            left = [merge_some(left[:MOST], torch.float32), *left[MOST:]]
        return merge_some(left, first.out.dtype)
    return reference(parts)


def reference(parts: Sequence[Partial]) -> Partial:
    """The same in plain torch."""
    lse = torch.stack([p.lse for p in parts])  # [P, B, H, N]
    total = lse.logsumexp(0)
    weight = (lse - total.masked_fill(total == -math.inf, 0.0)).exp()
    wide = torch.promote_types(parts[0].out.dtype, torch.float32)
    out = torch.zeros_like(parts[0].out, dtype=wide)
    for w, part in zip(weight, parts, strict=True):
        out.addcmul_(part.out.to(wide), w[..., None].to(wide))
    # Where a piece is empty its output may hold anything: those rows leave it out, instead of
    # multiplying it by zero.
    some = (weight == 0).any(0)
    if some.any():
        safe = torch.zeros_like(out[some])
        for w, part in zip(weight, parts, strict=True):
            share = w[some][:, None].to(wide)
            safe += torch.where(share > 0, part.out[some] * share, 0.0)
        out[some] = safe
    return Partial(out.to(parts[0].out.dtype), total)
