"""Does the calibrated mixture beat every single method with one global setting?

Every method runs at eight settings or more in all heads of all layers, with the same dense
fall-back and the same minimum length as the mixtures; mixtures are calibrated at several budgets.
All of them answer the same held-out prompts, one of each task. Quality is the worst task's budget
error (relative L1 error of the last hidden state at scored positions); speed is the median prefill
of a batch of prompts, estimate and selection included, dense beside it in the same process.

    python benchmarks/mixture.py --length 8192 --out benchmarks/results/mixture-cpu.json
    python benchmarks/mixture.py --length 16384 --batch 8 --out benchmarks/results/mixture-16k.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import accelkit
from accelkit.calibration import quality
from accelkit.calibration.capture import forward
from accelkit.calibration.results import environment
from accelkit.calibration.tasks import TASKS, make
from accelkit.patches.method import Method, load, names
from accelkit.patches.patch import patch, plan_of
from accelkit.patches.plan import Limits, Plan

SETTINGS = 8
HELD_OUT_SEED = 9_000
"""Far from the seeds that calibration draws and checks with."""
HOPELESS = 1.25
"""Settings that take longer than this share of dense are not followed further."""


def settings_of(name: str) -> list[Method]:
    """At least eight global settings of a method: its dial's values and points between them."""
    cls = load(name)
    if cls.dial is None:
        return [cls()]
    values = sorted(cls.dial.values)
    whole = all(isinstance(v, int) for v in values)
    while len(values) < SETTINGS:
        gaps = [math.log(b / a) for a, b in pairwise(values)]
        widest = gaps.index(max(gaps))
        between = math.sqrt(values[widest] * values[widest + 1])
        between = round(between) if whole else between
        if between in values:
            break
        values.insert(widest + 1, between)
    return [cls(**{cls.dial.field: v}) for v in values]


def prefill_ms(model: Any, ids: np.ndarray, repeat: int) -> float:
    """Median milliseconds of a prefill of `ids` `[B, N]`."""
    times = []
    for n in range(repeat + 1):
        quality.synchronise(model.device)
        begin = time.perf_counter()
        forward(model, ids)
        quality.synchronise(model.device)
        if n:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(
    model: Any, plan: Plan, dense: list, ids: np.ndarray, dense_ms: float, repeat: int
) -> dict[str, Any]:
    """Quality of a plan on every held-out prompt, and its prefill.

    A plan whose first prefill takes more than `HOPELESS` times as long as dense is not followed
    further: its `worst_error` is None and its time that of the one run.
    """
    with patch(model, plan) as handle:
        ms = prefill_ms(model, ids, 1)
        if ms > HOPELESS * dense_ms:
            return {"ms": ms, "density": None, "worst_error": None, "worst_drop": None, "tasks": {}}
        ms = prefill_ms(model, ids, repeat)
        with handle.measuring():
            forward(model, ids[:1])
        density = handle.report().density
    rows = [quality.check(model, plan, reference) for reference in dense]
    tasks = quality.by_task(rows)
    return {
        "ms": ms,
        "density": density,
        "worst_error": max(t["error"] for t in tasks.values()),
        "worst_drop": max(
            t["dense_accuracy"] - t["accuracy"] for t in tasks.values() if t["asked"]
        ),
        "tasks": tasks,
    }


def verdict(mixtures: list[dict], singles: list[dict], dense_ms: float) -> list[dict[str, Any]]:
    """For each mixture the fastest single setting whose worst-task error is no larger."""
    table = []
    for mixture in mixtures:
        known = [s for s in singles if s["worst_error"] is not None]
        equal = [s for s in known if s["worst_error"] <= mixture["worst_error"]]
        best = min(equal, key=lambda s: s["ms"], default=None)
        rival_ms = min(best["ms"], dense_ms) if best else dense_ms
        table.append(
            {
                "budget": mixture["budget"],
                "worst_error": mixture["worst_error"],
                "worst_drop": mixture["worst_drop"],
                "mixture_ms": mixture["ms"],
                "dense_ms": dense_ms,
                "best_single": best["setting"] if best and best["ms"] < dense_ms else "dense",
                "best_single_ms": rival_ms,
                "ratio": rival_ms / mixture["ms"],
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/models/tiny-llama")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [make(task, args.length, HELD_OUT_SEED, None, tokenizer) for task in args.tasks]
    rows = [prompts[i % len(prompts)].ids for i in range(args.batch)]
    ids = np.stack(rows).astype(np.int64)
    for _ in range(2):
        dense = [quality.reference(model, p) for p in prompts]

    mixtures: list[dict[str, Any]] = []
    singles: list[dict[str, Any]] = []
    dense_times = [prefill_ms(model, ids, args.repeat)]
    journal = args.out.with_suffix(".journal.jsonl")
    for n, budget in enumerate(args.budgets):
        begin = time.perf_counter()
        # The journal is shared: later budgets only search and check.
        plan = accelkit.calibrate(
            model, tokenizer=tokenizer, budget=budget, lengths=[args.length], preset=args.preset,
            batch=args.batch, journal=journal, resume=n > 0,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        row = measure(model, plan, dense, ids, dense_times[0], args.repeat)
        used = sorted({p.label() for p in plan.policies})
        mixtures.append({"budget": budget, "seconds": seconds, "policies": used, **row})
        print(f"mixture {budget}: {row['ms']:.1f} ms, error {row['worst_error']:.4f}, "
              f"density {row['density']}", file=sys.stderr, flush=True)  # fmt: skip
    limits = Limits(min_length=plan.limits.min_length)
    for name in args.methods or [n for n in names() if "prefill" in load(n).phases]:
        hopeless = 0
        for method in settings_of(name):
            if hopeless == 2:
                continue  # its estimate alone takes longer than dense, at every setting
            single = plan_of(model, method).model_copy(update={"limits": limits})
            row = measure(model, single, dense, ids, dense_times[0], args.repeat)
            field = type(method).dial.field if type(method).dial else ""
            setting = f"{name}({field}={getattr(method, field):.4g})" if field else name
            hopeless += row["worst_error"] is None
            singles.append({"method": name, "setting": setting, **row})
            print(f"{setting}: {row['ms']:.1f} ms, error {row['worst_error']}, "
                  f"density {row['density']}", file=sys.stderr, flush=True)  # fmt: skip
        dense_times.append(prefill_ms(model, ids, args.repeat))
        # Written after every method: a run that is cut short keeps what it has.
        table = verdict(mixtures, singles, statistics.median(dense_times))
        result = {
            "model": args.model, "tokens": args.length, "batch": args.batch, "dtype": str(dtype),
            "preset": args.preset, "prompts": len(prompts), "dense_ms": dense_times,
            "environment": environment(torch.device(device)),
            "table": table, "mixtures": mixtures, "singles": singles,
        }  # fmt: skip
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    journal.unlink(missing_ok=True)
    for row in table:
        print(
            f"budget {row['budget']:<5} error {row['worst_error']:.4f}  mixture "
            f"{row['mixture_ms']:.1f} ms  best single {row['best_single']} "
            f"{row['best_single_ms']:.1f} ms  dense {row['dense_ms']:.1f} ms  {row['ratio']:.2f}×"
        )


if __name__ == "__main__":
    main()
