"""What rounding to 8 bits may do to operands and to a result: bounds that follow from the steps.

An operand lies within half a step of what it stands for: of its scale in int8, of its own power of
two in e4m3 (three bits behind the leading one, 2⁻⁹ of the scale at least). Given the operands, a
kernel may differ from fp64 by what its sums lose and by the rounding of P.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from accelkit.kernels.launch import Launch
from accelkit.kernels.quantize import TOP, Operands, dequantize

E4M3 = 2.0**-4
"""Greatest relative error of rounding to e4m3."""
SUBNORMAL = 2.0**-10
"""Half a step of the least e4m3 values."""
PRODUCTS = {"int8": 2.0**-20, "fp8": 2.0**-12}
"""Loss of a sum of products against the sum of their magnitudes. Hopper's tensor cores keep 14 bits
of fp8 products; integers are exact, and their factor and maximum are fp32."""
SLACK = 2e-5
"""fp32 exponentials and sums of rows."""


class Limits(NamedTuple):
    """How far outputs `[…, Dv]` and LSE may be from fp64 on the same operands."""

    out: Tensor
    lse: Tensor


def limits(rows: Any, out: Tensor, ops: Operands, launch: Launch) -> Limits:
    """For a batch entry and head as `fuzz_kernels.Rows` has them, and its output `[N, Dv]`.

    The Hopper kernel reads int8 scores as floats around 1.5 · 2²³, so logits are off by up to one
    step of the integers.
    """
    seen = rows.logits > -torch.inf
    size = (rows.q.abs() @ rows.k.abs().T).masked_fill(~seen, 0.0).amax(-1) * launch.scale
    off = size * PRODUCTS[launch.qk]
    if launch.qk == "int8":
        step = ops.k_scale[rows.batch, rows.kv_head].max()
        off = off + ops.q_scale[rows.batch, rows.slot] * step * launch.scale
    lse = rows.lse + (0.0 if ops.shift is None else ops.shift[rows.batch, rows.slot])
    half = torch.finfo(launch.out.dtype).eps / 2
    share = E4M3 if ops.v_scale is not None else half
    most = (rows.p @ rows.v.abs()) * (1.01 * share + 2 * off[:, None] + SLACK)
    if ops.v_scale is not None:  # the row's maximum stands for 2⁸
        most += rows.p.amax(-1, keepdim=True) * (SUBNORMAL / 2**8) * (seen.double() @ rows.v.abs())
    return Limits(
        most + 1.01 * half * out.abs() + 1e-30,
        off + SLACK * (1 + lse.masked_fill(lse == -torch.inf, 0.0).abs()),
    )


def misrounded(launch: Launch, ops: Operands) -> str | None:
    """What is wrong with the operands of a call, or None."""
    q = launch.q[:, launch.q_heads.long()].double()
    k, v = launch.k.double(), launch.v.double()
    mean = k.mean(2, keepdim=True) if ops.shift is not None else torch.zeros_like(k[:, :, :1])
    got_q, got_k, got_v = dequantize(ops)
    by_key = ops.k_scale.repeat_interleave(ops.block, -1)[..., : launch.n_k, None]
    top = TOP[launch.qk]
    wrong = [
        _off("q", got_q, q, ops.q_scale[..., None], launch.qk, 0.0),
        _off("k", got_k, k - mean, by_key, launch.qk, 1e-6 * k.abs().amax()),
    ]
    if bool((ops.q_scale * top - q.abs().amax(-1)).abs().gt(1e-6 * q.abs().amax(-1) + 1e-18).any()):
        wrong.append("scales of q are not its greatest values")
    if ops.shift is not None:
        of_head = mean[:, launch.kv_heads.long()]
        near = (q.abs() * of_head.abs()).sum(-1) * launch.scale * 1e-5 + 1e-6
        gap = (ops.shift - (q * of_head).sum(-1) * launch.scale).abs()
        wrong.append("shift of the logits is wrong" if bool((gap > near).any()) else None)
    if ops.v_scale is not None:
        slack = 1e-6 * v.abs().amax()
        rest = v - ops.v_mean[:, :, None]
        wrong.append(_off("v", got_v, rest, ops.v_scale[:, :, None], "fp8", slack))
        off = (ops.v_mean - v.mean(2)).abs().amax()
        wrong.append("means of v are wrong" if bool(off > 10 * slack) else None)
    return "; ".join(filter(None, wrong)) or None


def _off(name: str, got: Tensor, want: Tensor, scale: Tensor, form: str, slack: Any) -> str | None:
    """Whether some value is further than half a step from what it stands for."""
    half = scale / 2 if form == "int8" else torch.maximum(want.abs() * E4M3, scale * SUBNORMAL)
    share = float(((got - want).abs() / (half * 1.001 + slack)).max())
    return f"{name} is {share:.2f} half steps from what it stands for" if share > 1 else None
