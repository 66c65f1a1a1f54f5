"""Attention kernels and estimators against every peer that is installed, in one process on one GPU.

    python benchmarks/kernels.py --out results.json [--only llm,d64] [--speeds]

Random normal data; medians of device times, the pieces of work taking turns. A kernel's rate is
TFLOP/s of the blocks that it computes; rates are given relative to the dense cuDNN kernel of the
same shape and causality. Every kernel is first compared with an fp32 reference on a few query
tiles, and a wrong one is not timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accelkit.kernels import dispatch, scores, select
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex, plain_inputs
from accelkit.kernels.prepare import prepare

BLOCK = (128, 128)
OURS = ("triton", "gluon")
AHEAD = 2_000_000
"""Clock cycles that the device waits before a timed piece: the host is ahead, as in a model."""


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int
    causal: bool

    @property
    def pairs(self) -> float:
        """Visible query-key pairs of all heads."""
        n = self.tokens
        return self.batch * self.heads * (n * (n + 1) / 2 if self.causal else float(n) ** 2)


LLM = Shape("causal 32K, 32/8 heads, d128", 1, 32, 8, 32768, 128, True)
LONG = Shape("causal 128K, 32/8 heads, d128", 1, 32, 8, 131072, 128, True)
FULL = Shape("full 32K, 32/8 heads, d128", 1, 32, 8, 32768, 128, False)
VIDEO = Shape("full 118,800, 24 heads, d128", 1, 24, 24, 118800, 128, False)
D64 = Shape("full 17,776, 48 heads, d64", 1, 48, 48, 17776, 64, False)
LAPTOP = Shape("causal 8K, 4/2 heads, d64, CPU", 1, 4, 2, 8192, 64, True)

ANY, OWN = (
    {0.5: 1.0, 0.25: 0.97, 0.1: 0.92, 0.05: 0.85},
    {0.5: 0.95, 0.25: 0.93, 0.1: 0.88, 0.05: 0.8},
)
FREE = {0.5: 1.05, 0.25: 1.0, 0.1: 0.95, 0.05: 0.9}


def milliseconds(work: dict[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """Median device time of each piece of work, the pieces taking turns as often as the budget
    allows: 3 to 15 rounds, once without a budget. A piece that cannot run is left out and says why.
    """
    able = {}
    for name, run in work.items():
        try:
            run()
            run()
            torch.cuda.synchronize()
            able[name] = run
        except Exception as error:
            text = (str(error).splitlines() or [""])[0][:120]
            print(f"    {name} cannot run: {type(error).__name__}: {text}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in able}
    spent, rounds = 0.0, 0
    while rounds < (3 if budget_ms else 1) or (spent < budget_ms and rounds < 15):
        for name, run in able.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
            spent += times[name][-1] + 1.0
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def random_call(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v `[B, H, N, D]` as projections leave them: transposed views of `[B, N, H, D]`."""
    sizes = [
        (shape.batch, shape.tokens, h, shape.head_size)
        for h in (shape.heads, *[shape.kv_heads] * 2)
    ]
    return [torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for size in sizes]


def visible_blocks(shape: Shape, size: tuple[int, int], device: str) -> Tensor:
    """Blocks that some row of their tile sees, bool `[nq, nk]`."""
    nq, nk = -(-shape.tokens // size[0]), -(-shape.tokens // size[1])
    if not shape.causal:
        return torch.ones(nq, nk, dtype=torch.bool, device=device)
    last = (torch.arange(1, nq + 1, device=device)[:, None] * size[0]).clamp(max=shape.tokens) - 1
    return torch.arange(nk, device=device) * size[1] <= last


def random_mask(shape: Shape, size: tuple[int, int], density: float, device: str) -> Tensor:
    """Uniform random blocks of the visible ones, the diagonal always: bool `[1, H, nq, nk]`."""
    seen = visible_blocks(shape, size, device)
    mask = torch.rand(1, shape.heads, *seen.shape, device=device) < density
    if shape.causal:
        edge = seen.sum(-1, keepdim=True) - 1
        mask = mask | (torch.arange(seen.shape[1], device=device) == edge)
    return mask & seen


def mixed(index: BlockIndex, share: int) -> BlockIndex:
    """Every share-th head dense."""
    count = index.count.clone()
    count[:, ::share] = ALL
    return BlockIndex(index.start, count, index.blocks, index.size)


def dense_paths(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention by every library at hand."""

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal, enable_gqa=shape.heads > shape.kv_heads
                )

        return run

    paths: dict[str, Callable[[], object]] = {
        "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "FA2": sdpa(SDPBackend.FLASH_ATTENTION),
    }
    try:
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError:
        return paths
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    paths["fa4 dense"] = lambda: _flash_attn_fwd(*turned, causal=shape.causal, return_lse=True)
    return paths


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _not_later(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def flex(shape: Shape, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """Compiled flex_attention over the same blocks; only the diagonal is partial."""
    from torch.nn.attention.flex_attention import BlockMask

    def lists(m: Tensor) -> tuple[Tensor, Tensor]:
        order = m.int().argsort(dim=-1, descending=True, stable=True)
        return m.sum(-1, dtype=torch.int32), order.int()

    diagonal = torch.eye(mask.shape[2], dtype=torch.bool, device="cuda") & mask
    full, partial = (mask & ~diagonal, diagonal) if shape.causal else (mask, torch.zeros_like(mask))
    block_mask = BlockMask.from_kv_blocks(
        *lists(partial),
        *lists(full),
        BLOCK_SIZE=128,
        mask_mod=_not_later,
        seq_lengths=(shape.tokens, shape.tokens),
    )
    group = shape.heads > shape.kv_heads
    return lambda: _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=group)


def able(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, **options: Any) -> list[str]:
    """Kernels that can serve a launch."""
    launch = prepare(q, k, v, index, **options)
    return [name for name, refused in dispatch.KERNELS.items() if refused(launch) is None]


def check(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, causal: bool, backends: list[str]
) -> dict[str, float]:
    """Relative error of a few query tiles against fp32 for each backend that runs. Raises
    `ValueError` where one is wrong.
    """
    tiles, bq = sorted({1, index.rows // 2, index.rows - 1}), index.size[0]
    at = torch.cat([torch.arange(t * bq, min(q.shape[2], (t + 1) * bq)) for t in tiles])
    one = [t[:1] for t in (q, k, v)]
    want = attend(*one, index, causal=causal, rows=tiles, backend="reference").out[:, :, at].float()
    errors = {}
    for backend in backends:
        try:
            got = attend(*one, index, causal=causal, backend=backend).out[:, :, at]
        except Exception as error:  # a peer that cannot run here must not end the others
            print(f"    {backend} cannot run: {type(error).__name__}: {error}"[:200], flush=True)
            continue
        errors[backend] = float((got.float() - want).norm() / want.norm())
        if not errors[backend] < 1e-2:
            raise ValueError(f"{backend} is wrong: relative error {errors[backend]}")
    return errors


def rates(
    shape: Shape,
    cases: tuple[tuple[tuple[int, int], float | str], ...],
    targets: dict[float, float],
    budget_ms: float,
    with_flex: bool = True,
) -> Iterator[dict[str, Any]]:
    """Block-sparse kernels over random lists, relative to dense cuDNN."""
    from accelkit.kernels._triton import lower

    lower._KEEP_BYTES = 1 << 40  # the kernels alone: lists are made once
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    dense = milliseconds(dense_paths(shape, q, k, v), budget_ms)
    dense_flops = 4 * shape.head_size * shape.pairs
    print(f"{shape.name}: dense " + "  ".join(f"{n} {t:.3f}" for n, t in dense.items()), flush=True)
    for size, density in cases:
        mask = random_mask(shape, size, density if isinstance(density, float) else 0.05, "cuda")
        index = BlockIndex.from_mask(mask, size)
        computed, every = mask, visible_blocks(shape, size, "cuda")
        if density == "mixed":
            index, computed = mixed(index, 4), mask.clone()
            computed[:, ::4] = every
        share = float(computed.sum()) / float(every.sum() * shape.heads)
        names = able(q, k, v, index, causal=shape.causal)
        errors = check(q, k, v, index, shape.causal, names)
        names = list(errors)
        work: dict[str, Callable[[], object]] = {"cudnn": dense_paths(shape, q, k, v)["cudnn"]}
        for name in names:
            work[name] = partial(attend, q, k, v, index, causal=shape.causal, backend=name)
        work["call"] = lambda i=index: attend(q, k, v, replace(i), causal=shape.causal)
        if with_flex and size == BLOCK and density != "mixed":
            work["flex"] = flex(shape, mask, q, k, v)
        ms = milliseconds(work, budget_ms)
        flops = 4.0 * shape.batch * float(computed.sum()) * size[0] * size[1] * shape.head_size
        rate = {n: (dense_flops if n == "cudnn" else flops) / t / 1e9 for n, t in ms.items()}
        ratio = {n: rate[n] / rate["cudnn"] for n in rate}
        cells = "  ".join(f"{n} {t:.3f} ({ratio[n]:.2f})" for n, t in ms.items())
        print(f"  {size} ρ={share:.3f} | {cells}", flush=True)
        yield {
            **asdict(shape),
            "unit": list(size),
            "wanted": density,
            "density": share,
            "errors": errors,
            "dense_ms": dense,
            "ms": ms,
            "tflops": rate,
            "ratio": ratio,
            "times_cudnn": {n: ms["cudnn"] / t for n, t in ms.items()},
            "target": targets.get(density) if isinstance(density, float) else None,
            "own_target": OWN.get(density) if isinstance(density, float) else None,
        }


def _part(what: str, ms: dict[str, float], dense: float, target: str) -> dict[str, Any]:
    """A measurement that stands beside the dense time of the whole shape."""
    best = min(ms.values())
    print(f"{what}: " + "  ".join(f"{n} {t:.3f}" for n, t in ms.items()) + f" | dense {dense:.2f}")
    return {
        "what": what,
        "ms": ms,
        "dense_ms": dense,
        "share_of_dense": best / dense,
        "times_dense": dense / best,
        "target": target,
    }


def skipping(budget_ms: float) -> Iterator[dict[str, Any]]:
    """Three quarters of the key blocks lie far below the row maximum; lists are dense."""
    shape = FULL
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    weak = torch.arange(shape.tokens, device="cuda") // 128 % 4 != 0
    q[..., 0] = 4.0
    k[..., 0] = torch.where(weak, -5.0 * shape.head_size**0.5, 0.0).to(k.dtype)
    index = BlockIndex.dense(shape.heads, shape.tokens // 128, BLOCK, q.device)
    exact = attend(q, k, v, index, causal=False, backend="triton").out.float()
    work: dict[str, Callable[[], object]] = {"cudnn": dense_paths(shape, q, k, v)["cudnn"]}
    for name in able(q, k, v, index, causal=False, skip=1e-3):
        run = partial(attend, q, k, v, index, causal=False, skip=1e-3, backend=name)
        error = float((run().out.float() - exact).norm() / exact.norm())
        if not error < 1e-2:
            raise ValueError(f"skipping by {name} is wrong: relative error {error}")
        work[name] = run
    ms = milliseconds(work, budget_ms)
    yield _part("softmax-skip, 75 % of the tiles skippable, full 32K", ms, ms.pop("cudnn"), "1.5 ×")


def gathering(budget_ms: float) -> Iterator[dict[str, Any]]:
    """1,024 single keys for every 2,048 queries."""
    shape, tall = LLM, 2048
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    rows = shape.tokens // tall
    noise = torch.rand(1, shape.heads, rows, shape.tokens, device="cuda")
    before = torch.arange(rows, device="cuda")[:, None] * tall
    noise.masked_fill_(torch.arange(shape.tokens, device="cuda") >= before, -1.0)
    best = noise.topk(1024, -1)
    mask = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, best.indices, best.values >= 0)
    index = BlockIndex.from_mask(mask, (tall, 1))
    check(q, k, v, index, True, ["triton"])
    work = {
        "cudnn": dense_paths(shape, q, k, v)["cudnn"],
        "gather": lambda: attend(q, k, v, index),
    }
    ms = milliseconds(work, budget_ms)
    pairs = float(mask.sum()) * tall
    row = _part("gather, 1,024 stripes for 2,048 queries, 32K", ms, ms.pop("cudnn"), "rate 0.6")
    yield row | {"rate": pairs / ms["gather"] / (shape.pairs / row["dense_ms"])}


def estimating(budget_ms: float) -> Iterator[dict[str, Any]]:
    """Estimate, selection and lists at 128K; the whole call when a tenth of the blocks stays."""
    shape = LONG
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    call = plain_inputs(q, k, v, causal=True)
    dense = milliseconds({"cudnn": dense_paths(shape, q, k, v)["cudnn"]}, budget_ms)["cudnn"]

    def chosen(mask: Tensor) -> BlockIndex:
        return select.compact(select.force(mask, call, BLOCK), BLOCK)

    def mean(alpha: float) -> Tensor:
        return select.ratio_of_max(scores.rows_by_block_mean(call, BLOCK), alpha)

    def probe() -> BlockIndex:
        found = scores.probe(call, 64)
        lines = [select.top_p(x, 0.9) for x in (found.blocks(128), found.offset_blocks(128))]
        return chosen(select.lines(call, *lines, BLOCK))

    low, high = 0.0, 1.0  # α for which a tenth of the visible blocks stays
    every = visible_blocks(shape, BLOCK, "cuda").sum() * shape.heads
    for _ in range(12):
        alpha = (low + high) / 2
        dense_enough = float((select.force(mean(alpha), call, BLOCK).sum() / every).cpu()) > 0.1
        low, high = (alpha, high) if dense_enough else (low, alpha)
    parts: dict[str, tuple[str, Callable[[], object]]] = {
        "pooled": (
            "2 %",
            lambda: chosen(select.top_p(select.probabilities(scores.pooled(call, BLOCK)), 0.9)),
        ),
        "probe of 64 rows": ("2 %", probe),
        "strided 8": ("6 %", lambda: chosen(select.top_p(scores.strided(call, 8, BLOCK), 0.9))),
        "rows × block mean": ("–", lambda: chosen(mean(high))),
    }
    alone: dict[str, Callable[[], object]] = {
        "pooled": lambda: scores.pooled(call, BLOCK),
        "probe of 64 rows": lambda: scores.probe(call, 64),
        "strided 8": lambda: scores.strided(call, 8, BLOCK),
        "rows × block mean": lambda: scores.rows_by_block_mean(call, BLOCK),
    }
    for name, (target, run) in parts.items():
        ms = milliseconds({"estimate, selection, list": run}, budget_ms)
        scoring = milliseconds({"estimate": alone[name]}, budget_ms)["estimate"]
        yield _part(f"{name}, 128K", ms, dense, target) | {"estimate_ms": scoring}
    index = chosen(mean(high))
    for name in check(q, k, v, index, True, able(q, k, v, index)):
        run = {name: lambda b=name: attend(q, k, v, chosen(mean(high)), backend=b)}
        target = "6 ×" if name in OURS else "7 ×"
        yield _part(f"whole call at density 0.1, 128K, {name}", milliseconds(run, budget_ms), dense,
                    target)  # fmt: skip


FOUR = tuple((BLOCK, d) for d in (0.5, 0.25, 0.1, 0.05))
PARTS: dict[str, Callable[[float], Iterator[dict[str, Any]]]] = {
    "llm": lambda ms: rates(LLM, (*FOUR, (BLOCK, "mixed"), ((64, 64), 0.1)), ANY, ms),
    "long": lambda ms: rates(LONG, FOUR, ANY, ms, with_flex=False),
    "full": lambda ms: rates(FULL, FOUR, FREE, ms),
    "video": lambda ms: rates(VIDEO, FOUR, FREE, ms, with_flex=False),
    "d64": lambda ms: rates(D64, FOUR, FREE, ms),
    "skip": skipping,
    "gather": gathering,
    "estimators": estimating,
}


def speeds(results: list[dict[str, Any]], capability: str) -> list[dict[str, Any]]:
    """The table by which `dispatch` chooses: each kernel's mean rate relative to dense cuDNN."""
    found: dict[tuple[str, int, tuple[int, int], bool], list[float]] = {}
    for row in results:
        for name in (n for n in row["ratio"] if n in dispatch.KERNELS):
            key = (name, row["head_size"], tuple(row["unit"]), row["causal"])
            found.setdefault(key, []).append(row["ratio"][name])
    return [
        {
            "backend": name,
            "capability": capability,
            "head_dim": width,
            "unit": list(size),
            "causal": causal,
            "speed": round(statistics.fmean(values), 3),
        }
        for (name, width, size, causal), values in sorted(found.items())
    ]


def measure_cpu(rounds: int) -> list[dict[str, Any]]:
    """The CPU path against torch's dense attention, fp32, with all threads that torch uses."""
    q, k, v = random_call(LAPTOP, "cpu", torch.float32)

    def seconds(run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    results = []
    for size in ((128, 128), (64, 64), (2048, 1), (32, 1)):
        every = float(visible_blocks(LAPTOP, size, "cpu").sum()) * LAPTOP.heads
        for density in (0.25, 0.1, 0.05):
            mask = random_mask(LAPTOP, size, density, "cpu")
            index = BlockIndex.from_mask(mask, size)
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
            share, gain = float(mask.sum()) / every, best["dense"] / best["call"]
            results.append({"shape": LAPTOP.name, "unit": list(size), "density": share, "ms": best})
            print(f"{size} ρ={share:.3f} | {best} | {gain:.2f}×, {gain * share:.2f} of ideal")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=600.0, help="ms of device time a case")
    parser.add_argument("--speeds", type=Path, help="write the table of measured speeds there")
    parser.add_argument("--cpu", action="store_true", help="time the CPU path instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if args.cpu:
        about = platform.processor() or platform.machine()
        report |= {"processor": about, "threads": torch.get_num_threads()}
        report["results"] = measure_cpu(12)
    else:
        import triton

        report |= {
            "gpu": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "dtype": "bfloat16",
            "results": [],
            "parts": [],
        }
        failed: list[str] = []
        for name in args.only.split(",") if args.only else PARTS:
            begin = time.monotonic()
            try:
                for row in PARTS[name](args.budget):
                    report["results" if "ratio" in row else "parts"].append(row)
                    if args.out:
                        args.out.write_text(json.dumps(report, indent=1))
            except Exception:  # one part must not take the others with it
                traceback.print_exc()
                failed.append(name)
            torch.cuda.empty_cache()
            print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        if args.speeds:
            found = speeds(report["results"], "{}.{}".format(*torch.cuda.get_device_capability()))
            args.speeds.write_text(json.dumps(found, indent=1) + "\n")
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
