"""`accelkit show`: a plan, or the attention sites of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accelkit import console
from accelkit.console import AsJson, Talk
from accelkit.errors import InvalidInputError

PHASES = ("prefill", "decode", "denoise")


def show(
    plan_or_model: Annotated[
        str,
        typer.Argument(
            metavar="PLAN|MODEL",
            help="A plan: file, folder or hub id; or a model's folder, whose sites are listed.",
        ),
    ],
    phase: Annotated[
        str | None, typer.Option(help="prefill, decode or denoise. Default: the plan's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the heads × layers picture (.png, .svg or .pdf).")
    ] = None,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """Show a plan: policy, density and error of each head; or the attention sites of a model."""
    console.verbosity(talk)
    if phase not in (None, *PHASES):
        raise InvalidInputError(f"--phase: {phase!r} is unknown; expected {', '.join(PHASES)}")
    from accelkit.patches.plan import Plan
    from accelkit.patches.plan_file import FILE

    folder = Path(plan_or_model)
    is_model = any((folder / name).exists() for name in ("config.json", "model_index.json"))
    if is_model and not (folder / FILE).exists():
        if out or plot:
            raise InvalidInputError(
                f"{plan_or_model} has no plan to draw; make one with `accelkit calibrate`"
            )
        from accelkit.calibration.opening.pipelines import describe_any

        found = describe_any(plan_or_model)
        console.emit(
            found, as_json, console.table(f"{found['class_name']}: attention sites", found["sites"])
        )
        return
    from accelkit.calibration.show import pictures, report

    plan = Plan.from_pretrained(plan_or_model)
    document = report.summary(plan, phase) | {"heads_by_site": pictures.head_rows(plan, phase)}
    if out:
        document["report"] = str(report.write_html(plan, out))
    if plot:
        pictures.save_figure(plan, plot, phase)
        document["picture"] = str(plot)
    written = [f"{k:9}{document[k]}" for k in ("report", "picture") if k in document]
    console.emit(document, as_json, report.tables(plan, phase), *written)
