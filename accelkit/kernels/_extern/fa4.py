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

from accelkit.kernels._extern import common
from accelkit.kernels.index import ceil_div
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
        or common.device_refusal(launch.q.device)
        or common.tensors_refusal(launch)
        or _shapes(launch)
        or common.options_refusal(launch)
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


def block_sparse(launch: Launch) -> None:
    """Write `launch.out` and `launch.lse`."""
    forward, lists = _package()
    q, k, v, out, lse = common.parts(launch)
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
