"""How long the cost table of a GPU takes to fit, and how well it predicts what it did not see.

    python benchmarks/cost_fit.py --out results.json [--only llm,dit] [--tokens 65536]

The fit is that of `accelkit bench --fit` and `accelkit calibrate`: one layer of Llama-3.1-8B (32
query heads, 8 KV heads, head size 128, bfloat16, causal) with all methods of language models, and
one of a video model (24 heads, head size 128, a grid of 32,760 tokens, not causal) with all methods
of denoisers. It is judged on what it never timed: other lengths (a denoiser has one), other
densities, other head counts, and whole calls of every method at the middle of its dial ("call"),
and at its ends ("setting"). Every reading is taken, in the fit and here, once the card's clock is
back from what ran before. Compiling is told apart: a process starts with what Triton's cache holds,
so an empty TRITON_CACHE_DIR shows a new machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention.report import machine

from accelkit.calibration.candidates import chosen_methods
from accelkit.calibration.fit import fit
from accelkit.calibration.fit import kernels as fit_kernels
from accelkit.calibration.fit import methods as fit_methods
from accelkit.calibration.fit.clock import clock, dense_ms
from accelkit.calibration.fit.inputs import Shape, random_call, shorter
from accelkit.calibration.session import compile_clock
from accelkit.kernels.cost import Check, CostTable, MethodCost, interpolate, unit
from accelkit.kernels.select import density
from accelkit.patches.call import AttentionCall, Geometry
from accelkit.patches.method import AttentionMethod

SHAPES = {
    "llm": Shape(32, 8, 128, layers=32),
    "dit": Shape(24, 24, 128, layers=30, causal=False, geometry=Geometry(grid=(21, 30, 52))),
}
GRID = 21 * 30 * 52
DENSITIES = (0.07, 0.15, 0.3)
DENSEST_KEYS = 0.15
"""Lists of single keys denser than this are not measured: nobody runs them."""
HEADS = (0.625, 0.375)
"""Shares of the heads."""
KEYS = 5 * fit_kernels.MOST_SINGLE_KEYS // 8
GOOD = 0.1
SMALL = 0.01
"""Terms below this share of dense attention are listed and not judged: no plan turns on them."""
PASSES = 3
WORST = 10
"""Rows that are printed again at the end."""
Row = dict[str, Any]


def row(term: str, what: str, tokens: int, predicted: float, measured: float, **more: Any) -> Row:
    found = {"term": term, "what": what, "tokens": tokens, **more, "predicted_ms": predicted}
    return found | {"measured_ms": measured, "error": predicted / measured - 1 if measured else 0.0}


def timer(call: AttentionCall) -> Callable[..., float]:
    """Times a run on the device of a call."""
    return lambda run, times=3: clock(run, times, call.q.device)


def kernels(costs: CostTable, call: AttentionCall, keys: bool) -> Iterator[Row]:
    """Launches over random lists for head counts that the fit did not see; over single keys, whose
    length does not depend on the call's, only if `keys`.
    """
    ms = timer(call)
    for name in costs.kernels:
        size = unit(name)
        if size[1] == 1 and not keys:
            continue
        there = shorter(call, min(call.n_q, KEYS)) if size[1] == 1 else call
        for share in HEADS:
            heads = int(share * len(call.heads))
            part = there.take(there.heads[:heads])
            for wanted in DENSITIES:
                if size[1] == 1 and wanted > DENSEST_KEYS:
                    continue
                one = fit_kernels.point(part, size, wanted, held=True).one
                shares = density([one.index], part).tolist()
                want = costs.random_ms(size, part.n_q, shares)
                got = ms(partial(fit_kernels.anew, one))
                share = statistics.fmean(shares)
                yield row("kernel", name, part.n_q, want, got, heads=heads, density=share)


def methods(
    costs: CostTable, call: AttentionCall, tried: Sequence[AttentionMethod]
) -> Iterator[Row]:
    """A method's terms, and its whole call with all that a layer pays for: choosing, moving rows,
    kernels over the lists that it chose.
    """
    for method in tried:
        if method.kind not in costs.methods:
            continue
        there, now = fit_methods.prepared(call, method, fit_methods.middle(method))
        answers = fit_methods.asked(there, now)
        if answers is None:
            continue
        one, cost = answers[0], costs.methods[method.kind]
        ms = timer(call)
        found = [fit_methods.permutation(there, one, ms)]
        if not method.static:  # otherwise made once
            found = [*fit_methods.choosing(there, now, one, ms), *found]
        for term, got in zip(MethodCost.TERMS[-len(found) :], found, strict=True):
            yield row(term, method.kind, call.n_q, interpolate(cost.terms[term], call.n_q), got)
        yield from _whole("call", fit_methods.checked(costs, method, call, ms))
        for setting in fit_methods.ends(method):
            if fit_methods.prepared(call, method, setting)[1] == setting:
                yield from _whole("setting", fit_methods.checked(costs, method, call, ms, setting))


def _whole(term: str, c: Check | None) -> Iterator[Row]:
    if c is not None:
        yield row(term, c.what, c.tokens, c.predicted_ms, c.measured_ms, density=c.density)


def settled(once: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Rows with the medians of passes over all of them: a clock that a hot card has lowered for a
    while spoils one pass of a row and not all of them.
    """
    for same in zip(*(list(once()) for _ in range(PASSES)), strict=True):
        first, readings = same[0], [r["measured_ms"] for r in same]
        got, want = statistics.median(readings), first["predicted_ms"]
        error = want / got - 1 if got else 0.0
        yield first | {"measured_ms": got, "error": error, "readings_ms": readings}


def counts(r: Row, dense: dict[int, float]) -> bool:
    """Whether a plan may turn on what a row measured."""
    return r["measured_ms"] >= SMALL * dense[max(r["tokens"], min(dense))]


def unclear(r: Row) -> bool:
    """Whether a row that is missed was read so differently that the prediction lies between its
    readings.
    """
    least, most = min(r["readings_ms"]), max(r["readings_ms"])
    apart = most > (1 + GOOD) * least and least <= r["predicted_ms"] <= most
    return abs(r["error"]) > GOOD and apart


def judged(rows: Sequence[Row], dense: dict[int, float]) -> dict[str, dict[str, Any]]:
    """By term: how many rows there are, which share lies within 10 % of the median reading, how
    many of the others lie between readings, the mean and the worst.
    """
    found = {}
    for term in dict.fromkeys(r["term"] for r in rows):
        mine = [r for r in rows if r["term"] == term and counts(r, dense)]
        if mine:
            worst = max(mine, key=lambda r: abs(r["error"]))
            gaps = [abs(r["error"]) for r in mine]
            found[term] = {
                "rows": len(mine),
                "within": statistics.fmean(g <= GOOD for g in gaps),
                "unclear": sum(map(unclear, mine)),
                "mean": statistics.fmean(gaps),
                "worst": worst["error"],
                "worst_row": f"{worst['what']} at {worst['tokens']}",
            }
    return found


def shortened(data: Any) -> Any:
    """The same data with five digits of every number."""
    if isinstance(data, dict):
        return {k: shortened(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [shortened(v) for v in data]
    return float(f"{data:.5g}") if isinstance(data, float) else data


def case(
    name: str,
    tokens: int,
    device: torch.device,
    fit_only: bool,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Fit one shape, then predict and measure; `save` is given what is known so far."""
    shape, dtype = SHAPES[name], torch.bfloat16
    tried = chosen_methods(None, "prefill" if shape.causal else "denoise")
    steps: list[tuple[str, float]] = []

    def step(text: str) -> None:
        steps.append((text, time.monotonic()))
        print(f"  {steps[-1][1] - steps[0][1]:5.1f} s {text}", flush=True)

    with compile_clock() as compiled:
        begin = time.monotonic()
        costs = fit.fit(shape, dtype, device, tokens, tried, step=step)
        end = time.monotonic()
        found: dict[str, Any] = {"shape": name, "tokens": tokens, "fit_s": end - begin}
        found["compiling_s"] = compiled()
    if device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    ends = [t for _, t in steps[1:]] + [end]
    found["steps_s"] = {s: e - b for (s, b), e in zip(steps, ends, strict=True)}
    found |= {"costs": costs.to_dict(), "rows": []}
    print(f"{name}: {end - begin:.1f} s, compiling {found['compiling_s']:.1f} s of it", flush=True)
    save(found)
    if fit_only:
        return
    lengths = [3 * tokens // 16, 3 * tokens // 8, 3 * tokens // 4] if shape.causal else [tokens]
    dense: dict[int, float] = {}
    for n in lengths:
        call = random_call(shape, dtype, device, n)
        dense[n] = dense_ms(call, timer(call))
        if shape.causal:
            plain = row("dense", "dense", n, costs.dense_ms(n), dense[n])
            found["rows"].append(plain | {"readings_ms": [dense[n]]})

        def once(call: AttentionCall = call, n: int = n) -> Iterator[Row]:
            yield from kernels(costs, call, n == lengths[0])
            yield from methods(costs, call, tried)

        for r in settled(once):
            found["rows"].append(r)
            about = {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}
            del about["readings_ms"]
            print(" ", about, flush=True)
        found["terms"] = judged(found["rows"], dense)
        save(found)
    for term, about in found["terms"].items():
        print(f"{name} {term}: {about}", flush=True)
    heavy = [r for r in found["rows"] if counts(r, dense)]
    for r in sorted(heavy, key=lambda r: -abs(r["error"]))[:WORST]:
        print(f"{name} worst: {r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="llm,dit")
    parser.add_argument("--tokens", type=int, default=65536, help="Of the language model.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fit-only", action="store_true", help="Judge nothing.")
    args = parser.parse_args()
    report: dict[str, Any] = {**machine(), "cases": {}}
    for name in args.only.split(","):

        def save(found: dict[str, Any], name: str = name) -> None:
            report["cases"][name] = found
            if args.out:
                args.out.write_text(json.dumps(shortened(report), indent=1) + "\n")

        case(
            name,
            args.tokens if SHAPES[name].causal else GRID,
            torch.device(args.device),
            args.fit_only,
            save,
        )


if __name__ == "__main__":
    main()
