"""Device times of pieces of work that take turns."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import torch

from accelkit.calibration.fit_clock import device_ms


def milliseconds(work: dict[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """Median device time of each piece of work, the pieces taking turns as often as the budget
    allows: 3 to 15 rounds, once without a budget, each in an order of its own: what ran before
    decides how warm the card is and how fast its clock. A piece that cannot run is left out and
    says why.
    """
    able = {}
    for name, run in work.items():
        try:
            run()
            torch.cuda.synchronize()
            able[name] = run
        except Exception as error:
            text = (str(error).splitlines() or [""])[0][:120]
            print(f"    {name} cannot run: {type(error).__name__}: {text}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in able}
    spent, rounds, order = 0.0, 0, random.Random(0)
    while rounds < (3 if budget_ms else 1) or (spent < budget_ms and rounds < 15):
        for name in order.sample(list(able), len(able)):
            run = able[name]
            times[name] += device_ms(run, 1)
            spent += times[name][-1] + 1.0
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}
