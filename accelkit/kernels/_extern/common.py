"""What kernels of other packages ask of a launch."""

from __future__ import annotations

import torch
from torch import Tensor

from accelkit.kernels.index import capability
from accelkit.kernels.launch import Launch


def device_refusal(device: torch.device) -> str | None:
    """Why no kernel of another package is tried on a device, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device and the tensors are on {device}"
    if (found := capability(device)) != (9, 0):
        return f"it is tried on sm_90 only and this device is sm_{found[0]}{found[1]}"
    return None


def tensors_refusal(launch: Launch) -> str | None:
    """Half precision in and out, rows that the bulk copy engine can read."""
    q, k, v, out = launch.q, launch.k, launch.v, launch.out
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype} is neither fp16 nor bf16"
    if out.dtype != q.dtype:
        return f"the output is {out.dtype} and the inputs are {q.dtype}"
    if launch.n_k == 0:
        return "there are no keys"
    for name, t in (("q", q), ("k", k), ("v", v), ("out", out)):
        if t.stride(-1) != 1 or any(s % 8 for s in t.stride()[:-1]) or t.data_ptr() % 16:
            return f"{name} does not lie at 16-byte steps"
    if launch.lse.stride(-1) != 1:
        return "the LSE is strided along the tokens"
    return None


def options_refusal(launch: Launch) -> str | None:
    """Plain attention over blocks of whole groups of heads."""
    if launch.qk != "native":
        return "it multiplies in the inputs' own precision"
    if launch.q_pos is not None or launch.k_pos is not None:
        return "rows or keys have positions of their own, or padding"
    for name in ("rows", "skip"):
        if getattr(launch, name) is not None:
            return f"it has no {name}"
    if isinstance(launch.bias, Tensor):
        return "it has no bias for each key"
    if launch.scale <= 0:
        return f"the scale {launch.scale} is not positive"
    if not launch.head_ids:
        return "the KV heads of the query heads are not known without reading the device"
    heads, (first, end) = launch.head_ids, span(launch)
    if sorted(heads) != list(range(first, end)):
        return "the heads are not whole groups that follow one another"
    if launch.out_heads is not launch.q_heads and list(heads) != sorted(heads):
        return "the output has another order than the heads"
    return None


def span(launch: Launch) -> tuple[int, int]:
    """Query heads from the first to the last group that takes part."""
    group, heads = launch.q.shape[1] // launch.k.shape[1], launch.head_ids or ()
    return min(heads) // group * group, (max(heads) // group + 1) * group


def parts(launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, out and LSE of the heads that take part, views `[B, H, N, …]`."""
    first, end = span(launch)
    group = launch.q.shape[1] // launch.k.shape[1]
    mine, theirs = slice(first, end), slice(first // group, end // group)
    out, lse = launch.out, launch.lse
    if out.shape[1] == launch.q.shape[1]:  # given for all heads
        out, lse = out[:, mine], lse[:, mine]
    q, k, v = launch.q[:, mine], launch.k[:, theirs], launch.v[:, theirs]
    return q.detach(), k.detach(), v.detach(), out, lse
