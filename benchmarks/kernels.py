"""Attention kernels against the best dense path and compiled flex_attention, on one GPU.

    python benchmarks/kernels.py --out results.json [--sweep]

Random normal data; medians of interleaved repetitions timed by device events. `kernel` is the
attention kernel over a lowered index, `call` the whole of `attend` with a fresh index (checks,
lowering, sort). TFLOP/s count executed blocks. Every timed kernel is first compared with an fp32
reference on a few query tiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accelkit.kernels._triton import block_sparse as kernel
from accelkit.kernels._triton.lower import lower
from accelkit.kernels._triton.tile import Tile
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex
from accelkit.kernels.prepare import prepare


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int
    causal: bool


LLM = Shape("causal 32K, 32/8 heads, d128", 1, 32, 8, 32768, 128, True)
LONG = Shape("causal 128K, 32/8 heads, d128", 1, 32, 8, 131072, 128, True)
DIT = Shape("full 32K, 12 heads, d128", 2, 12, 12, 32760, 128, False)
D64 = Shape("full 17.8K, 48 heads, d64", 1, 48, 48, 17776, 64, False)


def milliseconds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each piece of work, the pieces taking turns."""
    for run in work.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def random_call(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v `[B, H, N, D]` as projections leave them: transposed views of `[B, N, H, D]`."""
    sizes = [
        (shape.batch, shape.tokens, h, shape.head_size)
        for h in (shape.heads, *[shape.kv_heads] * 2)
    ]
    return [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for size in sizes]


def random_mask(shape: Shape, size: tuple[int, int], density: float, device: str) -> torch.Tensor:
    """Uniform random blocks of the visible ones, the diagonal always: bool [1, H, nq, nk]."""
    nq, nk = -(-shape.tokens // size[0]), -(-shape.tokens // size[1])
    mask = torch.rand(1, shape.heads, nq, nk, device=device) < density
    if shape.causal:
        edge = (torch.arange(1, nq + 1, device=device)[:, None] * size[0] - 1).clamp(
            max=shape.tokens - 1
        ) // size[1]
        block = torch.arange(nk, device=device)
        mask = (mask | (block == edge)) & (block <= edge)
    return mask


def mixed(index: BlockIndex, share: int) -> BlockIndex:
    """Every share-th head dense."""
    count = index.count.clone()
    count[:, ::share] = ALL
    return BlockIndex(index.start, count, index.blocks, index.size)


def visible_blocks(shape: Shape, index: BlockIndex) -> tuple[int, int]:
    """Blocks that the index executes, and visible blocks in all."""
    nk = -(-shape.tokens // index.size[1])
    mask = index.to_mask(nk)
    if shape.causal:
        high = torch.arange(1, index.rows + 1, device=mask.device)[:, None] * index.size[0] - 1
        mask &= torch.arange(nk, device=mask.device) * index.size[1] <= high
        every = (
            int((torch.arange(nk, device=mask.device) * index.size[1] <= high).sum()) * shape.heads
        )
    else:
        every = mask.numel()
    return int(mask.sum()) * shape.batch, every * shape.batch


def flex(shape: Shape, mask: torch.Tensor, compiled: Callable, q, k, v) -> Callable[[], object]:
    """Compiled flex_attention over the same blocks; only the diagonal is partial."""
    from torch.nn.attention.flex_attention import BlockMask

    def lists(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return m.sum(-1, dtype=torch.int32), m.int().argsort(
            dim=-1, descending=True, stable=True
        ).int()

    nq = mask.shape[2]
    diagonal = torch.eye(nq, dtype=torch.bool, device="cuda") & mask
    full, partial = (mask & ~diagonal, diagonal) if shape.causal else (mask, torch.zeros_like(mask))
    cnt, idx = lists(partial)
    full_cnt, full_idx = lists(full)
    block_mask = BlockMask.from_kv_blocks(
        cnt,
        idx,
        full_cnt,
        full_idx,
        BLOCK_SIZE=128,
        mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(shape.tokens, shape.tokens),
    )
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=True)


def check(q, k, v, index: BlockIndex, causal: bool) -> float:
    """Relative error of a few query tiles against fp32, or a refusal to go on."""
    rows = sorted({1, index.rows // 2, index.rows - 1})
    got = attend(q, k, v, index, causal=causal, rows=rows).out[:1]
    want = attend(
        q[:1].float(),
        k[:1].float(),
        v[:1].float(),
        index,
        causal=causal,
        rows=rows,
        backend="reference",
    ).out
    error = float((got.float() - want).norm() / want.norm())
    if not error < 1e-2:
        raise SystemExit(f"the kernel is wrong: relative error {error}")
    return error


def fresh(index: BlockIndex) -> BlockIndex:
    return replace(index)


def measure(shape: Shape, cases, rounds: int, sweep: bool, with_flex: bool) -> list[dict]:
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    groups = shape.heads // shape.kv_heads

    def dense() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(
                q, k, v, is_causal=shape.causal, enable_gqa=groups > 1
            )

    compiled = None
    if with_flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
    results = []
    for size, density in cases:
        wanted = density if isinstance(density, float) else 0.05
        mask = random_mask(shape, size, wanted, "cuda")
        index = BlockIndex.from_mask(mask, size)
        if not isinstance(density, float):
            index = mixed(index, 4)
        error = check(q, k, v, index, shape.causal)
        launch = prepare(q, k, v, index, causal=shape.causal)
        work = lower(launch)
        tile = kernel.choose_tile(size, shape.head_size, q.dtype, False)
        jobs: dict[str, Callable[[], object]] = {
            "dense": dense,
            "kernel": lambda launch=launch, work=work, tile=tile: kernel.run(launch, work, tile),
            "call": lambda index=index: attend(q, k, v, fresh(index), causal=shape.causal),
        }
        if sweep:
            for other in other_tiles(size, tile):
                name = f"kernel {other.bm}x{other.bn} w{other.warps} s{other.stages}"
                jobs[name] = lambda launch=launch, work=work, tile=other: kernel.run(
                    launch, work, tile
                )
        if compiled is not None and size == (128, 128) and isinstance(density, float):
            jobs["flex"] = flex(shape, mask, compiled, q, k, v)
        times = milliseconds(jobs, rounds)
        done, every = visible_blocks(shape, index)
        flops = 4 * done * size[0] * size[1] * shape.head_size
        pairs = shape.tokens * (shape.tokens + 1) / 2 if shape.causal else shape.tokens**2
        dense_flops = 4 * shape.batch * shape.heads * shape.head_size * pairs
        results.append(
            {
                "shape": shape.name,
                "unit": list(size),
                "wanted": density,
                "density": done / every,
                "error": error,
                "tile": [tile.bm, tile.bn, tile.warps, tile.stages],
                "ms": times,
                "tflops": {
                    n: (dense_flops if n == "dense" else flops) / t / 1e9 for n, t in times.items()
                },
            }
        )
        row = "  ".join(f"{n} {t:.3f}" for n, t in times.items())
        share = results[-1]["tflops"]["kernel"] / results[-1]["tflops"]["dense"]
        print(
            f"{shape.name} {size} ρ={results[-1]['density']:.3f} | {row} | {share:.2f} of dense",
            flush=True,
        )
    return results


def other_tiles(size: tuple[int, int], tile: Tile) -> list[Tile]:
    """Tiles worth trying for a unit beside the chosen one."""
    tries = [(tile.bm, tile.bn, tile.warps, s) for s in (2, 3, 4)] + [
        (64, tile.bn, 4, s) for s in (2, 3)
    ]
    kept = []
    for bm, bn, warps, stages in tries:
        other = Tile(bm, bn, size[0] // bm, warps, stages)
        shared = 2 * 128 * (bm + 2 * stages * bn)
        if other != tile and size[0] % bm == 0 and other not in kept and shared < 230_000:
            kept.append(other)
    return kept


def measure_cpu(rounds: int) -> list[dict]:
    """The CPU path against torch's dense attention, fp32, with all threads that torch uses."""
    shape = Shape("causal 8K, 4/2 heads, d64, CPU", 1, 4, 2, 8192, 64, True)
    q, k, v = random_call(shape, "cpu", torch.float32)

    def seconds(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    results = []
    for size in ((128, 128), (64, 64), (2048, 1), (32, 1)):
        for density in (0.25, 0.1, 0.05):
            index = BlockIndex.from_mask(random_mask(shape, size, density, "cpu"), size)
            jobs = {
                "dense": lambda: scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                "call": lambda index=index: attend(q, k, v, index),
            }
            times = {name: [] for name in jobs}
            for _ in range(rounds + 1):
                for name, run in jobs.items():
                    times[name].append(seconds(run) * 1e3)
            # The least, not the median: on shared cores the rest is other people's work.
            best = {name: min(values[1:]) for name, values in times.items()}
            done, every = visible_blocks(shape, index)
            results.append(
                {
                    "shape": shape.name,
                    "unit": list(size),
                    "wanted": density,
                    "density": done / every,
                    "threads": torch.get_num_threads(),
                    "ms": best,
                }
            )
            gain = best["dense"] / best["call"]
            print(
                f"{shape.name} {size} ρ={done / every:.3f} | dense {best['dense']:.1f} "
                f"call {best['call']:.1f} | {gain:.2f}×, {gain * done / every:.2f} of ideal",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    parser.add_argument("--no-flex", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="time the CPU path instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.cpu:
        report = {
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
        }
        report["results"] = measure_cpu(args.rounds)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))
        return
    block, small = (128, 128), (64, 64)
    plan = [
        (
            LLM,
            [
                *((block, d) for d in (1.0, 0.5, 0.25, 0.1, 0.05)),
                (block, "mixed"),
                (small, 0.25),
                (small, 0.1),
            ],
            True,
        ),
        (D64, [(block, 0.25), (block, 0.1), (small, 0.1), (block, "mixed")], False),
        (DIT, [(block, 0.25), (block, 0.1), (block, "mixed")], False),
        (LONG, [(block, 0.1), (block, "mixed")], False),
    ]
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "dtype": "bfloat16",
        "rounds": args.rounds,
        "results": [],
    }
    for shape, cases, with_flex in plan:
        report["results"] += measure(
            shape, cases, args.rounds, args.sweep, with_flex and not args.no_flex
        )
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
