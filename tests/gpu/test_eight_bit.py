"""The 8-bit attention kernels on a GPU against the reference that rounds as they do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_cases import permutation, random_index, tensors

from accelkit.kernels import block_sparse
from accelkit.kernels.dispatch import attend, explain
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.prepare import prepare
from accelkit.kernels.quantize import Rounding, dequantize, quantize, reference

pytestmark = pytest.mark.gpu

PRECISIONS = [("int8", "fp8"), ("fp8", "fp8"), ("int8", "native"), ("fp8", "native")]
SUMS = {"int8": 1e-4, "fp8": 2e-3}
"""What sums of products may differ by in the LSE: integers are exact."""

RAGGED, CHUNKED = (1000, 1000, 0), (300, 1100, 800)


@dataclass(frozen=True)
class Case:
    size: tuple[int, int] = (128, 128)
    head_size: int = 128
    causal: bool = True
    lengths: tuple[int, int, int] = RAGGED
    option: str = "plain"
    precisions: tuple[str, str] = ("int8", "fp8")

    def __str__(self) -> str:
        tail = "causal" if self.causal else "full"
        parts = [f"{self.size[0]}x{self.size[1]}-d{self.head_size}-{tail}", *self.precisions]
        return "-".join([*parts, *map(str, self.lengths), self.option])


CASES = [
    Case(),
    Case(precisions=("fp8", "fp8"), lengths=CHUNKED),
    Case(precisions=("int8", "native"), causal=False),
    Case(precisions=("fp8", "native"), option="rows"),
    Case(option="heads"),
    Case(size=(256, 64), causal=False),
    Case(size=(384, 128)),
    Case(size=(384, 128), precisions=("fp8", "fp8"), lengths=CHUNKED),
    Case(size=(64, 64), lengths=CHUNKED),
    Case(option="positions"),
    Case(option="key_mask", causal=False, head_size=64),
    Case(head_size=64),
    Case(head_size=64, causal=False, precisions=("fp8", "fp8")),
    Case(head_size=64, precisions=("int8", "native"), lengths=CHUNKED),
    Case(head_size=64, size=(64, 128), causal=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelkit.kernels._triton.eight_bit import operands

    torch.manual_seed(0)
    n_q, n_k, q_start = case.lengths
    q, k, v = tensors(2, 8, 2, n_q, n_k, case.head_size, torch.bfloat16, device="cuda")
    k, v = (t + 3 * torch.randn(case.head_size, device="cuda", dtype=t.dtype) for t in (k, v))
    chosen = (5, 0, 3, 6) if case.option == "heads" else tuple(range(8))
    index = random_index(2, len(chosen), n_q, n_k, case.size, 0.4, (1,), (1,), "cuda")
    qk, pv = case.precisions
    args: dict[str, Any] = {"causal": case.causal, "q_start": q_start, "heads": chosen}
    args |= {"qk": qk, "pv": pv, "smooth_k": True}
    if case.option == "positions":
        args["k_pos"] = permutation(1, 8, n_k, 9, "cuda")
        args["q_pos"] = permutation(2, 1, n_q, 5, "cuda") + q_start
    if case.option == "key_mask":
        args["key_mask"] = torch.ones(2, n_k, dtype=torch.bool, device="cuda")
        args["key_mask"][0, :333] = False
    if case.option == "rows":
        args["rows"] = torch.tensor([1, index.rows - 1], device="cuda")

    def run(backend: str | None) -> Partial:
        shape = (2, n_q, 8, case.head_size)
        out = torch.full(shape, math.nan, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        lse = torch.full((2, 8, n_q), math.nan, device="cuda")
        return attend(q, k, v, index, **args, out=out, lse=lse, backend=backend)

    assert explain(q, k, v, index, **args).backend == "triton"
    got, again = run(None), run(None)
    torch.testing.assert_close(got.out, again.out, atol=0, rtol=0, equal_nan=True)
    own = operands(prepare(q, k, v, index, **args))
    monkeypatch.setattr(block_sparse, "quantize", lambda *_: own)
    want = run("reference")
    torch.testing.assert_close(got.out.isnan(), want.out.isnan())
    assert_near(got, want, *case.precisions)
    assert not got.out[want.lse == -math.inf].any()


def assert_near(got: Partial, want: Partial, qk: str, pv: str) -> None:
    """Operands are the same to the bit: what is left are sums in another order, the few bits with
    which 8-bit products are added, and P, rounded relative to the maximum so far instead of the
    row's.
    """
    seen = want.lse > -math.inf
    torch.testing.assert_close(got.lse, want.lse, atol=SUMS[qk], rtol=1e-5, equal_nan=True)
    assert relative(got.out[seen], want.out[seen]) < (8e-3 if pv == "fp8" else 5e-3)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def structured(kind: str, head_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of 8 and 2 heads over 1,000 tokens with one trait that rounding might not bear."""
    q, k, v = tensors(1, 8, 2, 1000, 1000, head_size, torch.float16, device="cuda")
    if kind == "sinks":  # four keys that every query sees with a logit above 30
        way = torch.nn.functional.normalize(torch.randn(1, 2, 1, head_size, device="cuda"), dim=-1)
        q = (q + 8 * way.repeat_interleave(4, 1)).half()
        k[:, :, :4] = (way * (35 * head_size**0.5 / 8)).half()
    elif kind == "one-hot":  # each query has one key of its own
        own = torch.randperm(1000, device="cuda")
        q = (k.repeat_interleave(4, 1)[:, :, own] * (35 / head_size**0.5) + 0.3 * q).half()
    elif kind == "repeated":  # eight keys, each many times
        k = k[:, :, torch.arange(1000, device="cuda") % 8]
    elif kind == "extremes":  # near the ends of fp16
        q, k, v = q * 200, k * 0.05, v * 8000
        k[..., 0] = 60000.0
        q[..., 0] = 0.0
        v[:, :, 5] = 60000.0
    return q, k, v


@pytest.mark.parametrize("kind", ["random", "sinks", "one-hot", "repeated", "extremes"])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(("qk", "pv"), PRECISIONS)
def test_structured_inputs(kind, head_size, qk, pv) -> None:
    """Beside exact attention the kernel errs as much as its rounding does in torch."""
    torch.manual_seed(1)
    q, k, v = structured(kind, head_size)
    index = BlockIndex.dense(8, 8, (128, 128), q.device)
    options = {"qk": qk, "pv": pv, "smooth_k": True}
    exact = attend(q, k, v, index, backend="reference")
    want = attend(q, k, v, index, backend="reference", **options)
    got = attend(q, k, v, index, **options)
    for name in ("out", "lse"):
        one, two, true = (getattr(part, name).float() for part in (got, want, exact))
        assert one.isfinite().all()
        assert relative(one, true) < 1.2 * relative(two, true) + 5e-4, name


@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("head_size", [64, 128])
def test_operands_equal_those_of_torch(qk, head_size) -> None:
    q, k, v = tensors(2, 8, 2, 1000, 1100, head_size, torch.bfloat16, device="cuda")
    ids = torch.tensor([5, 0, 3], dtype=torch.int32, device="cuda")
    how = Rounding(qk, "fp8", True, 128, 0.1, ids, ids // 4)
    got, want = quantize(q, k + 5, v, how), reference(q, k + 5, v, how)
    for one, two in zip(dequantize(got), dequantize(want), strict=True):
        # A mean that was added up in another order may push a value over the edge of its step.
        off = ((one - two).abs() > 1e-3 * two.abs() + 1e-4).float().mean()
        assert off < 2e-3
    torch.testing.assert_close(got.shift, want.shift, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_without_a_mean_are_those_of_torch_to_the_bit(qk, dtype) -> None:
    """Few bits of input often lie half way between two steps, in bf16 one value in 300."""
    q, k, v = tensors(2, 8, 2, 1000, 1100, 64, dtype, device="cuda")
    ids = torch.arange(8, dtype=torch.int32, device="cuda")
    how = Rounding(qk, "native", False, 128, 0.1, ids, ids // 4)
    got, want = quantize(q, k, v, how), reference(q, k, v, how)
    for name in ("q", "k", "q_scale", "k_scale"):
        one, two = (getattr(ops, name).view(torch.uint8) for ops in (got, want))
        assert torch.equal(one, two), name
    if qk == "int8":
        half = q.double() * 127 / q.double().abs().amax(-1, keepdim=True)
        assert ((half - half.floor()) == 0.5).any()
