"""Device times of pieces of work: medians on a GPU, the least of a few runs on a CPU, where other
programs only add time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accelkit.calibration.bench import times_ms
from accelkit.patches.call import AttentionCall

PATIENCE_MS = 1000.0
"""Time that the repeats of one measurement may take together on a CPU."""
AHEAD = 2_000_000
"""Clock cycles that a GPU waits before a measurement: the host is ahead of it, as in a model."""


def clock(run: Callable[[], Any], times: int, device: torch.device) -> float:
    """Milliseconds of `run` after one run to warm up; slow ones are not repeated."""
    if device.type == "cuda":
        return statistics.median_low(device_ms(run, times, 1))  # of two, not their mean
    found = list(times_ms(run, 1, 0, device))
    while len(found) < 2 or (len(found) <= times and sum(found) + found[-1] < PATIENCE_MS):
        if sum(found) > 4 * PATIENCE_MS:
            break
        found += times_ms(run, 1, 0, device)
    return min(found)


def device_ms(run: Callable[[], Any], times: int, warmup: int = 0) -> list[float]:
    """Milliseconds of each run on the current GPU, without the time in which it waits for the
    host.
    """
    for _ in range(warmup):
        run()
    marks = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


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
    for backend in (None, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel([backend]) if backend is not None else nullcontext():
                found.append(ms(run))
        except RuntimeError:
            continue
    return min(found)
