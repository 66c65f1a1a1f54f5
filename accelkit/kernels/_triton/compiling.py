"""How long this process compiles kernels, as Triton tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton import knobs


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    """Gives a function that says how many seconds have gone into compiling since it was opened."""
    spent, before = 0.0, knobs.compilation.listener

    def hear(**compiled: Any) -> None:
        nonlocal spent
        spent += compiled["times"].total / 1e6
        if before is not None:
            before(**compiled)

    knobs.compilation.listener = hear
    try:
        yield lambda: spent
    finally:
        knobs.compilation.listener = before
