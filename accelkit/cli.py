"""The command line. Every command is a file of `commands/`; they stand here in the order of use."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from accelkit import console
from accelkit.commands.bench import bench
from accelkit.commands.calibrate import calibrate
from accelkit.commands.doctor import doctor
from accelkit.commands.evaluate import evaluate
from accelkit.commands.methods import methods
from accelkit.commands.patch import patch
from accelkit.commands.show import show

app = typer.Typer(
    name="accelkit",
    cls=console.Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Speeds up pretrained language models and diffusion pipelines by calibrated sparse "
    "attention.",
    epilog="Begin with `accelkit calibrate MODEL --dry-run`, which says what can be gained, then "
    "`accelkit calibrate MODEL --out PLAN` and `accelkit patch MODEL --plan PLAN --prompt …`.",
)
for command in (calibrate, patch, show, methods, bench):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(doctor)


def _version(value: bool) -> None:
    if value:
        from accelkit import __version__

        typer.echo(f"accelkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `accelkit` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())
