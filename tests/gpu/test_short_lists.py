"""Rows that list one tile, at the lengths of small videos: what was poisoned is written, all of it,
time after time.
"""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import tensors
from planted import video_call
from torch import Tensor

from accelkit.errors import KernelUnavailableError, UnsupportedConfigurationError
from accelkit.kernels.dispatch import KERNELS, attend
from accelkit.kernels.index import BlockIndex
from accelkit.patches.methods.gna import GNA
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import answer, compute

pytestmark = pytest.mark.gpu

TIMES = 50
GRIDS = {3328: (13, 16, 16), 1280: (5, 16, 16), 1296: (9, 12, 12), 320: (5, 8, 8)}
"""Frames, rows and columns of a video, by its tokens."""


def one_tile(heads: int, tokens: int, unit: tuple[int, int], moved: int) -> BlockIndex:
    """Every row of tiles lists one tile: that many places from its own."""
    rows, tiles = -(-tokens // unit[0]), -(-tokens // unit[1])
    at = (torch.arange(rows) * unit[0] // unit[1] + moved) % tiles
    mask = torch.zeros(1, heads, rows, tiles, dtype=torch.bool)
    mask[:, :, torch.arange(rows), at] = True
    return BlockIndex.from_mask(mask.cuda(), unit)


def fp32(tensors: list[Tensor], index: BlockIndex, causal: bool) -> tuple[Tensor, Tensor]:
    part = attend(*(t.float() for t in tensors), index, causal=causal, backend="reference")
    return part.out, part.lse


@pytest.mark.parametrize("backend", list(KERNELS))
@pytest.mark.parametrize("skip", [None, 0.01])
@pytest.mark.parametrize("moved", [0, 1])
@pytest.mark.parametrize("unit", [(128, 128), (64, 64), (128, 64)], ids=str)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("tokens", list(GRIDS))
def test_rows_of_one_tile(
    tokens: int, head_size: int, unit: tuple[int, int], moved: int, skip: float | None, backend: str
) -> None:
    q, k, v = tensors(1, 4, 4, tokens, tokens, head_size, torch.bfloat16, device="cuda")
    index = one_tile(4, tokens, unit, moved)
    want, want_lse = fp32([q, k, v], index, False)
    for _ in range(TIMES):
        out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device="cuda")
        options = {"causal": False, "skip": skip, "out": out, "lse": lse}
        try:
            attend(q, k, v, index, backend=backend, **options)
        except (KernelUnavailableError, UnsupportedConfigurationError) as error:
            pytest.skip(str(error))
        assert out.isfinite().all()
        assert float((out - want).norm() / want.norm()) < (6e-3 if skip is None else 2e-2)
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("window", [(0.3, 0.3, 0.3), (1.0, 0.3, 0.3)], ids=str)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("tokens", list(GRIDS))
def test_windows_of_a_video(tokens: int, head_size: int, window: tuple[float, ...]) -> None:
    """As a patched denoiser computes them, with the kernel that dispatch takes."""
    q, k, v = tensors(1, 4, 4, tokens, tokens, head_size, torch.bfloat16, device="cuda")
    policy = Policy(methods=(GNA(window=window),))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answers = answer(video_call(q, k, v, GRIDS[tokens]), policy)
        assert answers is not None
        return compute(answers[0]).out

    want = run(q.float(), k.float(), v.float())
    assert want.isfinite().all()
    for _ in range(TIMES):
        torch.empty_like(q).fill_(math.nan)  # the allocator gives this memory to the output
        got = run(q, k, v)
        assert got.isfinite().all()
        assert float((got - want).norm() / want.norm()) < 6e-3
