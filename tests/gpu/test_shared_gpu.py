"""Several processes on one GPU: every row is written, and the same, launch after launch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accelkit.errors import KernelUnavailableError
from accelkit.kernels.dispatch import KERNELS, attend, explain
from accelkit.kernels.index import BlockIndex

pytestmark = pytest.mark.gpu

PROCESSES, LAUNCHES = 3, 300


def _index(heads: int, tiles: int, listed: int) -> BlockIndex:
    at = (torch.arange(tiles)[:, None] + torch.arange(listed)) % tiles
    mask = torch.zeros(tiles, tiles, dtype=torch.bool).scatter_(1, at, True)
    return BlockIndex.from_mask(mask.expand(1, heads, tiles, tiles).contiguous().cuda(), (128, 128))


def _launches(process: int, backend: str, missed) -> None:
    """Count launches over far more rows than multiprocessors, ordered anew, that leave one
    unwritten or write another result.
    """
    torch.manual_seed(process)
    q, k, v = torch.randn(3, 16, 4, 3328, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    index = _index(4, 26, 8)
    first = attend(q, k, v, index, causal=False, backend=backend).out
    for _ in range(LAUNCHES):
        out = torch.full_like(q, float("nan"))
        lse = torch.full(q.shape[:3], float("nan"), device="cuda")
        attend(q, k, v, replace(index), causal=False, out=out, lse=lse, backend=backend)
        missed[process] += int((out != first).any() | torch.isnan(lse).any())
        torch.nn.functional.silu(out)  # the GPU goes to others between launches, as in a model
        torch.cuda.synchronize()


@pytest.mark.parametrize("backend", list(KERNELS))
def test_no_row_is_left_out_where_processes_take_turns(backend: str) -> None:
    q = torch.zeros(1, 4, 3328, 64, device="cuda", dtype=torch.bfloat16)
    try:
        explain(q, q, q, _index(4, 26, 8), causal=False, backend=backend)
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    missed = torch.zeros(PROCESSES, dtype=torch.int32).share_memory_()
    torch.multiprocessing.spawn(_launches, (backend, missed), PROCESSES)
    assert missed.tolist() == [0] * PROCESSES
