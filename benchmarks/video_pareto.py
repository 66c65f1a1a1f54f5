"""Does the calibrated mixture beat every single method, fewer steps and step caches on video?

Every method runs at eight settings or more in all heads of all layers behind the same dense steps;
mixtures are calibrated at several budgets. All of them draw the same held-out prompts with the same
seeds. Fidelity is that to the dense result of equal seed (relative L1 error and PSNR of the
latents, PSNR and SSIM of the frames, worst prompt and mean); the detector's score says whether the
videos still show what was asked.

Speed is predicted for Wan2.1-1.3B at 480 × 832 and 81 frames: kernels and methods are measured at
its 32,760 tokens, and each plan's densities, as they were measured here, are put into that table.
Attention's share of the dense denoising is measured on a few of its layers.

    python benchmarks/video_pareto.py examples/models/tiny-wan --out benchmarks/results/video.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from denoise_dit import built

import accelkit
from accelkit.calibration import (
    denoise_caches,
    denoise_check,
    denoise_measure,
    fit,
    pipelines,
    video,
    video_bench,
)
from accelkit.calibration.candidates import (
    Bench,
    Family,
    between,
    calibrated_settings,
    chosen_methods,
    stored,
    thinned,
)
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.results import environment
from accelkit.calibration.video import Settings, Shot, Take
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches.adapters import facts, sites, watch
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule
from accelkit.patches.sites.attention import PLAIN, answer, compute

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "train"))
DENSE_STEPS = 0.2
"""Share of the steps that stays dense for every single method."""
SETTINGS = 8
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
        self.dense, self.pictures = self.drawn()

    def drawn(self, **changes: int) -> tuple[Take, np.ndarray]:
        """Final latents `[B, …]`, and frames `[B, F, H, W, 3]`."""
        take = video.run(self.pipe, replace(self.settings, **changes), self.shot)
        with torch.inference_mode():
            pictures = decoded(self.pipe, take.latents)
        return take, pictures

    def judged(self, take: Take, pictures: np.ndarray) -> dict[str, Any]:
        """Fidelity to the dense results, and how many videos show what was asked."""
        rows = []
        for n in range(len(self.scenes)):
            mine = Take(take.latents[n], pictures[n], 0.0)
            true = Take(self.dense.latents[n], self.pictures[n], 0.0)
            rows.append(video.fidelity(mine, true))
        seen = [self.shapes.look(torch.from_numpy(p)) for p in pictures]
        right = [self.shapes.score(a, s)["all"] for a, s in zip(self.scenes, seen, strict=True)]
        keys = ("error", "latent_psnr", "psnr", "ssim")
        mean = {k: statistics.fmean(r[k] for r in rows) for k in keys}
        worst = {k: (max if k == "error" else min)(r[k] for r in rows) for k in keys}
        return {"mean": mean, "worst": worst, "right": sum(right), "of": len(right)}


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


# -- costs ----------------------------------------------------------------------------------------


def measured_costs(methods: Sequence[AttentionMethod], device: str, layers: int) -> dict[str, Any]:
    """The cost table at the target's shape, and attention's share of its dense denoising."""
    pipe, size, shot = built("wan", layers, device)
    size = replace(size, num_inference_steps=4)
    with torch.inference_mode():
        take = [video.run(pipe, size, shot) for _ in range(2)][-1]
    step = 1e3 * statistics.median(b - a for a, b in pairwise(take.ends))
    about = video_bench.attention(pipe, size, shot)
    seen = video_bench.denoise_look.glance(pipe, size, shot)
    shape = fit.Shape(
        12, 12, 128, layers, causal=False,
        geometry=video_bench.denoise_look.geometry_of(seen),
    )  # fmt: skip
    del pipe
    torch.cuda.empty_cache()
    table = fit.fit(shape, torch.bfloat16, torch.device(device), about["tokens"], methods)
    # What low precision and skipping save, no list shows: they are timed at the target's size.
    call = fit.random_call(shape, torch.bfloat16, torch.device(device), about["tokens"])
    clocked = {}
    for method in (m for m in methods if m.kind in table.methods):
        one = (answer(call, Policy(methods=(method,))) or (None,))[0]
        if one is not None and one.execution != PLAIN:
            run = partial(compute, one)
            clocked[repr(one.execution)] = fit.clock(run, 3, torch.device(device))
    return {"share": about["attention_ms"] / step, "table": table.to_dict(), "clocked": clocked}


def moved(costs: CostTable, tokens: int, heads: int) -> CostTable:
    """The target's table under the tokens and heads of the small model: a layer of it costs what a
    layer of the target costs, and equal densities cost the same share of it.
    """
    big = costs.dense[-1][0]

    def kernel(size: str, k: Kernel) -> Kernel:
        rows = -(-big // int(size.split("x")[0])) / -(-tokens // int(size.split("x")[0]))
        many = costs.heads / heads
        return replace(k, row=k.row * rows * many, pair=k.pair * (big / tokens) ** 2 * many)

    return replace(
        costs,
        heads=heads, kv_heads=heads,
        dense=((tokens, costs.dense_ms(big)),),
        ride=((tokens, costs.ride_ms(big) * costs.heads),),
        kernels={s: kernel(s, k) for s, k in costs.kernels.items()},
        methods={
            m: MethodCost(((tokens, c.points[-1][1]),), c.share) for m, c in costs.methods.items()
        },
    )  # fmt: skip


def attention_ratio(
    costs: CostTable, tokens: int, method: AttentionMethod, size: tuple[int, int], density: float
) -> float:
    """A layer that runs one method in all heads ÷ a dense layer."""
    once, each = costs.method_ms(method.kind, tokens)
    head = each + costs.head_ms(size, tokens, density)
    return (once + costs.launch_ms(size) + costs.heads * head) / costs.dense_ms(tokens)


# -- every method alone ---------------------------------------------------------------------------


def variants(subject: Subject, methods: Sequence[AttentionMethod]) -> tuple[list[Family], dict]:
    """Families as a calibrator names them after one dense run, with side tensors by site."""
    tables: dict[str, torch.Tensor] = {}
    found: dict[str, Family] = {}
    middle = (subject.settings.num_inference_steps or 20) // 2

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
        gaps = [abs(np.log(b / a)) for a, b in pairwise(values)]
        at = int(np.argmax(gaps))
        value = between(values[at], values[at + 1])
        if value in values:
            break
        settings.insert(at + 1, settings[at].model_copy(update={family.field: value}))
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


def unit_of(
    subject: Subject, method: AttentionMethod, tables: dict
) -> tuple[tuple[int, int], str | None]:
    """Unit of a method's lists, from one call of one site, and its arithmetic unless plain."""
    found, arithmetic = [(128, 128)], [None]

    def visit(call: Any) -> None:
        own = {k.rpartition("/")[2]: v for k, v in tables.items() if k.startswith(call.site.path)}
        answers = answer(replace(call, tables=own, memory={}), Policy(methods=(method,)))
        sizes = [getattr(p, "size", None) for a in answers or () for p in a.pieces]
        found.extend(s for s in sizes if s)
        arithmetic.extend(repr(a.execution) for a in answers or () if a.execution != PLAIN)
        raise video.Enough

    with watch(subject.pipe, visit):
        video.begin(subject.pipe, subject.settings, subject.one)
    return found[-1], arithmetic[-1]


def run_alone(
    subject: Subject, method: AttentionMethod, tables: dict, costs: CostTable, tokens: int,
    share: float, size: tuple[int, int], timed: float | None,
) -> dict[str, Any] | None:  # fmt: skip
    plan = alone(subject.pipe, method, tables)
    with accelkit.patch(subject.pipe, plan) as handle:
        with handle.measuring():
            # Few steps of one prompt tell the density: lists are read back for it.
            video.run(subject.pipe, replace(subject.settings, num_inference_steps=4), subject.one)
        densities = [s.density for s in handle.report().sites.values() if s.density is not None]
        if not densities:
            return None
        take, pictures = subject.drawn()
    density, renewed = (
        statistics.fmean(densities),
        method.renewed(subject.settings.num_inference_steps or 20),
    )
    if renewed and density > 1 / 3:
        density = (3 * density - 1) / 2  # one of these three sparse steps was a renewing one
    ratio = attention_ratio(costs, tokens, method, size, density)
    if timed is not None:
        ratio = timed / costs.dense_ms(tokens)
    ratio = renewed + (1 - renewed) * ratio
    w = DENSE_STEPS
    cost = 1 - share + share * (w + (1 - w) * ratio)
    return {
        "setting": stored(method), "density": density, "cost": cost,
        **subject.judged(take, pictures),
    }  # fmt: skip


# -- the others -----------------------------------------------------------------------------------


def ratios_of(journal: Path) -> list[float]:
    """What MagCache lives on, as a calibration measured it."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    found = [json.loads(line)["value"] for line in lines if '"unit": "cache/ratios"' in line]
    return found[0] if found else []


def dialled(cache: Any, ratios: list[float]) -> Family:
    """At least eight settings of a step cache; none where it lacks its ratios."""
    if "ratios" in type(cache).model_fields:
        if not ratios:
            return Family(cache.kind, (), None)
        cache = cache.model_copy(update={"ratios": tuple(ratios)})
    field = cache.dial.field
    some = tuple(cache.model_copy(update={field: v}) for v in cache.dial.values)
    family = finer(Family(cache.kind, some, field))
    return Family(cache.kind, tuple(spread(family.settings)), field)


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
    return {"setting": stored(cache), "cost": calls / whole, **subject.judged(take, pictures)}


def run_mixture(
    subject: Subject, budget: float, costs: CostTable, share: float, prompts: list[dict],
    journal: Path, preset: str, methods: list[str] | None, clocked: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """A plan calibrated with the target's costs, drawn on the held-out prompts."""
    original = denoise_measure.measured

    def measured(*args: Any) -> Any:
        # A step of the target takes attention's time ÷ attention's share.
        found, seen = original(*args), args[1]
        dense = sum(seen.calls.values()) * costs.dense_ms(args[-1])
        return replace(found, step_seconds=dense / share / 1e3 / seen.total)

    def speed(checker: Any, plan: Plan) -> dict[str, float]:
        return {"ms": checker.cost(plan), "dense_ms": 1.0}

    saved = fit.fit, denoise_measure.measured, denoise_check.Checker.speed, Bench._clock
    fit.fit = lambda *args, **options: costs  # type: ignore[assignment]
    Bench._clock = lambda bench, one: clocked[repr(one.execution)]  # type: ignore[method-assign]
    denoise_measure.measured = measured
    denoise_check.Checker.speed = speed  # type: ignore[method-assign]
    size = subject.settings
    begin = time.perf_counter()
    try:
        plan = accelkit.calibrate(
            subject.pipe, prompts, budget=budget, height=size.height, width=size.width,
            num_frames=size.num_frames, steps=size.num_inference_steps, preset=preset,
            journal=journal, resume=True, progress=False, methods=methods,
        )  # fmt: skip
    finally:
        fit.fit, denoise_measure.measured, denoise_check.Checker.speed, Bench._clock = saved  # type: ignore[method-assign]
    seconds = time.perf_counter() - begin
    opened = accelkit.patch(subject.pipe, plan) if "note" not in plan.measured else nullcontext()
    with opened:
        take, pictures = subject.drawn()
    return {
        "budget": budget,
        "cost": 1 / plan.measured.get("predicted_speedup", 1.0),
        "seconds": seconds,
        "measured": plan.measured,
        "calibration": plan.calibration,
        "policies": [p.label() for p in plan.policies],
        **subject.judged(take, pictures),
    }


# -- picture --------------------------------------------------------------------------------------


def draw(found: dict[str, Any], path: Path, key: str = "psnr") -> None:
    """PSNR against predicted speed-up: every method, the mixture, fewer steps and step caches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    marks = "osv^<>DPX*hp"
    for n, (name, rows) in enumerate(found["curves"].items()):
        points = sorted((1 / r["cost"], r["mean"][key]) for r in rows)
        special = name in ("mixture", "fewer steps")
        cache = name in found["caches"]
        axes.plot(
            *zip(*points, strict=True),
            marker=marks[n % len(marks)], markersize=5 if not special else 8,
            linewidth=2.5 if special else 1.0, linestyle="--" if cache or special else "-",
            color={"mixture": "black", "fewer steps": "grey"}.get(name), label=name,
        )  # fmt: skip
    axes.set_xlabel("predicted speed-up of the whole denoising, Wan2.1-1.3B 480p")
    axes.set_ylabel(f"{key.upper()} against dense, mean over held-out prompts (dB)")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "models" / "tiny-wan"))
    parser.add_argument(
        "--size", type=int, nargs=3, default=[64, 64, 25], help="height width frames"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.02, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--methods", nargs="+", help="default: all for denoising")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--costs", type=Path, help="costs measured before; made if not there")
    parser.add_argument("--layers", type=int, default=4, help="of the target, to measure shares")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after these")
    parser.add_argument("--out", type=Path, default=Path("runs/video_pareto.json"))
    args = parser.parse_args()
    begin = time.perf_counter()
    late = lambda: time.perf_counter() - begin > args.seconds  # noqa: E731

    device = "cuda" if torch.cuda.is_available() else "cpu"
    caches, rest = denoise_caches.chosen_caches(args.methods)
    methods = chosen_methods(rest, "denoise") if rest != [] else []
    if args.costs and args.costs.exists():
        about = json.loads(args.costs.read_text())
    else:
        about = measured_costs(methods, device, args.layers)
        if args.costs:
            args.costs.write_text(json.dumps(about))
    big, share = CostTable.from_dict(about["table"]), about["share"]
    clocked = about["clocked"]
    print(f"f = {share:.3f}, {time.perf_counter() - begin:.0f} s; refused: {sorted(big.refused)}")

    pipe = pipelines.open_pipeline(args.model, device=device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(torch.float32)  # what is compared is attention, not how pictures are decoded
    size = Settings(*args.size, args.steps)
    subject = Subject(pipe, size, args.prompts, args.guidance)
    seen = video_bench.denoise_look.glance(pipe, size, subject.one)
    tokens = max(seen["tokens"].values())
    heads = next(iter(facts(pipe)[0].components.values())).q_heads
    costs = moved(big, tokens, heads)
    curves: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, Any] = {
        "model": Path(args.model).name, "tokens": tokens, **vars(size), "share": share,
        "dense_steps": DENSE_STEPS, "target_tokens": big.dense[-1][0], "refused": dict(big.refused),
        "environment": environment(torch.device(device)), "curves": curves,
        "caches": [c.kind for c in caches],
        "dense": subject.judged(subject.dense, subject.pictures),
    }  # fmt: skip

    def add(name: str, row: dict[str, Any] | None) -> None:
        if row is None:
            return
        curves.setdefault(name, []).append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1))
        mean = row["mean"]
        print(
            f"{time.perf_counter() - begin:5.0f} s  {name[:40]:40} {1 / row['cost']:5.2f} ×  "
            f"error {row['mean']['error']:.4f}  PSNR {mean['psnr']:.2f}  SSIM {mean['ssim']:.4f}  "
            f"right {row['right']}/{row['of']}",
            flush=True,
        )

    rng = random.Random(1)
    prompts = [
        {"prompt": subject.shapes.random_scene(rng, 1, False).prompt,
         "guidance_scale": args.guidance}
        for _ in range(8)
    ]  # fmt: skip
    journal = args.out.with_suffix(".journal.jsonl")
    for steps in sorted({max(2, round(args.steps * s)) for s in (0.2, 0.25, 0.3, 0.4, 0.5, 0.6,
                                                                  0.75, 0.9)}):  # fmt: skip
        take, pictures = subject.drawn(num_inference_steps=steps)
        row = subject.judged(take, pictures)
        add("fewer steps", {"setting": {"steps": steps}, "cost": steps / args.steps, **row})
    for budget in args.budgets:
        if late():
            break
        add("mixture", run_mixture(
            subject, budget, costs, share, prompts, journal, args.preset, args.methods, clocked
        ))  # fmt: skip
    able = [m for m in methods if m.kind in costs.methods]
    families, tables = variants(subject, able)
    waiting: list[list[tuple[str, Callable[[], dict[str, Any] | None]]]] = []
    for cache in caches:
        family = dialled(cache, ratios_of(journal))
        waiting.append([(cache.kind, partial(run_cache, subject, s)) for s in family.settings])
    for name in dict.fromkeys(m.kind for m in able):
        mine = [f for f in families if f.settings[0].kind == name]
        # Settings without a dial are one curve; a dial's variants are a curve each.
        loose = [s for f in mine if f.field is None for s in f.settings]
        some = [finer(f) for f in mine if f.field is not None]
        some += [thinned(Family(name, tuple(loose), None), 12)] if loose else []
        for family in some:
            unit, arithmetic = unit_of(subject, family.settings[0], tables)
            run = partial(run_alone, subject, tables=tables, costs=costs, tokens=tokens,
                          share=share, size=unit, timed=clocked.get(arithmetic))  # fmt: skip
            waiting.append([(family.name, partial(run, s)) for s in spread(family.settings)])
    # A point of every curve before a second one of any: the time may end.
    for turn in range(max(map(len, waiting), default=0)):
        for name, run in (row[turn] for row in waiting if turn < len(row)):
            if not late():
                add(name, run())
    draw(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
