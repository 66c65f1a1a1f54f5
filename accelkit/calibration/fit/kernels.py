"""Coefficients of one unit's kernel from random lists, judged on lists that were left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from accelkit.calibration.fit.clock import device_ms
from accelkit.calibration.fit.inputs import random_index, shorter
from accelkit.calibration.timing import times_ms
from accelkit.kernels import dispatch, select
from accelkit.kernels.cost import Kernel, least_squares, visible_pairs
from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.sites.attention import Answer, compute

FITTED = (0.04, 0.12, 0.35, 1.0)
CHECKED = (0.08, 0.2)
"""Densities of random blocks that the fit sees, and those on which it is judged. On a GPU the
length on which it is judged is none of those that it sees either."""
SINGLE_KEYS = 0.15
"""Lists of single keys denser than this are not measured: nobody runs them."""
MOST_SINGLE_KEYS = 8192
"""Length up to which lists of single keys are measured."""
GOOD_FIT = 0.05
ROUNDS = 5
"""Measuring ends when the error on held-out points is below `GOOD_FIT`, when another round mended
little of it, or after so many rounds.
"""
MENDED = 0.8


@dataclass(frozen=True)
class Point:
    """A launch to be timed, what it computes, and whether the fit is judged on it."""

    one: Answer
    features: tuple[float, float, float]
    held: bool


def kernel(calls: Mapping[int, AttentionCall], size: tuple[int, int], until: float) -> Kernel:
    """Coefficients of one unit; measuring is not repeated after the moment `until`."""
    points = list(launches(calls, size))
    device = points[0].one.call.q.device
    spent = [float("inf")] * len(points)
    found = Kernel(0.0, 0.0, 0.0, float("inf"))
    # Rounds over all points: a disturbance then spoils one run of several points, not one point.
    for turn in range(ROUNDS):
        runs = [_least(partial(anew, p.one), device) for p in points]
        spent = [min(pair) for pair in zip(spent, runs, strict=True)]
        before = found.error
        found = solved(list(zip(points, spent, strict=True)))
        settled = found.error < GOOD_FIT or found.error > MENDED * before
        if (turn and settled) or time.monotonic() > until:
            break
    return replace(found, backend=_backend(points[-1].one))


def launches(calls: Mapping[int, AttentionCall], size: tuple[int, int]) -> Iterator[Point]:
    """The launches of a fit, over random lists. On a GPU some have a quarter of the heads: at one
    head count rows and launches cannot be told apart at long lengths.
    """
    longest = max(calls)
    if size[1] == 1 and longest > MOST_SINGLE_KEYS:
        # A mask of single keys grows with the square of the length; shorter prompts tell as much.
        whole = calls[longest]
        calls = {n: shorter(whole, n) for n in (MOST_SINGLE_KEYS // 4, MOST_SINGLE_KEYS)}
        longest = MOST_SINGLE_KEYS
    whole, held = calls[longest], longest
    if whole.q.is_cuda and whole.causal:
        held = 3 * longest // 4
        calls = {**calls, held: shorter(whole, held)}
    for n, call in calls.items():
        fitted = FITTED if n != held or held == longest else ()
        for part in _parts(call):
            for density in (*fitted, *(CHECKED if n == held else ())):
                if (size[1] == 1 and density > SINGLE_KEYS) or (density == 1.0 and n == longest):
                    continue
                yield point(part, size, density, density in CHECKED)


def _parts(call: AttentionCall) -> list[AttentionCall]:
    """The call with all heads and, on a GPU, with a quarter of them."""
    few = len(call.heads) // 4
    return [call, call.take(call.heads[:few])] if call.q.is_cuda and few else [call]


def point(call: AttentionCall, size: tuple[int, int], density: float, held: bool) -> Point:
    """A launch over random lists of this density."""
    index = random_index(call, size, density)
    share = float(select.density(index, call).sum())
    pairs = share * visible_pairs(call.n_q, call.causal) / 1e6
    rows = float(len(call.heads) * call.tiles(size)[0])
    return Point(Answer(call, (index,)), (1.0, rows, pairs), held)


def anew(one: Answer) -> None:
    """Compute an answer without what kernels kept with its lists: a layer has its own."""
    compute(replace(one, pieces=tuple(replace(p) for p in one.pieces)))


def solved(points: Sequence[tuple[Point, float]]) -> Kernel:
    """Coefficients from the points that are not held out, and their error on those that are."""
    seen = [(p.features, t) for p, t in points if not p.held]
    found = least_squares([f for f, _ in seen], [t for _, t in seen])
    gaps = [
        abs(sum(a * b for a, b in zip(found, p.features, strict=True)) - t) / t
        for p, t in points
        if p.held
    ]
    launch, row, pair = found
    return Kernel(launch, row, pair, round(statistics.fmean(gaps), 4))


def _least(run: Callable[[], Any], device: torch.device) -> float:
    """The lesser of two runs; every round adds some."""
    return min(device_ms(run, 2, 1) if device.type == "cuda" else times_ms(run, 2, 0, device))


def _backend(one: Answer) -> str:
    """Which backend runs an answer's first piece."""
    call, index = one.call, one.pieces[0]
    assert isinstance(index, BlockIndex)
    return dispatch.explain(
        call.q, call.k, call.v, index, causal=call.causal, heads=call.heads,
        kv_of_head=call.kv_of_head,
    ).backend  # fmt: skip
