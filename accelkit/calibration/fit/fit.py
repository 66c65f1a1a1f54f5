"""Measures attention on this device and fits the cost table that search and reports predict with.

Random data; medians on a GPU, the least of a few runs on a CPU. Methods that cannot win here are
refused on the way, with the reason, so that no time is spent on them later: a prompt of a quarter
of the length tells whether the whole one is worth it.

`fit_inputs` makes what is measured, `fit_clock` times it, `fit_ahead` compiles it beforehand,
`fit_methods` and `fit_kernels` turn times into the terms of `kernels.cost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit import ahead as fit_ahead
from accelkit.calibration.fit import kernels as fit_kernels
from accelkit.calibration.fit import methods as fit_methods
from accelkit.calibration.fit.clock import clock, dense_ms
from accelkit.calibration.fit.inputs import Shape, random_call
from accelkit.kernels.cost import CostTable, MethodCost, name
from accelkit.patches.method import AttentionMethod

LEAST = 512
"""Length in tokens below which nothing is measured."""


def fit(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    methods: Sequence[AttentionMethod] = (),
    *,
    repeat: int = 3,
    limit_s: float = 60.0,
    brief: bool = False,
    step: Callable[[str], None] | None = None,
    expect: Callable[[int], None] | None = None,
) -> CostTable:
    """The cost table for calls of up to `tokens` tokens. A denoiser's calls have one length, for
    their lists follow from a grid.

    `step` is told what is measured next, `expect` how many steps are left after compiling. After
    `limit_s` seconds nothing is repeated any more. `brief` is for a search on a GPU, in which a
    fit would take longer than all the rest: fewer lengths, each reading the lesser of two.
    """
    until = time.monotonic() + (0.0 if brief else limit_s)
    at = lengths(shape, tokens, device, brief)
    calls = {n: random_call(shape, dtype, device, n) for n in at}
    tell = step or (lambda _: None)

    def ms(run: Callable[[], Any], times: int = repeat) -> float:
        return clock(run, 2 if brief else times if time.monotonic() < until else 1, device)

    known = {fit_ahead.UNIT}
    if device.type == "cuda":
        tell("compiling kernels")
        known = fit_ahead.rehearse(calls, methods, shape, brief)
    if expect is not None:
        expect(1 + len(methods) + len(known))
    tell("dense attention")
    dense = tuple((n, dense_ms(call, ms)) for n, call in calls.items())
    ride = tuple((n, ms(partial(dense_attention, call))) for n, call in calls.items())
    sizes = {fit_ahead.UNIT: None}
    costs: dict[str, tuple[MethodCost, fit_methods.Lists]] = {}
    refused: dict[str, str] = {}
    for method in methods:
        tell(method.kind)
        found = fit_methods.cost(method, calls, dense, ms, shape)
        if isinstance(found, str):
            refused[method.kind] = found
            continue
        cost, lists, others = found
        costs[method.kind] = cost, lists
        sizes |= dict.fromkeys([size for size, _ in lists] + others)
    fitted = {}
    for size in sizes:
        tell(f"kernel {name(size)}")
        fitted[name(size)] = fit_kernels.kernel(calls, size, until)
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    table = CostTable(
        about, str(dtype).removeprefix("torch."), shape.heads, shape.kv_heads, shape.head_dim,
        dense, ride, fitted, {}, refused, shape.causal,
    )  # fmt: skip
    longest = max(calls)
    beside = {k: fit_methods.against(table, *found, longest) for k, found in costs.items()}
    return replace(table, methods=beside)


def lengths(shape: Shape, tokens: int, device: torch.device, brief: bool = False) -> list[int]:
    """Lengths at which costs are measured, ascending; between two of them they are interpolated. A
    GPU has time for more of them, and the shortest one shows what launches cost.
    """
    if not shape.causal:
        return [tokens]
    shares = (16, 4, 2, 1) if device.type == "cuda" and not brief else (4, 1)
    return sorted({max(LEAST, tokens // s) for s in shares})
