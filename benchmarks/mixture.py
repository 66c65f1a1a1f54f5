"""Does the calibrated mixture beat every single method with one global setting?

Every method for prefill, also those that calibration refuses on a device, runs at eight settings or
more in all heads of all layers, with the same dense fall-back and the same minimum length as the
mixtures, which are calibrated at several budgets. All of them answer the same held-out prompts.
Quality is the worst task's budget error (relative L1 error of the last hidden state at scored
positions, mean of the task's prompts); beside it the share of answers that a task lost.

A setting that is slower than dense, or that spoils a prompt beyond anything a mixture may do, is no
rival: its other prompts are left out, and it says so (`stopped`). In the end the mixtures and the
rivals are timed together, a batch of prompts each, estimate and selection included, every one of
them and dense in every turn of one process; the table is made of these times alone.

    python benchmarks/mixture.py --length 8192 --out benchmarks/results/mixture-8k-cpu.json
    python benchmarks/mixture.py --length 16384 --batch 8 --answers 500 --match \
        --out benchmarks/results/mixture-16k.json

A run goes on with what its `--out` holds already, so it may be cut into several. Parts of several
machines are put together with `--join`: what mixtures and settings lose may come from another
device than their times (`asked_on`), for the plans are the same. `--match` calibrates one more
mixture for every setting that no mixture beats yet, with a budget that should bring its error near
that setting's: plans keep a distance from their budgets.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mixture_bench import Bench, label, settings_of, told
from mixture_table import joined, losses, matching, name_of, rivals, same, save, shown

import accelkit
from accelkit.calibration.evaluation.tasks import TASKS
from accelkit.calibration.refine import plan_digest
from accelkit.calibration.results import environment
from accelkit.patches.method import load, names
from accelkit.patches.plan import Plan

MATCHES = 2
"""How often `--match` looks for settings that no mixture beats."""
SHARED = ("dense", "fit", "screen/", "weight/", "measure/0/")
"""Units of a calibration's journal that are alike for all budgets, by the beginning of their keys.
"""


class Study:
    """One run: the bench, what was found so far, and the plans of the mixtures by name."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.plans: dict[str, Plan] = {}
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.bench = Bench(
            args.model, args.tasks, args.length, args.batch, args.answers, device, args.dtype,
            args.slow,
        )  # fmt: skip
        self.found: dict[str, Any] = {
            "model": args.model, "tokens": args.length, "batch": args.batch,
            "dtype": str(self.bench.model.dtype), "preset": args.preset,
            "environment": environment(self.bench.model.device), "mixtures": [], "singles": [],
        }  # fmt: skip
        if args.out.exists():
            before = json.loads(args.out.read_text("utf-8"))
            same(self.found, before, str(args.out))
            keep = ("mixtures", "singles", "speed", "note")
            self.found |= {k: before[k] for k in keep if k in before}
        for row in self.found["mixtures"]:
            folder = args.plans / f"{row['budget']:g}"
            if folder.exists():
                plan = Plan.from_pretrained(folder)
                if plan_digest(plan) == row["plan"]:
                    self.plans[name_of(row)] = plan

    def save(self) -> None:
        save(self.found, self.args.out)

    def warm(self) -> None:
        """Calibrate once, so that kernels are compiled and loaded before a search is counted."""
        self.calibrated(self.args.budgets[0])

    def mixture(self, budget: float) -> None:
        """A plan, calibrated or of an earlier run, and what it loses."""
        plan = self.plan(budget)
        digest = plan_digest(plan)
        row = next((m for m in self.found["mixtures"] if m["plan"] == digest), None)
        if row is None or row["budget"] != budget or row["prompts"] < len(self.bench.samples):
            kept = ("dense_prefills", "search_prefills", "dense_prefill_ms", "dense_peak_bytes",
                    "peak_bytes", "refused", "seconds", "methods")  # fmt: skip
            row = {
                "budget": budget, "plan": digest,
                "policies": sorted({p.label() for p in plan.policies}),
                "calibration": {k: plan.calibration.get(k) for k in kept},
                "measured": plan.measured, **self.bench.measure(plan),
            }  # fmt: skip
            for old in [m for m in self.found["mixtures"] if m["budget"] == budget]:
                self.found["mixtures"].remove(old)
                self.plans.pop(name_of(old), None)
            self.found["mixtures"].append(row)
            told(f"mixture {budget:g}", row)
        self.plans[name_of(row)] = plan
        self.save()

    def plan(self, budget: float) -> Plan:
        """The plan of an earlier run, or one calibrated now."""
        folder = self.args.plans / f"{budget:g}"
        if folder.exists():
            return Plan.from_pretrained(folder)
        plan = self.calibrated(budget, self.journal(budget))
        plan.save_pretrained(folder)
        return plan

    def calibrated(self, budget: float, journal: Path | None = None) -> Plan:
        """A plan made now."""
        args = self.args
        # Every row: what cutting the last layer short saves, single methods would save as well.
        return accelkit.calibrate(
            self.bench.model, tokenizer=self.bench.tokenizer, budget=budget, lengths=[args.length],
            methods=args.among, preset=args.preset, batch=args.batch,
            journal=journal, resume=True, progress=False, every_row=True,
        )  # fmt: skip

    def journal(self, budget: float) -> Path:
        """A budget's journal: what its search picks is measured further for it alone, everything
        before that is shared with the budget that was calibrated first. Plans are shared by all.
        """
        mine: Path = self.args.out.with_suffix(f".journal-{budget:g}.jsonl")
        known = sorted(self.args.out.parent.glob(self.args.out.stem + ".journal-*.jsonl"))
        if known and not mine.exists():
            shared = _lines(known[0], SHARED)
            plans = [line for path in known for line in _lines(path, ("plan/",))[1:]]
            mine.write_text("".join(shared + plans), "utf-8")
        return mine

    def singles(self, kind: str) -> None:
        """All settings of a method that were not run before."""
        known = {s["setting"]: s for s in self.found["singles"]}
        for method in settings_of(kind):
            setting = label(method)
            before = known.get(setting)
            whole = before and (before["stopped"] or before["prompts"] == len(self.bench.samples))
            if whole:
                continue
            row = self.bench.measure(self.bench.single(method), self.args.most_error)
            rest = [s for s in self.found["singles"] if s["setting"] != setting]
            self.found["singles"] = [*rest, {"method": kind, "setting": setting, **row}]
            told(setting, row)
            self.save()

    def together(self) -> None:
        """Time mixtures and rivals in one process."""
        methods = {label(m): m for s in self.found["singles"] for m in settings_of(s["method"])}
        sides = dict(self.plans)
        for single in rivals(self.found, self.args.slow):
            sides[single["setting"]] = self.bench.single(methods[single["setting"]])
        ms: dict[str, list[float]] = {}
        for turn in range(self.args.turns):
            for name, one in self.bench.turn(sides, backwards=turn % 2 == 1).items():
                ms.setdefault(name, []).append(one)
            self.found["speed"] = {
                "environment": environment(self.bench.model.device),
                "batch": self.args.batch,
                "ms": ms,
            }
            self.save()
            shown_ms = {name: round(times[-1], 1) for name, times in ms.items()}
            print(f"turn {turn + 1}", shown_ms, file=sys.stderr, flush=True)

    def match(self) -> None:
        """Mixtures for the errors of settings that none of them beats."""
        for _ in range(MATCHES):
            tried = {m["budget"] for m in self.found["mixtures"]}
            budgets = {
                matching(self.found["mixtures"], s["worst_error"]) for s in losses(self.found)
            }
            for budget in sorted(budgets - tried):
                self.mixture(budget)
            if budgets <= tried:
                return
            self.together()


def _lines(journal: Path, prefixes: tuple[str, ...]) -> list[str]:
    """The first line of a journal and those of the units whose keys begin so."""
    first, *units = journal.read_text("utf-8").splitlines(keepends=True)
    return [first, *(u for u in units if json.loads(u)["unit"].startswith(prefixes))]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="examples/models/tiny-llama")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="of the model; float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.02, 0.05, 0.1])
    parser.add_argument("--methods", nargs="*", help="single methods to run; all of them")
    parser.add_argument("--among", nargs="*", default=None, help="methods that mixtures may use")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--answers", type=int, default=0, help="fewest of every task that has any")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--most-error", type=float, default=0.12, help="of rivals, mean of a task")
    parser.add_argument("--slow", type=float, default=1.1, help="share of dense that ends a test")
    parser.add_argument("--turns", type=int, default=5, help="times that all are timed; 0: not yet")
    parser.add_argument("--warm", action="store_true", help="calibrate once before anything counts")
    parser.add_argument("--match", action="store_true", help="mixtures for unbeaten settings")
    parser.add_argument("--plans", type=Path, help="folder of the mixtures' plans, kept or read")
    parser.add_argument("--join", type=Path, nargs="*", help="results to put together")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    args.plans = args.plans or args.out.with_suffix(".plans")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parsed(arguments)
    if args.join:
        found = joined(args.join)
        save(found, args.out)
        print(shown(found))
        return
    study = Study(args)
    if args.warm:
        study.warm()
    for budget in args.budgets:
        study.mixture(budget)
    able = [n for n in names() if "prefill" in load(n).phases]
    for kind in able if args.methods is None else args.methods:
        study.singles(kind)
    if args.turns:
        study.together()
        if args.match:
            study.match()
    study.save()
    print(shown(study.found))


if __name__ == "__main__":
    main()
