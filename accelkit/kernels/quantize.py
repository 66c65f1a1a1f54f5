"""8-bit operands of an attention call: int8 or fp8 queries and keys, fp8 values.

SageAttention 1 and 2 (2410.02367, 2411.10958). Each query row has its own scale, each block of keys
one, each channel of V one; all are fp32 and cost the attention kernel nothing. Softmax does not see
a vector that is taken from every key, so the mean key goes first (`smooth`): channels with large
offsets would otherwise eat the bits of all others. `q · mean` is handed on for the LSE. V is
centred by its channel means, which come back exactly at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import InvalidInputError
from accelkit.kernels.launch import Launch

TOP = {"int8": 127.0, "fp8": 16.0}
"""Greatest query or key. A sum of 128 products of fp8 stays below 2¹⁵ so: fp16 holds it."""

V_TOP = 448.0
"""Greatest value of V: all that e4m3 has."""

DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

FULL = 256.0
"""The row maximum of P before it is rounded to fp8, whose greatest value is 448."""

_LEAST = 1e-20  # a block of zeros has a scale all the same


@dataclass(frozen=True)
class Operands:
    """What an 8-bit kernel reads.

    `q` `[B, H, Nq, D]` of the call's heads and `k` `[B, Hkv, Nk, D]` with `q_scale` fp32
    `[B, H, Nq]` and `k_scale` fp32 `[B, Hkv, ceil(Nk / block)]`. `shift` fp32 `[B, H, Nq]` is what
    smoothing took from the logits of a row, None without. `v` is as it came, or e4m3
    `[B, Hkv, Dv, M]`, M = Nk filled up to whole blocks, each 16 tokens in `grouped` order, with
    `v_scale` and `v_mean` fp32 `[B, Hkv, Dv]`.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    shift: Tensor | None
    v: Tensor
    v_scale: Tensor | None
    v_mean: Tensor | None
    block: int


@dataclass(frozen=True)
class Rounding:
    """How to round one attention call.

    `qk` is "int8" or "fp8", `pv` "native" or "fp8"; `smooth_k` takes the mean key from all keys;
    `block` keys share a scale, a multiple of 16; `scale` is the factor of the logits, used for
    `shift` only; `q_heads` and `kv_heads`, integer `[H]`, are the heads of q and of k for each head
    of the call.

    Raises `InvalidInputError` for other formats or blocks.
    """

    qk: str
    pv: str
    smooth_k: bool
    block: int
    scale: float
    q_heads: Tensor
    kv_heads: Tensor

    def __post_init__(self) -> None:
        if self.qk not in TOP or self.pv not in ("native", "fp8"):
            raise InvalidInputError(
                f"quantize: qk {self.qk!r} and pv {self.pv!r}, expected int8 or fp8, and native or "
                "fp8"
            )
        if self.block < 16 or self.block % 16:
            raise InvalidInputError(
                f"quantize: block is {self.block}, expected a multiple of 16 keys"
            )


def quantize(q: Tensor, k: Tensor, v: Tensor, how: Rounding) -> Operands:
    """Quantise q `[B, Hq, Nq, D]`, k `[B, Hkv, Nk, D]` and v `[B, Hkv, Nk, Dv]`, any strides."""
    from accelkit.kernels.dispatch import fast_device

    if fast_device(q):
        from accelkit.kernels._triton.quantize import quantize as fast

        return fast(q, k, v, how)
    return reference(q, k, v, how)


def reference(q: Tensor, k: Tensor, v: Tensor, how: Rounding) -> Operands:
    """The same in plain torch."""
    q, k = q[:, how.q_heads.long()].float(), k.float()
    shift = None
    if how.smooth_k:
        mean = k.mean(2, keepdim=True)
        shift = (q * mean[:, how.kv_heads.long()]).sum(-1) * how.scale
        k = k - mean
    q8, q_scale = _rounded(q, how.qk, (-1,))
    n, block = k.shape[2], how.block
    cells = pad(k, (0, 0, 0, -n % block)).unflatten(2, (-1, block))
    k8, k_scale = _rounded(cells, how.qk, (-1, -2))
    k8, q_scale, k_scale = k8.flatten(2, 3)[:, :, :n], q_scale[..., 0], k_scale[..., 0, 0]
    if how.pv == "native":
        return Operands(q8, q_scale, k8.contiguous(), k_scale, shift, v, None, None, block)
    v = v.float()
    v_mean = v.mean(2)
    v_scale = ((v.abs().amax(2) + v_mean.abs()) / V_TOP).clamp(min=_LEAST)
    v8 = ((v - v_mean[:, :, None]) * (1.0 / v_scale)[:, :, None]).to(DTYPE["fp8"]).view(torch.uint8)
    v8 = grouped(pad(v8, (0, 0, 0, -n % block)).mT).contiguous().view(DTYPE["fp8"])
    return Operands(q8, q_scale, k8.contiguous(), k_scale, shift, v8, v_scale, v_mean, block)


def grouped(x: Tensor) -> Tensor:
    """Tokens of the last dimension, each 16 of them in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7
    14 15: the columns of P that a thread holds after QK are then those that the 8-bit product PV
    wants from it. Its own inverse is `ungrouped`.
    """
    return x.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def ungrouped(x: Tensor) -> Tensor:
    """Tokens in their own order again."""
    return x.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)


def dequantize(ops: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, H, Nq, D]`, k (smoothed) and v (without its mean) as the kernel sees them, fp32."""
    n = ops.k.shape[2]
    by_key = ops.k_scale.repeat_interleave(ops.block, -1)[..., :n]
    q, k = ops.q.float() * ops.q_scale[..., None], ops.k.float() * by_key[..., None]
    if ops.v_scale is None:
        return q, k, ops.v.float()
    v = ungrouped(ops.v.view(torch.uint8)).contiguous().view(DTYPE["fp8"]).float()
    return q, k, v.mT[:, :, :n] * ops.v_scale[:, :, None]


def round_probabilities(p: Tensor) -> Tensor:
    """Rows of P `[…, N]` as fp8 holds them: their maximum stands for 2⁸."""
    unit = p.amax(-1, keepdim=True).clamp(min=_LEAST) / FULL
    return (p / unit).to(DTYPE["fp8"]).to(p.dtype) * unit


def rounding_of(launch: Launch) -> Rounding:
    """How a checked launch wants to be rounded."""
    return Rounding(
        launch.qk, launch.pv, launch.smooth_k, block_of(launch.index.size[1]), launch.scale,
        launch.q_heads, launch.kv_heads,
    )  # fmt: skip


def block_of(bk: int) -> int:
    """Keys that share a scale under units of `bk` keys: the greatest power of two that divides it,
    at most 128.
    """
    return min(bk & -bk, 128)


def _rounded(x: Tensor, form: str, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """8-bit values and the scale that they share over `dims` (kept).

    Half of the greatest value lies on the edge of an int8 step, and few bits of input hit it often:
    each operation here is rounded by itself, and the Triton form has the same ones.
    """
    scale = (x.abs().amax(dims, keepdim=True) * (1.0 / TOP[form])).clamp(min=_LEAST)
    x = x * (1.0 / scale)
    return (x.round() if form == "int8" else x).to(DTYPE[form]), scale
