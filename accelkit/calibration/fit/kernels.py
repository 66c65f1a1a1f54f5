"""Coefficients of one unit's kernel from random lists, judged on lists that were left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from accelkit.calibration.fit.clock import device_ms, each_ms, settle
from accelkit.calibration.fit.inputs import random_index, shorter
from accelkit.calibration.timing import times_ms
from accelkit.kernels import dispatch, select
from accelkit.kernels.cost import (
    FEW_ROWS,
    Check,
    Kernel,
    beyond,
    least_squares,
    name,
    visible_pairs,
)
from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.sites.attention import Answer, compute

MOST_SINGLE_KEYS = 8192
"""Length up to which lists of single keys are measured."""
ODD = 0.05
"""Points that lie farther off than this are measured again."""
ROUNDS = 4
"""Most often that this is done; it ends when readings stay as they were."""
STAYED = 0.97


@dataclass(frozen=True)
class Densities:
    """Densities of random blocks in launches with all heads and with few of them, and those on
    which the fit is judged. On a GPU the length and the head count on which it is judged are none
    of those that it sees either.
    """

    whole: tuple[float, ...]
    part: tuple[float, ...]
    held: tuple[float, ...]


FITTED = Densities((0.01, 0.04, 0.12, 0.35, 1.0), (0.04, 0.35), (0.1, 0.2))
BRIEF = Densities((0.04, 0.35, 1.0), (0.12,), (0.2,))
SINGLE_KEYS = Densities((0.02, 0.05, 0.12), (0.05,), (0.1,))
BRIEF_KEYS = Densities((0.02, 0.12), (0.05,), (0.1,))
"""Nobody runs denser lists of single keys."""
EACH_SHAPE = Densities((0.04,), (0.04,), (0.1,))
"""One launch of every shape."""


@dataclass(frozen=True)
class Point:
    """A launch to be timed, at a mean density, what it computes, and whether the fit is judged on
    it.
    """

    one: Answer
    density: float
    features: tuple[float, ...]
    held: bool


def kernel(
    calls: Mapping[int, AttentionCall], size: tuple[int, int], until: float, brief: bool = False
) -> tuple[Kernel, tuple[Check, ...]]:
    """Coefficients of one unit, and what they say of launches that they have not seen; nothing is
    measured again after the moment `until`. `brief`: from as few launches as tell them apart, on a
    GPU that need not be rested.
    """
    points = list(launches(calls, size, densities(size, brief)))
    if brief:
        return judged(size, points, each_ms([partial(anew, p.one) for p in points]))

    def least(p: Point) -> float:
        return _least_ms(partial(anew, p.one), p.one)

    spent = [least(p) for p in points]
    said = solved(points, spent)[1]
    for _ in range(ROUNDS):
        odd = [i for i, ms in enumerate(said) if abs(ms / spent[i] - 1) > ODD]
        if not odd or time.monotonic() > until:
            break
        again = {i: least(points[i]) for i in odd}
        stayed = all(ms > STAYED * spent[i] for i, ms in again.items())
        for i, ms in again.items():
            spent[i] = min(ms, spent[i])
        said = solved(points, spent)[1]
        if stayed:
            break
    settle(points[0].one.call.q.device)
    return judged(size, points, spent)


def judged(
    size: tuple[int, int], points: Sequence[Point], spent: Sequence[float]
) -> tuple[Kernel, tuple[Check, ...]]:
    """Coefficients of one unit from the milliseconds of its launches, and what they say of those
    that are held out.
    """
    found, said = solved(points, spent)
    checks = tuple(
        Check("kernel", name(size), p.one.call.n_q, len(p.one.call.heads), p.density, want, got)
        for p, want, got in zip(points, said, spent, strict=True)
        if p.held
    )
    error = statistics.fmean(abs(c.error) for c in checks)
    one = points[0].one
    again = min(device_ms(partial(compute, one), 2, 1)) if one.call.q.is_cuda else spent[0]
    kept = max(spent[0] - again, 0.0)
    found = replace(found, error=round(error, 4), backend=_backend(one), kept=kept)
    return replace(found, lanes=_lanes(one)), checks


def densities(size: tuple[int, int], brief: bool = False) -> Densities:
    """Densities at which a unit is measured."""
    keys, blocks = (BRIEF_KEYS, BRIEF) if brief else (SINGLE_KEYS, FITTED)
    return keys if size[1] == 1 else blocks


def launches(
    calls: Mapping[int, AttentionCall], size: tuple[int, int], some: Densities
) -> Iterator[Point]:
    """The launches of a fit, over random lists. On a GPU some have a quarter of the heads: at one
    head count rows and launches cannot be told apart at long lengths.
    """
    longest = max(calls)
    if size[1] == 1 and longest > MOST_SINGLE_KEYS:
        # A mask of single keys grows with the square of the length; shorter prompts tell as much.
        whole = calls[longest]
        calls = {n: shorter(whole, n) for n in (MOST_SINGLE_KEYS // 4, MOST_SINGLE_KEYS)}
        longest = MOST_SINGLE_KEYS
    for n, call in calls.items():
        for part in _parts(call):
            for density in some.whole if part is call else some.part:
                if density < 1.0 or n < longest:
                    yield point(part, size, density, held=False)
    whole = calls[longest]
    if whole.q.is_cuda:
        if whole.causal:
            whole = shorter(whole, held(longest))
        whole = whole.take(whole.heads[: max(1, len(whole.heads) // 2)])
    for density in some.held:
        yield point(whole, size, density, held=True)


def held(longest: int) -> int:
    """Length of calls on which a fit is judged."""
    return 5 * longest // 16


def _parts(call: AttentionCall) -> list[AttentionCall]:
    """The call with all heads and, on a GPU, with a quarter of them."""
    few = len(call.heads) // 4
    return [call, call.take(call.heads[:few])] if call.q.is_cuda and few else [call]


def point(call: AttentionCall, size: tuple[int, int], density: float, held: bool) -> Point:
    """A launch over random lists of this density."""
    index = random_index(call, size, density)
    one = Answer(call, (index,))
    shares, rows = select.density(index, call), len(call.heads) * call.tiles(size)[0]
    mean, pairs = shares.mean().item(), shares.sum().item() * visible_pairs(call.n_q, call.causal)
    turns = Kernel(0.0, 0.0, 0.0, lanes=_lanes(one)).turns(rows * size[0])
    features = [1.0, turns * rows, turns * pairs / 1e6, 0.0, 0.0, 0.0]
    if call.q.is_cuda:
        features[3:5] = mean * call.n_q / 1e3, float(rows > FEW_ROWS)
    if call.causal:  # others have one length
        features[5] = turns * pairs / 1e6 * beyond(call.n_q)
    return Point(one, mean, tuple(features), held)


def anew(one: Answer) -> None:
    """Compute an answer without what kernels kept with its lists: a layer has its own."""
    compute(replace(one, pieces=tuple(replace(p) for p in one.pieces)))


def solved(points: Sequence[Point], spent: Sequence[float]) -> tuple[Kernel, list[float]]:
    """Coefficients from the points that are not held out, and what they say of all."""
    seen = [(p.features, ms) for p, ms in zip(points, spent, strict=True) if not p.held]
    found = least_squares([f for f, _ in seen], [ms for _, ms in seen])
    said = [sum(a * b for a, b in zip(found, p.features, strict=True)) for p in points]
    launch, row, pair, tail, sort, far = found
    return Kernel(launch, row, pair, tail=tail, sort=sort, far=far), said


def _least_ms(run: Callable[[], Any], one: Answer) -> float:
    """The lesser of two runs after one to warm up; on a CPU, where runs are long, of two."""
    device = one.call.q.device
    settle(device)
    return min(device_ms(run, 2, 1) if device.type == "cuda" else times_ms(run, 2, 0, device))


def _lanes(one: Answer) -> int:
    """Programs that run at one time where the kernel over single keys keeps them on their
    multiprocessors; 0 for other kernels.
    """
    call, index = one.call, one.pieces[0]
    assert isinstance(index, BlockIndex)
    if index.size[1] > 1 or not call.q.is_cuda or _backend(one) != "gluon":
        return 0
    return torch.cuda.get_device_properties(call.q.device).multi_processor_count


def _backend(one: Answer) -> str:
    """Which backend runs an answer's first piece."""
    call, index = one.call, one.pieces[0]
    assert isinstance(index, BlockIndex)
    return dispatch.explain(
        call.q, call.k, call.v, index, causal=call.causal, heads=call.heads,
        kv_of_head=call.kv_heads,
    ).backend  # fmt: skip
