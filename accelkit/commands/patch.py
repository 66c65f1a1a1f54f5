"""`accelkit patch`: run a model with a plan, beside dense."""

from __future__ import annotations

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
    Yes,
)
from accelkit.errors import InvalidInputError


def patch(
    model: Model,
    plan: PlanAt = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue, to answer or to show.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text.")] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="A long text with a question about one line of it.",
            rich_help_panel=console.OF_TEXT,
        ),
    ] = False,
    length: Annotated[
        str | None,
        typer.Option(
            help="Length of the demo in tokens, such as 16k.", rich_help_panel=console.OF_TEXT
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate.", rich_help_panel=console.OF_TEXT)
    ] = 64,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Run the dense model as well.")
    ] = True,
    repeat: Annotated[
        int | None,
        typer.Option(min=1, help="Runs behind each median. Default: 3, for pipelines 1."),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write a pipeline's video (.mp4) or picture (.png).",
            rich_help_panel=console.OF_PICTURES,
        ),
    ] = None,
    fps: Annotated[
        float,
        typer.Option(
            min=1.0, help="Frames a second of that video.", rich_help_panel=console.OF_PICTURES
        ),
    ] = 16.0,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the model with its plan; accelkit.from_pretrained opens it patched."
        ),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    yes: Yes = False,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Run MODEL with a plan: its answer or video, its speed, and how far it agrees with dense."""
    console.verbosity(talk)
    from accelkit.calibration.opening import pipelines

    text = prompt if prompt_file is None else console.read_text(prompt_file)
    where = {"dtype": dtype, "device": device}
    size = {"height": height, "width": width, "steps": steps}
    if pipelines.is_pipeline(model):
        console.refuse("a pipeline", demo=demo, length=length)
        wished = console.given(num_frames=frames, **size)
        opened = pipelines.opened(model, plan, text and text.strip(), wished, seed, **where)
        document, shown = _show(
            opened, save, yes, dense=compare, repeat=repeat or 1, output=output, fps=fps
        )
    else:
        console.refuse("a language model", output=output, frames=frames, **size)
        sources = [prompt is not None, prompt_file is not None, demo]
        if sum(sources) > 1 or (not any(sources) and save is None):
            raise InvalidInputError(
                "give one of --prompt, --prompt-file and --demo (or only --save DIR)"
            )
        question = None
        if any(sources):
            question = text, console.size(length, "--length") if length is not None else None, seed
        if save is not None and (save / "config.json").exists():
            console.replaces(save, yes)
        how = {"max_new_tokens": max_new_tokens, "dense": compare, "repeat": repeat or 3}
        document, shown = _answer(model, plan, question, save, where, **how)
    console.emit(document, as_json, *shown)


def _show(opened: Any, save: Path | None, yes: bool, **how: Any) -> tuple[dict[str, Any], Any]:
    """A pipeline with its plan: videos, a contact sheet and what was gained."""
    from accelkit.calibration.compare import videos
    from accelkit.calibration.opening import models as opening
    from accelkit.calibration.opening import pipelines

    pipe, plan, *_ = opened
    for path in (how["output"], save and save / pipelines.INDEX):
        if path and path.exists():
            console.replaces(path, yes)
    made = videos.compare(*opened, **how)
    files = made.files()
    if save is not None:
        files["saved"] = str(opening.save_model(pipe, None, plan, save).parent)
    lines = [f"{k:9}{v}" for k, v in files.items()]
    return made.as_dict() | {"files": files}, [videos.table(made), *lines]


def _answer(
    name: str,
    plan: str | None,
    question: tuple[str | None, int | None, int] | None,
    save: Path | None,
    where: dict[str, str],
    **how: Any,
) -> tuple[dict[str, Any], Any]:
    """A language model with its plan: both answers, if there is a question (text or None for the
    demo, its length, its seed), and where things lie.
    """
    from accelkit.calibration.compare import answers
    from accelkit.calibration.opening import models as opening

    model, tokenizer, read, place = opening.opened(name, plan, **where)
    document: dict[str, Any] = {"plan": place, "report": opening.report_beside(place)}
    shown: list[Any] = []
    if question is not None:
        opening.need_tokenizer(tokenizer, name)
        ids, expected = answers.prompt(tokenizer, read, *question)
        result = answers.compare(model, tokenizer, read, ids, expected=expected, **how)
        document |= result.as_dict()
        shown += [answers.table(result), *([f"note: {result.note}"] if result.note else [])]
    if save is not None:
        document["saved"] = str(opening.save_model(model, tokenizer, read, save).parent)
    files = [f"{k:9}{document[k]}" for k in ("plan", "report", "saved") if document.get(k)]
    return document, [*shown, *files]
