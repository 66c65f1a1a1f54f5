"""Compiles what a fit is going to run, all of it at once: Triton lets other threads run while it
compiles, and a machine without its cache would otherwise wait for one kernel after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Semaphore
from typing import Any

import torch

from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit import kernels as fit_kernels
from accelkit.calibration.fit import methods as fit_methods
from accelkit.calibration.fit.inputs import Shape
from accelkit.calibration.session import compile_clock
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod

UNIT = (128, 128)
"""The unit that is fitted whatever methods there are."""
MOST_THREADS = 16
LONG_AT_ONCE = 4
"""So many threads work on calls of full length, whose memory adds up."""
COLD_S = 1.0
"""Seconds of compiling for the shortest calls that tell of a machine without its cache."""
Size = tuple[int, int]


def rehearse(
    calls: Mapping[int, AttentionCall],
    methods: Sequence[AttentionMethod],
    shape: Shape,
    brief: bool = False,
) -> set[Size]:
    """Run once what a fit measures, first at the shortest length and then at all of them, and
    return the units of the lists. What fails here fails again where it is measured, and says why
    there. `brief`: the shortest length only, where its kernels lay in the cache.
    """
    room, device = Semaphore(LONG_AT_ONCE), calls[max(calls)].q.device
    short = {min(calls): calls[min(calls)]}

    def both(job: Callable[[Mapping[int, AttentionCall]], Iterable[Size]]) -> set[Size]:
        found: set[Size] = set()
        try:
            with torch.cuda.device(device):
                if len(calls) > 1:
                    found |= set(job(short))
                if not brief or compiled() > COLD_S:
                    with room:
                        found |= set(job(calls))
        except Exception:  # left to the measurement
            torch.cuda.empty_cache()
        return found

    with compile_clock() as compiled, ThreadPoolExecutor(_threads()) as pool:
        # Kernels of the unit that is always there take longest to compile and come first.
        waiting = [pool.submit(both, partial(_kernel, UNIT)), pool.submit(both, _dense)]
        waiting += [pool.submit(both, partial(_method, m, shape)) for m in methods]
        known = {UNIT}
        while waiting:
            new = waiting.pop(0).result() - known
            known |= new
            waiting += [pool.submit(both, partial(_kernel, s)) for s in new]
    torch.cuda.synchronize(device)
    return known


def _threads() -> int:
    """One for each CPU that this process may use, up to a limit."""
    if hasattr(os, "sched_getaffinity"):
        return min(MOST_THREADS, len(os.sched_getaffinity(0)))
    return min(MOST_THREADS, os.cpu_count() or 1)


def _dense(calls: Mapping[int, AttentionCall]) -> tuple[()]:
    for call in calls.values():
        dense_attention(call)
    return ()


def _kernel(size: Size, calls: Mapping[int, AttentionCall]) -> tuple[()]:
    for point in fit_kernels.launches(calls, size):
        fit_kernels.anew(point.one)
    return ()


def _method(
    method: AttentionMethod, shape: Shape, calls: Mapping[int, AttentionCall]
) -> list[Size]:
    """Units of a method's lists."""

    def once(run: Callable[[], Any], times: int = 1) -> float:
        run()
        return 1.0

    slow = tuple((n, 1e9) for n in calls)  # no method is refused
    found = fit_methods.cost(method, calls, slow, once, shape)
    if isinstance(found, str):
        return []
    _, lists, others = found
    return [size for size, _ in lists] + others
