"""Compiles what a fit is going to run, all of it at once: Triton lets other threads run while it
compiles, and a machine without its cache would otherwise wait for one kernel after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from accelkit.calibration import fit_kernels, fit_methods
from accelkit.calibration.capture import dense_attention
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.sites.attention import compute

UNIT = (128, 128)
MOST_THREADS = 16
"""Each holds a method's working memory on the GPU."""
DENSITY = 0.12


def rehearse(
    calls: Mapping[int, AttentionCall], methods: Sequence[AttentionMethod]
) -> set[tuple[int, int]]:
    """Run every kernel of a fit once, at the shortest and the longest length, and return the units
    of the lists. What fails here fails again where it is measured, and says why there.
    """
    ends = list({n: calls[n] for n in (min(calls), max(calls))}.values())
    device = ends[0].q.device
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as pool:
        # Kernels of the unit that is always there take longest to compile and come first.
        first = [partial(_dense, ends), partial(_lists, ends, UNIT)]
        jobs: list[Callable[[], Iterable[Any]]] = [
            *first,
            *(partial(_method, m, ends) for m in methods),
        ]
        sizes = {UNIT}
        waiting = [pool.submit(_safely, device, job) for job in jobs]
        while waiting:
            new = set(waiting.pop(0).result()) - sizes
            sizes |= new
            waiting += [pool.submit(_safely, device, partial(_lists, ends, s)) for s in new]
    torch.cuda.synchronize(device)
    return sizes


def _safely(device: torch.device, job: Callable[[], Iterable[Any]]) -> list[Any]:
    """A job on this device, whose failure is left to the measurement."""
    try:
        with torch.cuda.device(device):
            return list(job())
    except Exception:
        return []


def _dense(calls: Sequence[AttentionCall]) -> tuple[()]:
    for call in calls:
        dense_attention(call)
    return ()


def _lists(calls: Sequence[AttentionCall], size: tuple[int, int]) -> tuple[()]:
    for point in fit_kernels.rehearsal(calls, size, DENSITY):
        fit_kernels.anew(point.one)
    return ()


def _method(method: AttentionMethod, calls: Sequence[AttentionCall]) -> list[tuple[int, int]]:
    """Units of the method's lists, after everything that `fit_methods.cost` times has run."""
    sizes: list[tuple[int, int]] = []
    for bare in calls:
        call, now = fit_methods.prepared(bare, method, fit_methods.middle(method))
        answers = fit_methods.asked(call, now)
        if answers is None:
            continue
        one = answers[0]
        sizes = fit_methods.units(answers)
        compute(one)
        for execution in fit_methods.precisions(one, method):
            compute(replace(one, execution=execution))
    if calls[-1].causal:
        sizes += fit_methods.other_units(method, calls[-1])
    return sizes
