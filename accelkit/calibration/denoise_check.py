"""The end-to-end check of a pipeline's plan: final latents and frames of equal seed, dense and
patched. The worst prompt counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from accelkit.calibration import video
from accelkit.calibration.measure import Run
from accelkit.calibration.quality import geometric_mean, relative
from accelkit.calibration.refine import Round, plan_digest
from accelkit.calibration.video import Enough, Settings, Shot, Take
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

HOPELESS = 2.0
"""A run whose latents have this multiple of the budget is not finished."""
MOST_RUNS = 2.0
"""Dense runs for each prompt that the check may be worth."""
CLEAR = 1.5
"""A bound that is this multiple of the budget is not mended by further prompts."""
WATCHED = 4
"""Latents are compared on the way at one step in so many."""


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
        self.references: dict[int, tuple[Take, dict[int, Tensor]]] = {}

    def check(self, now: Round, allowed: float) -> None:
        """Run the shots, the most revealing of earlier rounds first, until one fails."""
        digest = plan_digest(now.plan)
        for n in self.order:
            self.run.tell("checking a plan")
            key = f"check/{digest}/{n}"
            row = self.run.journal.unit(key, partial(self._row, now.plan, n, allowed))
            now.rows.append({**row, "prompt": n})
            # The error of a run that was not finished would have grown further.
            errors = [r["error"] / r["done"] for r in now.rows]
            now.measured = max(errors)
            now.bound = self.margin * geometric_mean(errors)
            if now.measured > allowed or now.bound > CLEAR * allowed:
                break
        now.held = len(now.rows) == len(self.shots) and now.reach <= allowed
        worst = [r["prompt"] for r in sorted(now.rows, key=lambda r: -r["error"])]
        self.order = worst + [n for n in self.order if n not in worst]

    def spent(self, rounds: Sequence[Round], plan: Plan) -> bool:
        """Whether another round, of this plan, would be worth more dense runs than the check may
        take.
        """
        if not any(r.held for r in rounds):
            return False
        runs = sum(self.cost(r.plan) * row["done"] for r in rounds for row in r.rows)
        return 1 + runs / len(self.shots) + self.cost(plan) > MOST_RUNS

    def speed(self, plan: Plan) -> dict[str, float]:
        """Milliseconds of the denoising, dense and patched: the fastest of the checked runs."""
        digest = plan_digest(plan)
        rows = [self.run.journal[f"check/{digest}/{n}"] for n in range(len(self.shots))]
        return {k: min(r[k] for r in rows) for k in ("ms", "dense_ms")}

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
            found = video.fidelity(take, true)
        else:
            there = path[done].to(take.latents.device).float()
            found = {"error": relative(take.latents, there)}
        return {
            "task": self.shots[n].name,
            "seed": self.shots[n].seed,
            **found,
            "done": (done + 1) / len(true.ends),
            "ms": 1e3 * take.ends[-1],
            "dense_ms": 1e3 * true.ends[done],
        }
