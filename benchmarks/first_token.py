"""Time to first token of calibrated plans for generation beside dense attention, in turns.

Dense is what the model runs by itself (torch's choice of flash attention or cuDNN on a GPU),
`trimmed_ms` the same with its last layer for the last row alone, null where the plan does not trim
it; every row is a calibration of its own. Medians of whole prefills with the cache that `generate`
fills.

    python benchmarks/first_token.py --sizes 16384x8 32768x8 --out first-token.json
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from functools import partial
from typing import Any

import by_size
import numpy as np
import torch

import accelkit
from accelkit.calibration import data
from accelkit.calibration.capture import prefill
from accelkit.calibration.timing import times_ms
from accelkit.patches.plan import Plan

NOTE = (
    "By `benchmarks/first_token.py`: each row is a calibration of its own, then medians in turns "
    "on a prompt with needles that it did not see. `times dense` is dense ÷ patched; where the "
    "error is 0 every layer is dense but the last one, if that is trimmed."
)


def read(
    model: Any, tokenizer: Any, tokens: int, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One calibration, and readings of its plan on a prompt with needles that it did not see."""
    plan = accelkit.calibrate(
        model, tokenizer=tokenizer, lengths=[tokens], batch=batch, progress=False
    )
    ids = data.made("needle", tokens, 777, True, tokenizer).ids.astype(np.int64)
    prompt = torch.from_numpy(np.repeat(ids[None], batch, 0)).to(model.device)
    sides: dict[str, Plan | None] = {"dense_ms": None, "patched_ms": plan}
    if plan.trim_last_layer:
        bare = {p: s.model_copy(update={"rules": ()}) for p, s in plan.sites.items()}
        sides["trimmed_ms"] = plan.model_copy(update={"sites": bare})
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, side in sides.items():
            with accelkit.patch(model, side) if side is not None else nullcontext():
                found[name] += times_ms(partial(prefill, model, prompt), 1, 1, model.device)
    median = {name: statistics.median(some) for name, some in found.items()}
    return {
        "tokens": tokens,
        "batch": batch,
        "trimmed_ms": None,
        **median,
        "times_dense": median["dense_ms"] / median["patched_ms"],
        "dense_rows": plan.dense_rows,
        "budget": plan.budget.max_rel_error if plan.budget else None,
        "measured_error": plan.measured["measured_error"],
        "lost_answers": sum(t["lost"] for t in plan.measured.get("per_task", {}).values()),
        "seconds": plan.calibration["seconds"]["whole"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7)
    by_size.run(parser, "First token of {} with calibrated plans", read, note=NOTE)


if __name__ == "__main__":
    main()
