"""`accelkit eval`: scores on tasks, with a plan and dense."""

from __future__ import annotations

from typing import Annotated

import typer

from accelkit import console
from accelkit.console import AsJson, Device, Dtype, Lengths, Model, PlanAt, Seed, Talk
from accelkit.errors import InvalidInputError


def evaluate(
    model: Model,
    plan: PlanAt = None,
    tasks: Annotated[str, typer.Option(help="Names between commas, or all.")] = "all",
    lengths: Lengths = "8k",
    samples: Annotated[
        int, typer.Option(min=1, help="Prompts for each task and length, at least.")
    ] = 4,
    answers: Annotated[
        int, typer.Option(min=0, help="Answers for each task and length, at least.")
    ] = 0,
    against: Annotated[str, typer.Option(help="dense, or none to score one side only.")] = "dense",
    max_drop: Annotated[
        float | None, typer.Option(help="Fail (exit 3) if a task loses more points out of 100.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Score MODEL on long-context tasks and text, with a plan and dense."""
    console.verbosity(talk)
    limits = console.sizes(lengths)
    if against not in ("dense", "none"):
        raise InvalidInputError(f"--against: {against!r} is unknown; expected dense or none")
    if max_drop is not None and against == "none":
        raise InvalidInputError("--max-drop compares with dense; leave --against out")
    from accelkit.calibration.evaluation import evaluate as quality
    from accelkit.calibration.evaluation.tasks import TASKS
    from accelkit.calibration.opening.models import has_plan, need_tokenizer, open_model, opened

    read = None
    if max_drop is not None and not (plan or has_plan(model)):
        raise InvalidInputError("--max-drop compares a plan with dense; give --plan")
    if plan or has_plan(model):
        loaded, tokenizer, read, _ = opened(model, plan, dtype=dtype, device=device)
    else:
        loaded, tokenizer = open_model(model, dtype=dtype, device=device)
    scores = quality.evaluate(
        loaded,
        need_tokenizer(tokenizer, model),
        read,
        names=TASKS if tasks == "all" else console.names(tasks),
        lengths=limits,
        samples=samples,
        answers=answers,
        dense=against == "dense",
        seed=seed,
        progress=console.say,
    )
    console.emit([s.as_dict() for s in scores], as_json, quality.table(scores))
    if max_drop is not None:
        quality.worst_drop(scores, max_drop)
