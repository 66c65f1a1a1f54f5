"""Pieces joined by LSE equal one call over their union."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import tensors

from accelkit.errors import InvalidInputError
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.merge import merge


def split_call(pieces: int) -> tuple[list[Partial], Partial]:
    q, k, v = tensors(2, 4, 2, 130, 130, 32)
    owner = torch.randint(0, pieces + 1, (1, 4, 5, 5))  # the last share belongs to nobody
    parts = [attend(q, k, v, BlockIndex.from_mask(owner == i, (32, 32))) for i in range(pieces)]
    return parts, attend(q, k, v, BlockIndex.from_mask(owner < pieces, (32, 32)))


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_pieces_equal_the_union(pieces) -> None:
    parts, whole = split_call(pieces)
    got = merge(parts)
    torch.testing.assert_close(got.out, whole.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse, whole.lse, atol=1e-5, rtol=1e-5)


def test_empty_pieces_take_no_part_whatever_they_hold() -> None:
    (first, second), _ = split_call(2)
    first.lse[:, :, :50] = -math.inf
    first.out[:, :, :50] = math.nan
    second.lse[:, :, 40:50] = -math.inf
    got = merge([first, second])
    assert got.out.isfinite().all()
    torch.testing.assert_close(got.out[:, :, :40], second.out[:, :, :40])
    assert not got.out[:, :, 40:50].any()
    assert (got.lse[:, :, 40:50] == -math.inf).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_triton_agrees(pieces) -> None:
    from accelkit.kernels._triton.merge import merge_some

    (first, *others), _ = split_call(pieces)
    first.lse[:, :, :50] = -math.inf
    first.out[:, :, :50] = math.nan
    for part in others:
        part.lse[:, :, 40:60] = -math.inf
    last = others[-1]
    strided = Partial(last.out.transpose(1, 2).contiguous().transpose(1, 2), last.lse)
    got = merge_some([first, *others[:-1], strided], torch.float32)
    want = merge([first, *others])
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-5, rtol=1e-5)


def test_half_precision_keeps_its_dtype() -> None:
    (first, second), whole = split_call(2)
    got = merge([Partial(p.out.bfloat16(), p.lse) for p in (first, second)])
    assert got.out.dtype == torch.bfloat16
    torch.testing.assert_close(got.out.float(), whole.out, atol=3e-2, rtol=3e-2)


def test_wrong_pieces_are_named() -> None:
    (first, second), _ = split_call(2)
    with pytest.raises(InvalidInputError, match="at least one"):
        merge([])
    with pytest.raises(InvalidInputError, match="piece 1"):
        merge([first, Partial(second.out[:, :2], second.lse[:, :2])])
