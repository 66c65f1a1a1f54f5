"""What the Pareto figure draws: every method alone, step caches, fewer steps, calibrated mixtures.

Each function runs the held-out prompts of a `Subject` once and returns a row: what was set, its
predicted cost at the target as a share of a dense denoising, and how close it comes to dense.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pareto_target import DENSE_STEPS, arithmetic, single_cost, unit_of

import accelkit
from accelkit.calibration import candidates
from accelkit.calibration.bench import video as video_bench
from accelkit.calibration.candidates import Family, between, calibrated_settings, stored
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.denoise import calibrate as denoise
from accelkit.calibration.denoise import check as denoise_check
from accelkit.calibration.denoise import measure as denoise_measure
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.caches import OWN
from accelkit.calibration.denoise.fidelity import fidelity
from accelkit.calibration.denoise.schedule import recorded, schedules
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings, Take
from accelkit.calibration.evaluation import quality
from accelkit.calibration.fit import fit
from accelkit.kernels.cost import CostTable
from accelkit.patches.adapters import facts, sites, watch
from accelkit.patches.method import AttentionMethod
from accelkit.patches.parts import step_cache
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule
from accelkit.patches.sites.attention import Answer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "train"))
SETTINGS = 8
DECODED = 16
"""Videos that are decoded at once: several processes share a device."""
HELD_OUT_SEED = 70_000
"""Far from the seeds that calibration draws and checks with."""


class Subject:
    """The pipeline, the held-out prompts it draws all at once, and their dense results."""

    def __init__(self, pipe: Any, settings: Settings, count: int, guidance: float) -> None:
        import shapes

        self.pipe, self.settings, self.shapes = pipe, settings, shapes
        rng = random.Random(HELD_OUT_SEED)
        self.scenes = [shapes.random_scene(rng, 1, True) for _ in range(count)]
        prompts = [s.prompt for s in self.scenes]
        self.shot = Shot("held out", {"prompt": prompts, "guidance_scale": guidance}, HELD_OUT_SEED)
        self.one = replace(self.shot, arguments={**self.shot.arguments, "prompt": prompts[0]})
        self.steps = settings.num_inference_steps or 20
        self.dense, self.pictures = self.drawn()
        self.repeated = False

    def drawn(self, **changes: int) -> tuple[Take, np.ndarray]:
        """Final latents `[B, …]`, and frames `[B, F, H, W, 3]`."""
        take = video.run(self.pipe, replace(self.settings, **changes), self.shot)
        with torch.inference_mode():
            some = [decoded(self.pipe, few) for few in take.latents.split(DECODED)]
        return take, np.concatenate(some)

    def judged(self, take: Take, pictures: np.ndarray) -> dict[str, Any]:
        """Fidelity to the dense results, and how many videos show what was asked."""
        rows = []
        for n in range(len(self.scenes)):
            mine = Take(take.latents[n], pictures[n], 0.0)
            true = Take(self.dense.latents[n], self.pictures[n], 0.0)
            rows.append(fidelity(mine, true))
        seen = [self.shapes.look(torch.from_numpy(p)) for p in pictures]
        right = [self.shapes.score(a, s)["all"] for a, s in zip(self.scenes, seen, strict=True)]
        keys = ("error", "latent_psnr", "psnr", "ssim")
        mean = {k: statistics.fmean(r[k] for r in rows) for k in keys}
        worst = {k: (max if k == "error" else min)(r[k] for r in rows) for k in keys}
        finite = all(r["error"] < quality.BROKEN for r in rows)
        return {
            "mean": mean, "worst": worst, "right": sum(right), "of": len(right),
            "shown": "".join(str(int(r)) for r in right), "finite": finite,
        }  # fmt: skip


def decoded(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """What the pipeline does behind its last step."""
    vae = pipe.vae
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, std = (
        torch.tensor(v, device=latents.device).view(shape)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    out = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    return pipe.video_processor.postprocess_video(out, output_type="np")


def variants(subject: Subject, methods: Sequence[AttentionMethod]) -> tuple[list[Family], dict]:
    """Families as a calibrator names them after one dense run, with side tensors by site."""
    tables: dict[str, torch.Tensor] = {}
    found: dict[str, Family] = {}
    middle = (subject.steps) // 2

    def visit(call: Any) -> Any:
        if call.clock.step != middle or call.clock.branch != "cond":
            return None
        dense = dense_attention(call)
        families, mine = calibrated_settings(methods, call.site, call, dense)
        tables.update({f"{call.site.path}/{k}": v.cpu() for k, v in mine.items()})
        found.update({f.name: f for f in families})
        return dense.out

    with watch(subject.pipe, visit):
        video.run(subject.pipe, subject.settings, subject.one)
    return list(found.values()), tables


def finer(family: Family) -> Family:
    """A family with at least `SETTINGS` values of its dial where there are values between."""
    settings = list(family.settings)
    while family.field and len(settings) < SETTINGS:
        values = [getattr(m, family.field) for m in settings]
        ways = [(abs(np.log(b / a)), i, between(a, b)) for i, (a, b) in enumerate(pairwise(values))]
        ways = [w for w in ways if w[2] not in values]
        if not ways:
            break
        _, at, value = max(ways, key=lambda w: w[0])
        settings.insert(at + 1, settings[at].model_copy(update={family.field: value}))
    return Family(family.name, tuple(settings), family.field)


FURTHER: dict[str, tuple[dict[str, Any], ...]] = {
    "psa": tuple(
        {"ends": e}
        for e in ((0.03, 0.08, 0.16, 0.45), (0.07, 0.18, 0.3, 0.6), (0.15, 0.32, 0.5, 0.8))
    ),
    "sage_attention": tuple(
        {"qk": qk, "pv": pv, "smooth_k": False}
        for qk in ("int8", "fp8")
        for pv in ("fp8", "native")
    ),
    "sliding_tile": tuple(
        {"window": w} for w in ((1.0, 0.5, 0.5), (1.0, 0.75, 0.5), (1.0, 0.5, 1.0), (0.6, 1.0, 1.0))
    ),
    "taylor_seer": ({"interval": 10},),
    "window": ({"window_tokens": 640}, {"window_tokens": 1536}),
}
"""Settings beside those that calibration names, where these are fewer than eight."""


def further(method: Any) -> list[Any]:
    """More settings of a method, which differ from this one in these fields only."""
    return [method.model_copy(update=one) for one in FURTHER.get(method.kind, ())]


def more(family: Family) -> Family:
    """A family with its further settings, along its dial."""
    settings = [*dict.fromkeys([*further(family.settings[0]), *family.settings])]
    if family.field and len(settings) > len(family.settings):
        settings.sort(key=lambda m: getattr(m, str(family.field)))
    return Family(family.name, tuple(settings), family.field)


def spread(settings: Sequence[Any]) -> list[Any]:
    """Both ends first, then what lies farthest from those before."""
    left, found = list(range(len(settings))), []
    while left:
        best = max(left, key=lambda i: (min((abs(i - j) for j in found), default=i == 0), -i))
        left.remove(best)
        found.append(best)
    return [settings[i] for i in found]


def alone(pipe: Any, method: AttentionMethod, tables: dict[str, torch.Tensor]) -> Plan:
    """The method in every head behind the dense steps."""
    fingerprint, heads = facts(pipe)
    steps = (DENSE_STEPS, 1.0)
    layers = {
        s.path: LayerPlan(
            rules=(Rule(phase="denoise", steps=steps, policies=(1,) * heads[s.path]),)
        )
        for s in sites(pipe)
    }
    policies = (Policy(), Policy(methods=(method,)))
    return Plan(fingerprint=fingerprint, policies=policies, sites=layers).with_tables(tables)


def run_alone(
    subject: Subject, method: AttentionMethod, tables: dict, costs: CostTable, about: dict[str, Any]
) -> dict[str, Any] | None:
    plan = alone(subject.pipe, method, tables)
    with accelkit.patch(subject.pipe, plan) as handle:
        with handle.measuring():
            # Few steps of one prompt tell the density: lists are read back for it.
            video.run(subject.pipe, replace(subject.settings, num_inference_steps=4), subject.one)
        densities = [s.density for s in handle.report().sites.values() if s.density is not None]
        if not densities:
            return None
        take, pictures = subject.drawn()
    density, renewed = statistics.fmean(densities), method.renewed(subject.steps)
    if renewed and density > 1 / 3:
        density = (3 * density - 1) / 2  # one of these three sparse steps was a renewing one
    unit, execution = unit_of(subject.pipe, subject.settings, subject.one, method, tables)
    found = {
        "setting": stored(method), "density": density, "renewed": renewed, "unit": unit,
        "execution": execution,
    }  # fmt: skip
    return {**found, "cost": single_cost(found, costs, about), **subject.judged(take, pictures)}


def measured_cache(cache: Any, subject: Subject) -> Any:
    """A step cache with the numbers of this model that it needs."""
    noted: list[float] = []
    with ExitStack() as stack:
        magnitudes = step_cache.magnitudes(subject.pipe.transformer, subject.steps)
        ratios, kept = stack.enter_context(magnitudes), stack.enter_context(recorded(subject.pipe))
        each = lambda done, latents: noted.__setitem__(slice(None), ratios())  # noqa: E731
        video.run(subject.pipe, subject.settings, subject.one, each=each)
    own = {
        "ratios": tuple(round(r, 5) for r in noted),
        "schedules": tuple(map(tuple, schedules(kept))),
    }
    return cache.model_copy(update={k: v for k, v in own.items() if k in type(cache).model_fields})


def dialled(cache: Any) -> Family:
    """At least eight settings of a step cache, named as `families` names variants."""
    field, usual = cache.dial.field, type(cache)()
    own = {
        k: v for k, v in cache if k not in (field, *OWN) and v != getattr(usual, k)
    }  # fmt: skip
    name = cache.kind + (json.dumps(own) if own else "")
    some = tuple(cache.model_copy(update={field: v}) for v in cache.dial.values)
    family = finer(more(Family(name, some, field)))
    return Family(name, tuple(spread(family.settings)), field)


def run_cache(subject: Subject, cache: Any) -> dict[str, Any]:
    """A step cache alone; its cost is the share of attention calls that it leaves."""
    count = [0]

    def add(_: Any) -> None:
        count[0] += 1

    plan = video_bench.cache_alone(subject.pipe, cache)
    with watch(subject.pipe, add):
        video.run(subject.pipe, subject.settings, subject.one)
    whole, count[0] = count[0], 0
    with accelkit.patch(subject.pipe, plan) as handle:
        take, pictures = subject.drawn()
        calls = handle.report().calls
    setting = {k: v for k, v in stored(cache).items() if k != "schedules"}  # one for every share
    return {"setting": setting, "cost": calls / whole, **subject.judged(take, pictures)}


SHARED = ("dense_run_s", "dense_runs", "check_dense_runs", "seconds")
"""What a plan says of its calibration's time."""


def check_runs(measured: dict[str, Any]) -> float:
    """Dense runs a prompt that a plan's check was worth at the target's prices, the dense side
    included; a run that ended early counts whole.
    """
    ratios = [
        r["prompts"] * r["predicted_ms"] / r["predicted_dense_ms"] for r in measured["rounds"]
    ]
    most = max((r["prompts"] for r in measured["rounds"]), default=1)
    return 1 + sum(ratios) / most


@contextmanager
def at_target(costs: CostTable, about: dict[str, Any]) -> Iterator[None]:
    """While open, calibration takes the target's times for those of the machine it runs on."""
    original, check = denoise_measure.measured, denoise_check.Checker
    ((_, dense_ms),) = costs.dense  # what was not clocked counts as no faster

    def measured(*args: Any) -> Any:
        # A step of the target takes attention's time ÷ attention's share.
        found, seen = original(*args), args[1]
        dense = sum(seen.calls.values()) * costs.dense_ms(args[-1])
        return replace(found, step_seconds=dense / about["share"] / 1e3 / seen.total)

    # The check may be worth two dense runs a prompt at the target's prices, for its plans differ
    # in speed there and hardly here, where launches take most of the time.
    def took(checker: Any, plan: Plan, row: dict[str, Any]) -> float:
        return checker.cost(plan) * row["done"]

    def speed(checker: Any, plan: Plan) -> dict[str, float]:
        return {"ms": checker.cost(plan), "dense_ms": 1.0}

    def answers_ms(answers: Sequence[Answer], batch: int) -> list[float]:
        return [about["clocked"].get(arithmetic(a.execution), dense_ms) for a in answers]

    with ExitStack() as stack:
        for owner, name, value in (
            # A run at the small geometry takes as long here as a whole one, and nothing is timed
            # again.
            (denoise, "CACHES", float("inf")), (denoise_check, "AGAIN", 0),
            (fit, "fit", lambda *args, **options: costs), (candidates, "answers_ms", answers_ms),
            (denoise_measure, "measured", measured), (check, "speed", speed), (check, "took", took),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, value))
        yield


def run_mixture(
    subject: Subject, budget: float, costs: CostTable, about: dict[str, Any], prompts: list[dict],
    journal: Path, preset: str, methods: list[str] | None,
) -> dict[str, Any]:  # fmt: skip
    """A plan calibrated with the target's costs, drawn on the held-out prompts."""
    size = subject.settings
    begin = time.perf_counter()
    with at_target(costs, about):
        plan = accelkit.calibrate(
            subject.pipe, prompts, budget=budget, height=size.height, width=size.width,
            num_frames=size.num_frames, steps=size.num_inference_steps, preset=preset,
            journal=journal, resume=True, progress=False, methods=methods,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    opened = accelkit.patch(subject.pipe, plan) if "note" not in plan.measured else nullcontext()
    with opened:
        take, pictures = subject.drawn()
        again = {} if subject.repeated else subject.judged(*subject.drawn())["mean"]
        subject.repeated = True
    return {
        "budget": budget,
        "again": again,  # what equal runs differ by; the first mixture of a process tells
        "cost": 1 / plan.measured.get("predicted_speedup", 1.0),
        "seconds": seconds,
        "check_runs": check_runs(plan.measured),
        "measured": plan.measured,
        # One journal serves all budgets, so what it took is not that of one.
        "calibration": {k: v for k, v in plan.calibration.items() if k not in SHARED},
        "policies": [p.label() for p in plan.policies],
        **subject.judged(take, pictures),
    }
