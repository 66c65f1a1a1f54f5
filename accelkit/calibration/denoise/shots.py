"""What a pipeline is run on: prompts with their arguments and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelkit.errors import InvalidInputError

FILES = (".txt", ".jsonl")
"""What names of files of prompts end with."""
BUILT_IN = (
    "a red fox running through fresh snow, low winter sun",
    "waves breaking on black rocks at dusk, slow motion",
    "a chef slicing vegetables in a bright kitchen, close-up",
    "an astronaut walking across a field of yellow flowers",
    "night traffic on a wet city street, neon signs, aerial view",
    "a paper boat drifting down a narrow stream",
)
CHECK_SEED = 500_000
"""Seeds of results to check on begin here, those to measure on are below."""


@dataclass(frozen=True)
class Shot:
    """One result to make: the pipeline's call arguments that are its own, and its seed."""

    name: str
    arguments: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Shots:
    """Shots to measure on and, with other seeds and where possible other prompts, to check on."""

    measure: tuple[Shot, ...]
    check: tuple[Shot, ...]
    about: str


def gather(data: Any, seed: int, measure: int, check: int) -> Shots:
    """At most `measure` and `check` shots.

    Args:
        data: None for built-in prompts; a file with a prompt in each line, or JSON lines of call
            arguments; one prompt; or a list of prompts and of dicts of call arguments, whose
            `seed` is taken if there is one.

    Raises:
        InvalidInputError: no prompt, or something that is none.
    """
    items = list(BUILT_IN) if data is None else _items(data)
    if not items:
        raise InvalidInputError("no prompts: expected at least one; None takes built-in ones")
    given = [dict(i) if isinstance(i, Mapping) else {"prompt": i} for i in items]
    for n, one in enumerate(given):
        if not one or not isinstance(one.get("prompt", ""), str):
            raise InvalidInputError(
                f"prompt {n + 1} is {items[n]!r:.80}; expected text, or a dict of call arguments "
                "with a text as 'prompt'"
            )
    first, second = (given[0::2], given[1::2]) if len(given) > 1 else (given, given)

    def shots(some: Sequence[dict[str, Any]], most: int, begin: int) -> tuple[Shot, ...]:
        out = []
        for n, one in enumerate(some[:most]):
            rest = {k: v for k, v in one.items() if k != "seed"}
            name = str(rest.get("prompt", f"prompt {n + 1}"))
            out.append(Shot(name[:80], rest, int(one.get("seed", begin + seed * 1000 + n))))
        return tuple(out)

    about = "built-in prompts" if data is None else f"{len(given)} of the user's"
    return Shots(shots(first, measure, 0), shots(second, check, CHECK_SEED), about)


def _items(data: Any) -> list[Any]:
    path = Path(data) if isinstance(data, Path) else None
    if isinstance(data, str) and "\n" not in data and len(data) < 1024:
        # A name that is no file is told rather than drawn.
        path = Path(data) if data.endswith(FILES) or Path(data).is_file() else None
    if path is None:
        if isinstance(data, str | Mapping):
            return [data] if data else []
        if not isinstance(data, Sequence):
            raise InvalidInputError(
                f"data is {type(data).__name__}; expected a file, a prompt or a list of prompts"
            )
        return list(data)
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        lines = [line for line in lines if line]
        found = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error}); expected a prompt in each line, or JSON lines"
        ) from error
    if not found:
        raise InvalidInputError(f"{path} is empty; expected a prompt in each line")
    return found


def together(shots: Sequence[Shot]) -> Shot | None:
    """One shot that makes all of them at once, from noise of its own; None where their arguments
    cannot be joined.
    """
    keys = shots[0].arguments.keys()
    if any(s.arguments.keys() != keys for s in shots):
        return None
    joined: dict[str, Any] = {}
    for key in keys:
        values = [s.arguments[key] for s in shots]
        if all(isinstance(v, str) for v in values):
            joined[key] = values
        elif all(isinstance(v, Tensor) and v.ndim and len(v) == 1 for v in values):
            if len({v.shape for v in values}) > 1:
                return None
            joined[key] = torch.cat(values)
        elif all(isinstance(v, int | float | None) and v == values[0] for v in values):
            joined[key] = values[0]
        else:
            return None
    return Shot(shots[0].name, joined, shots[0].seed)
