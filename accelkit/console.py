"""What all commands share: sizes, times and ratios as people write them; output; logs; errors as
exit codes."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from accelkit.errors import AccelkitError, AccelkitWarning, InvalidInputError

log = logging.getLogger("accelkit")
# Panels of `--help`, and options that several commands share.
OF_TEXT, OF_PICTURES = "For language models", "For pipelines"
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a saved model or pipeline, or a hub id.")
]
PlanAt = Annotated[
    str | None,
    typer.Option(
        "--plan", metavar="P", help="Plan: file, folder or hub id. Default: in the model's folder."
    ),
]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 8k,32k.")]
Height = Annotated[
    int | None,
    typer.Option(min=1, help="Of a pipeline's pictures, in pixels.", rich_help_panel=OF_PICTURES),
]
Width = Annotated[
    int | None,
    typer.Option(min=1, help="Of a pipeline's pictures, in pixels.", rich_help_panel=OF_PICTURES),
]
Frames = Annotated[
    int | None, typer.Option(min=1, help="Of a pipeline's videos.", rich_help_panel=OF_PICTURES)
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps of a pipeline.", rich_help_panel=OF_PICTURES),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of prompts and choices.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Talk = Annotated[
    bool | None,
    typer.Option("--verbose/--quiet", "-v/-q", help="All logs and tracebacks, or errors only."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Replace what exists without asking.")]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "": 1}
_TOKENS = {"k": 1024, "m": 1024**2, "": 1}


def size(text: str, option: str) -> int:
    """Tokens: "8192", "32k" (32 × 1024), "1m"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower())
    tokens = round(float(found[1]) * _TOKENS[found[2]]) if found else 0
    if tokens < 1:
        raise InvalidInputError(f"{option}: {text!r} is no size; write tokens such as 8192 or 32k")
    return tokens


def sizes(text: str) -> tuple[int, ...]:
    """Several sizes between commas, ascending, each once."""
    found = {size(part, "--lengths") for part in names(text)}
    if not found:
        raise InvalidInputError("--lengths: nothing given; write tokens such as 8k,32k")
    return tuple(sorted(found))


def seconds(text: str | None) -> float | None:
    """Seconds: "90s", "15m", "1.5h"; a bare number is seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    if not found or float(found[1]) == 0:
        raise InvalidInputError(
            f"--time-limit: {text!r} is no time; expected such as 90s, 15m or 1h"
        )
    return float(found[1]) * _SECONDS[found[2]]


def share(text: str) -> float:
    """A budget, between 0 and 1, exclusive: "0.02" or "2%"."""
    found = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?)(%?)", text.strip().lower())
    value = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if not 0 < value < 1:
        raise InvalidInputError(
            f"--budget: {text!r} is no share between 0 and 1; write such as 0.02 or 2%"
        )
    return value


def names(text: str | None) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def emit(document: Any, as_json: bool, *renderables: Any) -> None:
    """The result, on stdout: one JSON document, or what a person reads."""
    if as_json:
        sys.stdout.write(
            json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )
        return
    from rich.console import Console

    # Off a terminal rich assumes 80 columns and would cut tables short.
    console = Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 120)
    for part in renderables:
        if isinstance(part, str):
            # Paths stay whole: they are there to be copied.
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def given(**options: Any) -> dict[str, Any]:
    """The options that somebody set."""
    return {k: v for k, v in options.items() if v is not None}


def refuse(what: str, **options: Any) -> None:
    """What this kind of model has no use for and somebody set all the same."""
    found = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if found:
        raise InvalidInputError(f"{what} has no use for {' and '.join(found)}; leave it out")


def table(title: str, rows: Sequence[dict[str, Any]]) -> Any:
    """A rich table of rows that have the same keys; numbers stand at the right."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    grid = Table()
    for key, value in (rows[0] if rows else {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        grid.add_column(
            key.replace("_", " "), justify="right" if number else "left", overflow="fold"
        )
    for row in rows:
        grid.add_row(*(cell(shown(k, v)) for k, v in row.items()))
    # The title stands by itself: a table breaks its own at its width.
    return Group(Text(title, style="italic"), grid)


def shown(key: str, value: Any) -> Any:
    """A share in percent and a ratio with its sign, by the names that such columns have."""
    if isinstance(value, float) and key.endswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float) and ("speedup" in key or "faster" in key):
        return f"{value:.2f} ×"
    return value


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value)


def plain(value: Any) -> Any:
    """The same data with what JSON has; numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def say(text: str) -> None:
    """One line for the person, on stderr; silent under -q."""
    if log.getEffectiveLevel() <= logging.WARNING:
        sys.stderr.write(text + "\n")


def verbosity(talk: bool | None) -> None:
    """Logs and warnings go to stderr: all if `talk`, errors only if it is False."""
    level = logging.WARNING if talk is None else logging.DEBUG if talk else logging.ERROR
    log.setLevel(level)
    for old in log.handlers[:]:
        if isinstance(old, _Stderr):
            log.removeHandler(old)
    log.addHandler(_Stderr())
    if not talk:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if talk is False:
        os.environ["ACCELKIT_PROGRESS"] = "0"
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        if issubclass(category, AccelkitWarning) or talk:
            log.warning("%s", message)

    warnings.showwarning = show  # type: ignore[assignment]


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        sys.stderr.write(f"{record.levelname.lower()}: {line}\n")


def read_text(path: Path) -> str:
    """A text file's content."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path}: cannot be read as text ({error})") from error


def replaces(path: Any, yes: bool, instead: str = "choose another folder") -> None:
    """Ask before something is overwritten; without a terminal `--yes` is needed, or what `instead`
    says.
    """
    if yes:
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        if typer.confirm(f"{path} exists. Replace it?", err=True):
            return
        raise typer.Exit(2)
    raise InvalidInputError(f"{path} exists; add --yes to replace it, or {instead}")


class Commands(TyperGroup):
    """The app's commands; errors meant for the user become one line on stderr and an exit code."""

    def __init__(self, **options: Any) -> None:
        # The list of commands is plain text: rich's pages take as long to wake as all the rest.
        super().__init__(**{**options, "rich_markup_mode": None})

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AccelkitError as error:
            raise typer.Exit(_failed(error, str(error), error.exit_code)) from None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            if ctx.invoked_subcommand == "calibrate":
                sys.stderr.write(
                    f"what is finished is kept; go on with:\n  {resume_command(sys.argv[1:])}\n"
                )
            raise typer.Exit(130) from None
        except Exception as error:
            # torch is not imported here: both of its classes are known by name.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            hint = "the device's memory is full; try shorter prompts, --batch 1 or --dtype bfloat16"
            raise typer.Exit(_failed(error, hint, 5)) from None


def resume_command(arguments: Sequence[str]) -> str:
    """The command line that takes up an interrupted calibration."""
    extra = [] if "--resume" in arguments else ["--resume"]
    return shlex.join(["accelkit", *arguments, *extra])


def _failed(error: BaseException, message: str, code: int) -> int:
    if log.isEnabledFor(logging.DEBUG):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    sys.stderr.write(f"error: {message}\n")
    return code
