"""`accelkit bench`: time a plan against dense."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accelkit import console
from accelkit.console import (
    AsJson,
    Device,
    Dtype,
    Frames,
    Height,
    Lengths,
    Model,
    PlanAt,
    Seed,
    Steps,
    Talk,
    Width,
)
from accelkit.errors import InvalidInputError


def bench(
    model: Model,
    plan: PlanAt = None,
    lengths: Lengths = "8k",
    prompt: Annotated[str | None, typer.Option(help="For pipelines: what to show.")] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    repeat: Annotated[
        int | None,
        typer.Option(min=1, help="Timed runs of each path. Default: 5, for pipelines 1."),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the timed ones.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    fit: Annotated[
        bool, typer.Option("--fit", help="Measure this device's kernels and fit their cost table.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run; time nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Append the results to this JSON-lines file.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Fail (exit 3) below this ratio to the best dense path.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Time prefill or denoising against the model's own path and the best dense one present."""
    console.verbosity(talk)
    limits = console.sizes(lengths)
    from accelkit.calibration import results, session
    from accelkit.calibration.bench import prefill as speed
    from accelkit.calibration.opening import pipelines
    from accelkit.calibration.opening.models import open_model, opened

    if pipelines.is_pipeline(model):
        from accelkit.calibration.bench import video as video_bench

        if fit:
            raise InvalidInputError(
                "--fit is for language models; `accelkit calibrate` fits the costs of a pipeline"
            )

        size = console.given(height=height, width=width, num_frames=frames, steps=steps)
        pipe, read, setting, shot = pipelines.opened(
            model, plan, prompt, size, seed, dtype=dtype, device=device
        )
        if dry_run:
            expected = video_bench.preview(pipe, read, setting)
            console.emit(expected, as_json, console.table("What would run", expected))
            return
        timed = video_bench.bench(
            *(pipe, read, setting, shot), repeat=repeat or 1, warmup=warmup, progress=console.say
        )
        if out:
            about = results.about(pipe, model, str(plan or model))
            results.append_jsonl(out, [about | vars(setting) | row for row in timed])
        console.emit(timed, as_json, console.table("Denoising", timed))
        if min_speedup is not None:
            video_bench.gate(timed, min_speedup)
        return

    if fit:
        loaded = open_model(model, dtype=dtype, device=device)[0]
        with session.Bar(True) as bar:
            step = bar.tell if bar.wanted else console.say
            costs = speed.fit_costs(loaded, limits, step, bar.expect)
        console.emit(
            costs, as_json, *(console.table(k, v) for k, v in speed.cost_rows(costs).items())
        )
        return
    loaded, tokenizer, read, where = opened(model, plan, dtype=dtype, device=device)
    if dry_run:
        expected = speed.preview(loaded, read, limits)
        console.emit(expected, as_json, console.table("What would run", expected))
        return
    found = speed.bench(
        loaded,
        read,
        tokenizer,
        lengths=limits,
        batch=batch,
        repeat=repeat or 5,
        warmup=warmup,
        seed=seed,
        progress=console.say,
    )
    about = results.about(loaded, model, where)
    rows = [about | m.as_dict() for m in found]
    if out:
        results.append_jsonl(out, rows)
    console.emit(rows, as_json, speed.table(found), "own = " + speed.dense_paths(loaded)["own"])
    if min_speedup is not None:
        speed.gate(found, min_speedup)
