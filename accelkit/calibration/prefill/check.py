"""The end-to-end check of a plan for prefill: held-out prompts, dense and patched."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from accelkit.calibration import session
from accelkit.calibration.capture import prefill
from accelkit.calibration.data import Inputs
from accelkit.calibration.evaluation import quality
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.refine import Round, plan_digest
from accelkit.calibration.session import Run
from accelkit.calibration.timing import times_ms
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

FEW = 1
"""Most lost answers that are asked about on further prompts."""
OUTLIER = 1.6
"""A prompt's error that is this multiple of the others' has a cause of its own."""
MEASURED = 5.0
"""Runs that measuring the heads of such a prompt takes."""
BROKEN = 2.5
"""A lost answer of a prompt whose error is above this multiple of the budget has more than one
cause.
"""
LIFT = 1.15
"""What all prompts reach ÷ the error of the first one, before anything is known."""
TOGETHER = 4
"""Prompts that share a forward, where so many are calibrated for: what fails, fails early."""
MOST_RUNS = 4.0
"""Runs for each prompt that the check may be worth, dense ones included."""
FIRST = ("common_words", "multi_key", "variables")
"""Tasks that fail first where the rows with the question are dense; texts fail last there."""
TIMED = 6.0
"""Runs in which a plan is timed, dense ones included."""
KINDS = {"cpu": 4}
"""Kinds of prompts that it is timed on, by device: a CPU computes more of one than of another."""
CLEAR = 0.95
DOUBTS = 3
"""On a CPU, a plan that does not take less than this share of the dense sides is timed again, so
many times at most.
"""
Suspicion = tuple[Callable[[Plan], bool], Round | None]
"""Whether a plan gives a lost answer, and a round that gave it."""


class Checker:
    """Runs plans on the prompts to check on; the dense side of each is run once.

    `still` is the plan that leaves all layers dense, trimmed as the others are; its rows are the
    dense side.
    """

    def __init__(self, run: Run, inputs: Inputs, still: Plan) -> None:
        self.run, self.samples, self.more, self.still = run, inputs.check, inputs.more, still
        self.order = list(range(len(inputs.check)))
        # The prompt that tells most beside the first one, where that failed for a cause of its own.
        self.beside: int | None = None
        if still.dense_rows:  # answers from dense lists and from among many like them fail first
            self.order.sort(key=lambda n: _place(inputs.check[n].task))
            self.beside = next(iter(self.order[1:]), None)
        self.suspects: set[int] = set()
        # Of a prompt's further ones the one that lost an answer which was followed to a head.
        self.telling: dict[int, int] = {}
        self.references: dict[int, quality.Reference] = {}
        self.lifts: dict[int, float] = {}
        # Runs so far, and those of all prompts, in runs of the longest one.
        self.runs, self.whole = 0.0, sum(map(self._share, self.order))
        self.dense_runs: set[int] = set()

    def look(self, now: Round, allowed: float) -> None:
        """Run the most revealing prompt of earlier rounds; two where the first one tells whether
        what was learnt from it has helped, but nothing of the others.
        """
        some = list(dict.fromkeys(n for n in (self.order[0], self.beside) if n is not None))
        self._checked(now.plan, f"check/{plan_digest(now.plan)}", self._together(some))
        self._count(some)
        for n in some:
            self._add(now, n, allowed)
            now.judged = now.judged or self._fails(now, n, allowed)
        self.expect(now)

    def expect(self, now: Round) -> None:
        """What all prompts may reach, from those that were run and what checks of others told."""
        known = [r["error"] * self.lifts.get(r["prompt"], LIFT) for r in now.rows if r["error"]]
        now.bound = max(known, default=0.0)

    def check(self, now: Round, allowed: float) -> None:
        """Run the other prompts, the most revealing of earlier rounds first, until one fails."""
        seen = {r["prompt"] for r in now.rows}
        left = [n for n in self.order if n not in seen]
        failed = False
        while left and not failed:
            some = self._together(left)
            self._checked(now.plan, f"check/{plan_digest(now.plan)}", some)
            self._count(some)  # all of them ran, even where the first one settles it
            for n in some:
                self._add(now, n, allowed, along=failed)
                failed = failed or self._fails(now, n, allowed)
            left = left[len(some) :]
        tasks = quality.by_task(_counted(now))
        now.bound = max(t["bound"] for t in tasks.values())
        now.held = not failed and quality.holds(tasks, allowed)
        now.judged = True
        errors = {r["prompt"]: r["error"] for r in now.rows if r["error"] is not None}
        first = [] if now.held else [_spoilt(now)["prompt"]]
        apart = now.apart = bool(first) and self._apart(now)
        # What failed for a cause of its own says nothing of the others.
        known = {n: e for n, e in errors.items() if not (apart and self._alike(n, first[0]))}
        if len(known) > 1:
            reach = LIFT * max(known.values()) if apart else now.reach
            self.lifts |= {n: reach / max(e, 1e-12) for n, e in known.items()}
        self.beside = max(known, key=known.__getitem__, default=None) if apart else None
        worst = sorted(errors, key=lambda n: -errors[n])
        # The next round must not lose the answers that this one lost.
        self.order = list(dict.fromkeys([*first, *worst, *self.order]))

    def affords(self) -> bool:
        """Whether another plan may be looked at, and one be checked on all prompts."""
        new = sum(self._share(n) for n in self.order if n not in self.dense_runs)
        return self.runs + 1 + new + self.whole <= MOST_RUNS * self.whole

    def seconds(self) -> float:
        """What a check of a plan on all prompts may take, its timing included."""
        new = [s for n, s in enumerate(self.samples) if n not in self.dense_runs]
        return whole_check(self.run, [*self.samples, *new])

    def _share(self, n: int) -> float:
        return len(self.samples[n].ids) / max(len(s.ids) for s in self.samples)

    def _add(self, now: Round, n: int, allowed: float, along: bool = False) -> None:
        """Rows of the n-th prompt; those of one that ran along with others tell what went wrong,
        but do not count.
        """
        key = f"check/{plan_digest(now.plan)}/{n}"
        rows = [self._row(now.plan, key, n)] if along else self._rows(now.plan, key, n, allowed)
        now.rows += [{**row, "prompt": n, "along": along} for row in rows]
        now.measured = max(r["error"] for r in _counted(now) if r["error"] is not None)

    def _count(self, prompts: Sequence[int]) -> None:
        """Count a run of some prompts, and their dense sides where those are new."""
        self.runs += sum(self._share(n) * (1 + (n not in self.dense_runs)) for n in prompts)
        self.dense_runs.update(prompts)

    def _fails(self, now: Round, n: int, allowed: float) -> bool:
        """Whether the n-th prompt, run last, settles that the round fails: what is over stays over,
        but a task's other prompts may make up for answers, and tell how far its errors spread.
        """
        if now.measured > allowed:
            return True
        seen = {r["prompt"] for r in now.rows}
        if any(self._alike(n, m) and m not in seen for m in range(len(self.samples))):
            return False
        return not quality.holds(quality.by_task(now.rows), allowed)

    def _alike(self, n: int, m: int) -> bool:
        """Whether two prompts are judged together."""
        a, b = self.samples[n], self.samples[m]
        return (a.task, len(a.ids)) == (b.task, len(b.ids))

    def _rows(self, plan: Plan, key: str, n: int, allowed: float) -> list[dict[str, Any]]:
        """One prompt, and further ones of its task when a lost answer leaves it open whether more
        than one in a hundred are lost.
        """
        sample = self.samples[n]
        rows = [self._row(plan, key, n)]
        first = [self.telling[n]] if n in self.telling else []
        others = itertools.chain(first, (i for i in itertools.count(1) if i not in first))
        while self.more is not None and rows[0]["error"] <= allowed and self._open(rows):
            at = next(others)
            further = partial(self.more, sample.task, len(sample.ids), at)
            self.run.tell("checking a plan")
            work = partial(quality.answers, self.run.model, plan, self.still, further)
            rows.append(self.run.journal.unit(f"{key}+{at}", work) | {"further": at})
            self.runs += self._share(n) * (1 + (rows[-1]["dense_right"] is not None))
        return rows

    def suspicion(self, now: Round, rounds: Sequence[Round], allowed: float) -> Suspicion | None:
        """For a round that failed with lost answers, what to ask of plans with some heads changed:
        is one of them given? Beside it a round that gave it, if there was one. None: no lost
        answer, or errors of all kinds beside it, or a prompt that lost none is over the budget as
        well, and smaller errors are due whatever is learnt.
        """
        row = _spoilt(now)
        if not row["lost_answers"] or (row["error"] or 0.0) > BROKEN * allowed:
            return None
        if any((r["error"] or 0.0) > allowed and not r["lost_answers"] for r in now.rows):
            return None
        n, further, place = row["prompt"], row.get("further"), row["lost_answers"][0]
        sample = self.samples[n]
        if further is not None and self.more is not None:
            sample, self.telling[n] = self.more(sample.task, len(sample.ids), further), further

        def gave(other: dict[str, Any]) -> bool:
            same = other["prompt"] == n and other.get("further") == further
            return same and place not in other["lost_answers"]

        return partial(self._gives, sample=sample, place=place), _latest(rounds, gave)

    def stands_out(self, now: Round) -> int | None:
        """The prompt with which a round failed, if it lost no answer and its error is far from that
        of others: something in it is seen nowhere else. None: it is not, or was so before and still
        is.
        """
        row = _spoilt(now)
        n = row["prompt"]
        if row["lost_answers"] or n in self.suspects:
            return None
        if not self._others(now, n):
            self._beside(now, n)
        if row["error"] < OUTLIER * float(np.median(self._others(now, n) or [np.inf])):
            return None
        self.suspects.add(n)
        self.runs += MEASURED * self._share(n)
        return n

    @staticmethod
    def _others(now: Round, n: int) -> list[float]:
        """Errors of the round's prompts but the n-th."""
        return [r["error"] for r in now.rows if r["prompt"] != n and r["error"] is not None]

    def _apart(self, now: Round) -> bool:
        """Whether a round failed for a cause of its own."""
        row = _spoilt(now)
        others = self._others(now, row["prompt"])
        return bool(row["lost_answers"]) or (
            bool(others) and row["error"] >= OUTLIER * float(np.median(others))
        )

    def _beside(self, now: Round, n: int) -> None:
        """Run another prompt, of another task if there is one, to tell whether the n-th stands
        out.
        """
        others = [m for m in self.order if m != n]
        other = min(others, key=lambda m: self._alike(n, m), default=None)
        if other is not None:
            key = f"check/{plan_digest(now.plan)}/{other}"
            self._count([other])
            now.rows.append({**self._row(now.plan, key, other), "prompt": other})

    def _gives(self, plan: Plan, sample: Sample, place: int) -> bool:
        def work() -> list[bool]:
            return quality.answered(self.run.model, plan, sample)[0]

        self.run.tell("finding what went wrong")
        self.runs += 1
        key = f"blame/{plan_digest(plan)}/{session.digest([sample.ids.tobytes()])}"
        return self.run.journal.unit(key, work)[place]

    @staticmethod
    def _open(rows: Sequence[dict[str, Any]]) -> bool:
        lost = quality.lost(rows)
        return 0 < lost <= FEW and lost > quality.MOST_DROP * sum(r["asked"] for r in rows)

    def _together(self, prompts: Sequence[int]) -> list[int]:
        """The first of some prompts and those after it that may share its forward."""
        tokens = [len(self.samples[n].ids) for n in prompts]
        alike = next((i for i, n in enumerate(tokens) if n != tokens[0]), len(tokens))
        return list(prompts[: min(alike, self.run.batch, TOGETHER)])

    def _checked(self, plan: Plan, prefix: str, prompts: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of prompts that share a forward, dense and with a plan."""

        def work(places: Sequence[int]) -> list[dict[str, Any]]:
            some = [prompts[i] for i in places]
            new = [n for n in some if n not in self.references]
            if new:
                samples = [self.samples[n] for n in new]
                found = quality.references(self.run.model, samples, self.still)
                self.references |= dict(zip(new, found, strict=True))
            return quality.checks(self.run.model, plan, [self.references[n] for n in some])

        for _ in prompts:
            self.run.tell("checking a plan")
        return self.run.journal.together([f"{prefix}/{n}" for n in prompts], work)

    def _row(self, plan: Plan, key: str, n: int) -> dict[str, Any]:
        return self._checked(plan, key.rpartition("/")[0], [n])[0]

    def speed(self, plan: Plan) -> dict[str, float]:
        """Milliseconds of a whole prefill as `generate` does it, dense and patched, on the longest
        prompts; patched the mean of a few kinds, and dense of the first and the last of them.
        """
        longest = max(len(s.ids) for s in self.samples)
        kinds = {s.task: s.ids for s in reversed(self.samples) if len(s.ids) == longest}
        model, device = self.run.model, self.run.device
        on_gpu = device.type == "cuda"
        some = list(reversed(kinds.values()))[: KINDS.get(device.type, 1)]
        runs = [
            partial(
                prefill,
                model,
                torch.from_numpy(np.repeat(ids[None].astype(np.int64), self.run.batch, 0)).to(
                    device
                ),
            )
            for ids in some
        ]
        sides: dict[str, Plan | None] = {"dense_ms": None, "ms": plan}
        if plan.trim_last_layer and any(s.rules for s in plan.sites.values()):
            sides["trimmed_ms"] = self.still
        least: dict[str, dict[int, float]] = {k: {} for k in sides}

        def turn(n: int, names: Sequence[str]) -> None:
            """One more reading of each; what disturbs a reading only adds to it."""
            place = n % len(runs)
            for k in names:
                side = sides[k]
                with nullcontext() if side is None else patch(model, side):
                    # The first one warms up: lists from geometry are made once in a patch's life.
                    # Another one may have waited for a busy host.
                    often = 2 if side is None else 3
                    ms = min(times_ms(runs[place], often if on_gpu else 1, 0, device))
                least[k][place] = min(ms, least[k].get(place, ms))

        def took() -> dict[str, float]:
            return {k: statistics.mean(found.values()) for k, found in least.items()}

        def work() -> dict[str, float]:
            turn(0, list(sides))
            if not on_gpu:  # dense at both ends, so that a drifting clock meets both sides
                last = max(1, len(runs) - 1)
                for n in range(1, last):
                    turn(n, ("ms",))
                turn(last, ("ms", "dense_ms"))
                for n in range(DOUBTS):  # other programs may have met one side alone
                    now = took()
                    if now["ms"] < CLEAR * min(v for k, v in now.items() if k != "ms"):
                        break
                    turn(n, list(sides))
            return took() | {"tokens": longest}

        self.run.tell("timing the plan")
        return self.run.journal.unit(f"speed/{plan_digest(plan)}", work)


def _place(task: str) -> int:
    """In which order tasks are checked where the rows with the question are dense."""
    return FIRST.index(task) if task in FIRST else len(FIRST) + (task == "text")


def whole_check(run: Run, samples: Sequence[Sample]) -> float:
    """Seconds that a plan may take on such prompts, its timing included."""
    longest = max(len(s.ids) for s in samples)
    runs = sum(len(s.ids) for s in samples) / longest
    return run.dense_s * (runs / run.batch + TIMED)


def _counted(now: Round) -> list[dict[str, Any]]:
    """The rows by which a round is judged."""
    return [r for r in now.rows if not r.get("along")]


def _spoilt(now: Round) -> dict[str, Any]:
    """What tells most about a round that failed: the last row with a lost answer of a task that
    lost too many, else the one with the largest error.
    """
    tasks = quality.by_task(now.rows)
    many = {k for k, t in tasks.items() if t["lost"] > quality.MOST_DROP * t["asked"]}
    lost = [r for r in now.rows if r["lost_answers"] and quality.task_of(r) in many]
    return lost[-1] if lost else max(now.rows, key=lambda r: r["error"] or 0.0)


def _latest(rounds: Sequence[Round], fine: Callable[[dict[str, Any]], bool]) -> Round | None:
    """The latest round with such a row."""
    return next((r for r in reversed(rounds) if any(map(fine, r.rows))), None)
