"""`accelkit bench`: time a plan against dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from accelkit import console
from accelkit.console import (
    AsJson,
    Device,
    Dtype,
    Frames,
    Height,
    Model,
    PlanAt,
    Seed,
    Steps,
    Talk,
    Width,
)


def bench(
    model: Model,
    plan: PlanAt = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens, such as 8k,32k. Default: 8k.",
            rich_help_panel=console.OF_TEXT,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="For pipelines: what to show.", rich_help_panel=console.OF_PICTURES),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    repeat: Annotated[
        int | None,
        typer.Option(min=1, help="Timed runs of each path. Default: 5, for pipelines 1."),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before the timed ones.")] = 1,
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts at once.", rich_help_panel=console.OF_TEXT)
    ] = 1,
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
    from accelkit.calibration import results
    from accelkit.calibration.opening import models, pipelines

    where = {"dtype": dtype, "device": device}
    size = {"height": height, "width": width, "steps": steps}
    no_times: dict[str, Any] = {"out": out, "min_speedup": min_speedup}
    if dry_run:
        console.refuse("--dry-run", fit=fit, **no_times)
    opened: Sequence[Any]
    if pipelines.is_pipeline(model):
        console.refuse("a pipeline", fit=fit, lengths=lengths, batch=batch > 1)
        opened = pipelines.opened(
            model, plan, prompt, console.given(num_frames=frames, **size), seed, **where
        )
        place = plan or model
        timed = _denoising(opened, dry_run, repeat=repeat or 1, warmup=warmup)
    else:
        console.refuse("a language model", prompt=prompt, frames=frames, **size)
        limits = console.sizes("8k" if lengths is None else lengths)
        if fit:
            console.refuse("--fit", plan=plan, repeat=repeat, batch=batch > 1, **no_times)
            _fit(models.open_model(model, **where)[0], limits, as_json)
            return
        *opened, place = models.opened(model, plan, **where)
        often = {"repeat": repeat or 5, "warmup": warmup, "batch": batch, "seed": seed}
        timed = _prefill(opened, limits, dry_run, **often)
    rows, shown, gate = timed
    if not dry_run:
        about = results.about(opened[0], model, place)
        rows = [about | row for row in rows]
    console.emit(rows, as_json, *shown)
    if out:
        results.append_jsonl(out, rows)
    if gate is not None and min_speedup is not None:
        gate(min_speedup)


Timed = tuple[list[dict[str, Any]], list[Any], Callable[[float], None] | None]
"""Rows, what a person reads of them, and the gate of `--min-speedup` unless nothing was timed."""


def _denoising(opened: Sequence[Any], dry_run: bool, **often: int) -> Timed:
    """Whole videos of a pipeline."""
    from accelkit.calibration.bench import video as speed

    pipe, plan, settings, shot = opened
    if dry_run:
        expected = speed.preview(pipe, plan, settings)
        return expected, [console.table("What would run", expected)], None
    found = speed.bench(pipe, plan, settings, shot, progress=console.say, **often)
    rows = [vars(settings) | row for row in found]
    about = ("tokens", "attention_ms", "attention_share")
    paths = [{k: v for k, v in row.items() if k not in about} for row in found]
    tokens, ms, share = (found[0][k] for k in about)
    shown = [
        console.table("Denoising", paths),
        f"own = as the pipeline was loaded; attention takes {share:.1%} of it "
        f"({ms:.1f} ms of each forward over {tokens} tokens)",
    ]
    return rows, shown, partial(speed.gate, found)


def _prefill(opened: Sequence[Any], lengths: Sequence[int], dry_run: bool, **often: int) -> Timed:
    """Prefill of a language model at each length."""
    from accelkit.calibration.bench import prefill as speed

    model, tokenizer, plan = opened
    if dry_run:
        expected = speed.preview(model, plan, lengths)
        return expected, [console.table("What would run", expected)], None
    found = speed.bench(model, plan, tokenizer, lengths=lengths, progress=console.say, **often)
    shown = [speed.table(found), "own = " + speed.dense_paths(model)["own"]]
    return [m.as_dict() for m in found], shown, partial(speed.gate, found)


def _fit(model: Any, lengths: Sequence[int], as_json: bool) -> None:
    """The cost table of this device for layers like the model's."""
    from accelkit.calibration import session
    from accelkit.calibration.bench import prefill as speed

    with session.Bar(True) as bar:
        costs = speed.fit_costs(model, lengths, bar.tell, bar.expect)
    tables = speed.cost_rows(costs)
    console.emit(costs, as_json, *(console.table(k, v) for k, v in tables.items()))
