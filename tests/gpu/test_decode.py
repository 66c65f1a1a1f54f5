"""A decode step over lists on a GPU: parts chosen for the device, against fp64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import random_index, tensors

from accelkit.kernels.decode import _splits, decode
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import Partial

pytestmark = pytest.mark.gpu


def fp64(q, k, v, index) -> Partial:
    """The same lists, each KV head's queries one by one, by the reference."""
    group = q.shape[1] // k.shape[1]
    wide = (t.double() for t in (q, k, v))
    rows = index.take([h // group for h in range(q.shape[1])])
    return attend(*wide, rows, causal=False, backend="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", [1, 64, 128])
@pytest.mark.parametrize(
    ("batch", "heads", "n_k", "size"), [(1, (32, 8), 8192, 128), (3, (6, 2), 5000, 64)]
)
def test_against_fp64(dtype, unit, batch, heads, n_k, size) -> None:
    q, k, v = tensors(batch, *heads, 1, n_k, size, dtype, device="cuda")
    index = random_index(batch, heads[1], 1, n_k, (1, unit), 0.3, dense_heads=(1,), device="cuda")
    assert _splits(k, batch) > 1
    got, want = decode(q, k, v, index), fp64(q, k, v, index)
    limit = {torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got.out.double(), want.out.double(), atol=limit, rtol=limit)
    torch.testing.assert_close(got.lse.double(), want.lse.double(), atol=1e-3, rtol=1e-3)
    alone = decode(q, k, v, index, splits=1)
    torch.testing.assert_close(got.out, alone.out, atol=limit, rtol=limit)
