"""Block-sparse attention: reference against plain softmax, backends against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import check_call, permutation, random_index, tensors
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from accelkit.errors import (
    InvalidInputError,
    KernelUnavailableError,
    UnsupportedConfigurationError,
)
from accelkit.kernels import cpu_rows
from accelkit.kernels.dispatch import attend, explain
from accelkit.kernels.index import ALL, BlockIndex

HEADS = [(4, 1), (4, 2), (2, 2)]
LENGTHS = [
    (200, 200, 0),
    (70, 200, 130),
    (64, 190, 0),
]  # queries, keys, position of the first query
OPTIONS = ["plain", "key_mask", "positions", "rows", "bias", "q_pos"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_reference_is_masked_softmax(heads, lengths, causal) -> None:
    n_q, n_k, q_start = lengths
    q, k, v = tensors(2, *heads, n_q, n_k, 32)
    index = random_index(2, heads[0], n_q, n_k, (32, 16), dense_heads=(1,))
    part = attend(q, k, v, index, causal=causal, q_start=q_start, backend="reference")
    seen = index.to_mask(-(-n_k // 16)).repeat_interleave(32, 2).repeat_interleave(16, 3)
    seen = seen[:, :, :n_q, :n_k]
    if causal:
        seen &= torch.arange(n_k) <= torch.arange(n_q)[:, None] + q_start
    group = heads[0] // heads[1]
    wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = (q @ wide_k.mT / math.sqrt(32)).masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    want = torch.nan_to_num((s - lse[..., None]).exp()) @ wide_v
    torch.testing.assert_close(part.out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lse, lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dense_index_is_dense_attention(backend) -> None:
    q, k, v = tensors(1, 4, 2, 100, 230, 64)
    index = BlockIndex.dense(4, 1, (128, 128), q.device)
    mask = torch.arange(230) <= torch.arange(100)[:, None] + 130
    want = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    part = attend(q, k, v, index, q_start=130, backend=backend)
    torch.testing.assert_close(part.out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("size", [(64, 64), (32, 16), (16, 32)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_cpu_path_against_reference(option, size, causal, lengths) -> None:
    for batch, heads in zip((1, 2, 2), HEADS, strict=True):
        check_call("torch", batch, heads, lengths, 64, size, causal, option)


@pytest.mark.parametrize("head_size", [24, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_path_head_sizes(head_size, dtype) -> None:
    check_call("torch", 1, (2, 1), (130, 130, 0), head_size, (64, 64), True, "plain", dtype)
    check_call("torch", 1, (2, 1), (130, 130, 0), head_size, (64, 64), True, "plain", dtype, 40)


@pytest.mark.parametrize("size", [(64, 64), (128, 32), (64, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_path_shares_what_neighbours_read(size, causal, monkeypatch) -> None:
    """Runs of 1024 and of 256 rows read in one piece what all of their tiles list."""
    heights = []
    fused = cpu_rows.fused

    def spy(q: torch.Tensor, *rest: Any, **options: Any) -> Any:
        heights.append(q.shape[2])
        return fused(q, *rest, **options)

    monkeypatch.setattr(cpu_rows, "fused", spy)
    n, own = 2500, torch.Generator().manual_seed(1)
    q, k, v = tensors(1, 2, 1, n, n, 32)
    rows, columns = -(-n // size[0]), -(-n // size[1])
    mask = torch.rand(1, 2, rows, columns, generator=own) < 0.05
    mask[..., : 600 // size[1]] = True  # everyone's
    mask[:, :, 1280 // size[0] : 1920 // size[0], 600 // size[1] : 1300 // size[1]] = True
    mask[:, 1, : 1300 // size[0], 0] = False  # one head of two reads this
    index = BlockIndex.from_mask(mask, size)
    found = attend(q, k, v, index, causal=causal, backend="torch")
    wide = (t.double() for t in (q, k, v))
    want = attend(*wide, index, causal=causal, backend="reference")
    torch.testing.assert_close(found.out.double(), want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lse, want.lse.float(), atol=1e-5, rtol=1e-5)
    assert {1024, 256, size[0]} <= set(heights)


def test_cpu_path_keeps_what_is_not_a_number_to_its_readers() -> None:
    """Tiles that share stages, calls and memory with one that reads it do not."""
    n, own = 2048, torch.Generator().manual_seed(3)
    q, k, v = tensors(1, 2, 1, n, n, 32)
    k[:, :, 1000], v[:, :, 1000] = math.nan, math.nan
    mask = torch.rand(1, 2, 32, 32, generator=own) < 0.3
    mask |= torch.eye(32, dtype=torch.bool)
    out = attend(q, k, v, BlockIndex.from_mask(mask, (64, 64)), causal=True, backend="torch").out
    reads = (mask[..., 1000 // 64] & (torch.arange(32) >= 1000 // 64)).repeat_interleave(64, -1)
    found, behind = out.isnan().any(-1), torch.arange(n) > 1000
    # Torch's own triangle spreads it over the rows of the tile that holds it.
    assert not found[~reads].any() and found[reads & behind].all()
    assert 0 < (reads & behind).sum() < found.numel() / 2


@pytest.mark.parametrize(("heads", "n"), [(1, 1500), (1, 2500), (3, 2500)])
@pytest.mark.parametrize("start", [0, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_heads_that_threads_share_unevenly(heads, n, start, dtype, monkeypatch) -> None:
    """Bands of dense heads, beside a sparse one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    keys = n + start
    q, k, v = (t.to(dtype) for t in tensors(1, 4, 2, n, keys, 32))
    dense = BlockIndex.dense(heads, -(-n // 128), (128, 128), q.device)
    mask = torch.ones((1, 1, -(-n // 128), -(-keys // 128)), dtype=torch.bool)
    index = BlockIndex.cat([dense, BlockIndex.from_mask(mask, (128, 128))])
    chosen = [*range(heads), 3]
    part = attend(q, k, v, index, q_start=start, heads=chosen, backend="torch")
    seen = torch.arange(keys) <= torch.arange(n)[:, None] + start
    wide = (t.float() for t in (q, k, v))
    want = scaled_dot_product_attention(*wide, attn_mask=seen, enable_gqa=True)[:, chosen]
    off = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(part.out.float(), want, atol=off, rtol=off)


@pytest.mark.interpreter
@pytest.mark.parametrize("option", [*OPTIONS, "skip"])
@pytest.mark.parametrize(
    ("size", "heads", "lengths", "causal", "dtype"),
    [
        ((32, 32), (4, 2), (100, 100, 0), True, torch.float16),
        ((32, 16), (2, 2), (40, 90, 50), True, torch.float32),
        ((16, 48), (2, 1), (40, 90, 0), False, torch.float32),
    ],
)
def test_triton_against_reference(option, size, heads, lengths, causal, dtype) -> None:
    check_call("triton", 1, heads, lengths, 32, size, causal, option, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("head_size", [24, 64, 96, 128, 256])
def test_triton_head_sizes(head_size) -> None:
    check_call("triton", 1, (1, 1), (40, 40, 0), head_size, (32, 32), True, "plain", torch.float16)
    check_call("triton", 1, (1, 1), (40, 40, 0), head_size, (40, 64), False, "plain", None, 16)


def test_skip_by_hand() -> None:
    """Three keys far below the first block's maximum are dropped, mass and all."""
    q = torch.ones(1, 1, 2, 1)
    k = torch.tensor([5.0, 4.0, -3.0, -4.0, 4.5, 0.0]).view(1, 1, 6, 1)
    v = torch.arange(6.0).view(1, 1, 6, 1)
    index = BlockIndex.dense(1, 1, (2, 2), q.device)
    options: dict[str, Any] = {"causal": False, "scale": 1.0, "backend": "reference"}
    part = attend(q, k, v, index, **options, skip=0.01)
    kept = torch.tensor([0, 1, 4, 5])
    p = k[0, 0, kept, 0].exp()
    torch.testing.assert_close(part.out[0, 0, 0, 0], (p * v[0, 0, kept, 0]).sum() / p.sum())
    torch.testing.assert_close(part.lse[0, 0, 0], p.sum().log())
    whole = attend(q, k, v, index, **options)
    torch.testing.assert_close(attend(q, k, v, index, **options, skip=0.0).out, whole.out)
    # The first block a row sees always counts, even when all others are larger.
    last_first = BlockIndex(
        index.start,
        torch.full_like(index.count, 2),
        torch.tensor([1, 0], dtype=torch.int32),
        (2, 2),
    )
    assert attend(q, k, v, last_first, **options, skip=1.0).lse[0, 0, 0] > part.lse[0, 0, 0] - 1


class _Work(TorchDispatchMode):
    """Counts the pairs of queries and keys that attention on a CPU works on."""

    pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(("mm", "bmm", "baddbmm", "matmul")), "attention beside the count"
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            q, k = args[:2]
            causal = (kwargs or {}).get("is_causal", len(args) > 4 and args[4])
            self.pairs += q.shape[:-1].numel() * k.shape[-2] // (2 if causal else 1)
        return func(*args, **(kwargs or {}))


def test_cpu_path_skips_the_work() -> None:
    """8K tokens, a quarter of the blocks: a quarter of dense SDPA's pairs."""
    q, k, v = tensors(1, 2, 2, 8192, 8192, 64)
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 2, 64, 64, generator=g) < 0.24).tril() | torch.eye(64).bool()
    index = BlockIndex.from_mask(mask, (128, 128))
    with _Work() as dense:
        scaled_dot_product_attention(q, k, v, is_causal=True)
    with _Work() as sparse:
        attend(q, k, v, index, backend="torch")
    assert dense.pairs == 2 * 8192 * 8192 // 2
    # Squares on the diagonal count by half, as those below it count fully.
    assert 0.2 < sparse.pairs / dense.pairs < 0.3


def test_number_bias_moves_only_the_lse() -> None:
    q, k, v = tensors(1, 2, 1, 100, 100, 32)
    index = random_index(1, 2, 100, 100, (32, 32))
    for options in ({}, {"rows": [1, 3]}):
        plain = attend(q, k, v, index, **options)
        for backend in ("torch", "reference"):
            moved = attend(q, k, v, replace(index, bias=1.5), **options, backend=backend)
            torch.testing.assert_close(moved.out, plain.out, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(moved.lse, plain.lse + 1.5, atol=1e-5, rtol=1e-5)


def test_writes_only_its_heads_and_rows() -> None:
    q, k, v = tensors(2, 4, 2, 150, 150, 32)
    index = random_index(2, 2, 150, 150, (32, 32))
    for backend in ("torch", "reference"):
        out = torch.full((2, 150, 4, 32), math.nan).transpose(1, 2)
        lse = torch.full((2, 4, 150), math.nan)
        attend(q, k, v, index, heads=(3, 0), rows=[1, 4], out=out, lse=lse, backend=backend)
        written = torch.zeros(2, 4, 150, dtype=torch.bool)
        for rows in (slice(32, 64), slice(128, 150)):
            written[:, [0, 3], rows] = True
        assert torch.equal(~lse.isnan(), written)
        assert torch.equal(~out.isnan().any(-1), written)
        alone = attend(q, k, v, index, heads=(3, 0), rows=[1, 4], backend=backend)
        torch.testing.assert_close(alone.out[:, 0, 32:64], out[:, 3, 32:64])
        assert not alone.out[:, :, :32].any()
        assert (alone.lse[:, :, :32] == -math.inf).all()


def test_key_padding_equals_shorter_keys() -> None:
    q, k, v = tensors(1, 2, 1, 64, 160, 32)
    mask = torch.ones(1, 160, dtype=torch.bool)
    mask[:, 100:] = False
    index = BlockIndex.dense(2, 2, (32, 32), q.device)
    padded = attend(q, k, v, index, causal=False, key_mask=mask)
    short = attend(q, k[:, :, :100], v[:, :, :100], index, causal=False)
    torch.testing.assert_close(padded.out, short.out, atol=1e-5, rtol=1e-5)


def test_permuted_keys_change_nothing() -> None:
    q, k, v = tensors(1, 2, 2, 96, 96, 32)
    pos = permutation(1, 2, 96)
    at = pos.long()[..., None].expand(1, 2, 96, 32)
    index = BlockIndex.dense(2, 3, (32, 32), q.device)
    for backend in ("torch", "reference"):
        moved = attend(q, k.gather(2, at), v.gather(2, at), index, k_pos=pos, backend=backend)
        plain = attend(q, k, v, index, backend=backend)
        torch.testing.assert_close(moved.out, plain.out, atol=1e-5, rtol=1e-5)


def test_explicit_heads_and_kv_map() -> None:
    q, k, v = tensors(1, 4, 2, 64, 64, 32)
    index = BlockIndex.dense(2, 1, (64, 64), q.device)
    part = attend(q, k, v, index, heads=torch.tensor([1, 2]), kv_of_head=[1, 0])
    want = scaled_dot_product_attention(q[:, [1, 2]], k[:, [1, 0]], v[:, [1, 0]], is_causal=True)
    torch.testing.assert_close(part.out, want, atol=1e-5, rtol=1e-5)


def test_backend_choice_has_a_reason(monkeypatch) -> None:
    q, k, v = tensors(1, 2, 1, 64, 64, 32)
    index = BlockIndex.dense(2, 1, (64, 64), q.device)
    assert explain(q, k, v, index).backend == "torch"
    skipped = explain(q, k, v, index, skip=0.1)
    assert skipped.backend == "reference"
    assert "skip" in skipped.reason
    monkeypatch.setenv("ACCELKIT_KERNEL", "reference")
    assert explain(q, k, v, index).backend == "reference"
    monkeypatch.setenv("ACCELKIT_KERNEL", "magic")
    with pytest.raises(InvalidInputError, match="magic"):
        attend(q, k, v, index)
    monkeypatch.delenv("ACCELKIT_KERNEL")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelUnavailableError, match=r"CUDA|not installed"):
        attend(q, k, v, index, backend="triton")


def test_errors_say_what_was_expected() -> None:
    q, k, v = tensors(1, 4, 2, 100, 100, 32)
    index = random_index(1, 4, 100, 100, (32, 32))
    good = {"q": q, "k": k, "v": v, "index": index}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"q": q[0]}, "four dimensions"),
        ({"k": k.half()}, "as q"),
        ({"v": v[:, :, :50]}, "as k"),
        ({"index": random_index(1, 3, 100, 100, (32, 32))}, "4 heads"),
        ({"index": replace(index, blocks=index.blocks.long())}, "int32"),
        ({"heads": [0, 1, 2, 4]}, "0 … 3"),
        ({"kv_of_head": [0, 1]}, "one for each"),
        ({"rows": [4]}, "0 … 3"),
        ({"key_mask": torch.ones(1, 99, dtype=torch.bool)}, r"\(1, 100\)"),
        ({"k_pos": torch.zeros(1, 2, 100, dtype=torch.int32)}, r"1\|4, 100"),
        ({"skip": 1.5}, "0 … 1"),
        ({"out": torch.zeros(1, 4, 100, 16)}, "unit last stride"),
        ({"lse": torch.zeros(1, 4, 100)}, "both or neither"),
        ({"q_start": -1}, "≥ 0"),
    ]
    for change, message in wrong:
        with pytest.raises(InvalidInputError, match=message):
            attend(**(good | change))
    levels = replace(index, pyramid=True)
    with pytest.raises(UnsupportedConfigurationError, match="pyramid"):
        attend(q, k, v, levels)


def test_no_rows_and_no_heads_compute_nothing() -> None:
    q, k, v = tensors(1, 2, 1, 64, 64, 32)
    index = BlockIndex.dense(2, 1, (64, 64), q.device)
    part = attend(q, k, v, index, rows=[])
    assert not part.out.any()
    assert (part.lse == -math.inf).all()
    assert attend(q, k, v, index.take([]), heads=[]).out.shape == (1, 0, 64, 32)


def test_lists_shared_between_heads_and_batch() -> None:
    """Start and count may be stride-0 views, as lists of one KV head for its query heads are."""
    q, k, v = tensors(2, 4, 2, 128, 128, 32)
    one = random_index(1, 2, 128, 128, (32, 32))
    shape = (1, 2, 2, 4)
    start, count = (t[:, :, None].expand(shape).reshape(1, 4, 4) for t in (one.start, one.count))
    shared = replace(one, start=start, count=count)
    alone = replace(
        one, start=one.start[:, :1].expand(2, 4, 4), count=one.count[:, :1].expand(2, 4, 4)
    )
    for index in (shared, alone):
        for backend in ("torch", "triton"):
            got = attend(q, k, v, index, backend=backend)
            want = attend(q, k, v, index, backend="reference")
            torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    assert (alone.count != ALL).all()
