"""Attention in 8 bits: speed beside cuDNN and our own 16-bit kernel, error on random and structured
inputs, on one GPU.

    python benchmarks/eight_bit.py --out results.json

`kernel` is the attention kernel over operands that are 8 bits already, `call` all of `attend`:
checks, quantisation, lowering of a fresh index, kernel. Errors are relative L1 and cosine against
fp32 on the same bf16 inputs; bf16 kernels stand beside as what the inputs' own precision costs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from attention.peers import cudnn
from attention.report import machine
from attention.shapes import D64, LLM, VIDEO, Shape, random_call, random_mask
from attention.timing import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from accelkit.kernels._triton import eight_bit
from accelkit.kernels._triton.lower import lower
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.prepare import prepare

DIT = Shape("full 32,760, 2 × 12 heads, d128", 2, 12, 12, 32760, 128, False)
PRECISIONS = (("fp8", "fp8"), ("int8", "fp8"), ("fp8", "native"), ("int8", "native"))
NATIVE = ("triton", "gluon")
DENSITIES = (1.0, 0.25, 0.1)
UNIT = (128, 128)
KINDS = ("random", "offsets", "sinks", "one-hot", "repeated", "extremes")


def index_of(shape: Shape, density: float) -> BlockIndex:
    if density < 1.0:
        return BlockIndex.from_mask(random_mask(shape, UNIT, density, "cuda"), UNIT)
    rows = -(-shape.tokens // UNIT[0])
    return BlockIndex.dense(shape.heads, rows, UNIT, torch.device("cuda"))


def jobs_of(shape: Shape, qkv: list[Tensor], density: float, precisions) -> dict[str, Callable]:
    """Everything that is timed for one density; a kernel that is wrong ends the run."""
    q, k, v = qkv
    causal, index = shape.causal, index_of(shape, density)
    work = lower(prepare(q, k, v, index, causal=causal))
    jobs: dict[str, Callable[[], object]] = {"cudnn dense": lambda: cudnn(q, k, v, causal)}
    for name in NATIVE:
        jobs[f"{name} call"] = lambda n=name: attend(
            q, k, v, replace(index), causal=causal, backend=n
        )
    want = attend(q, k, v, index, causal=causal, backend="triton").out
    for qk, pv in precisions:
        options = {"causal": causal, "qk": qk, "pv": pv, "smooth_k": True}
        low = prepare(q, k, v, index, **options)
        ops, name = eight_bit.operands(low), f"{qk}/{pv}"
        jobs[f"{name} quantise"] = partial(eight_bit.operands, low)
        jobs[f"{name} kernel"] = partial(eight_bit.start, low, ops, work)
        jobs[f"{name} call"] = lambda o=options: attend(q, k, v, replace(index), **o)
        error = float((jobs[f"{name} call"]().out - want).norm() / want.norm())
        if not error < 0.1:
            raise SystemExit(f"{shape.name}: {name} is wrong: relative error {error}")
    return jobs


def speed(shape: Shape, densities, precisions, budget_ms: float) -> list[dict]:
    """Milliseconds of every precision at every density, in turns with the 16-bit kernels."""
    qkv, results = random_call(shape, "cuda", torch.bfloat16), []
    for density in densities:
        times = milliseconds(jobs_of(shape, qkv, density, precisions), budget_ms)
        own = min(times[f"{name} call"] for name in NATIVE if f"{name} call" in times)
        dense = times["cudnn dense"]
        for qk, pv in precisions:
            call = times[f"{qk}/{pv} call"]
            results.append(
                {
                    "shape": shape.name,
                    "density": density,
                    "QK": qk,
                    "PV": pv,
                    "call, ms": call,
                    "of it quantising": times[f"{qk}/{pv} quantise"],
                    "kernel alone": times[f"{qk}/{pv} kernel"],
                    "cuDNN dense, ms": dense,
                    "own 16-bit call, ms": own,
                    "× cuDNN dense": dense / call,
                    "× own 16-bit": own / call,
                    "ms": times,
                }
            )
            parts = [f"{k} {v:.2f}" for k, v in results[-1].items() if isinstance(v, float)]
            print(f"{shape.name} {qk}/{pv}: {', '.join(parts)}", flush=True)
    return results


def inputs(kind: str, heads: int, kv_heads: int, n: int, d: int) -> list[Tensor]:
    """q, k, v `[1, H, N, D]` bf16 with one trait of real attention each."""
    make = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(1)}
    q = torch.randn(1, heads, n, d, **make)
    k, v = (torch.randn(1, kv_heads, n, d, **make) for _ in range(2))
    group = heads // kv_heads
    if kind == "offsets":  # a few channels of K far from zero, V with a mean
        k[..., :: d // 8] += 15 * torch.randn(1, kv_heads, 1, 8, **make)
        v += torch.randn(1, kv_heads, 1, d, **make)
    elif kind == "sinks":  # four keys that every query sees with a logit above 30
        way = torch.nn.functional.normalize(torch.randn(1, kv_heads, 1, d, **make), dim=-1)
        q = q + 8 * way.repeat_interleave(group, 1)
        k[:, :, :4] = way * (35 * d**0.5 / 8)
    elif kind == "one-hot":  # each query has one key of its own, logits about 35
        own = torch.randperm(n, **make)
        q = k.repeat_interleave(group, 1)[:, :, own] * (35 / d**0.5) + 0.3 * q
    elif kind == "repeated":  # eight keys, each many times
        k = k[:, :, torch.arange(n, device="cuda") % 8]
    elif kind == "extremes":  # near the ends of fp16, where q does not look
        q, k, v = q * 200, k * 0.05, v * 8000
        q[..., 0], k[..., 0], v[:, :, 5] = 0.0, 60000.0, 60000.0
        return [t.half() for t in (q, k, v)]
    return [t.bfloat16() for t in (q, k, v)]


def errors(heads: int, kv_heads: int, n: int, d: int, causal: bool) -> list[dict]:
    """Relative L1 error and cosine of every kernel against fp32, by kind of input."""
    results = []
    index = BlockIndex.dense(heads, n // UNIT[0], UNIT, torch.device("cuda"))
    for kind in KINDS:
        q, k, v = inputs(kind, heads, kv_heads, n, d)
        wide = [t.float().repeat_interleave(heads // t.shape[1], 1) for t in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH):
            want = scaled_dot_product_attention(*wide, is_causal=causal)
        runs = {
            "cudnn": cudnn(q, k, v, causal),
            "native": attend(q, k, v, index, causal=causal, backend="triton").out,
        }
        for qk, pv in PRECISIONS:
            for smooth in (True, False) if pv == "native" else (True,):
                part = attend(q, k, v, index, causal=causal, qk=qk, pv=pv, smooth_k=smooth)
                runs[f"{qk}/{pv}{'' if smooth else ' not smoothed'}"] = part.out
        for name, got in runs.items():
            got = got.float()
            results.append(
                {
                    "inputs": kind,
                    "causal": causal,
                    "head_size": d,
                    "kernel": name,
                    "relative_l1": float((got - want).abs().sum() / want.abs().sum()),
                    "cosine": float(cosine_similarity(got.flatten(), want.flatten(), 0)),
                }
            )
        row = [r for r in results if r["inputs"] == kind]
        print(kind, d, " ".join(f"{r['kernel']} {r['relative_l1']:.4f}" for r in row), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget-ms", type=float, default=1000, help="device time for a shape")
    parser.add_argument(
        "--only", choices=("errors", "speed", "dense"), help="dense: d128, full lists"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    report = {
        "title": "Attention in 8 bits, quantisation included (`benchmarks/eight_bit.py`)",
        **machine(),
        "budget_ms": args.budget_ms,
        "errors": [],
        "rows": [],
        "sparse": [],
    }
    if args.only in (None, "errors"):
        report["errors"] = errors(8, 2, 4096, 128, True) + errors(8, 8, 4096, 64, False)
    shapes, densities = (LLM, DIT, D64), DENSITIES
    if args.only == "dense":
        shapes, densities = (LLM, DIT), (1.0,)
    plan = [(s, densities, PRECISIONS, args.budget_ms) for s in shapes]
    for job in () if args.only == "errors" else (*plan, (VIDEO, (1.0,), PRECISIONS, 0)):
        for row in speed(*job):
            report["rows" if row["density"] == 1.0 else "sparse"].append(row)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
