"""Measures attention on this device and fits the cost table that search and reports predict with.

Random data; on a GPU two readings that agree, on a CPU one in units of a probe beside it. Methods
that cannot win here are refused on the way, with the reason, so that no time is spent on them
later: two short prompts tell whether a long one is worth it.

`inputs` makes what is measured, `clock` times it, `ahead` compiles it beforehand, `methods` and
`kernels` turn times into the terms of `accelkit.kernels.cost` and check them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit import ahead, kernels, turns
from accelkit.calibration.fit.clock import clock, dense_ms
from accelkit.calibration.fit.inputs import Shape, random_call, shorter
from accelkit.calibration.fit.methods import Found, beside_random, checked, cost
from accelkit.kernels.cost import Check, CostTable, Kernel, MethodCost, Points, name
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod

LEAST = {"cpu": 512, "cuda": 2048}
"""Length in tokens below which nothing is measured; a GPU's time is that of launches there."""


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
    room: int | None = None,
    step: Callable[[str], None] | None = None,
    expect: Callable[[int], None] | None = None,
) -> CostTable:
    """The cost table for calls of up to `tokens` tokens. A denoiser's calls have one length, for
    their lists follow from a grid.

    `step` is told what is measured next, `expect` how many steps are left after compiling. After
    `limit_s` seconds nothing is repeated any more. `brief` is for a search on a GPU, in which a
    fit would take longer than all the rest: fewer lengths, and whole calls are not checked. `room`
    is how many bytes of a GPU the calls that are compiled side by side may take.
    """
    until = time.monotonic() + limit_s
    at = lengths(shape, tokens, device, brief)
    calls = {n: random_call(shape, dtype, device, n) for n in at}
    tell = step or (lambda _: None)

    def ms(run: Callable[[], Any], times: int = repeat) -> float:
        often = times if brief or time.monotonic() < until else 1
        return clock(run, often, device, rested=not brief)

    gpu = device.type == "cuda"
    known = {ahead.UNIT}
    if gpu:
        tell("compiling kernels")
        known = ahead.rehearse(calls, methods, shape, room, brief)
    thorough = gpu and not brief
    if expect is not None:
        once = 1 + len(methods) + len(known) + thorough
        expect(once if gpu else turns.TURNS[0] * once)
    timed = partial(_timed, calls, methods, shape, tell)
    fitted: dict[str, tuple[Kernel, tuple[Check, ...]]] = {}
    if gpu:
        few = brief and shape.causal
        seen = timed(lambda _: ms, thin=thorough, brief=few)
        for size in seen.sizes:
            tell(f"kernel {name(size)}")
            fitted[name(size)] = kernels.kernel(calls, size, until, few)
    else:
        seen, timers = _in_turns(timed, calls, tell, until)
        fitted = {name(size): timers.fitted(size) for size in seen.sizes}
    table = CostTable(
        torch.cuda.get_device_name(device) if gpu else "cpu",
        str(dtype).removeprefix("torch."), shape.heads, shape.kv_heads, shape.head_dim,
        seen.dense, seen.ride, {k: kernel for k, (kernel, _) in fitted.items()}, {},
        seen.refused, shape.causal, tuple(c for _, checks in fitted.values() for c in checks),
    )  # fmt: skip
    table = replace(table, methods={k: _with_lists(table, f) for k, f in seen.costs.items()})
    if thorough:
        tell("whole calls")
        table = _judged(table, methods, calls, ms, until)
    return table


@dataclass(frozen=True)
class _Seen:
    """Dense attention by length, as the model runs it and through the kernels here; what methods
    cost, or why they are refused.
    """

    dense: Points
    ride: Points
    costs: dict[str, Found]
    refused: dict[str, str]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Units whose kernels are needed."""
        return list(dict.fromkeys([ahead.UNIT, *(s for f in self.costs.values() for s in f.sizes)]))


def _in_turns(
    timed: Callable[..., _Seen],
    calls: Mapping[int, AttentionCall],
    tell: Callable[[str], None],
    until: float,
) -> tuple[_Seen, turns.Timers]:
    """Everything in turns: other programs slow a CPU down for seconds at a time."""
    timers = turns.Timers(calls)
    for call in calls.values():
        dense_attention(call)  # whatever runs first takes longer
    for turn in range(turns.TURNS[1]):
        if turn >= turns.TURNS[0] and time.monotonic() > until:
            break
        seen = timed(timers.turn, thin=True)
        tell("kernels")
        timers.kernels(seen.sizes)
    return seen, timers


def _timed(
    calls: Mapping[int, AttentionCall],
    methods: Sequence[AttentionMethod],
    shape: Shape,
    tell: Callable[[str], None],
    clocked: Callable[[str], Callable[..., float]],
    **how: bool,
) -> _Seen:
    """Dense attention and every method; `clocked(name)` times what is called so, `how` are options
    of `methods.cost`.
    """
    tell("dense attention")
    ms = clocked("dense")
    dense = tuple((n, dense_ms(call, ms)) for n, call in calls.items())
    ride = tuple((n, ms(partial(dense_attention, call))) for n, call in calls.items())
    if next(iter(calls.values())).q.device.type == "cpu":  # two readings of the same kernel
        dense = ride = tuple((n, (a + b) / 2) for (n, a), (_, b) in zip(dense, ride, strict=True))
    costs: dict[str, Found] = {}
    refused: dict[str, str] = {}
    for method in methods:
        tell(method.kind)
        found = cost(method, calls, dense, clocked(method.kind), shape, **how)
        if isinstance(found, str):
            refused[method.kind] = found
        else:
            costs[method.kind] = found
    return _Seen(dense, ride, costs, refused)


def _with_lists(table: CostTable, found: Found) -> MethodCost:
    """A method's cost with the factors of its lists."""
    rows, pairs = [], []
    for n, seen in found.lists.items():
        of_rows, of_pairs = beside_random(table, n, seen, found.kept)
        rows.append((n, of_rows))
        pairs.append((n, of_pairs))
    return replace(found.cost, lists=tuple(pairs), rows=tuple(rows))


def _judged(
    table: CostTable,
    methods: Sequence[AttentionMethod],
    calls: Mapping[int, AttentionCall],
    ms: Callable[..., float],
    until: float,
) -> CostTable:
    """The table with the errors of whole calls at a length that it has not seen, a denoiser's at
    the one that there is; of as many as there is time for before the moment `until`.
    """
    longest = max(calls)
    call = calls[longest]
    if table.causal:
        call = shorter(call, kernels.held(longest))
    found, checks = dict(table.methods), list(table.checks)
    for method in methods:
        if method.kind not in found or time.monotonic() > until:
            continue
        seen = checked(table, method, call, ms)
        if seen is not None:
            checks.append(seen)
            found[method.kind] = replace(found[method.kind], error=round(abs(seen.error), 4))
    return replace(table, methods=found, checks=tuple(checks))


def lengths(shape: Shape, tokens: int, device: torch.device, brief: bool = False) -> list[int]:
    """Lengths at which costs are measured, ascending; between two of them they are interpolated. A
    GPU has time for more of them, the shortest one shows what launches cost, and one is another
    share of its next power of two than the others.
    """
    if not shape.causal:
        return [tokens]
    shares = (16, 8, 4, 1.6, 1) if device.type == "cuda" and not brief else (4, 1)
    least = min(LEAST.get(device.type, LEAST["cpu"]), tokens)
    return sorted({max(least, int(tokens / s)) for s in shares})
