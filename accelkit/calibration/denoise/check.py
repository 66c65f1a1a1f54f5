"""The end-to-end check of a pipeline's plan: final latents and frames of equal seed, dense and
patched. The worst prompt counts.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.fidelity import fidelity
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Enough, Settings, Take
from accelkit.calibration.evaluation.quality import geometric_mean, relative
from accelkit.calibration.refine import Round, plan_digest
from accelkit.calibration.session import Run
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

log = logging.getLogger("accelkit")
HOPELESS = 1.25
"""A run whose latents have this multiple of the budget is not finished."""
MOST_RUNS = 2.0
"""Dense runs for each prompt that the check may be worth, the dense side included."""
CAREFUL = 0.75
"""Share of its ε that the last round takes which the check can afford, if none held before."""
CLEAR = 1.5
"""A bound that is this multiple of the budget is not mended by further prompts."""
WATCHED = 4
"""Latents are compared on the way at one step in so many."""
AGAIN = 3
"""Dense steps that are timed once more behind the checks: a machine that was busy during the
reference would make every plan look fast.
"""


class Checker:
    """Runs plans on held-out shots; the dense side of each is run once, and only if it is needed.

    `cost(plan)` predicts a run's time ÷ the dense one's. Further prompts hardly exceed the mean
    error times `margin`.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        shots: Sequence[Shot],
        cost: Callable[[Plan], float],
        margin: float,
    ) -> None:
        self.run, self.settings, self.shots, self.cost = run, settings, shots, cost
        self.margin = margin
        self.order = list(range(len(shots)))
        self.prompts = len(shots)
        self.references: dict[int, tuple[Take, dict[int, Tensor]]] = {}
        self.lately: dict[int, float] = {}
        self.checked: list[Round] = []

    def check(self, now: Round, allowed: float) -> None:
        """Run the shots, the most revealing of earlier rounds first, until one fails, or until it
        is clear that further prompts would.
        """
        digest = plan_digest(now.plan)
        self.checked.append(now)
        for n in self.order[: self.prompts]:
            self.run.tell("checking a plan")
            key = f"check/{digest}/{n}"
            row = self._unit(key, partial(self._row, now.plan, n, allowed), allowed)
            now.rows.append({**row, "prompt": n})
            # The error of a run that was not finished would have grown further.
            errors = [r["error"] / r["done"] for r in now.rows]
            # Frames count as well: noise that stays in them is a small error of the latents.
            frames = [1 - r["ssim"] for r in now.rows if r.get("ssim") is not None]
            now.measured = max([*errors, *frames])
            likely = self.likely({r["prompt"]: e for r, e in zip(now.rows, errors, strict=True)})
            now.bound = self.margin * geometric_mean(likely)
            clear = len(likely) >= self.prompts and now.bound > CLEAR * allowed
            if now.measured > allowed or clear:
                break
        now.held = len(now.rows) == self.prompts and now.reach <= allowed
        if len(now.rows) == len(self.shots):
            self.lately = {r["prompt"]: r["error"] / r["done"] for r in now.rows}
        worst = [r["prompt"] for r in sorted(now.rows, key=lambda r: -r["error"])]
        self.order = worst + [n for n in self.order if n not in worst]

    def likely(self, errors: Mapping[int, float]) -> list[float]:
        """The errors of all prompts: as measured, or as the last round that ran all of them lets
        expect. Of some alone, if there was none.
        """
        if not self.lately:
            return list(errors.values())
        alike = geometric_mean([e / max(self.lately[n], 1e-12) for n, e in errors.items()])
        return [errors.get(n, alike * self.lately[n]) for n in range(len(self.shots))]

    def _unit(self, key: str, work: Callable[[], dict[str, Any]], allowed: float) -> dict[str, Any]:
        """A row of the journal; made anew if it was cut short for a smaller budget than this."""
        book = self.run.journal
        if key in book and book[key]["done"] < 1 and book[key]["error"] <= HOPELESS * allowed:
            book.drop(key)
        return book.unit(key, work)

    def used(self, rounds: Sequence[Round]) -> float:
        """Dense runs for each prompt that the rounds took and that timing some steps again takes in
        the end, the dense side included.
        """
        taken = sum(self.took(r.plan, row) for r in rounds for row in r.rows)
        again = min((AGAIN / steps_of(row) for r in rounds for row in r.rows), default=0.0)
        return 1 + (taken + again) / len(self.shots)

    def took(self, plan: Plan, row: Mapping[str, Any]) -> float:
        """Dense runs that a run took, decoding included, without compiling; as predicted if it has
        no times.
        """
        if "steps_ms" not in row:
            return self.cost(plan) * row["done"]
        compiling = self.run.journal.compiling(f"check/{plan_digest(plan)}/{row['prompt']}")
        ms = sum(row["steps_ms"]) + row.get("decoding_ms", 0.0) - 1e3 * compiling
        dense = sum(row["dense_steps_ms"]) / row["done"] + row.get("dense_decoding_ms", 0.0)
        return ms / dense

    def whole(self, rounds: Sequence[Round], plan: Plan) -> float:
        """Dense runs for each prompt that a whole round of this plan may take: as predicted, times
        how much longer earlier ones took.
        """
        longer = [
            self.took(r.plan, row) / (self.cost(r.plan) * row["done"])
            for r in rounds
            for row in r.rows
        ]
        return self.cost(plan) * (statistics.median(longer) if longer else 1.0)

    def spent(self, rounds: Sequence[Round], plan: Plan) -> bool:
        """Whether a whole round of this plan could be worth more dense runs than the check may
        take.
        """
        return bool(rounds) and self.used(rounds) + self.whole(rounds, plan) > MOST_RUNS

    def narrow(self, rounds: Sequence[Round], plan: Plan) -> bool:
        """Let a last round run only the most telling prompts, as many as the check can still
        afford; whether it affords any.
        """
        left = (MOST_RUNS - self.used(rounds)) * len(self.shots)
        self.prompts = min(len(self.shots), int(left / self.whole(rounds, plan) + 1e-9))
        what = f"{len(self.shots) - self.prompts} of {len(self.shots)} prompts of round"
        why = f"the check would be worth more than {MOST_RUNS:g} dense runs a prompt"
        self.run.skipped.append(f"{what} {len(rounds) + 1}: {why}")
        return self.prompts > 0

    def affords(self, *plans: Plan) -> bool:
        """Whether a check that has not begun may run whole rounds of all these plans."""
        return 1 + sum(self.whole([], plan) for plan in plans) <= MOST_RUNS

    def least(self, rounds: Sequence[Round], allowed: float) -> None:
        """Where none held, for further prompts might exceed the budget, let that one hold which
        comes closest among those that stayed within it on every prompt: a user whose own prompts
        all kept to the budget is served better by it than by a dense plan.
        """
        whole = [r for r in rounds if len(r.rows) == len(self.shots) and r.measured <= allowed]
        if whole and not any(r.held for r in rounds):
            best = min(whole, key=lambda r: r.reach)
            best.held = True
            log.warning(
                "the plan stayed within %g on every prompt of the check (%.3g at most), and no "
                "other could be afforded; one further prompt in twenty may reach %.3g",
                allowed, best.measured, best.reach,
            )  # fmt: skip

    def care(self, rounds: Sequence[Round], plan: Plan) -> float:
        """The share of ε that a round shall take which takes this plan's time: less where no other
        could follow and none has held; a plan that is too careful is better than none.
        """
        if any(r.held for r in rounds):
            return 1.0
        whole = self.whole(rounds, plan)
        last = self.used(rounds) + whole / len(self.shots) + whole > MOST_RUNS
        return CAREFUL if last else 1.0

    def speed(self, plan: Plan) -> dict[str, float]:
        """Milliseconds of the denoising, dense and patched: the least of each step over the
        prompts, and dense ones no slower than some that are timed again.
        """
        digest = plan_digest(plan)
        keys = [f"check/{digest}/{n}" for n in range(len(self.shots))]
        rows = [self.run.journal[key] for key in keys if key in self.run.journal]
        dense, patched = (
            np.min([row[side] for row in rows], 0) for side in ("dense_steps_ms", "steps_ms")
        )
        again = self.run.journal.unit("check/again", self._again)
        slower = dense[: len(again)].sum() / sum(again) if again else 1.0
        return {"ms": float(patched.sum()), "dense_ms": float(dense.sum() / max(slower, 1.0))}

    def _again(self) -> list[float]:
        """Milliseconds of the first dense steps, timed once more: as many as are afforded."""
        most = self.retimed()
        if not most:
            return []

        def each(done: int, latents: Tensor) -> None:
            if done + 1 == most:
                raise Enough

        return _steps_ms(video.run(self.run.model, self.settings, self.shots[0], each=each))

    def retimed(self) -> int:
        """Dense steps that are timed once more: fewer where the check has no room for all."""
        rows = [row for now in self.checked for row in now.rows]
        if not rows:
            return AGAIN
        over = max(self.used(self.checked) - MOST_RUNS, 0.0) * len(self.shots)
        return max(AGAIN - math.ceil(over * steps_of(rows[0]) - 1e-6), 0)

    def reference(self, n: int) -> tuple[Take, dict[int, Tensor]]:
        """A dense run, with its latents on the way."""
        if n not in self.references:
            path: dict[int, Tensor] = {}

            def each(done: int, latents: Tensor) -> None:
                if done % WATCHED == 0:
                    path[done] = latents.to("cpu", copy=True)

            self.run.tell("dense reference")
            take = video.run(self.run.model, self.settings, self.shots[n], decode=True, each=each)
            self.references[n] = take, path
        return self.references[n]

    def _row(self, plan: Plan, n: int, allowed: float) -> dict[str, Any]:
        true, path = self.reference(n)

        def each(done: int, latents: Tensor) -> None:
            if done in path:
                there = path[done].to(latents.device)
                if relative(latents.float(), there.float()) > HOPELESS * allowed:
                    raise Enough

        with patch(self.run.model, plan):
            take = video.run(self.run.model, self.settings, self.shots[n], decode=True, each=each)
        done = len(take.ends) - 1
        if take.whole:
            found = fidelity(take, true)
        else:
            there = path[done].to(take.latents.device).float()
            found = {"error": relative(take.latents, there)}
        return {
            "task": self.shots[n].name,
            "seed": self.shots[n].seed,
            **found,
            "done": (done + 1) / len(true.ends),
            "steps_ms": _steps_ms(take),
            "dense_steps_ms": _steps_ms(true)[: done + 1],
            "decoding_ms": 1e3 * (take.seconds - take.ends[-1]) if take.whole else 0.0,
            "dense_decoding_ms": 1e3 * (true.seconds - true.ends[-1]),
        }


def steps_of(row: Mapping[str, Any]) -> float:
    """Steps of a whole run; endlessly many where a row has no times."""
    return len(row["dense_steps_ms"]) / row["done"] if "dense_steps_ms" in row else math.inf


def _steps_ms(take: Take) -> list[float]:
    """Milliseconds of each step of a run; what comes before the first one counts as its own."""
    return [round(1e3 * float(s), 3) for s in np.diff([0.0, *take.ends])]
