"""What calibrating a pipeline costs at full size, in dense denoising runs.

Wan2.1-T2V-1.3B's configuration at 480 × 832 and 81 frames (32,760 tokens) with random weights: what
calibration finds on them says nothing, what it spends does. The end-to-end check is left out; it is
bounded apart, by `denoise_check.MOST_RUNS` dense runs for each prompt.

    python benchmarks/calibrate_dit.py --out benchmarks/results/calibrate-wan.json
    python benchmarks/calibrate_dit.py --layers 6 --steps 20     # quicker, and it says so
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from denoise_dit import built
from diffusers import WanPipeline

import accelkit
from accelkit.calibration import denoise, video
from accelkit.calibration.refine import Round
from accelkit.calibration.results import environment
from accelkit.calibration.video import Settings

TIMED = 3
"""Steps of the dense run that is timed; the first one of them only warms up."""


class Unchecked(denoise.Checker):
    """Says that every plan holds and runs none."""

    def check(self, now: Round, allowed: float) -> None:
        now.measured, now.held = allowed, True

    def pace(self, rounds: Any) -> float:
        return 0.0 if rounds else 1.0

    def speed(self, plan: Any) -> dict[str, float]:
        return {"ms": self.cost(plan), "dense_ms": 1.0}


def guided(layers: int, device: str) -> tuple[WanPipeline, Settings, dict[str, Any]]:
    """The pipeline with guidance, as it runs by default: two forwards a step."""
    pipe, size, shot = built("wan", (layers,), device)
    other = torch.randn(1, 512, 4096, device=device)
    return pipe, size, {
        **shot.arguments, "negative_prompt_embeds": other, "guidance_scale": 5.0
    }  # fmt: skip


def dense_step(pipe: Any, size: Settings, arguments: dict[str, Any]) -> float:
    """Seconds of a dense step."""
    shot = video.Shot("dense", arguments, 0)
    ends = video.run(pipe, replace(size, num_inference_steps=TIMED), shot).ends
    return statistics.median(b - a for a, b in pairwise(ends))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=3, help="height width frames")
    parser.add_argument("--methods", nargs="+", help="default: all for denoising")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate_dit.json"))
    args = parser.parse_args()

    pipe, size, arguments = guided(args.layers, args.device)
    if args.size:
        size = Settings(*args.size)
    step = dense_step(pipe, size, arguments)
    whole = step * args.steps
    print(f"dense: {step:.3f} s a step, {whole:.1f} s a run", flush=True)

    denoise.Checker = Unchecked  # type: ignore[misc]
    begin = time.perf_counter()
    plan = accelkit.calibrate(
        pipe, [arguments] * 4, height=size.height, width=size.width, num_frames=size.num_frames,
        steps=args.steps, preset=args.preset, methods=args.methods,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    row = {
        "layers": args.layers,
        "tokens": plan.calibration["tokens"],
        "steps": args.steps,
        "dense_step_s": step,
        "dense_run_s": whole,
        "calibration_s": seconds,
        "dense_runs": seconds / whole,
        **{f"{k.replace(' ', '_')}_s": v for k, v in plan.calibration["seconds"].items()},
    }
    found = {
        "title": f"Calibrating Wan2.1-1.3B shapes, {args.layers} of 30 layers, random weights",
        "note": "By `benchmarks/calibrate_dit.py`, compilation of kernels included, without the "
        "end-to-end check. A dense run is its median step times the number of steps.",
        "preset": args.preset,
        "environment": environment(torch.device(args.device)),
        "rows": [row],
        "refused": plan.calibration["refused"],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
