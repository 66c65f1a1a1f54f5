"""Costs at the size that the Pareto figure speaks of: Wan2.1-1.3B at 480 × 832 and 81 frames.

Kernels and methods are measured at its 32,760 tokens, attention's share of the dense denoising on a
few of its layers; some plans are run there, to be held against what the table predicts for them.
"""

from __future__ import annotations

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
from accelkit.calibration.fit import clock as fit_clock
from accelkit.calibration.fit import fit
from accelkit.calibration.fit import inputs as fit_inputs
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, load
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import PLAIN, answer, compute

DENSE_STEPS = 0.2
"""Share of the steps that stays dense for every single method."""
STEPS = 10
"""Of each run at the target."""
CONFIRMED = ("sliding_tile", "gna", "flash_prefill")
"""Methods that are run at the target."""


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
        if one is not None and one.execution != PLAIN and repr(one.execution) not in clocked:
            run = partial(compute, one)
            clocked[repr(one.execution)] = fit_clock.clock(run, 3, torch.device(device))
            waiting += method.calibrator(call.site).settings()  # each has an execution of its own
    return {"share": about["attention_ms"] / step, "table": table.to_dict(), "clocked": clocked}


def confirmed(about: dict[str, Any], device: str, layers: int) -> list[dict[str, Any]]:
    """Runs at the target beside what its costs predict for them, in dense denoisings."""
    table = CostTable.from_dict(about["table"])
    pipe, size, shot = built("wan", [layers], device)
    size = replace(size, num_inference_steps=STEPS)
    video.run(pipe, replace(size, num_inference_steps=2), shot)
    dense = video.run(pipe, size, shot).ends[-1]
    found = []
    for kind in (k for k in CONFIRMED if k in table.methods):
        method = load(kind)()
        plan = forced(pipe, Policy(methods=(method,)), DENSE_STEPS)
        share = density(pipe, plan, replace(size, num_inference_steps=4), shot)
        unit, _ = unit_of(pipe, size, shot, method, {})
        with accelkit.patch(pipe, plan):
            spent = min(video.run(pipe, size, shot).ends[-1] for _ in range(2))
        ratio = attention_ratio(table, table.dense[-1][0], kind, unit, share)
        found.append({
            "setting": stored(method), "density": share, "measured": spent / dense,
            "predicted": denoising_ratio(about["share"], ratio),
        })  # fmt: skip
    return found


def unit_of(
    pipe: Any, size: video.Settings, shot: video.Shot, method: AttentionMethod, tables: dict
) -> tuple[tuple[int, int], str | None]:
    """Unit of a method's lists, from one call of one site, and its arithmetic unless plain."""
    found, arithmetic = [(128, 128)], [None]

    def visit(call: AttentionCall) -> None:
        own = {k.rpartition("/")[2]: v for k, v in tables.items() if k.startswith(call.site.path)}
        there = replace(call, tables=own, memory={})
        answers = answer(there, Policy(methods=(method,)))
        if method.renewed(2):  # the first answer was a dense one
            prime(answers or ())
            answers = answer(there, Policy(methods=(method,)))
        sizes = [getattr(p, "size", None) for a in answers or () for p in a.pieces]
        found.extend(s for s in sizes if s)
        arithmetic.extend(repr(a.execution) for a in answers or () if a.execution != PLAIN)
        raise video.Enough

    with watch(pipe, visit):
        video.begin(pipe, size, shot)
    return found[-1], arithmetic[-1]


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
            m: MethodCost(((tokens, c.points[-1][1]),), c.share, lists=c.lists)
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


def single_cost(found: dict[str, Any], costs: CostTable, about: dict[str, Any]) -> float:
    """Predicted time of a whole denoising by one method ÷ a dense one, from what its run found:
    density, the share of the steps that renew its memory, the unit of its lists, its arithmetic.
    """
    ((tokens, dense),) = costs.dense
    timed = about["clocked"].get(found["execution"])
    if timed is None:
        kind, unit = found["setting"]["kind"], tuple(found["unit"])
        ratio = attention_ratio(costs, tokens, kind, unit, found["density"])
    else:
        ratio = timed / dense
    return denoising_ratio(about["share"], found["renewed"] + (1 - found["renewed"]) * ratio)


def denoising_ratio(share: float, ratio: float) -> float:
    """A denoising whose layers cost `ratio` of dense ones behind the dense steps ÷ a dense one."""
    return 1 - share + share * (DENSE_STEPS + (1 - DENSE_STEPS) * ratio)
