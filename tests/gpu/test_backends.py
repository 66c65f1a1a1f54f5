"""Every backend of this GPU under torch.compile, in CUDA graphs and against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accelkit.errors import KernelUnavailableError
from accelkit.kernels import ops
from accelkit.kernels.dispatch import KERNELS, attend
from accelkit.kernels.index import ALL, BlockIndex

pytestmark = pytest.mark.gpu

SIZE = (128, 128)


def call(
    n_q: int = 1000, n_k: int = 1000, d: int = 128
) -> tuple[Tensor, Tensor, Tensor, BlockIndex]:
    g = torch.Generator(device="cuda").manual_seed(0)
    shapes = (n_q, 8), (n_k, 2), (n_k, 2)
    q, k, v = (
        torch.randn(2, n, h, d, generator=g, device="cuda").bfloat16().transpose(1, 2)
        for n, h in shapes
    )
    nq, nk = -(-n_q // 128), -(-n_k // 128)
    index = BlockIndex.from_mask(torch.rand(2, 8, nq, nk, generator=g, device="cuda") < 0.3, SIZE)
    count = index.count.clone()
    count[:, 2], count[:, 1, 0] = ALL, 0
    return q, k, v, BlockIndex(index.start, count, index.blocks, SIZE)


NOT_CAUSAL = ("cudnn",)
"""Backends that serve no causal call."""


@pytest.fixture(params=list(KERNELS))
def backend(request: pytest.FixtureRequest) -> str:
    q, k, v, index = call()
    try:
        attend(q, k, v, index, causal=request.param not in NOT_CAUSAL, backend=request.param)
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("lengths", [(1000, 1000), (700, 1500)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [None, (7, 6, 5, 4, 3, 2, 1, 0), (4, 5, 6, 7)])
def test_lists_of_all_kinds(backend: str, lengths, causal: bool, heads) -> None:
    if causal and backend in NOT_CAUSAL:
        pytest.skip("it knows no causality")
    q, k, v, index = call(*lengths)
    if heads is not None:
        at = torch.tensor(heads, device="cuda")
        index = BlockIndex(index.start[:, at], index.count[:, at], index.blocks, SIZE)
    options = {"causal": causal, "q_start": lengths[1] - lengths[0] if causal else 0}

    def run(name: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.full_like(tensors[0], float("nan"))
        lse = torch.full(q.shape[:3], float("nan"), device="cuda")
        attend(*tensors, index, heads=heads, out=out, lse=lse, backend=name, **options)
        return out, lse

    got, want = run(backend, q, k, v), run("reference", q.double(), k.double(), v.double())
    mine = list(heads or range(8))
    others = [h for h in range(8) if h not in mine]
    assert got[0][:, others].isnan().all()
    error = (got[0][:, mine].double() - want[0][:, mine]).norm() / want[0][:, mine].norm()
    assert float(error) < 6e-3
    torch.testing.assert_close(got[1][:, mine], want[1][:, mine], atol=1e-4, rtol=1e-5)


def test_graphs_replay(backend: str) -> None:
    q, k, v, index = call()
    options = {"causal": backend not in NOT_CAUSAL, "backend": backend}
    still = q.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # An index without anything kept on it: lists are lowered inside the graph.
        fresh = BlockIndex(index.start, index.count, index.blocks, SIZE)
        found = attend(still, k, v, fresh, **options)
    still.copy_(q.flip(2))
    graph.replay()
    torch.testing.assert_close(found.out, attend(q.flip(2), k, v, index, **options).out)


def test_operator_and_compiled_graph(backend: str) -> None:
    q, k, v, index = call()
    causal = backend not in NOT_CAUSAL
    args = (
        q, k, v, index.start, index.count, index.blocks, [128, 128], None, 0.0, None, causal, 0,
        None, None, None, None, None, None, None, None, None, "native", "native", False, backend,
    )  # fmt: skip
    torch.library.opcheck(ops.attend, args)
    compiled = torch.compile(
        lambda q: attend(q * 1.0, k, v, index, causal=causal, backend=backend).out, fullgraph=True
    )
    want = attend(q, k, v, index, causal=causal, backend=backend).out
    torch.testing.assert_close(compiled(q), want)
