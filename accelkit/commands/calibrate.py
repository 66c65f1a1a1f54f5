"""`accelkit calibrate`: measure a model and write a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accelkit import console
from accelkit.console import (
    AsJson,
    Device,
    Dtype,
    Frames,
    Height,
    Model,
    Seed,
    Steps,
    Talk,
    Width,
    Yes,
)
from accelkit.errors import MissingExtraError

if TYPE_CHECKING:
    from accelkit.patches.plan import Plan


def calibrate(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for plan, journal and report.")] = Path(
        "accelkit-plan"
    ),
    budget: Annotated[
        str | None,
        typer.Option(help="Error that may be spent: 0.02 or 2%. Default: 2%, for pipelines 10%."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths such as 8k,32k. Default: by the device.",
            rich_help_panel=console.OF_TEXT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text or JSON-lines file. Default: built-in tasks.",
            rich_help_panel=console.OF_TEXT,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="For pipelines: a prompt a line, or JSON lines. Default: built-in ones.",
            rich_help_panel=console.OF_PICTURES,
        ),
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    steps: Steps = None,
    preset: Annotated[str, typer.Option(help="careful, balanced or fast.")] = "balanced",
    methods: Annotated[
        str | None, typer.Option(help="Methods to try, such as flex_prefill,window. Default: all.")
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Prompts that will be prefilled together; costs are theirs.",
            rich_help_panel=console.OF_TEXT,
        ),
    ] = 1,
    every_row: Annotated[
        bool,
        typer.Option(
            "--every-row",
            help="Logits of every row will be asked for, not those of the last rows alone.",
            rich_help_panel=console.OF_TEXT,
        ),
    ] = False,
    seed: Seed = 0,
    time_limit: Annotated[
        str | None, typer.Option(help="Stop measuring after 90s, 15m or 1h.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the journal in --out.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show attention's share and the most that can be gained; write nothing.",
        ),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    yes: Yes = False,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Measure MODEL and write the fastest plan that keeps within the error budget."""
    console.verbosity(talk)
    allowed = None if budget is None else console.share(budget)
    stop = console.seconds(time_limit)
    size = console.given(height=height, width=width, num_frames=frames, steps=steps)
    limits = None if lengths is None else console.sizes(lengths)
    chosen = console.names(methods) or None
    journal = out / "journal.jsonl"
    from accelkit.calibration.journal import holds_units
    from accelkit.patches.method import load
    from accelkit.patches.plan import Budget
    from accelkit.patches.plan_file import FILE

    for name in chosen or ():
        load(name)
    if resume and not journal.exists():
        console.say(f"{journal}: there is no journal to take up, so all is measured anew")
    if not dry_run and not resume and (out / FILE).exists():
        console.replaces(out / FILE, yes)
    elif not dry_run and not resume and holds_units(journal):
        console.replaces(journal, yes, "--resume to go on from it")
    from accelkit.calibration.calibrate import calibrate as measure
    from accelkit.calibration.calibrate import dry_run as bound_of
    from accelkit.calibration.opening import pipelines
    from accelkit.calibration.prefill.measure import PRESETS
    from accelkit.calibration.session import need_preset

    need_preset(preset, PRESETS)
    draws = pipelines.is_pipeline(model)
    if draws:
        of_texts = {"data": data, "lengths": lengths, "batch": batch > 1, "every_row": every_row}
        console.refuse("a pipeline", **of_texts)
    else:
        of_pictures = {"height": height, "width": width, "frames": frames, "steps": steps}
        console.refuse("a language model", prompts=prompts, **of_pictures)
    loaded, tokenizer = pipelines.open_any(model, dtype=dtype, device=device)
    if dry_run:
        if draws:
            told = pipelines.size_told(loaded, size)
            console.say(f"two dense steps at {told}, twice; --height, --width and --frames set it")
        bound = bound_of(loaded, lengths=limits, **size)
        console.emit(
            bound,
            as_json,
            console.table("Attention's share, and the speed-up if attention cost nothing", bound),
        )
        return
    plan = measure(
        loaded,
        data or prompts,
        tokenizer=tokenizer,
        budget=None if allowed is None else Budget(max_rel_error=allowed),
        lengths=limits,
        **size,
        methods=chosen,
        preset=preset,
        batch=batch,
        every_row=every_row,
        seed=seed,
        time_limit=stop,
        journal=journal,
        resume=resume,
        progress=talk is not False,
    )
    _keep(plan, out, journal, as_json)


def _keep(plan: Plan, out: Path, journal: Path, as_json: bool) -> None:
    """Write the plan and its report into a folder, and show both."""
    from accelkit.calibration.show import report

    files = {"plan": str(plan.save_pretrained(out)), "journal": str(journal)}
    try:
        files["report"] = str(report.write_html(plan, out / "report.html"))
    except MissingExtraError as error:
        console.say(f"no report: {error}, then accelkit show {out} --out report.html")
    where = "\n".join(f"{name:8}{place}" for name, place in files.items())
    console.emit(
        report.summary(plan) | {"files": files},
        as_json,
        report.tables(plan, heads=False),
        "",
        where,
    )
