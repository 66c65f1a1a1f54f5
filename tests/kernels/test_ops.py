"""`attend` inside compiled graphs: the operator keeps its promises and gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from accelkit.kernels import ops
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex


def _call(heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockIndex]:
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 100, 16, generator=g)
    k, v = torch.randn(2, 2, 2, 100, 16, generator=g).unbind()
    mask = torch.rand(1, heads, 7, 7, generator=g) < 0.5
    return q, k, v, BlockIndex.from_mask(mask, (16, 16))


def test_opcheck() -> None:
    q, k, v, index = _call()
    args = (
        q, k, v, index.start, index.count, index.blocks, [16, 16], None, 0.0, None, True, 0,
        None, [3, 1, 0, 2], None, None, torch.ones(2, 100, dtype=torch.bool), None, None, None,
        None, "native", "native", False, None,
    )  # fmt: skip
    torch.library.opcheck(ops.attend, args)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "scale": 0.5},
        {"heads": (2, 0, 3, 1), "kv_of_head": (1, 0, 1, 0)},
        {"rows": (0, 3), "backend": "reference"},
        {"skip": 0.01},
        {"qk": "int8", "pv": "fp8", "smooth_k": True},
    ],
)
def test_compiled_call_gives_the_same(options: dict) -> None:
    q, k, v, index = _call()

    def run(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = attend(q * 2, k, v, index, **options)
        return found.out + 1, found.lse

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q), run(q), strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_call_writes_where_it_is_told() -> None:
    q, k, v, index = _call(heads=2)

    def run(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, index, heads=(3, 1), out=out, lse=lse).out

    fresh = [torch.full((2, 4, 100, 16), 7.0), torch.full((2, 4, 100), 7.0)]
    want, got = [t.clone() for t in fresh], [t.clone() for t in fresh]
    run(*want)
    torch.compile(run, fullgraph=True, backend="aot_eager")(*got)
    for a, b, before in zip(got, want, fresh, strict=True):
        torch.testing.assert_close(a, b)
        assert (a[:, [0, 2]] == before[:, [0, 2]]).all() and not (a == before).all()
