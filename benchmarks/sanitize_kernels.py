"""One small launch of every kernel, for NVIDIA's compute-sanitizer.

    python benchmarks/sanitize_kernels.py        # compiles the kernels, so that the next is short
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python benchmarks/sanitize_kernels.py

Lengths are ragged and lists have dense, empty and clipped rows. Without the caching allocator every
tensor is an allocation of its own, so that a read beyond one is seen.

`--tool racecheck` reports hazards in all warp-specialised kernels, `--tool synccheck` errors in the
one that skips, and both report the same in the kernels of `attention.warps`, which do nothing else:
see `docs/kernel-limits.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from accelkit.errors import KernelUnavailableError, UnsupportedConfigurationError
from accelkit.kernels import dispatch, pyramid, scores, select
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex, ceil_div, plain_inputs
from accelkit.kernels.merge import merge
from accelkit.kernels.permute import put_rows, take_rows

HEADS, KV_HEADS, N = 4, 2, 500
OPTIONS = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "skip": {"causal": True, "skip": 0.01},
    "int8, fp8": {"causal": True, "qk": "int8", "pv": "fp8", "smooth_k": True},
    "fp8, fp8": {"causal": False, "qk": "fp8", "pv": "fp8"},
    "int8": {"causal": False, "qk": "int8"},
    "fp8": {"causal": True, "qk": "fp8", "smooth_k": True},
}


def tensors(d: int) -> list[Tensor]:
    sizes = [(2, N, h, d) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, device="cuda").bfloat16().transpose(1, 2) for s in sizes]


def lists(size: tuple[int, int], nk: int | None = None) -> BlockIndex:
    """Random blocks, or entries of `nk`, with one empty and one dense row."""
    nq, nk = ceil_div(N, size[0]), nk or ceil_div(N, size[1])
    index = BlockIndex.from_mask(torch.rand(2, HEADS, nq, nk, device="cuda") < 0.4, size)
    count = index.count.clone()
    count[:, 0, 1], count[:, 1, 1] = 0, ALL
    return BlockIndex(index.start, count, index.blocks, size)


def attention(d: int) -> Iterator[tuple[str, Callable[[], object]]]:
    q, k, v = tensors(d)
    for size in ((128, 128), (64, 64), (128, 1)):
        index = lists(size)
        for name, options in OPTIONS.items():
            for backend in dispatch.KERNELS:
                run = partial(attend, q, k, v, index, backend=backend, **options)
                yield f"{backend}, d{d}, {size}, {name}", run
        biased = replace(index, bias=torch.rand(1, HEADS, N, device="cuda"))
        levels = replace(lists(size, pyramid.firsts(N, size[1])[-1]), pyramid=True)
        for backend in dispatch.KERNELS:
            run = partial(attend, q, k, v, biased, backend=backend)
            yield f"{backend}, d{d}, {size}, biased keys", run
            if size[1] > 1:
                run = partial(attend, q, k, v, levels, causal=False, backend=backend)
                yield f"{backend}, d{d}, {size}, levels", run


def estimators() -> Iterator[tuple[str, Callable[[], object]]]:
    q, k, v = tensors(128)
    call, size = plain_inputs(q, k, v, causal=True), (128, 128)
    pooled = scores.pooled(call, size)
    p, mask = select.probabilities(pooled), pooled > 0
    probe, anchor = scores.probe(call), scores.anchor_max(call, 128, 256)
    columns, offsets = probe.columns.topk(20).indices, probe.diagonals.topk(20).indices
    order = torch.randperm(N, device="cuda").int()[None]
    parts = [attend(q, k, v, lists(size), backend="triton") for _ in range(2)]
    yield "helper, pooled", lambda: scores.pooled(call, size)
    yield "helper, probe", lambda: scores.probe(call)
    yield "helper, rows by block mean", lambda: scores.rows_by_block_mean(call, size)
    yield "helper, strided", lambda: scores.strided(call, 8, size)
    yield "helper, block mass", lambda: scores.block_mass(call, None, size, rows=[0, 3])
    yield "helper, sampled maxima", lambda: scores.sampled_max(call, size)
    yield "helper, self-similarity", lambda: scores.self_similarity(call.k, 128)
    yield "helper, anchors", lambda: scores.anchor_max(call, 128, 256)
    yield "helper, stripes", lambda: scores.stripes(call, anchor, 2.75, 128, 256)
    yield "helper, top keys of a tile", lambda: scores.tile_top_k(call, 32, 0.1)
    yield "helper, top k", lambda: select.top_k(pooled, 2)
    yield "helper, top p", lambda: select.top_p(p, 0.9)
    yield "helper, global top p", lambda: select.global_top_p(p, 0.9)
    yield "helper, compact", lambda: select.compact(mask, size)
    yield "helper, vertical slash", lambda: select.vertical_slash(call, columns, offsets)
    yield "helper, merge", lambda: merge(parts)
    yield "helper, permute", lambda: put_rows(q.clone(), take_rows(q, order), order)


def handing_over() -> Iterator[tuple[str, Callable[[], object]]]:
    """What Triton does around the parts of a warp-specialised kernel, without a kernel."""
    if torch.cuda.get_device_capability()[0] != 9:
        return
    from attention import warps

    out = torch.empty(2, dtype=torch.int32, device="cuda")
    yield "warps, nothing shared", lambda: warps.apart[(2,)](out)
    yield "warps, one number handed over", lambda: warps.handed[(2,)](out)
    yield "warps, one number relayed", lambda: warps.relayed[(2,)](out)
    yield "warps, arriving and waiting", lambda: warps.met[(2,)](out, warps.ARRIVE, warps.SYNC)
    yield "warps, waiting at two places", lambda: warps.met[(2,)](out, warps.SYNC, warps.SYNC)
    yield "warps, voting at two places", lambda: warps.met[(2,)](out, warps.VOTE, warps.VOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    torch.manual_seed(0)
    work = [*handing_over(), *(case for d in args.width for case in attention(d)), *estimators()]
    ran, begin = 0, time.monotonic()
    for name, run in work:
        if args.only not in name:
            continue
        try:
            run()
        except (KernelUnavailableError, UnsupportedConfigurationError):  # not for this backend
            continue
        torch.cuda.synchronize()
        ran += 1
        print(f"{time.monotonic() - begin:.1f} s {name}", flush=True)
    print(f"{ran} launches ran")


if __name__ == "__main__":
    main()
