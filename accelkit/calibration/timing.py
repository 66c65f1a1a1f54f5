"""Times of runs, one by one; what to make of them is the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


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
