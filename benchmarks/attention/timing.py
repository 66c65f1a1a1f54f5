"""Device times of pieces of work that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from accelkit.calibration.timing import AHEAD_MS, CYCLES, device_ms, host_ms


def turns(pieces: int, round: int) -> list[int]:
    """Order of some pieces of work in a round. In as many rounds as there are pieces, or in twice
    as many where their number is odd, each follows each other one equally often: how fast a
    processor runs depends on how much power it drew just before.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(pieces)]
    order = [(place + round) % pieces for place in zigzag]
    return order[::-1] if round // pieces % 2 else order


def milliseconds(work: dict[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """Median device time of each piece of work, the pieces taking turns as often as the budget
    allows: 3 to 15 rounds and whole cycles of turns, once without a budget. A piece that cannot run
    is left out and says why.
    """
    able, host = {}, {}
    for name, run in work.items():
        try:
            run()
            torch.cuda.synchronize()
            able[name], host[name] = run, min(host_ms(run), AHEAD_MS[1])
            torch.cuda.synchronize()
        except Exception as error:
            text = (str(error).splitlines() or [""])[0][:120]
            print(f"    {name} cannot run: {type(error).__name__}: {text}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in able}
    names, spent, rounds = list(able), 0.0, 0
    least, cycle = (3, max(len(names), 1)) if budget_ms else (1, 1)
    while rounds < least or rounds % cycle or (spent < budget_ms and rounds < 15):
        for name in (names[i] for i in turns(len(names), rounds)):
            torch.cuda._sleep(int(host[name] * CYCLES))  # the host is ahead
            times[name] += device_ms(able[name], 1)
            spent += times[name][-1] + 1.0
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}
