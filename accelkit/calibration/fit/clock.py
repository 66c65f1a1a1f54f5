"""Device times of pieces of work: two readings that agree on a GPU, the least of a few runs on a
CPU, where other programs only add time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accelkit.calibration.timing import times_ms
from accelkit.patches.call import AttentionCall

PATIENCE_MS = 1000.0
"""Time that the repeats of one measurement may take together on a CPU."""
CYCLES = 2_000_000
"""Clock cycles of a GPU in about a millisecond."""
AHEAD_MS = (1.0, 20.0)
"""How long a GPU waits before a measurement, at least and at most, so that the host is ahead of it,
as it is in a model.
"""
SLACK = 1.5
"""How much longer it waits than the host took to start the same work before."""
EASY = 1.2
"""The same for many pieces, whose times differ less together."""
AGREE = 1.03
"""Two readings that lie so near each other are believed."""
MOST_READINGS = 8
STEADY = 0.97
"""Share of its best clock at which a GPU counts as rested."""
NAP_S = 0.01
PATIENCE_S = 0.3
"""How long to wait for that."""
_best = dict[torch.device, float]()
"""The highest clock that was seen of each GPU, in cycles a millisecond."""


def clock(run: Callable[[], Any], times: int, device: torch.device, rested: bool = True) -> float:
    """Milliseconds of `run` after one run to warm up; slow ones are not repeated. On a GPU `times`
    beyond one asks for two readings that agree, since whatever disturbs one only adds time;
    without `rested` nobody waits for its best clock.
    """
    if device.type == "cuda":
        found = list[float]()
        while not found or (1 < len(found) < MOST_READINGS and not _agree(found)):
            if rested:
                settle(device)
            found += device_ms(run, min(times, 2), 1)
        return sorted(found)[:2][-1]
    found = list(times_ms(run, 1, 0, device))
    while len(found) < 2 or (len(found) <= times and sum(found) + found[-1] < PATIENCE_MS):
        if sum(found) > 4 * PATIENCE_MS:
            break
        found += times_ms(run, 1, 0, device)
    return min(found)


def settle(device: torch.device) -> None:
    """Wait until a GPU has its best clock again: heavy work lowers it for a while, in which light
    work takes up to a fifth longer. One that does not come back has a new best.
    """
    if device.type != "cuda":
        return
    until = time.monotonic() + PATIENCE_S
    with torch.cuda.device(device):
        now = _cycles_per_ms()
        while now < STEADY * _best.get(device, 0.0) and time.monotonic() < until:
            time.sleep(NAP_S)
            now = _cycles_per_ms()
        best = _best.get(device, 0.0)
        if now > best:  # two must agree on it
            now = min(now, _cycles_per_ms())
    _best[device] = max(now, best) if now >= STEADY * best else now


def _cycles_per_ms() -> float:
    """The clock of the current GPU, which counts its cycles itself while it waits."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = CYCLES // 2
    torch.cuda._sleep(cycles // 4)  # the host is ahead
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / begin.elapsed_time(end)


def _agree(found: Sequence[float]) -> bool:
    """Whether the least two readings do, or are too short to tell."""
    least, next_one = sorted(found)[:2]
    return next_one < max(AGREE * least, least + 1e-3)


def device_ms(run: Callable[[], Any], times: int, warmup: int = 0) -> list[float]:
    """Milliseconds of each run on the current GPU, without the time in which it waits for the
    host; for work that takes the host more than a millisecond, runs before tell how long.
    """
    least, most = AHEAD_MS
    hosts = [_host_ms(run) for _ in range(warmup)]
    marks = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ahead = min(max(least, SLACK * min(hosts, default=0.0)), most)
        torch.cuda._sleep(int(ahead * CYCLES))
        begin.record()
        hosts.append(_host_ms(run))
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def each_ms(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The lesser of two readings of several short pieces of work on the current GPU, which waits
    once for all of them: for each alone it would wait longer than it works.
    """
    hosts = [sum(map(_host_ms, runs))]
    readings: list[list[tuple[Any, Any]]] = [[] for _ in runs]
    for _ in range(2):
        torch.cuda._sleep(int(max(AHEAD_MS[0], EASY * min(hosts)) * CYCLES))
        hosts.append(0.0)
        for run, mine in zip(runs, readings, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            hosts[-1] += _host_ms(run)
            end.record()
            mine.append((begin, end))
    torch.cuda.synchronize()
    return [min(begin.elapsed_time(end) for begin, end in mine) for mine in readings]


def _host_ms(run: Callable[[], Any]) -> float:
    """Milliseconds that the host takes to start some work."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def dense_ms(call: AttentionCall, ms: Callable[..., float]) -> float:
    """The fastest dense path present; `ms` times a run."""
    group = call.q.shape[1] != call.k.shape[1]

    def run() -> Tensor:
        return scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.causal, enable_gqa=group
        )

    if call.q.device.type != "cuda":
        return ms(run)
    found = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel([backend]):
                found.append(ms(run))
        except RuntimeError:
            continue
    return min(found) if found else ms(run)
