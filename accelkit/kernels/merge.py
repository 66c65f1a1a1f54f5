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
    """The same in plain torch: one piece after another joins those before it."""
    first, *others = parts
    exact = torch.promote_types(first.out.dtype, torch.float32)
    out, lse = first.out.to(exact), first.lse
    for part in others:
        share = torch.sigmoid(part.lse - lse).masked_fill_(part.lse == -math.inf, 0.0)
        more = part.out.to(exact)
        joined = torch.lerp(out, more, share[..., None].to(exact))
        # What an empty piece holds may be anything, even times zero.
        alone = ((share == 0) | (share == 1)).nonzero(as_tuple=True)
        joined[alone] = torch.where(share[alone][:, None] > 0, more[alone], out[alone])
        out, lse = joined, torch.logaddexp(lse, part.lse)
    out[(lse == -math.inf).nonzero(as_tuple=True)] = 0.0  # many times as fast as by a mask
    return Partial(out.to(first.out.dtype), lse)
