"""`accelkit methods`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from accelkit import console
from accelkit.console import AsJson, Talk


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this method.")] = None,
    as_json: AsJson = False,
    talk: Talk = None,
) -> None:
    """List the methods, or explain one: its idea, its numbers and what they mean."""
    console.verbosity(talk)
    from accelkit.doctor import explain, listing

    if name:
        one = explain(name)
        text = f"{one['name']}\n\n{one['about']}\n"
        told = any(f["meaning"] for f in one["fields"])
        rows = [{k: v for k, v in f.items() if told or k != "meaning"} for f in one["fields"]]
        console.emit(one, as_json, text, console.table("Numbers", rows))
    else:
        found = listing()
        hint = "accelkit methods NAME explains one; docs/concepts.md explains what a method answers"
        console.emit(found, as_json, console.table("Methods", found), hint)
