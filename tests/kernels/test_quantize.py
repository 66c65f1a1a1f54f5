"""8-bit operands: what rounding may cost, what smoothing saves, and the fast form against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from accelkit.errors import InvalidInputError
from accelkit.kernels import quantize as q8
from accelkit.kernels.quantize import Rounding, dequantize, grouped, quantize, reference, ungrouped


def operands(smooth: bool = True, qk: str = "int8", pv: str = "fp8", offset: float = 0.0, **change):
    """A call of three heads over 90 tokens: q, k, v as projections leave them, and the options."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 90, h, d, generator=g).half().transpose(1, 2)
        for h, d in ((4, 64), (2, 64), (2, 32))
    )
    k = k + offset * torch.randn(64, generator=g).half()
    options: dict[str, Any] = {
        "qk": qk,
        "pv": pv,
        "smooth_k": smooth,
        "block": 32,
        "scale": 0.125,
        "q_heads": torch.tensor([3, 0, 1], dtype=torch.int32),
        "kv_heads": torch.tensor([1, 0, 0], dtype=torch.int32),
    }
    return (q, k, v), options | change


@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_rounding_stays_within_half_a_step(qk) -> None:
    (q, k, v), options = operands(qk=qk)
    ops = quantize(q, k, v, Rounding(**options))
    got_q, got_k, got_v = dequantize(ops)
    want_q, want_v = q[:, [3, 0, 1]].float(), v.float() - ops.v_mean[:, :, None]
    want_k = k.float() - k.float().mean(2, keepdim=True)
    by_key = ops.k_scale.repeat_interleave(32, -1)[..., :90, None]
    for got, want, scale in (
        (got_q, want_q, ops.q_scale[..., None]),
        (got_k, want_k, by_key),
        (got_v, want_v, ops.v_scale[:, :, None]),
    ):
        if qk == "int8" and got is not got_v:
            step = scale
        else:  # three bits behind the leading one; 2⁻⁹ is the least of all
            step = torch.maximum(want.abs() / 8, scale / 512)
        assert ((got - want).abs() <= step / 2 * 1.001).all()
    assert ops.q.dtype == ops.k.dtype == q8.DTYPE[qk]
    assert ops.v.shape == (2, 2, 32, 96)  # filled up to whole blocks


def test_scales_reach_the_greatest_value() -> None:
    (q, k, v), options = operands(smooth=False)
    ops = quantize(q, k, v, Rounding(**options))
    assert (ops.q.abs().amax(-1) == 127).all()
    last = ops.k[:, :, 64:].abs().amax((-1, -2))  # the ragged block has a scale of its own
    assert (last == 127).all()


def test_smoothing_saves_the_bits_of_an_offset() -> None:
    (q, k, v), options = operands(offset=30.0)
    with_mean, without = (
        dequantize(quantize(q, k, v, Rounding(**options | {"smooth_k": s})))[1]
        for s in (True, False)
    )
    centred = k.float() - k.float().mean(2, keepdim=True)
    error = (with_mean - centred).norm() / centred.norm()
    plain = (without - k.float()).norm() / centred.norm()
    assert error < 0.012
    assert plain > 10 * error
    ops = quantize(q, k, v, Rounding(**options))
    mean = k.float().mean(2)[:, [1, 0, 0]]
    want = torch.einsum("bhnd,bhd->bhn", q[:, [3, 0, 1]].float(), mean) * 0.125
    torch.testing.assert_close(ops.shift, want, atol=1e-4, rtol=1e-5)


def test_token_order_of_values() -> None:
    order = grouped(torch.arange(32))
    assert order[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert ungrouped(order).tolist() == list(range(32))


def test_zeros_stay_zeros() -> None:
    (q, k, v), options = operands()
    ops = quantize(q * 0, k * 0, v * 0, Rounding(**options))
    assert all(not t.any() for t in dequantize(ops))
    assert ops.q_scale.isfinite().all()


def test_wrong_formats_are_named() -> None:
    _, options = operands()
    with pytest.raises(InvalidInputError, match="int4"):
        Rounding(**options | {"qk": "int4"})
    with pytest.raises(InvalidInputError, match="multiple of 16"):
        Rounding(**options | {"block": 24})


@pytest.mark.interpreter
@pytest.mark.parametrize("qk", ["int8", "fp8"])
@pytest.mark.parametrize(("pv", "smooth"), [("fp8", True), ("fp8", False), ("native", True)])
def test_triton_against_torch(qk, pv, smooth) -> None:
    from accelkit.kernels._triton.quantize import quantize as fast

    (q, k, v), options = operands(smooth, qk, pv, offset=3.0)
    got, want = (f(q, k, v, Rounding(**options)) for f in (fast, reference))
    for name in ("q_scale", "k_scale", "shift", "v_scale", "v_mean"):
        one, two = getattr(got, name), getattr(want, name)
        assert (one is None) == (two is None), name
        if one is not None:
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    for name, got_t, want_t in zip("qkv", dequantize(got), dequantize(want), strict=True):
        # The interpreter's cast to fp8 loses a carry into the exponent, in one of forty values.
        exact = pv == "native" if name == "v" else qk == "int8"
        wrong = ((got_t - want_t).abs() > 1e-5).float().mean()
        assert wrong <= (0.0 if exact else 0.04), f"{name}: {wrong:.3f} of the values differ"
