"""The Triton attention kernels on a GPU against fp64, with poisoned outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from attention_cases import permutation, random_index, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accelkit.kernels._triton import gluon_block_sparse, gluon_gather
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.merge import merge
from accelkit.kernels.merge import reference as merge_reference
from accelkit.kernels.prepare import prepare

pytestmark = pytest.mark.gpu

# ‖out − ref‖ / ‖ref‖ that rounding of inputs, probabilities and output explains.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    size: tuple[int, int] = (128, 128)
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    heads: tuple[int, int] = (8, 2)
    lengths: tuple[int, int, int] = (1024, 1024, 0)
    value_size: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        name = f"{self.size[0]}x{self.size[1]}-d{self.head_size}-{str(self.dtype)[6:]}"
        tail = "causal" if self.causal else "full"
        return "-".join([name, tail, *map(str, self.lengths), *self.options])


RAGGED, CHUNKED = (1000, 1000, 0), (300, 1100, 800)
F16, F32 = torch.float16, torch.float32
CASES = [
    Case(),
    Case(lengths=RAGGED),
    Case(lengths=RAGGED, causal=False),
    Case(lengths=CHUNKED),
    Case(dtype=F16, heads=(4, 4)),
    Case(dtype=F32, lengths=RAGGED),
    Case(size=(64, 64)),
    Case(size=(64, 64), lengths=CHUNKED, dtype=F16),
    Case(size=(64, 128), causal=False),
    Case(size=(128, 64), lengths=RAGGED),
    Case(size=(32, 32), lengths=RAGGED),
    Case(size=(256, 256), lengths=RAGGED),
    Case(size=(256, 128), lengths=CHUNKED, causal=False),
    Case(size=(128, 256), lengths=CHUNKED, dtype=F16),
    Case(size=(128, 64), lengths=CHUNKED, head_size=64),
    Case(size=(48, 80), lengths=RAGGED),
    Case(head_size=64),
    Case(head_size=64, lengths=RAGGED, causal=False),
    Case(head_size=64, size=(64, 64), dtype=F16),
    Case(head_size=96, lengths=RAGGED),
    Case(head_size=80, value_size=64, lengths=RAGGED),
    Case(head_size=40, value_size=16, lengths=RAGGED),
    Case(head_size=64, value_size=32, causal=False),
    Case(head_size=256, lengths=RAGGED),
    Case(head_size=256, size=(64, 64), causal=False),
    Case(head_size=64, dtype=F32, size=(64, 64)),
    Case(lengths=CHUNKED, options={"key_mask": True}),
    Case(causal=False, lengths=RAGGED, options={"key_mask": True}),
    Case(lengths=RAGGED, options={"positions": True}),
    Case(lengths=RAGGED, causal=False, options={"positions": True}, head_size=64),
    Case(lengths=RAGGED, options={"rows": True}),
    Case(lengths=RAGGED, options={"bias": True}),
    Case(lengths=RAGGED, options={"bias": True}, size=(128, 64)),
    Case(lengths=RAGGED, options={"bias": True}, causal=False),
    Case(lengths=CHUNKED, options={"bias": True}, causal=False, head_size=64, dtype=F16),
    # Two entries of 64 keys share a tile.
    Case(size=(128, 64), lengths=RAGGED, causal=False),
    Case(size=(128, 64), lengths=RAGGED, causal=False, head_size=64),
    Case(size=(256, 64), lengths=CHUNKED, causal=False, dtype=F16, options={"heads": True}),
    Case(size=(128, 64), lengths=RAGGED, causal=False, options={"bias": True}),
    Case(size=(128, 64), lengths=CHUNKED, causal=False, options={"rows": True}, head_size=96),
    Case(size=(128, 64), lengths=RAGGED, causal=False, options={"bias": True}, head_size=64),
    # All keys of an entry have one bias.
    Case(lengths=RAGGED, options={"bias": True, "by_entry": True}),
    Case(lengths=RAGGED, options={"bias": True, "by_entry": True}, causal=False, dtype=F16),
    Case(size=(128, 64), lengths=CHUNKED, options={"bias": True, "by_entry": True}, head_size=64),
    Case(size=(128, 64), lengths=RAGGED, causal=False, options={"bias": True, "by_entry": True}),
    Case(
        size=(256, 64),
        lengths=CHUNKED,
        causal=False,
        options={"bias": True, "by_entry": True},
        head_size=64,
    ),
    Case(size=(128, 256), lengths=CHUNKED, causal=False, options={"bias": True, "by_entry": True}),
    Case(lengths=RAGGED, options={"skip": 0.2}),
    Case(lengths=RAGGED, options={"skip": 0.2}, causal=False, dtype=F16),
    Case(lengths=CHUNKED, options={"skip": 0.2}, size=(128, 64)),
    Case(lengths=RAGGED, options={"skip": 0.2}, head_size=64),
    Case(lengths=RAGGED, options={"skip": 0.2}, size=(64, 64), head_size=64),
    Case(lengths=RAGGED, options={"unaligned": True}),
    Case(lengths=CHUNKED, options={"heads": True}),
    Case(size=(128, 1), lengths=RAGGED),
    Case(size=(512, 1), lengths=RAGGED),
    Case(size=(32, 1), lengths=CHUNKED, head_size=64),
    Case(size=(1, 1), lengths=(70, 500, 430)),
    Case(size=(128, 1), lengths=RAGGED, options={"positions": True}),
    Case(size=(64, 1), lengths=RAGGED, options={"rows": True}, head_size=256, causal=False),
]


def serve(backend: str, q, k, v, index: BlockIndex, **options: Any) -> None:
    """Run a call on one of our kernels, or skip the test with the kernel's reason."""
    if backend == "triton":
        attend(q, k, v, index, backend="triton", **options)
        return
    launch = prepare(q, k, v, index, **options)
    kernel = gluon_gather if index.size[1] == 1 else gluon_block_sparse
    if reason := kernel.refusal(launch):
        pytest.skip(reason)
    (kernel.gather if index.size[1] == 1 else kernel.block_sparse)(launch)


def votes_of_halves(index: BlockIndex, n_q: int) -> BlockIndex:
    """The same lists for units of 64 rows, which is how the Hopper kernel votes."""
    parts = index.size[0] // 64
    rows = -(-n_q // 64)
    start, count = (t.repeat_interleave(parts, -1)[..., :rows] for t in (index.start, index.count))
    return replace(index, start=start, count=count, size=(64, index.size[1]))


@pytest.mark.parametrize("backend", ["triton", "gluon"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_fp64(case: Case, backend: str) -> None:
    (heads, kv_heads), (n_q, n_k, q_start) = case.heads, case.lengths
    size = case.head_size + (1 if "unaligned" in case.options else 0)
    q, k, v = tensors(2, heads, kv_heads, n_q, n_k, size, case.dtype, case.value_size, "cuda")
    q, k = q[..., : case.head_size], k[..., : case.head_size]
    if "unaligned" in case.options:
        v = v[..., : case.head_size]
    chosen = (5, 0, 3, 6) if "heads" in case.options else tuple(range(heads))
    index = random_index(2, len(chosen), n_q, n_k, case.size, 0.35, (1,), (2,), "cuda")
    args: dict[str, Any] = {"causal": case.causal, "q_start": q_start, "heads": chosen}
    if "key_mask" in case.options:
        args["key_mask"] = torch.ones(2, n_k, dtype=torch.bool, device="cuda")
        args["key_mask"][0, :333] = False
    if "positions" in case.options:
        args["k_pos"] = permutation(1, heads, n_k, 9, "cuda")
        args["q_pos"] = permutation(2, 1, n_q, 5, "cuda") + q_start
    if "rows" in case.options:
        args["rows"] = torch.tensor([1, index.rows - 1], device="cuda")
    if "bias" in case.options:
        bias, entries = torch.randn(1, heads, n_k, device="cuda"), "by_entry" in case.options
        if entries:
            bias = bias[..., :: case.size[1]].repeat_interleave(case.size[1], -1)[..., :n_k]
        index = replace(index, bias=bias, bias_by_entry=entries)
    if "skip" in case.options:
        args["skip"] = case.options["skip"]
    width = v.shape[-1]
    out = torch.full((2, n_q, heads, width), math.nan, dtype=case.dtype, device="cuda").transpose(
        1, 2
    )
    lse = torch.full((2, heads, n_q), math.nan, device="cuda")
    serve(backend, q, k, v, index, **args, out=out, lse=lse)
    if backend == "gluon" and "skip" in case.options:
        index = votes_of_halves(index, n_q)
    want_out = torch.full((2, heads, n_q, width), math.nan, dtype=torch.float64, device="cuda")
    want_lse = torch.full((2, heads, n_q), math.nan, device="cuda")
    wide = (t.double() for t in (q, k, v))
    attend(*wide, index, **args, out=want_out, lse=want_lse, backend="reference")

    torch.testing.assert_close(
        out.isnan(), want_out.isnan()
    )  # written where it should be, and nowhere else
    there = ~want_lse.isnan()
    error = (out[there].double() - want_out[there]).norm() / want_out[there].norm()
    limit = TOLERANCE[case.dtype]
    if "skip" in case.options:
        limit *= 2  # a vote within rounding of the threshold may fall either way
    assert error < limit, f"relative error {error:.2e}"
    finite = there & want_lse.isfinite()
    assert torch.equal(lse.isinf(), want_lse.isinf())
    torch.testing.assert_close(
        lse[finite], want_lse[finite], atol=2e-4 if limit < 2e-3 else 2e-3, rtol=1e-4
    )


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_empty_rows_are_zero(backend: str) -> None:
    q, k, v = tensors(1, 4, 2, 512, 512, 128, torch.bfloat16, device="cuda")
    index = random_index(1, 4, 512, 512, (128, 128), empty_rows=(1,), device="cuda")
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device="cuda")
    serve(backend, q, k, v, index, out=out, lse=lse)
    assert out.isfinite().all() and not out[:, :, 128:256].any()
    assert (lse[:, :, 128:256] == -math.inf).all()


def structured(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Inputs that models make and random ones are not."""
    q, k, v = tensors(1, 8, 2, 2048, 2048, 128, dtype, device="cuda")
    if kind == "sinks":  # the first keys take logits of 30 and more from every row
        q[..., 0], k[:, :, :4, 0] = 20.0, 18.0
    elif kind == "one-hot":  # a row sees little but the key at its own place
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype) * 20
        q = k.repeat_interleave(4, 1) * 2
    elif kind == "repeated":
        k[:, :, 1:], v[:, :, ::2] = k[:, :, :1].clone(), v[:, :, :1].clone()
    elif kind == "large":
        q, v = q * 30, v * 1000
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sinks", "one-hot", "repeated", "large"])
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_error_is_that_of_dense_attention(backend: str, kind: str, dtype: torch.dtype) -> None:
    q, k, v = structured(kind, dtype)
    index = BlockIndex.dense(8, 16, (128, 128), q.device)
    out = torch.full_like(q, math.nan)
    serve(backend, q, k, v, index, out=out)
    wide = [t.double() for t in (q, k, v)]
    want = attend(*wide, index, backend="reference").out
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours, theirs = (float((t.double() - want).norm() / want.norm()) for t in (out, dense))
    assert ours <= 2 * theirs, f"{ours:.2e} against {theirs:.2e} of cuDNN"


@pytest.mark.parametrize("skip", [None, 0.01])
@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_the_same_call_gives_the_same_bits(backend: str, skip: float | None) -> None:
    """Many more rows than programs, of very different lengths, so that a race would show."""
    q, k, v = tensors(2, 16, 4, 4000, 4000, 128, torch.bfloat16, device="cuda")
    index = random_index(2, 16, 4000, 4000, (128, 128), 0.2, (3, 9), (7,), "cuda")
    found = []
    for _ in range(3):
        out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device="cuda")
        serve(backend, q, k, v, index, skip=skip, out=out, lse=lse)
        found.append((out, lse))
    assert not found[0][0].isnan().any()
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("head_size", [64, 128])
def test_halves_drop_tiles_alone(head_size: int, causal: bool) -> None:
    """Sixteen features say which halves of the query tiles see which key blocks weakly."""
    n_q, n_k, skip = 1000, 1500, 0.3
    q, k, v = tensors(2, 8, 2, n_q, n_k, head_size, torch.bfloat16, device="cuda")
    kind = torch.arange(n_q, device="cuda") // 64 % 16
    weak = torch.rand(12, 16, device="cuda").repeat_interleave(128, 0)[:n_k] < 0.6
    q *= 0.2
    q[..., :16] = 4.0 * torch.nn.functional.one_hot(kind, 16)
    k[..., :16] = -2.5 / 4 * head_size**0.5 * weak
    index = random_index(2, 8, n_q, n_k, (128, 128), 0.7, (1,), (2,), "cuda")
    args: dict[str, Any] = {"causal": causal, "q_start": n_k - n_q if causal else 0}
    out, lse = torch.full_like(q, math.nan), torch.full(q.shape[:3], math.nan, device="cuda")
    serve("gluon", q, k, v, index, **args, skip=skip, out=out, lse=lse)
    halves, wide = votes_of_halves(index, n_q), [t.double() for t in (q, k, v)]
    want = attend(*wide, halves, **args, skip=skip, backend="reference")
    whole = attend(*wide, index, **args, skip=skip, backend="reference")
    exact = attend(*wide, index, **args, backend="reference")
    size = float(want.out.norm())
    assert float((out - want.out).norm()) / size < 2 * TOLERANCE[torch.bfloat16]
    assert all(float((t.out - want.out).norm()) / size > 0.02 for t in (whole, exact))
    assert torch.equal(lse.isinf(), want.lse.isinf())
    seen = want.lse.isfinite()
    torch.testing.assert_close(lse[seen], want.lse[seen].float(), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("pieces", [2, 3])
def test_merge_agrees_with_torch(pieces: int) -> None:
    parts = []
    for i in range(pieces):
        out = torch.randn(2, 300, 8, 96, device="cuda").bfloat16().transpose(1, 2)
        lse = torch.randn(2, 8, 300, device="cuda")
        lse[:, :, i * 10 : 40] = -math.inf
        out[:, :, i * 10 : 40] = math.nan
        parts.append(Partial(out, lse))
    got, want = merge(parts), merge_reference(parts)
    torch.testing.assert_close(got.out, want.out, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(got.lse, want.lse)
