"""The CPU path against torch's dense attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from accelkit.calibration.timing import times_ms
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex
from attention.shapes import LAPTOP, random_call, random_mask, visible_blocks


def measure_cpu(rounds: int) -> list[dict[str, Any]]:
    """The CPU path against torch's dense attention, fp32, with all threads that torch uses."""
    q, k, v = random_call(LAPTOP, "cpu", torch.float32)
    results = []
    for size in ((128, 128), (64, 64), (2048, 1), (32, 1)):
        every = float(visible_blocks(LAPTOP, size, "cpu").sum()) * LAPTOP.heads
        for density in (0.25, 0.1, 0.05):
            mask = random_mask(LAPTOP, size, density, "cpu")
            index = BlockIndex.from_mask(mask, size)
            jobs = {
                "dense": lambda: scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
                "call": lambda index=index: attend(q, k, v, index),
            }
            times = {name: [] for name in jobs}
            for _ in range(rounds + 1):
                for name, run in jobs.items():
                    times[name] += times_ms(run, 1, 0, q.device)
            # The least, not the median: on shared cores the rest is other people's work.
            best = {name: min(values[1:]) for name, values in times.items()}
            share, gain = float(mask.sum()) / every, best["dense"] / best["call"]
            results.append({"shape": LAPTOP.name, "unit": list(size), "density": share, "ms": best})
            print(f"{size} ρ={share:.3f} | {best} | {gain:.2f}×, {gain * share:.2f} of ideal")
    return results
