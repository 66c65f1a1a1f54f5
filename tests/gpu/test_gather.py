"""Attention over ascending lists of single keys on a GPU: long and ragged lists, keys inside a
row's own queries, poisoned outputs, against fp64.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import tensors

from accelkit.errors import KernelUnavailableError
from accelkit.kernels import dispatch
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex
from accelkit.kernels.merge import merge
from accelkit.kernels.prepare import prepare

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
BF16, F16 = torch.bfloat16, torch.float16


def ascending(heads: int, n_q: int, n_k: int, bq: int, q_start: int, seed: int = 0) -> BlockIndex:
    """Lists of very different lengths, some keys of which lie behind the first query or all; head 1
    reads every key, row 2 none, row 1 of head 0 exactly a tile of early keys.
    """
    g = torch.Generator().manual_seed(seed)
    nq = -(-n_q // bq)
    density = torch.rand(heads, nq, 1, generator=g) ** 3
    mask = torch.rand(heads, nq, n_k, generator=g) < density
    mask[:, 2] = False
    mask[0, 1] = torch.arange(n_k) < 128
    index = BlockIndex.from_mask(mask[None].cuda(), (bq, 1))
    count = index.count.clone()
    count[:, 1] = ALL
    return replace(index, count=count)


def served(backend: str, *call, **options) -> None:
    try:
        attend(*call, backend=backend, **options)
    except KernelUnavailableError as error:
        pytest.skip(str(error))


CASES = [
    (512, 128, None, BF16, True, (3000, 3000, 0)),
    (2048, 128, None, BF16, True, (7000, 7000, 0)),
    (512, 128, None, F16, True, (2100, 3000, 900)),
    (256, 64, None, F16, False, (1500, 2999, 0)),
    (128, 96, None, BF16, True, (700, 2000, 1300)),
    (512, 64, 128, BF16, True, (2000, 2000, 0)),
    (384, 128, 64, BF16, False, (2000, 1111, 0)),
    (512, 256, None, BF16, True, (2000, 2000, 0)),
    (64, 128, None, BF16, True, (1000, 1000, 0)),
]


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize(("bq", "size", "value", "dtype", "causal", "lengths"), CASES)
def test_against_fp64(backend, bq, size, value, dtype, causal, lengths) -> None:
    n_q, n_k, q_start = lengths
    q, k, v = tensors(2, 8, 2, n_q, n_k, size, dtype, value, "cuda")
    index = ascending(8, n_q, n_k, bq, q_start)
    options = {"causal": causal, "q_start": q_start}
    shape = (2, n_q, 8, v.shape[-1])
    out = torch.full(shape, math.nan, dtype=dtype, device="cuda").transpose(1, 2)
    lse = torch.full((2, 8, n_q), math.nan, device="cuda")
    served(backend, q, k, v, index, **options, out=out, lse=lse)
    want = attend(*(t.double() for t in (q, k, v)), index, **options, backend="reference")
    assert out.isfinite().all()
    error = float((out.double() - want.out).norm() / want.out.norm())
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"
    assert torch.equal(lse.isinf(), want.lse.isinf())
    seen = lse.isfinite()
    torch.testing.assert_close(lse[seen], want.lse[seen].float(), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_the_same_call_gives_the_same_bits(backend) -> None:
    q, k, v = tensors(2, 16, 4, 8000, 8000, 128, BF16, device="cuda")
    index = ascending(16, 8000, 8000, 512, 0)
    first = attend(q, k, v, index, backend=backend)
    for _ in range(4):
        again = attend(q, k, v, replace(index), backend=backend)
        assert torch.equal(again.out, first.out) and torch.equal(again.lse, first.lse)


def test_hopper_takes_the_kernel_that_is_made_for_it() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("not a Hopper GPU")
    q, k, v = tensors(1, 4, 2, 1024, 1024, 128, BF16, device="cuda")
    index = ascending(4, 1024, 1024, 256, 0)
    assert dispatch.explain(q, k, v, index).backend == "gluon"
    padded = torch.ones(1, 1024, dtype=torch.bool, device="cuda")
    with pytest.raises(KernelUnavailableError, match="key mask"):
        dispatch.explain(q, k, v, index, key_mask=padded, backend="gluon")


def test_stripes_and_blocks_merge_to_dense_attention() -> None:
    """Keys split at random between the two kinds of list."""
    q, k, v = tensors(1, 8, 2, 2048, 2048, 128, BF16, device="cuda")
    blocks = torch.rand(1, 8, 4, 16, device="cuda") < 0.5
    rest = (~blocks).repeat_interleave(128, -1)
    keys = BlockIndex.from_mask(rest, (512, 1))
    backend = "triton" if dispatch.gluon_refusal(prepare(q, k, v, keys)) else "gluon"
    parts = [
        attend(q, k, v, BlockIndex.from_mask(blocks, (512, 128))),
        attend(q, k, v, keys, backend=backend),
    ]
    dense = BlockIndex.dense(8, 4, (512, 128), q.device)
    want = attend(*(t.double() for t in (q, k, v)), dense, backend="reference")
    got = merge(parts)
    assert float((got.out.double() - want.out).norm() / want.out.norm()) < 6e-3
    torch.testing.assert_close(got.lse, want.lse.float(), atol=2e-3, rtol=1e-4)
