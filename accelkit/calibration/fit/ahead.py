"""Compiles what a fit is going to run, all of it at once: Triton lets other threads run while it
compiles, and a machine without its cache would otherwise wait for one kernel after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from accelkit.calibration import memory
from accelkit.calibration.candidates import families
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit import kernels
from accelkit.calibration.fit.clock import dense_ms
from accelkit.calibration.fit.inputs import Shape
from accelkit.calibration.fit.methods import asked, cost
from accelkit.calibration.session import compile_clock, compile_once, first_use
from accelkit.kernels.scores_blocks import CHUNK_BYTES
from accelkit.patches.call import AttentionCall, Site
from accelkit.patches.method import AttentionMethod

UNIT = (128, 128)
"""The unit that is fitted whatever methods there are."""
MOST_THREADS = 16
LONG_AT_ONCE = 8
"""So many threads more work on calls of full length, whose memory adds up."""
COPIES = 3
"""How often a thread holds a call's rows: as they are, laid out in another order, as outputs."""
CELL = 8
"""Tokens of the finest cells whose scores a thread holds."""
WORKSPACE = 32 * 2**20
"""What a thread's products of matrices take besides, on a Hopper GPU."""
Size = tuple[int, int]
Job = Callable[[Mapping[int, AttentionCall]], Iterable[Size]]
"""Runs what is measured at some lengths; gives the units of lists that it came across."""


def rehearse(
    calls: Mapping[int, AttentionCall],
    methods: Sequence[AttentionMethod],
    shape: Shape,
    room: int | None = None,
    brief: bool = False,
) -> set[Size]:
    """Run once what a fit measures at the shortest length and, where that had to compile something,
    at one of those with each next power of two, for which rows are filled up alike; return the
    units of the lists. What fails here fails again where it is measured, and says why there.
    Threads are so few that they find `room` bytes enough. `brief`: what this process rehearsed is
    not rehearsed again, unless the kernels of the first unit had to be compiled.
    """
    longest = calls[max(calls)]
    device = longest.q.device
    with first_use(("fit", shape, tuple(calls), longest.q.dtype, device, *methods)) as new:
        if new or not brief or _missing(calls):
            return _all(calls, methods, shape, room, brief)
    return {UNIT}


def _missing(calls: Mapping[int, AttentionCall]) -> bool:
    """Whether the kernels of the first unit had to be compiled."""
    with compile_clock(cached=False) as compiled:
        _kernel(UNIT, calls)
        return compiled() > 0


def _all(
    calls: Mapping[int, AttentionCall],
    methods: Sequence[AttentionMethod],
    shape: Shape,
    room: int | None,
    longer_too: bool,
) -> set[Size]:
    """The same without a look at what ran before; with `longer_too` also at longer lengths where
    nothing had to be compiled: libraries have other kernels for them.
    """
    device = calls[max(calls)].q.device
    short = {min(calls): calls[min(calls)]}
    if longer_too:
        for call in calls.values():
            dense_ms(call, _ran)
    each = {(n - 1).bit_length(): n for n in sorted(calls, reverse=True)}
    longer = {n: calls[n] for n in sorted(each.values())}

    def tried(job: Job, at: Mapping[int, AttentionCall]) -> Iterable[Size]:
        try:
            with torch.cuda.device(device):
                return job(at)
        except Exception:  # left to the measurement
            torch.cuda.empty_cache()
            return ()

    pool = _executor(_at_once(calls[min(calls)], room, _threads()))
    many = _at_once(calls[max(calls)], room, LONG_AT_ONCE)
    ran, known = list[Job](), {UNIT}
    with compile_clock(cached=False) as compiled, compile_once():
        with pool, _executor(many) as whole:
            # Kernels of the unit that is always there take longest to compile and come first.
            jobs: list[Job] = [partial(_kernel, UNIT), _dense]
            jobs += [j for m in methods for j in _jobs(m, shape)]
            running: dict[Future[Iterable[Size]], Job | None]
            running = {pool.submit(tried, j, short): j for j in jobs}
            while running:
                for ended in wait(running, return_when=FIRST_COMPLETED).done:
                    job, new = running.pop(ended), set(ended.result()) - known
                    known |= new
                    for kernel in (partial(_kernel, size) for size in new):
                        running[pool.submit(tried, kernel, short)] = kernel
                    if job is not None and len(calls) > 1:
                        ran.append(job)
                while many and ran and (longer_too or compiled()):
                    running[whole.submit(tried, ran.pop(), longer)] = None
        memory.give_back(device)
        while ran and (longer_too or compiled()):  # what is too long to run beside others
            new = set(tried(ran.pop(), longer)) - known
            known |= new
            for kernel in (partial(_kernel, size) for size in new):
                tried(kernel, short)
                ran.append(kernel)
    memory.give_back(device)
    return known


class _Here(Executor):
    """Runs in the thread that asks, whose workspaces are there already."""

    def submit(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(run(*args, **kwargs))
        return done


def _executor(threads: int) -> Executor:
    return ThreadPoolExecutor(threads) if threads else _Here()


def _at_once(call: AttentionCall, room: int | None, most: int) -> int:
    """How many threads half of the room is enough for, each with a call like this one; none where
    it is too small for one.
    """
    if room is None:
        return most
    cells = 4 * call.q.shape[0] * len(call.heads) * (call.n_q // CELL) ** 2
    rows = sum(t.nbytes for t in (call.q, call.k, call.v))
    each = COPIES * rows + min(CHUNK_BYTES, cells) + WORKSPACE
    return min(most, room // 2 // each)


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
    for point in kernels.launches(calls, size, kernels.EACH_SHAPE):
        kernels.anew(point.one)
    return ()


def _jobs(method: AttentionMethod, shape: Shape) -> list[Job]:
    """What runs a method once; one that changes nothing but the arithmetic has a kernel for each of
    its settings, which compile longest of all and so apart.
    """
    if method.answers() != {"execution"}:
        return [partial(_method, method, shape)]
    named = families(method.calibrator(Site("fit", 0)).settings())
    return [partial(_setting, setting) for f in named for setting in f.settings]


def _setting(setting: AttentionMethod, calls: Mapping[int, AttentionCall]) -> tuple[()]:
    for one in asked(calls[max(calls)], setting) or ():
        kernels.anew(one)
    return ()


def _method(
    method: AttentionMethod, shape: Shape, calls: Mapping[int, AttentionCall]
) -> list[Size]:
    """Units of a method's lists."""

    slow = tuple((n, 1e9) for n in calls)  # no method is refused
    found = cost(method, calls, slow, _ran, shape)
    if isinstance(found, str):
        return []
    return found.sizes


def _ran(run: Callable[[], Any], times: int = 1) -> float:
    """Run something once in place of timing it."""
    run()
    return 1.0
