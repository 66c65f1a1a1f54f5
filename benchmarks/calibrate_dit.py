"""What calibrating a pipeline costs at full size, in dense denoising runs.

Wan2.1-T2V-1.3B's configuration at 480 × 832 and 81 frames (32,760 tokens), or HunyuanVideo's at 720
× 1280 and 129 frames (118,800 and 256 of text), with random weights: what calibration finds on them
says nothing, what it spends does. A dense run is its median step, timed
here without a hook, times the number of steps; compiling kernels, which the next run on a machine
does not repeat, is counted apart. Without `--check` the end-to-end check is left out.

    python benchmarks/calibrate_dit.py --out benchmarks/results/calibrate-wan.json
    python benchmarks/calibrate_dit.py --layers 6 --steps 50 --check     # the check as well
    python benchmarks/calibrate_dit.py --model hunyuan --layers 1 2      # one dual, two single ones
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from denoise_dit import MODELS, SHAPES, built, unmasked
from torch import nn

import accelkit
from accelkit.calibration.denoise import calibrate as denoise
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings
from accelkit.calibration.journal import Journal
from accelkit.calibration.refine import Round
from accelkit.calibration.results import environment
from accelkit.patches.adapters import sites

TIMED = 3
"""Steps of the dense run that is timed; the first one of them only warms up."""


class Unchecked(denoise.Checker):
    """Says that every plan holds and runs none."""

    def check(self, now: Round, allowed: float) -> None:
        now.measured, now.held = allowed, True

    def spent(self, rounds: Any, plan: Any) -> bool:
        return bool(rounds)

    def speed(self, plan: Any) -> dict[str, float]:
        return {"ms": self.cost(plan), "dense_ms": 1.0}


def guided(model: str, layers: list[int], device: str) -> tuple[Any, Settings, dict[str, Any]]:
    """The pipeline with guidance, as it runs by default: two forwards a step; one of HunyuanVideo,
    which takes the guidance as a number.
    """
    pipe, size, shot = built(model, layers, device)
    if model == "hunyuan":
        return pipe, size, dict(shot.arguments)
    other = torch.randn(1, 512, 4096, device=device)
    return pipe, size, {
        **shot.arguments, "negative_prompt_embeds": other, "guidance_scale": 5.0
    }  # fmt: skip


def dense_step(pipe: Any, size: Settings, arguments: dict[str, Any]) -> float:
    """Seconds of a dense step."""
    shot = Shot("dense", arguments, 0)
    ends = video.run(pipe, replace(size, num_inference_steps=TIMED), shot).ends
    return statistics.median(b - a for a, b in pairwise(ends))


@contextmanager
def told() -> Iterator[list[dict[str, Any]]]:
    """Every stage of calibration is printed when its first unit has ended, with the time, and every
    run of the check, which are given as well: plan, prompt, share of the steps that ran, seconds
    with the dense run of the prompt where it was the first.
    """
    begin, put, seen = time.perf_counter(), Journal.put, set()
    checks: list[dict[str, Any]] = []

    def noted(self: Journal, key: str, value: Any, seconds: float, compiling: float = 0.0) -> Any:
        stage, _, which = key.partition("/")
        if stage not in seen:
            seen.add(stage)
            print(f"{time.perf_counter() - begin:7.1f} s  {stage}", flush=True)
        if stage == "check" and isinstance(value, dict) and "error" in value:
            plan, _, prompt = which.partition("/")
            run = {k: value[k] for k in ("error", "done") if k in value}
            checks.append({"plan": plan[:8], "prompt": prompt, **run, "seconds": seconds})
            print(f"{time.perf_counter() - begin:7.1f} s  {checks[-1]}", flush=True)
        return put(self, key, value, seconds, compiling)

    Journal.put = noted  # type: ignore[method-assign]
    try:
        yield checks
    finally:
        Journal.put = put  # type: ignore[method-assign]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(MODELS), default="wan")
    parser.add_argument("--layers", type=int, nargs="+", default=[], help="default: all")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, nargs=3, help="height width frames")
    parser.add_argument("--methods", nargs="+", help="default: all for denoising")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--journal", type=Path, help="keeps each unit of work with its seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate_dit.json"))
    return parser.parse_args()


def main() -> None:
    args = options()
    # HunyuanVideo's mask over its text hides nothing here, but would make dense runs slower.
    nn.functional.scaled_dot_product_attention = unmasked(
        nn.functional.scaled_dot_product_attention
    )
    pipe, size, arguments = guided(args.model, args.layers, args.device)
    layers = len(sites(pipe))
    if args.size:
        size = Settings(*args.size)
    step = dense_step(pipe, size, arguments)
    whole = step * args.steps
    print(f"dense: {step:.3f} s a step, {whole:.1f} s a run", flush=True)

    if not args.check:
        denoise.Checker = Unchecked  # type: ignore[misc]
    begin = time.perf_counter()
    with told() as checks:
        plan = accelkit.calibrate(
            pipe, [arguments] * 4, height=size.height, width=size.width, num_frames=size.num_frames,
            steps=args.steps, preset=args.preset, methods=args.methods, budget=args.budget,
            journal=args.journal,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    about = plan.calibration
    spent = about["seconds"]
    search = seconds - spent["compiling"] - spent["checking"]
    row = {
        "layers": layers,
        "tokens": about["tokens"],
        "steps": args.steps,
        "dense_step_s": step,
        "dense_run_s": whole,
        "calibration_s": seconds,
        "dense_runs": search / whole,
        "dense_runs_with_compiling": (search + spent["compiling"]) / whole,
        "check_dense_runs_a_prompt": spent["checking"] / whole / 2 if args.check else None,
        "said_by_the_plan": {k: about[k] for k in ("dense_run_s", "dense_runs")},
        **{f"{k.replace(' ', '_')}_s": v for k, v in spent.items()},
    }
    found = {
        "title": f"Calibrating {SHAPES[args.model]}, {layers} layers, random weights",
        "note": "By `benchmarks/calibrate_dit.py`. A dense run is its median step times the number "
        "of steps; `dense_runs` is everything but the check and compiling kernels.",
        "preset": args.preset,
        "environment": environment(torch.device(args.device)),
        "rows": [row],
        "rounds": plan.measured["rounds"],
        "checks": checks,
        "refused": about["refused"],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
