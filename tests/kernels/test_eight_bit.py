"""Attention in 8 bits: what rounding costs, fast form against reference, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import permutation, random_index, tensors

from accelkit.errors import (
    InvalidInputError,
    KernelUnavailableError,
    UnsupportedConfigurationError,
)
from accelkit.kernels import dispatch
from accelkit.kernels.dispatch import attend, explain
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.prepare import prepare

PRECISIONS = [("int8", "native"), ("fp8", "native"), ("int8", "fp8"), ("fp8", "fp8")]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("qk", "pv", "limit"),
    [
        ("int8", "native", 0.012),
        ("fp8", "native", 0.04),
        ("int8", "fp8", 0.045),
        ("fp8", "fp8", 0.06),
    ],
)
def test_reference_rounds_as_much_as_the_formats_do(qk, pv, limit) -> None:
    """Random data of unit variance has no average that would hide the rounding of V."""
    q, k, v = tensors(2, 4, 2, 200, 200, 64)
    index = random_index(2, 4, 200, 200, (32, 32), dense_heads=(1,), empty_rows=(2,))
    exact = attend(q, k, v, index)
    got = attend(q, k, v, index, qk=qk, pv=pv, smooth_k=True)
    assert limit / 4 < error(got.out, exact.out) < limit
    torch.testing.assert_close(got.lse, exact.lse, atol=0.15, rtol=0.02)
    empty = exact.lse == -math.inf
    assert empty.any()
    assert not got.out[empty].any()
    assert (got.lse[empty] == -math.inf).all()


def test_smoothing_saves_int8_from_offsets() -> None:
    q, k, v = tensors(1, 4, 2, 200, 200, 64)
    k = k + 20 * torch.randn(64)
    index = BlockIndex.dense(4, 7, (32, 32), q.device)
    exact = attend(q, k, v, index)
    smooth, plain = (attend(q, k, v, index, qk="int8", smooth_k=s) for s in (True, False))
    assert error(smooth.out, exact.out) < 0.015
    assert error(plain.out, exact.out) > 5 * error(smooth.out, exact.out)
    torch.testing.assert_close(smooth.lse, exact.lse, atol=0.05, rtol=1e-3)


def test_equal_values_come_back_whole() -> None:
    """Every average of equal values is that value: V is centred before it is rounded."""
    q, k, _ = tensors(1, 2, 1, 100, 100, 64)
    v = torch.randn(1, 1, 1, 64).expand(1, 1, 100, 64)
    index = BlockIndex.dense(2, 4, (32, 32), q.device)
    part = attend(q, k, v, index, qk="int8", pv="fp8", smooth_k=True)
    torch.testing.assert_close(part.out, v.expand(1, 2, 100, 64), atol=1e-5, rtol=1e-5)


def options_of(option: str, heads: int, n_q: int, n_k: int, q_start: int, index: BlockIndex):
    options: dict[str, Any] = {}
    if option == "bias":
        index = replace(index, bias=torch.randn(1, heads, n_k))
    elif option == "positions":
        options = {
            "k_pos": permutation(1, heads, n_k, 5),
            "q_pos": permutation(2, 1, n_q, 3) + q_start,
        }
    elif option == "key_mask":
        options["key_mask"] = torch.ones(2, n_k, dtype=torch.bool)
        options["key_mask"][0, : n_k // 3] = False
    elif option == "rows":
        options["rows"] = [0, index.rows - 1]
    elif option == "heads":
        options = {"heads": [2, 0], "kv_of_head": [1, 0]}
        index = index.take([0, 1])
    return options, index


@pytest.mark.interpreter
@pytest.mark.parametrize(("qk", "pv"), PRECISIONS)
@pytest.mark.parametrize(
    ("size", "lengths", "causal", "head_size", "option"),
    [
        ((64, 64), (100, 100, 0), True, 64, "plain"),
        ((64, 32), (70, 150, 80), True, 128, "plain"),
        ((64, 32), (70, 150, 0), False, 64, "heads"),
    ],
)
def test_triton_against_reference(qk, pv, size, lengths, causal, head_size, option) -> None:
    check(qk, pv, size, lengths, causal, head_size, option)


@pytest.mark.interpreter
@pytest.mark.parametrize("option", ["bias", "positions", "key_mask", "rows"])
def test_triton_options(option) -> None:
    check("int8", "native", (64, 32), (100, 100, 0), True, 64, option)
    check("int8", "fp8", (64, 64), (100, 100, 0), False, 64, option)


def check(qk, pv, size, lengths, causal, head_size, option) -> None:
    n_q, n_k, q_start = lengths
    q, k, v = tensors(2, 4, 2, n_q, n_k, head_size, torch.float16)
    k, v = k + 2 * torch.randn(head_size).half(), v + torch.randn(head_size).half()
    index = random_index(2, 4, n_q, n_k, size, dense_heads=(1,), empty_rows=(1,))
    options, index = options_of(option, 4, n_q, n_k, q_start, index)
    options |= {"causal": causal, "q_start": q_start, "qk": qk, "pv": pv, "smooth_k": True}
    if option != "heads":
        shape = (2, n_q, 4, head_size)
        options["out"] = torch.full(shape, math.nan, dtype=torch.float16).transpose(1, 2)
        options["lse"] = torch.full((2, 4, n_q), math.nan)
    got = attend(q, k, v, index, **options, backend="triton")
    got = Partial(got.out.clone(), got.lse.clone())
    want = attend(q, k, v, index, **options, backend="reference")
    torch.testing.assert_close(got.lse, want.lse, atol=2e-2 if qk == "fp8" else 1e-3, rtol=1e-3)
    seen = want.lse > -math.inf
    # The interpreter's cast to fp8 halves one value in forty.
    limit = {"int8/native": 1e-3, "fp8/native": 2e-2}.get(f"{qk}/{pv}", 4e-2)
    assert error(got.out[seen], want.out[seen]) < limit
    assert not got.out[want.lse == -math.inf].any()


def test_wishes_are_served_or_refused() -> None:
    q, k, v = tensors(1, 2, 1, 64, 64, 32)
    index = BlockIndex.dense(2, 1, (64, 64), q.device)
    choice = explain(q, k, v, index, qk="int8", smooth_k=True)
    assert choice.backend == "reference"
    assert "8-bit" in choice.reason
    with pytest.raises(InvalidInputError, match="native, int8 or fp8"):
        attend(q, k, v, index, qk="int4")
    stripes = BlockIndex.dense(2, 1, (64, 1), q.device)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"qk": "native", "pv": "fp8"}, "8-bit scores"),
        ({"pv": "int8"}, "no int8 form"),
        ({"skip": 0.1}, "skip runs"),
        ({"index": stripes}, "multiple of 16 keys"),
    ]
    for change, message in refused:
        options = {"index": index, "qk": "int8"} | change
        with pytest.raises(UnsupportedConfigurationError, match=message):
            attend(q, k, v, **options)


def test_no_other_kernel_takes_a_rounded_call(monkeypatch) -> None:
    """On a GPU: the 8-bit kernel or an error, never 16-bit kernels or the slow reference."""
    q, k, v = tensors(1, 2, 1, 64, 64, 64, torch.float16)
    index = BlockIndex.dense(2, 1, (64, 64), q.device)
    low = prepare(q, k, v, index, qk="int8")
    for name in ("gluon", "fa4"):
        assert dispatch.KERNELS[name](low)
        with pytest.raises(KernelUnavailableError, match=name):
            attend(q, k, v, index, qk="int8", backend=name)
    on_gpu = SimpleNamespace(q=SimpleNamespace(device=torch.device("cuda")), qk="int8", pv="fp8")
    for refusal in (None, "head size 80"):
        monkeypatch.setattr(dispatch, "triton_refusal", lambda _, why=refusal: why)
        if refusal is None:
            assert dispatch.choose(on_gpu).backend == "triton"
            continue
        with pytest.raises(KernelUnavailableError, match=r"int8.*head size 80"):
            dispatch.choose(on_gpu)


def test_what_the_kernel_refuses() -> None:
    q, k, v = tensors(1, 2, 1, 64, 64, 80, torch.float16)
    index = BlockIndex.dense(2, 1, (64, 64), q.device)
    assert "head sizes 64 and 128" in str(eight_bit_refusal(q, k, v, index))
    q, k, v = (t[..., :64] for t in (q, k, v))
    assert eight_bit_refusal(q, k, v, index) is None
    assert "fp16 and bf16" in str(eight_bit_refusal(q.float(), k.float(), v.float(), index))
    small = BlockIndex.dense(2, 2, (32, 64), q.device)
    assert "64 × 32" in str(eight_bit_refusal(q, k, v, small))


def eight_bit_refusal(q, k, v, index: BlockIndex) -> str | None:
    return dispatch.triton_refusal(prepare(q, k, v, index, qk="int8"))
