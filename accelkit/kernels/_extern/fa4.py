"""flash-attn-4's block-sparse forward (CuTe DSL, `pip install "accelkit[fa4]"`) as a backend.

Every row of the index becomes two padded lists: blocks that all of its queries see wholly, which
run without masks, and the few that touch the diagonal or the ragged end, which run first. The lists
are made on the device and kept with the index.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels.index import capability, ceil_div
from accelkit.kernels.launch import Launch


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why the package cannot be used, or None."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return 'flash-attn-4 is not installed: pip install "accelkit[fa4]"'
    return None


def refusal(launch: Launch) -> str | None:
    """Why this backend cannot serve a launch, or None."""
    return (
        missing()
        or _device(launch.q.device)
        or _tensors(launch)
        or _shapes(launch)
        or _options(launch)
    )


def _shapes(launch: Launch) -> str | None:
    q, v, (bq, bk) = launch.q, launch.v, launch.index.size
    if any(n > 128 or n % 8 for n in (q.shape[3], v.shape[3])):
        return f"head sizes {q.shape[3]} and {v.shape[3]} are not multiples of 8 up to 128"
    if bq % 64 or bk not in (64, 128):
        return f"units of {bq} × {bk} tokens are not multiples of 64 × (64 or 128)"
    if launch.causal and launch.q_start != launch.n_k - launch.n_q:
        return "the last query is not at the last key"
    return None


def _device(device: torch.device) -> str | None:
    """Why it is not tried on a device, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device and the tensors are on {device}"
    if (found := capability(device)) != (9, 0):
        return f"it is tried on sm_90 only and this device is sm_{found[0]}{found[1]}"
    return None


def _tensors(launch: Launch) -> str | None:
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


def _options(launch: Launch) -> str | None:
    """Plain attention over blocks of whole groups of heads."""
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


def block_sparse(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`."""
    forward, lists = _package()
    q, k, v, out, lse = parts(launch)
    masked, masked_blocks, clean, clean_blocks = _lists(launch)
    with torch.cuda.device_of(launch.q):
        forward(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            softmax_scale=launch.scale,
            mask_mod=_causal() if launch.causal else None,
            block_sparse_tensors=lists(
                masked, masked_blocks, clean, clean_blocks, block_size=launch.index.size
            ),
            out=out.transpose(1, 2),
            lse=lse,
        )


@lru_cache(maxsize=1)
def _package() -> tuple[Any, Any]:
    """The forward function, and the type that holds its lists."""
    # What it says about itself whenever it compiles a kernel.
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted")
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd, BlockSparseTensorsTorch


@lru_cache(maxsize=1)
def _causal() -> Any:
    """Key `j` is visible to row `i` if it is not later, the last row being at the last key."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute import utils

    @cute.jit
    def mask(batch, head, row, key, lengths, tensors):  # type: ignore[no-untyped-def]
        begin = utils.scalar_to_ssa(lengths.seqlen_k - lengths.seqlen_q, cutlass.Int32)
        return row + begin >= key

    return mask


def _lists(launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts `[B|1, H, nq]` and ids `[B|1, H, nq, n]` of the masked and of the clean blocks."""
    from accelkit.kernels._triton import lower

    index, heads = launch.index, launch.head_ids or ()
    key = ("fa4", launch.n_q, launch.n_k, launch.causal, heads)
    found = index.lowered.get(key)
    if found is None:
        if list(heads) != sorted(heads):
            # Sorted on the device: a table from the host would have to be copied.
            at = launch.q_heads.argsort()
            index = replace(index, start=index.start[:, at], count=index.count[:, at])
        (batch, count, rows), (bq, bk) = index.count.shape, index.size
        one = replace(launch, index=index, q=launch.q[:batch])
        apart = ceil_div(bq, bk) + 2 if launch.causal else 1  # blocks that a diagonal can touch
        lists, counts = lower.lists_of(one, apart)
        ids = lists.view(batch, count, rows, launch.key_blocks + apart)
        masked, clean = counts[:2].view(2, batch, count, rows)
        most = launch.key_blocks
        found = masked, ids[..., most : most + min(apart, most)], clean, ids[..., :most]
        if lists.numel() * 4 <= lower._KEEP_BYTES:
            launch.index.lowered[key] = found
    return found
