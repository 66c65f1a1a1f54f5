"""Host side of the warp-specialised Hopper kernel: what it serves and how it is started."""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels._triton.lower import Work, lower
from accelkit.kernels._triton.tile import (
    LOG2E,
    common_refusal,
    describable,
    next_power_of_two,
    one_masked,
    table,
)
from accelkit.kernels._triton.tuned import tuned
from accelkit.kernels.index import capability
from accelkit.kernels.launch import Launch

BM = 128
"""Query rows of a tile: 64 for each of two consumer warpgroups."""
WIDEST = 128
"""Most keys of a tile."""
SWIZZLE = 64
"""Columns that one swizzle of shared memory spans (`gluon_tiles.WIDTH`)."""


def refusal(launch: Launch) -> str | None:
    """Why this kernel cannot serve a launch, or None."""
    q, v = launch.q, launch.v
    if reason := refused_here(launch):
        return reason
    if launch.index.size[1] % 64:
        return f"units of {launch.index.size} tokens do not divide into tiles of {BM} × 64"
    if launch.skip is not None and padded(q) != padded(v):
        return f"it skips at equal head sizes and these are {q.shape[3]} and {v.shape[3]}"
    return None


def refused_here(launch: Launch) -> str | None:
    """Why no warp-specialised kernel can serve a launch, or None."""
    (bq, bk), q, v = launch.index.size, launch.q, launch.v
    reason = missing() or common_refusal(launch)
    if reason is None and (not q.is_cuda or capability(q.device)[0] != 9):
        reason = f"it is for Hopper GPUs and the tensors are on {q.device}"
    if reason is not None:
        return reason
    if q.dtype == torch.float32 or launch.out.dtype != q.dtype:
        return f"it takes and gives fp16 or bf16, not {q.dtype} and {launch.out.dtype}"
    if launch.qk != "native":
        return "it multiplies in the inputs' own precision"
    if bq % BM:
        return f"units of {bq} × {bk} tokens do not divide into tiles of {BM} rows"
    if max(q.shape[3], v.shape[3]) > 128:
        return f"head size {max(q.shape[3], v.shape[3])} is above 128"
    if launch.q_pos is not None or launch.k_pos is not None:
        return "it takes no positions and no key mask"
    if isinstance(launch.bias, Tensor) and launch.skip is not None:
        return "it takes no bias of single keys where it skips"
    if launch.scale <= 0:
        return f"the scale {launch.scale} is not positive"
    if not all(describable(t) for t in (q, launch.k, v, launch.out)):
        return "q, k, v or out is not aligned to 16 bytes"
    return None


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the kernel cannot be built at all, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("accelkit.kernels._triton.gluon_kernel")
    except (ImportError, AttributeError) as error:
        return f"this triton has no Gluon for Hopper ({error})"
    return None


def block_sparse(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`. With `skip` each half of 64 query rows votes alone."""
    with torch.cuda.device_of(launch.q):
        if launch.skip is None:
            run(launch, lower(launch))
        else:
            run_skipping(launch, lower(launch, in_order=True))


def run(
    launch: Launch, work: Work, stages: int | None = None, mode: str = "lag", q_stages: int = 2
) -> None:
    """Start the kernel over lowered work."""
    from accelkit.kernels._triton import gluon_kernel

    # Without a causal edge a row has one partly visible entry at most, so that two entries of half
    # a tile can share one.
    pairs = launch.index.size[1] == WIDEST // 2 and not launch.causal
    common, constants = _arguments(launch, work, WIDEST if pairs else _keys(launch))
    bias, by = None, ""
    if isinstance(launch.bias, Tensor):
        bias, by = launch.bias, "entry" if launch.index.bias_by_entry else "key"
        bias = bias if bias.stride(2) == 1 else bias.contiguous()
    where, *steps = table(bias, launch.lse)
    if stages is None:
        stages, q_stages, mode = _tuned(
            "gluon" if launch.causal else "gluon_full", launch, constants
        )
    gluon_kernel.block_sparse[grid(launch, work)](
        *common, where, *launch.lse.stride(), *steps[:2], *_sizes(launch, work), **constants,
        EXTRA_MASKED=not (pairs or one_masked(launch, constants["BN"])),
        BIAS_BY=by, STAGES=stages, Q_STAGES=q_stages, MODE=mode, num_warps=4,
    )  # fmt: skip


def run_skipping(launch: Launch, work: Work, stages: int | None = None) -> None:
    """Start the kernel that skips over work lowered in list order."""
    from accelkit.kernels._triton import gluon_skip

    common, constants = _arguments(launch, work, _keys(launch))
    gluon_skip.skipping[grid(launch, work)](
        *common, launch.skip, *launch.lse.stride(), *_sizes(launch, work), **constants,
        STAGES=stages or _tuned("gluon_skip", launch, constants), num_warps=4,
    )  # fmt: skip


def _tuned(kernel: str, launch: Launch, constants: dict[str, Any]) -> Any:
    width = max(constants["BD"], constants["BDV"])
    return tuned(kernel, launch.q.device, width, (BM, constants["BN"]))


def padded(t: Tensor) -> int:
    return max(64, next_power_of_two(t.shape[3]))


def grid(launch: Launch, work: Work) -> tuple[int]:
    return (min(items(launch, work), _processors(launch.q.device)),)


def items(launch: Launch, work: Work) -> int:
    return work.items.shape[0] * (launch.index.size[0] // BM)


def _keys(launch: Launch) -> int:
    """Keys of a tile, which divides an entry."""
    return WIDEST if launch.index.size[1] % WIDEST == 0 else WIDEST // 2


def _arguments(launch: Launch, work: Work, bn: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The tensors and the constants that both kernels take, for tiles of `bn` keys."""
    (bq, bk), q, k, v = launch.index.size, launch.q, launch.k, launch.v
    bd, bdv = padded(q), padded(v)
    # A tile of two entries is copied by halves, and in columns as it lies in shared memory.
    box = (bn, bd, bdv) if bk >= bn else (bk, SWIZZLE, SWIZZLE)
    tensors = (
        descriptor(q, BM // 2, bd), descriptor(k, *box[:2]), descriptor(v, *box[::2]),
        descriptor(launch.out, BM // 2, bdv), launch.lse, work.items, work.lists,
        launch.q_heads, launch.kv_heads, launch.out_heads,
    )  # fmt: skip
    constants = {
        "BQ": bq, "BK": bk, "BM": BM, "BN": bn, "BD": bd, "BDV": bdv, "CAUSAL": launch.causal,
    }  # fmt: skip
    return tensors, constants


def _sizes(launch: Launch, work: Work) -> tuple[Any, ...]:
    return (
        items(launch, work), launch.n_q, launch.n_k, launch.q_start, work.capacity,
        launch.scale * LOG2E,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def layout(rows: int, width: int, dtype: torch.dtype):
    """How a tile lies in shared memory."""
    from triton.experimental.gluon import language as gl

    kind = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], kind)


def descriptor(t: Tensor, rows: int, width: int):
    """What the bulk copy engine needs to know of `[B, H, N, D]`, in boxes of `rows × width`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(
        t, list(t.shape), list(t.stride()), [1, 1, rows, width], layout(rows, width, t.dtype)
    )
