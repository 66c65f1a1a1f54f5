"""How long the cost table of a GPU takes to fit, and how well it predicts what it did not see.

    python benchmarks/cost_fit.py --out results.json [--tokens 65536]

The fit is that of `accelkit bench --fit` for one layer of Llama-3.1-8B (32 query heads, 8 KV heads,
head size 128, bfloat16) and all methods of language models. It is judged at lengths between those
that it measured, at other densities, with all heads and with a quarter of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from attention.report import machine

from accelkit.calibration import fit
from accelkit.calibration.candidates import chosen_methods
from accelkit.kernels import select
from accelkit.kernels.cost import CostTable, interpolate, unit
from accelkit.kernels.dispatch import explain
from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import Answer

SHAPE = fit.Shape(32, 8, 128, layers=32)
DENSITIES = (0.07, 0.15, 0.3)
Row = dict[str, Any]


def median(run: Any) -> float:
    return statistics.median(fit.device_ms(run, 3, 1))


def row(what: str, tokens: int, predicted: float, measured: float, **more: Any) -> Row:
    found = {"what": what, "tokens": tokens, **more, "predicted_ms": predicted}
    return found | {"measured_ms": measured, "error": predicted / measured - 1}


def launches(costs: CostTable, call: AttentionCall) -> list[Row]:
    """Kernels over random lists."""
    rows, tokens = [], call.n_q
    for name in costs.kernels:
        size = unit(name)
        if size[1] == 1 and tokens > fit.MOST_SINGLE_KEYS:
            continue
        for heads in (len(call.heads), len(call.heads) // 4):
            part = call.take(call.heads[:heads])
            for density in DENSITIES:
                index: BlockIndex = fit.random_index(part, size, density)
                share = float(select.density(index, part).sum()) / heads
                want = costs.launch_ms(size) + heads * costs.head_ms(size, tokens, share)
                got = median(lambda p=part, i=index: fit._anew(Answer(p, (i,))))
                backend = explain(
                    part.q, part.k, part.v, index, heads=part.heads, kv_of_head=part.kv_of_head
                ).backend
                more = {"heads": heads, "density": share, "backend": backend}
                rows.append(row(name, tokens, want, got, **more))
    return rows


def estimates(costs: CostTable, call: AttentionCall, methods: list[AttentionMethod]) -> list[Row]:
    """Choosing what to read, with its order and merging left out: one number a method."""
    rows = []
    for method in methods:
        if method.kind not in costs.methods or method.static:
            continue
        policy = Policy(methods=(fit._middle(method),))
        got = median(lambda p=policy: fit._ask(call, p))
        want = interpolate(costs.methods[method.kind].points, call.n_q)
        rows.append(row(method.kind, call.n_q, want, got))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    args = parser.parse_args()
    device, dtype = torch.device("cuda"), torch.bfloat16
    methods, n = chosen_methods(None), args.tokens
    begin = time.monotonic()
    costs = fit.fit(SHAPE, dtype, device, n, methods)
    seconds = time.monotonic() - begin
    print(f"fitted in {seconds:.1f} s; {costs.refused}", flush=True)
    report = {**machine(), "tokens": n, "fit_s": seconds, "costs": costs.to_dict(), "rows": []}
    for tokens in (3 * n // 16, 3 * n // 8, 3 * n // 4):
        call = fit.random_call(SHAPE, dtype, device, tokens)
        dense = row("dense", tokens, costs.dense_ms(tokens), fit.dense_ms(call, median))
        report["rows"] += [dense, *launches(costs, call), *estimates(costs, call, methods)]
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
        for r in report["rows"]:
            if r["tokens"] == tokens:
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()})
    kernels = [r for r in report["rows"] if "backend" in r]
    for name in costs.kernels:
        mine = [abs(r["error"]) for r in kernels if r["what"] == name]
        if mine:
            print(f"{name}: mean error {statistics.fmean(mine):.3f}, worst {max(mine):.3f}")


if __name__ == "__main__":
    main()
