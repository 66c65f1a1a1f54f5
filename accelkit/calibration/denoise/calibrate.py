"""Calibration of a diffusers pipeline on one page: look, measure, choose, check, choose again.

Every site is planned apart in every bucket of the denoising steps, and a step cache beside them,
so it is the budget that says how many early steps stay dense.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from accelkit.calibration import session, stages
from accelkit.calibration.candidates import chosen_methods
from accelkit.calibration.denoise import caches as denoise_caches
from accelkit.calibration.denoise import look, measure
from accelkit.calibration.denoise.check import Checker
from accelkit.calibration.denoise.look import bucket_of, site_of
from accelkit.calibration.denoise.plan import Planner
from accelkit.calibration.denoise.shots import Shot, Shots, gather
from accelkit.calibration.denoise.trial import trial
from accelkit.calibration.denoise.video import Settings
from accelkit.calibration.denoise.weights import Small, carried_on, weighed_at
from accelkit.calibration.fit import fit
from accelkit.calibration.journal import Journal
from accelkit.calibration.session import Preset, Run
from accelkit.errors import InvalidInputError, NothingPatchedError
from accelkit.patches.adapters import facts, sites
from accelkit.patches.method import Method
from accelkit.patches.plan import Budget, Fingerprint, Limits, Plan

log = logging.getLogger("accelkit")
STAGES: dict[str, str | tuple[str, ...]] = {
    "looking": "look",
    "fit": "fit",
    "measuring": ("run/", "screen/", "measure/"),
    "weighing": "weight/",
    "influence": "influence/",
    "composition": "composition/",
    "step caches": "cache/",
    "checking": "check/",
}
"""Stages by the beginning of their units' keys in the journal."""
BUDGET = 0.1
PRESETS = {
    "fast": (Preset(2, 3, 4, 0, 4, ()), 1, 1),
    "balanced": (Preset(3, 4, 6, 0, 5, ()), 2, 2),
    "careful": (Preset(5, 5, 8, 0, 6, ()), 3, 4),
}
"""How much is measured; and how many prompts to measure on and to check on."""
CACHES = 0.25
"""Dense runs that the search for step caches may be worth."""
SHORT = 4
"""Where a run at the small geometry does not take so much less time than a dense one, the search
may take so many of the former.
"""
LEAST = 1e-3
"""Least share of a bucket's errors that arrives in the latents; less is not believed."""


def calibrate(
    pipe: Any,
    data: Any = None,
    *,
    budget: float | Budget | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    steps: int | None = None,
    methods: Sequence[str | Method | type[Method]] | None = None,
    preset: str = "balanced",
    seed: int = 0,
    time_limit: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Plan:
    """The fastest plan for `pipe` whose final latents stay within `budget` of the dense ones, equal
    seed and worst prompt. `accelkit.calibrate` calls this for a pipeline; see there.
    """
    begun = time.monotonic()
    budget = session.as_budget(BUDGET if budget is None else budget)
    session.need_preset(preset, PRESETS)
    if not hasattr(pipe, "scheduler"):
        raise InvalidInputError(
            f"{type(pipe).__name__} is no pipeline; calibration runs whole denoisings, so it needs "
            "the pipeline around the denoiser"
        )
    if steps is not None and steps < 2:
        raise InvalidInputError(f"steps is {steps}; expected at least 2")
    caches, rest = denoise_caches.chosen_caches(methods)
    tried = chosen_methods(rest, "denoise") if rest != [] else []
    if not tried and not caches:
        raise InvalidInputError("methods is empty; name at least one, or None for all")
    fingerprint, heads = facts(pipe)
    session.need_unpatched(pipe, "pipeline")
    places = sites(pipe)
    if not places:
        raise NothingPatchedError(f"{type(pipe).__name__}: no attention that could run sparse")
    chosen, measure_on, check_on = PRESETS[preset]
    shots = gather(data, seed, measure_on, check_on)
    settings = Settings(height, width, num_frames, steps)
    settings.arguments(pipe)
    roots = {name: getattr(pipe, name) for name in fingerprint.components}
    belongs = {
        **_measured_on(pipe, fingerprint, roots),
        "prompts": session.digest([_plain(s) for s in (*shots.measure, *shots.check)]),
        "methods": [f"{m.kind} {m.model_dump_json()}" for m in (*tried, *caches)],
        "settings": vars(settings),
        "preset": preset,
        "seed": seed,
    }
    with session.compile_clock() as compiled, session.Bar(progress) as bar:
        book = Journal(journal, belongs, resume, compiled)
        watch = session.Stopwatch(book, begun)
        bar.expect(_units(len(places), len(shots.measure), chosen, len(caches), len(shots.check)))
        device = torch.device(pipe._execution_device)
        run = Run(
            pipe, device, places, heads, book, chosen, bar.tell, 1,
            session.checked_limit(time_limit), begun,
        )  # fmt: skip
        training = [root.training for root in roots.values()]
        try:
            for root in roots.values():
                root.eval()
            plan = _plan(run, settings, shots, roots, tried, caches, fingerprint, budget)
            took = watch.read(budget)
        finally:
            for root, was in zip(roots.values(), training, strict=True):
                root.train(was)
            book.close()
    about = {
        "data": shots.about,
        "prompts": [s.name for s in shots.measure],
        "checked_on": [s.name for s in shots.check],
        **{k: v for k, v in vars(settings).items() if v is not None},
        "seed": seed,
        "preset": preset,
        "methods": [m.kind for m in (*tried, *caches)],
        "skipped": run.skipped,
        **_cost(book, took, plan.calibration["steps"], shots),
    }
    made = session.producer("diffusers")
    update = {"calibration": about | plan.calibration, "producer": made}
    return plan.model_copy(update=update).with_tables(plan.tables)


def _plan(
    run: Run,
    settings: Settings,
    shots: Shots,
    roots: Mapping[str, Any],
    methods: Sequence[Any],
    caches: Sequence[Any],
    fingerprint: Fingerprint,
    budget: Budget,
) -> Plan:
    """Measure, then search and check in turns."""
    first, allowed = shots.measure[0], budget.max_rel_error
    seen = look.look(run, settings, first)
    glanced = run.journal.unit("look/whole", lambda: look.glance(run.model, settings, first))
    tokens = max(glanced["tokens"].values())
    size = next(iter(fingerprint.components.values()))
    layers = len(glanced["tokens"])
    shape = fit.Shape(
        size.q_heads, size.kv_heads, size.head_dim, layers, glanced["batch"], causal=False,
        geometry=look.geometry_of(glanced),
    )  # fmt: skip
    dtype = next(iter(roots.values())).dtype
    costs = stages.fitted(run, shape, dtype, tokens, methods)
    able = [m for m in methods if m.kind in costs.methods]
    found = measure.measured(run, seen, settings, shots.measure, able, costs, tokens)
    small = Small(run, seen, shots.measure, roots)
    weights, influence = _weights(run, small, found, fingerprint)
    afford = _affordable(run, small, found.step_seconds * seen.total) if caches else 0.0
    # Spread as the trials show it: what hardly changes anything may tip a single result over.
    margin = small.margin()
    cached, refused = denoise_caches.options(run, small, caches, allowed / margin, afford)
    grid = tuple(glanced["grid"]) if glanced["grid"] else None
    limits = Limits(min_length=tokens // 4, max_length=tokens, grid=grid, steps=seen.total)
    planner = Planner(seen, found, weights, costs, tokens, cached, fingerprint, budget, limits)
    planner.rounding = small.rounding()
    planner.rehearse(small, margin)
    checker = Checker(run, settings, shots.check, planner.ratio, margin)
    plan = planner.finished(planner.settle(run, checker))
    about = {
        "refused": {**costs.refused, **refused},
        "fit_error": round(costs.error(), 4),
        "tokens": tokens,
        "steps": seen.total,
        "buckets": [list(b) for b in small.shares],
        "influence": [float(f"{i:.4g}") for i in influence],
        "rounding": float(f"{planner.rounding:.4g}"),
        "composition": float(f"{planner.kappas[None]:.4g}"),
        "arithmetic": float(f"{planner.quiet:.4g}"),
        "margin": float(f"{checker.margin:.4g}"),
        "weighed_on": vars(seen.settings),
    }
    return plan.model_copy(update={"calibration": about}).with_tables(plan.tables)


def _affordable(run: Run, small: Small, dense_s: float) -> float:
    """Seconds that the search for step caches may take, where a dense run takes `dense_s`."""
    whole = run.journal.unit("cache/whole", lambda: small.whole.seconds)
    return SHORT * whole if SHORT * whole > dense_s else CACHES * dense_s - whole


def _weights(
    run: Run, small: Small, found: measure.Measurements, fingerprint: Fingerprint
) -> tuple[dict[str, list[float]], list[float]]:
    """Weights of the heads at every place, and the influence of every bucket that is in them; ones
    where nothing was measured.
    """
    seen = small.seen
    heads = {p: run.heads[site_of(p)] for p in seen.places}
    influence = [1.0] * len(small.shares)
    if not any(found.families.values()):
        return {p: [1.0] * n for p, n in heads.items()}, influence
    trials = [trial(found, heads, small.shares, fingerprint, b) for b in range(len(influence))]
    at = weighed_at(seen.places)
    some = stages.weighed(
        run, {p: heads[p] for p in dict.fromkeys(at.values())}, [small.probe],
        lambda place: trials[bucket_of(place)].left_out(place),
    )  # fmt: skip
    sensitive = {p: some[at[p]] for p in seen.places}
    influence = [max(small.influence(b, tried, sensitive), LEAST) for b, tried in enumerate(trials)]
    influence = carried_on(influence, small.total, seen.total)
    weights = {p: [w * influence[bucket_of(p)] for w in ws] for p, ws in sensitive.items()}
    return weights, influence


def _measured_on(pipe: Any, fingerprint: Fingerprint, roots: Mapping[str, Any]) -> dict[str, str]:
    """The pipeline and the device on which a journal's readings hold."""
    return {
        "accelkit": session.version(),
        "model": f"{fingerprint.class_name} {fingerprint.config_hash}",
        "weights": session.weights_digest(roots.values()),
        "device": str(pipe._execution_device),
        "dtype": str(next(iter(roots.values())).dtype),
        "scheduler": type(pipe.scheduler).__name__,
    }


def _cost(book: Journal, took: dict[str, float], steps: int, shots: Shots) -> dict[str, Any]:
    """What calibration took in seconds by stage and, without compiling, in dense denoising runs:
    the search, and for each prompt the check.
    """
    seconds = session.by_stage(book, STAGES) | took
    whole = book["measure/step"] * steps
    checking = seconds["checking"]
    return {
        "dense_run_s": round(whole, 3),
        "dense_runs": round((took["whole"] - took["compiling"] - checking) / whole, 2),
        "check_dense_runs": round(checking / whole / len(shots.check), 2),
        "seconds": seconds,
    }


def _plain(shot: Shot) -> bytes:
    """What tells a shot from another, tensors among its arguments included."""
    parts = [k.encode() + b"=" + session.bare(v) for k, v in sorted(shot.arguments.items())]
    return b"\n".join([*parts, str(shot.seed).encode()])


def _units(places: int, prompts: int, preset: Preset, caches: int, check: int) -> int:
    """The most units of work: looking, the fit, each place by stage, caches, and every check."""
    bucket = len(look.EDGES) - 1
    by_place = places * bucket * (2 + prompts)
    runs = bucket + 1 + caches * denoise_caches.RUNS
    return 3 + by_place + runs + (preset.rounds + 1) * check
