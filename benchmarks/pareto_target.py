"""Costs at the size that the Pareto figure speaks of: Wan2.1-1.3B at 480 × 832 and 81 frames.

Kernels and methods are measured at its 32,760 tokens, attention's share of the dense denoising on a
few of its layers; some plans are run there, to be held against what the table predicts for them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from denoise_dit import built, density, forced

import accelkit
from accelkit.calibration.bench import video as video_bench
from accelkit.calibration.candidates import prime, stored
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.fit import clock as fit_clock
from accelkit.calibration.fit import fit
from accelkit.calibration.fit import inputs as fit_inputs
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, Execution, load
from accelkit.patches.methods.mag_cache import MagCache
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import PLAIN, answer, compute

DENSE_STEPS = 0.2
"""Share of the steps that stays dense for every single method."""
STEPS = 10
"""Of each run at the target."""
CONFIRMED = (("gna", False), ("sage_attention", False), (None, True), ("sage_attention", True))
"""What is run at the target: a method in all heads or dense attention, and whether a step cache
leaves steps out beside it, as mixtures do.
"""
SKIPPED = 2
"""Steps in a row that this step cache leaves out."""


def measured_costs(
    methods: Sequence[AttentionMethod], device: str, layers: int,
    further: Callable[[AttentionMethod], list[Any]],
) -> dict[str, Any]:  # fmt: skip
    """The cost table at the target's shape, attention's share of its dense denoising, and what
    arithmetic of methods and of their `further` settings takes that is not plain.
    """
    pipe, size, shot = built("wan", [layers], device)
    size = replace(size, num_inference_steps=4)
    take = [video.run(pipe, size, shot) for _ in range(2)][-1]
    step = 1e3 * statistics.median(b - a for a, b in pairwise(take.ends))
    about = video_bench.attention(pipe, size, shot)
    seen = video_bench.denoise_look.glance(pipe, size, shot)
    shape = fit_inputs.Shape(
        12, 12, 128, layers, causal=False,
        geometry=video_bench.denoise_look.geometry_of(seen),
    )  # fmt: skip
    del pipe
    torch.cuda.empty_cache()
    table = fit.fit(shape, torch.bfloat16, torch.device(device), about["tokens"], methods)
    # What low precision and skipping save, no list shows: they are timed at the target's size.
    call = fit_inputs.random_call(shape, torch.bfloat16, torch.device(device), about["tokens"])
    clocked = {}
    waiting = [m for m in methods if m.kind in table.methods]
    waiting += [one for m in waiting for one in further(m)]
    for method in waiting:
        one = (answer(call, Policy(methods=(method,))) or (None,))[0]
        if one is not None and one.execution != PLAIN and arithmetic(one.execution) not in clocked:
            run = partial(compute, one)
            clocked[arithmetic(one.execution)] = fit_clock.clock(run, 3, torch.device(device))
            waiting += method.calibrator(call.site).settings()  # each has an execution of its own
    return {"share": about["attention_ms"] / step, "table": table.to_dict(), "clocked": clocked}


def confirmed(about: dict[str, Any], device: str, layers: int) -> list[dict[str, Any]]:
    """Runs at the target beside what its costs predict for them, in dense denoisings."""
    table = CostTable.from_dict(about["table"])
    pipe, size, shot = built("wan", [layers], device)
    size = replace(size, num_inference_steps=STEPS)
    # Warm, then timed; random weights say nothing about which steps may be left out.
    seen: list[str] = []
    with watch(pipe, lambda call: seen.append(call.site.path)):
        video.run(pipe, replace(size, num_inference_steps=2), shot)
    whole = len(seen) * STEPS / 2
    dense = min(video.run(pipe, size, shot).ends[-1] for _ in range(2))
    rhythm = MagCache(ratios=(1.0,) * STEPS, threshold=1.0, max_skip_steps=SKIPPED)
    found = []
    for kind, cached in CONFIRMED:
        if kind is not None and kind not in table.methods:
            continue
        policy = Policy() if kind is None else Policy(methods=(load(kind)(),))
        early = 0.0 if cached else DENSE_STEPS
        plan = forced(pipe, policy, early, rhythm if cached else None)
        one = {"setting": None, "density": 1.0, "renewed": 0.0, "unit": (128, 128)}
        if kind is not None:
            short = forced(pipe, policy, 0.5)
            share = density(pipe, short, replace(size, num_inference_steps=4), shot)
            unit, named = unit_of(pipe, size, shot, policy.methods[0], {})
            one |= {"setting": stored(policy.methods[0]), "density": share, "unit": unit}
            one |= {"execution": named}
        with accelkit.patch(pipe, plan) as handle:
            spent = min(video.run(pipe, size, shot).ends[-1] for _ in range(2))
            left = handle.report().calls / 2 / whole
        ratio = 1.0 if kind is None else single_ratio(one, table, about)
        found.append({
            "setting": one["setting"], "step_cache": stored(rhythm) if cached else None,
            "density": one["density"], "left": left, "measured": spent / dense,
            "predicted": left * denoising_ratio(about["share"], ratio, early),
        })  # fmt: skip
    return found


def arithmetic(one: Execution) -> str:
    """What files call an execution: its fields that are not those of plain arithmetic."""
    fields = {f.name: getattr(one, f.name) for f in dataclasses.fields(one)}
    return ", ".join(f"{k}={v}" for k, v in fields.items() if v != getattr(PLAIN, k))


def unit_of(
    pipe: Any, size: video.Settings, shot: Shot, method: AttentionMethod, tables: dict
) -> tuple[tuple[int, int], str | None]:
    """Unit of a method's lists, from one call of one site, and its arithmetic unless plain."""
    found: list[tuple[int, int]] = [(128, 128)]
    named: list[str | None] = [None]

    def visit(call: AttentionCall) -> None:
        own = {k.rpartition("/")[2]: v for k, v in tables.items() if k.startswith(call.site.path)}
        there = replace(call, tables=own, memory={})
        answers = answer(there, Policy(methods=(method,)))
        if method.renewed(2):  # the first answer was a dense one
            prime(answers or ())
            answers = answer(there, Policy(methods=(method,)))
        sizes = [getattr(p, "size", None) for a in answers or () for p in a.pieces]
        found.extend(s for s in sizes if s)
        named.extend(arithmetic(a.execution) for a in answers or () if a.execution != PLAIN)
        raise video.Enough

    with watch(pipe, visit):
        video.begin(pipe, size, shot)
    return found[-1], named[-1]


def moved(costs: CostTable, tokens: int, heads: int) -> CostTable:
    """The target's table under the tokens and heads of the small model: a layer of it costs what a
    layer of the target costs, and equal densities cost the same share of it.
    """
    big = costs.dense[-1][0]

    def kernel(size: str, k: Kernel) -> Kernel:
        rows = -(-big // int(size.split("x")[0])) / -(-tokens // int(size.split("x")[0]))
        many, longer = costs.heads / heads, big / tokens
        return replace(
            k, row=k.row * rows * many, pair=k.pair * longer**2 * many, tail=k.tail * longer
        )

    return replace(
        costs,
        heads=heads, kv_heads=heads,
        dense=((tokens, costs.dense_ms(big)),),
        ride=((tokens, costs.ride_ms(big) * costs.heads),),
        kernels={s: kernel(s, k) for s, k in costs.kernels.items()},
        methods={
            m: MethodCost(((tokens, c.points[-1][1]),), c.share, lists=c.lists, rows=c.rows)
            for m, c in costs.methods.items()
        },
    )  # fmt: skip


def attention_ratio(
    costs: CostTable, tokens: int, kind: str, size: tuple[int, int], density: float
) -> float:
    """A layer that runs one method in all heads ÷ a dense layer."""
    once, each = costs.method_ms(kind, tokens)
    head = each + costs.lists_ms(kind, size, tokens, [density])[0]
    return (once + costs.launch_ms(size) + costs.heads * head) / costs.dense_ms(tokens)


def single_ratio(found: dict[str, Any], costs: CostTable, about: dict[str, Any]) -> float:
    """A layer that runs what `found` says in all heads ÷ a dense layer: by its density, the unit of
    its lists and its arithmetic.
    """
    ((tokens, dense),) = costs.dense[-1:]
    if found.get("execution") is not None:
        return about["clocked"][found["execution"]] / dense
    kind, unit = found["setting"]["kind"], tuple(found["unit"])
    return attention_ratio(costs, tokens, kind, unit, found["density"])


def single_cost(found: dict[str, Any], costs: CostTable, about: dict[str, Any]) -> float:
    """Predicted time of a whole denoising by one method ÷ a dense one, from what its run found; the
    share of the steps that renew its memory included.
    """
    ratio = single_ratio(found, costs, about)
    return denoising_ratio(about["share"], found["renewed"] + (1 - found["renewed"]) * ratio)


def denoising_ratio(share: float, ratio: float, early: float = DENSE_STEPS) -> float:
    """A denoising whose layers cost `ratio` of dense ones behind the dense steps ÷ a dense one."""
    return 1 - share + share * (early + (1 - early) * ratio)
