"""Does the calibrated mixture beat every single method with one global setting?

Every method runs at eight settings or more in all heads of all layers, with the same dense
fall-back as the mixtures, which are calibrated at several budgets. All of them answer the same
held-out prompts of every task. Quality is the worst task's budget error (relative L1 error of the
last hidden state at scored positions, mean of the task's prompts); speed is the median prefill of
a batch of prompts, estimate and selection included, with dense beside it in the same process.

A setting that is slower than dense, or that spoils a prompt beyond anything a mixture may do, is no
rival: its other prompts are left out, and it says so (`complete`). One that leaves nothing out is
dense attention. Methods that calibration refuses on a
device, because choosing alone takes longer than dense attention, are left out with that reason.

    python benchmarks/mixture.py --length 8192 --out benchmarks/results/mixture-cpu.json
    python benchmarks/mixture.py --length 16384 --batch 8 --out benchmarks/results/mixture-16k.json

Parts may be measured in several runs on one kind of machine and put together: `--methods` names
some of the methods, `--budgets` without a value leaves the mixtures out, and `--join` reads the
parts. Times are compared by their ratio to the dense prefills of their own run.

`--answers N` also scores each mixture as `accelkit eval` does, with N answers a task or more. With
`--plans` a second run goes on with the plans of a first one, for instance to ask about other tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import accelkit
from accelkit.calibration import quality
from accelkit.calibration.capture import forward
from accelkit.calibration.corpus import source_corpus
from accelkit.calibration.evaluate import evaluate
from accelkit.calibration.refine import plan_digest
from accelkit.calibration.results import environment
from accelkit.calibration.tasks import TASKS, make
from accelkit.patches.method import Method, load, names
from accelkit.patches.patch import patch, plan_of
from accelkit.patches.plan import Plan

SETTINGS = 8
HELD_OUT_SEED = 9_000
"""Far from the seeds that calibration draws and checks with."""
SLOW = 1.1
"""Settings that take longer than this share of dense are not followed further."""
WHOLE = 0.999
"""Settings that compute this share of the visible pairs are dense attention, not its rivals."""
OPTIONS = {"qk": ("fp8", "int8"), "pv": ("fp8", "native"), "smooth_k": (False, True)}
"""Settings of methods that answer with the arithmetic only."""
SEVERAL = {"text": 3}
"""Prompts of tasks that differ much from prompt to prompt; the others have one."""
FIRST = ("text", "key_value", "variables")
"""Tasks that sparse attention fails first."""


def settings_of(name: str) -> list[Method]:
    """At least eight global settings of a method, from sparsest to densest: its dial's values and
    points between them.
    """
    cls = load(name)
    if cls.dial is None:
        return [cls(**dict(zip(OPTIONS, v, strict=True))) for v in product(*OPTIONS.values())]
    values = sorted(cls.dial.values)
    whole = all(isinstance(v, int) for v in values)
    while len(values) < SETTINGS:
        between = [(b / a, math.sqrt(a * b)) for a, b in pairwise(values)]
        between = [(gap, round(v) if whole else v) for gap, v in between]
        values = sorted([*values, max(m for m in between if m[1] not in values)[1]])
    if cls.dial.values[0] > cls.dial.values[-1]:
        values.reverse()
    return [cls(**{cls.dial.field: v}) for v in values]


class Bench:
    """The model, its held-out prompts, and the dense side of everything."""

    def __init__(self, args: argparse.Namespace) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=self.dtype)
        self.model, self.repeat = model.to(device).eval(), args.repeat
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        tasks = sorted(args.tasks, key=lambda t: FIRST.index(t) if t in FIRST else len(FIRST))
        tasks = [t for t in tasks for _ in range(SEVERAL.get(t, 1))]
        unseen = source_corpus(held_out=True)
        prompts = [
            make(t, args.length, HELD_OUT_SEED + i, unseen, self.tokenizer)
            for i, t in enumerate(tasks)
        ]
        rows = [prompts[i % len(prompts)].ids for i in range(args.batch)]
        self.ids = np.stack(rows).astype(np.int64)
        self.prefill_ms(1)
        self.references = [quality.reference(self.model, p) for p in prompts]
        self.dense_ms = [self.prefill_ms(self.repeat)]

    def prefill_ms(self, repeat: int = 1) -> float:
        """Median milliseconds of a prefill of the batch."""
        times = []
        for _ in range(repeat):
            quality.synchronise(self.model.device)
            begin = time.perf_counter()
            forward(self.model, self.ids)
            quality.synchronise(self.model.device)
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    def in_turns_ms(self, plan: Plan) -> tuple[float, float]:
        """Median milliseconds with the plan and dense, in turns, so that a drifting clock meets
        both.
        """
        times: list[tuple[float, float]] = []
        for _ in range(self.repeat):
            dense = self.prefill_ms()
            with patch(self.model, plan):
                if self.model.device.type == "cuda":
                    self.prefill_ms()  # warm
                times.append((self.prefill_ms(), dense))
        ms, dense = (statistics.median(side) for side in zip(*times, strict=True))
        self.dense_ms.append(dense)
        return ms, dense

    def slow(self, ms: float) -> bool:
        """Whether this reading tells that a setting is no rival; asks the clock again in doubt."""
        if ms > SLOW * min(self.dense_ms):
            self.dense_ms.append(self.prefill_ms())
            return ms > SLOW * self.dense_ms[-1]
        return False

    def measure(self, plan: Plan, most_error: float | None = None) -> dict[str, Any]:
        """Speed and quality of a plan. `worst_error` of one that is not complete is that of the
        prompts it ran on, None if it was too slow for any. Without `most_error` every prompt runs.
        """
        rows: list[dict[str, Any]] = []
        ms, dense_ms, density, slow = 0.0, self.dense_ms[-1], None, False
        if len(self.ids) > 1 or self.model.device.type == "cuda":
            with patch(self.model, plan):
                self.prefill_ms()  # compiles
                ms = self.prefill_ms()
            slow = most_error is not None and self.slow(ms)
        for reference in [] if slow else self.references:
            rows.append(quality.check(self.model, plan, reference))
            ms = ms or rows[0]["ms"]  # the first prompt alone tells as much
            slow = most_error is not None and len(rows) == 1 and self.slow(ms)
            if slow or (most_error is not None and rows[-1]["error"] > most_error):
                break
        complete = len(rows) == len(self.references)
        if complete:
            ms, dense_ms = self.in_turns_ms(plan)
            with patch(self.model, plan) as handle, handle.measuring():
                forward(self.model, self.ids[:1])
                density = handle.report().density
        tasks = quality.by_task(rows)
        drops = [t["dense_accuracy"] - t["accuracy"] for t in tasks.values() if t["asked"]]
        return {
            "complete": complete,
            "ms": ms,
            "dense_ms": dense_ms if complete else self.dense_ms[-1],
            "density": density,
            "worst_error": max((t["error"] for t in tasks.values()), default=None),
            "worst_prompt": max((t["worst"] for t in tasks.values()), default=None),
            "worst_drop": max(drops, default=None),
            "tasks": tasks,
        }


def mixture(bench: Bench, args: argparse.Namespace, budget: float) -> tuple[Plan, dict[str, Any]]:
    """A calibrated plan; later budgets share the first one's measurements and only search and
    check.
    """
    # Every row: what cutting the last layer short saves, single methods would save as well.
    folder = args.plans / f"{budget:g}" if args.plans else None
    begin = time.perf_counter()
    if folder is not None and folder.exists():
        plan = Plan.from_pretrained(folder)
    else:
        plan = accelkit.calibrate(
            bench.model, tokenizer=bench.tokenizer, budget=budget, lengths=[args.length],
            methods=args.among, preset=args.preset, batch=args.batch, journal=args.journal,
            resume=args.resume or budget != args.budgets[0], progress=False, every_row=True,
        )  # fmt: skip
        if folder is not None:
            plan.save_pretrained(folder)
    seconds = time.perf_counter() - begin
    used = sorted({p.label() for p in plan.policies})
    kept = ("dense_prefills", "dense_prefill_ms", "dense_peak_bytes", "peak_bytes", "refused")
    about = {k: plan.calibration[k] for k in (*kept, "seconds", "methods")}
    row = {"budget": budget, "seconds": seconds, "policies": used, "calibration": about}
    row |= {
        "answers": [],
        "plan": plan_digest(plan),
        "measured": plan.measured,
        **bench.measure(plan),
    }
    tell(f"mixture {budget}", row)
    return plan, row


def answers(bench: Bench, plan: Plan, args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Right answers with a plan and dense, as `accelkit eval` finds them on prompts of its own."""
    (score,) = evaluate(
        bench.model, bench.tokenizer, plan,
        names=[task], lengths=[args.length], answers=args.answers,
    )  # fmt: skip
    print(f"{task}: {score.drop or 0:.2f} points lost", file=sys.stderr, flush=True)
    return score.as_dict()


def singles(bench: Bench, name: str, most_error: float) -> list[dict[str, Any]]:
    """All settings of a method."""
    found: list[dict[str, Any]] = []
    for method in settings_of(name):
        row = bench.measure(plan_of(bench.model, method), most_error)
        dial = type(method).dial
        values = {k: getattr(method, k) for k in ((dial.field,) if dial else OPTIONS)}
        shown = ", ".join(f"{k}={v:.4g}" if dial else f"{k}={v}" for k, v in values.items())
        setting = f"{name}({shown})"
        found.append({"method": name, "setting": setting, **row})
        tell(setting, row)
    return found


def tell(what: str, row: dict[str, Any]) -> None:
    error = "–" if row["worst_error"] is None else f"{row['worst_error']:.4f}"
    print(f"{what}: {row['ms']:.1f} ms, dense {row['dense_ms']:.1f} ms, error {error}, "
          f"complete {row['complete']}", file=sys.stderr, flush=True)  # fmt: skip


def rival(single: dict[str, Any]) -> bool:
    """Whether a setting was followed to the end and left anything out."""
    density = single["density"] or 1.0  # None: no call ran sparse
    return single["complete"] and (density < WHOLE or load(single["method"]).dial is None)


def asked(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fewest answers of a task, and the points that the worst one lost; empty if none was asked."""
    right = [a["dense"] for a in answers if a["dense"]]
    if not right:
        return {}
    drops = [a["drop_points"] for a in answers if a["dense"]]
    return {"answers": min(r["asked"] for r in right), "points_lost": max(drops)}


def verdict(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For each mixture the fastest single setting whose worst-task error is no larger."""
    table, whole = [], statistics.median(found["dense_ms"])
    for mixture in sorted(found["mixtures"], key=lambda m: m["budget"]):
        rivals = [
            s for s in found["singles"] if rival(s) and s["worst_error"] <= mixture["worst_error"]
        ]
        share = min((s["ms"] / s["dense_ms"] for s in rivals), default=1.0)
        best = next((s for s in rivals if s["ms"] / s["dense_ms"] == share), None)
        mine = mixture["ms"] / mixture["dense_ms"]
        table.append(
            {
                "budget": mixture["budget"],
                "worst_error": mixture["worst_error"],
                "worst_prompt": mixture["worst_prompt"],
                "worst_drop": mixture["worst_drop"],
                **asked(mixture["answers"]),
                "mixture_ms": whole * mine,
                "dense_ms": whole,
                "best_single": best["setting"] if best and share < 1 else "dense",
                "best_single_ms": whole * min(share, 1.0),
                "ratio": min(share, 1.0) / mine,
            }
        )
    return table


def losses(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Single settings that are faster than dense and than every mixture of no larger error."""
    lost = []
    for s in found["singles"]:
        share = s["ms"] / s["dense_ms"]
        if not rival(s) or share >= 1:
            continue
        mine = [
            m["ms"] / m["dense_ms"]
            for m in found["mixtures"]
            if m["worst_error"] <= s["worst_error"]
        ]
        best = min(mine, default=1.0)
        if share < best:
            row = {"setting": s["setting"], "worst_error": s["worst_error"], "ratio": best / share}
            lost.append(row)
    return lost


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """Several parts as one result."""
    parts = [json.loads(p.read_text()) for p in paths]
    for key in ("model", "tokens", "batch", "dtype", "environment"):
        if any(p[key] != parts[0][key] for p in parts):
            raise SystemExit(f"--join: {key} differs between the parts")
    lists = ("dense_ms", "mixtures", "singles")
    whole = parts[0] | {k: [row for p in parts for row in p[k]] for k in lists}
    mixtures: dict[str, dict[str, Any]] = {}
    for row in whole["mixtures"]:  # one plan may have been asked for its answers in parts
        first = mixtures.setdefault(f"{row['budget']} {row['plan']}", row)
        if first is not row:
            first["answers"] += row["answers"]
    return whole | {"mixtures": list(mixtures.values())}


def save(found: dict[str, Any], path: Path) -> None:
    found["table"], found["losses"] = verdict(found), losses(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/models/tiny-llama")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--among", nargs="*", default=None, help="methods that mixtures may use")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--most-error", type=float, default=0.12, help="of rivals")
    parser.add_argument("--journal", type=Path, help="of the calibration; kept if it is named")
    parser.add_argument("--resume", action="store_true", help="take up the named journal")
    parser.add_argument("--plans", type=Path, help="folder of the mixtures' plans, kept or read")
    parser.add_argument("--answers", type=int, default=0, help="for each task and mixture; 0: none")
    parser.add_argument("--asked", nargs="*", default=TASKS, help="tasks that answers are for")
    parser.add_argument("--join", type=Path, nargs="*", help="results to put together")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.join:
        found = joined(args.join)
        save(found, args.out)
    else:
        own, args.journal = args.journal, args.journal or args.out.with_suffix(".journal.jsonl")
        bench = Bench(args)
        found = {
            "model": args.model, "tokens": args.length, "batch": args.batch,
            "dtype": str(bench.dtype), "preset": args.preset, "prompts": len(bench.references),
            "environment": environment(bench.model.device), "dense_ms": bench.dense_ms,
            "mixtures": [], "singles": [],
        }  # fmt: skip
        plans = []
        for budget in args.budgets:
            plan, row = mixture(bench, args, budget)
            plans.append(plan)
            found["mixtures"].append(row)
            save(found, args.out)  # a run that is cut short keeps what it has
        refused = {n for m in found["mixtures"] for n in m["calibration"]["refused"]}
        able = [n for n in names() if "prefill" in load(n).phases and n not in refused]
        for name in able if args.methods is None else args.methods:
            found["singles"] += singles(bench, name, args.most_error)
            save(found, args.out)
        for plan, row in zip(plans, found["mixtures"], strict=True):
            sparse = not all(p.dense for p in plan.policies)
            for task in args.asked if args.answers and sparse else ():
                row["answers"].append(answers(bench, plan, args, task))
                save(found, args.out)
        if own is None:
            args.journal.unlink(missing_ok=True)
    for row in found["table"]:
        print(
            f"budget {row['budget']:<5} error {row['worst_error']:.4f}  mixture "
            f"{row['mixture_ms']:.1f} ms  best single {row['best_single']} "
            f"{row['best_single_ms']:.1f} ms  dense {row['dense_ms']:.1f} ms  {row['ratio']:.2f}×"
        )
    for row in found["losses"]:
        print(f"faster than the mixtures at its error {row['worst_error']:.4f}: {row['setting']}")


if __name__ == "__main__":
    main()
