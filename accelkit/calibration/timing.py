"""Times of runs: one by one; on a GPU, of pieces of work without their host; on a CPU that other
programs use as well, as on one that is always as fast.

Others slow a CPU down for seconds at a time, up to twofold, and what happens to run then would look
dear. A short piece of dense attention before and after a run tells how fast the machine is just
then; the run counts as what it would have taken at the speed at which the process found it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from accelkit.kernels.index import BlockIndex
from accelkit.patches.sites.attention import Answer, compute

CYCLES = 2_000_000
"""Clock cycles of a GPU in about a millisecond."""
AHEAD_MS = (1.0, 20.0)
"""How long a GPU waits before a measurement, at least and at most, so that the host is ahead of it,
as it is in a model.
"""
SLACK = 1.5
"""How much longer it waits than the host took to start the same work before."""
EASY = 1.2
"""The same for many pieces, whose times differ less together, and for rough readings."""
FULL = 1 << 17
"""Rows of heads that fill a GPU several times over. Calls with fewer are clocked as several prompts
at once: alone they would take longer than their share of a batch.
"""

PROBE = (1, 4, 1024, 64)
"""Shape of the attention that tells the speed: a few milliseconds."""
FIRST = 15
"""Probes of which the least tells the speed at which times count."""
FRESH_S = 0.05
"""A probe that ended no longer ago still tells it."""


def times_ms(
    run: Callable[[], Any], repeat: int, warmup: int, device: torch.device
) -> tuple[float, ...]:
    """Milliseconds of each of `repeat` runs: CUDA events on a GPU, the clock elsewhere."""
    for _ in range(warmup):
        run()
    found = []
    for _ in range(repeat):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            found.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - begin))
    return tuple(found)


def device_ms(
    run: Callable[[], Any], times: int, warmup: int = 0, slack: float = SLACK
) -> list[float]:
    """Milliseconds of each run on the current GPU, without the time in which it waits for the
    host; for work that takes the host more than a millisecond, runs before tell how long, of which
    it waits for `slack` as much.
    """
    least, most = AHEAD_MS
    hosts = [host_ms(run) for _ in range(warmup)]
    marks = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ahead = min(max(least, slack * min(hosts, default=0.0)), most)
        torch.cuda._sleep(int(ahead * CYCLES))
        begin.record()
        hosts.append(host_ms(run))
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def each_ms(runs: Sequence[Callable[[], Any]], times: int = 2) -> list[float]:
    """The least of `times` readings of several short pieces of work on the current GPU, which waits
    once for all of them: for each alone it would wait longer than it works.
    """
    hosts = [sum(map(host_ms, runs))]
    readings: list[list[tuple[Any, Any]]] = [[] for _ in runs]
    for _ in range(times):
        torch.cuda._sleep(int(max(AHEAD_MS[0], EASY * min(hosts)) * CYCLES))
        hosts.append(0.0)
        for run, mine in zip(runs, readings, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            hosts[-1] += host_ms(run)
            end.record()
            mine.append((begin, end))
    torch.cuda.synchronize()
    return [min(begin.elapsed_time(end) for begin, end in mine) for mine in readings]


def answers_ms(some: Sequence[Answer], batch: int) -> list[float]:
    """Milliseconds of each answer to a call of one prompt, for a batch of such prompts."""
    if not some or not some[0].call.q.is_cuda:
        return [batch * min(times_ms(partial(compute, a), 2, 1, a.call.q.device)) for a in some]
    copies = [_copies(a, batch) for a in some]
    runs = [partial(compute, _repeated(a, n)) for a, n in zip(some, copies, strict=True)]
    return [ms * batch / n for n, ms in zip(copies, each_ms(runs, 1), strict=True)]


def _copies(a: Answer, batch: int) -> int:
    """How many prompts at once an answer is clocked for."""
    alone = a.order is None and not a.finishers and a.call.key_mask is None
    if not alone or not all(isinstance(p, BlockIndex) for p in a.pieces):
        return 1
    return max(1, min(batch, FULL // (a.call.n_q * len(a.call.heads))))


def _repeated(a: Answer, copies: int) -> Answer:
    """An answer to the call of several prompts that are all alike."""
    if copies == 1:
        return a
    q, k, v = (t.expand(copies, -1, -1, -1) for t in (a.call.q, a.call.k, a.call.v))
    return replace(a, call=replace(a.call, q=q, k=k, v=v, _shared={}))


def host_ms(run: Callable[[], Any]) -> float:
    """Milliseconds that the host takes to start some work."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Steady:
    """A clock in milliseconds of an even machine."""

    def __init__(self) -> None:
        self._qkv = torch.randn((3, *PROBE), generator=torch.Generator().manual_seed(0)).unbind()
        self._probe()
        self.usual = min(self._probe() for _ in range(FIRST))

    def __call__(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one run. What disturbs a probe only adds to it: the lesser one counts."""
        fresh = time.perf_counter() - self._ended < FRESH_S
        before = self._last if fresh else self._probe()
        begin = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - begin)
        return took * self.usual / min(before, self._probe())

    def _probe(self) -> float:
        q, k, v = self._qkv
        begin = time.perf_counter()
        scaled_dot_product_attention(q, k, v, is_causal=True)
        self._ended = time.perf_counter()
        self._last = 1e3 * (self._ended - begin)
        return self._last


@lru_cache
def _clock(threads: int) -> Steady:
    return Steady()


def steady_ms(run: Callable[[], Any]) -> float:
    """Milliseconds of one run on this CPU, as if it was as fast all the time."""
    return _clock(torch.get_num_threads())(run)
