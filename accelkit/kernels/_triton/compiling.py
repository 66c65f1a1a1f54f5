"""How long this process compiles kernels, as Triton tells it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from triton import knobs


@contextmanager
def clock(cached: bool = True) -> Iterator[Callable[[], float]]:
    """Gives a function that says for how many seconds something was compiled since it was opened;
    kernels that were compiled at once count once. Without `cached` kernels that lay in Triton's
    cache do not count, which are read in no time but not in none.
    """
    spans: list[tuple[float, float]] = []  # apart, ascending
    before = knobs.compilation.listener

    def hear(**compiled: Any) -> None:
        end = time.monotonic()
        begin = end - compiled["times"].total / 1e6
        if cached or not compiled["cache_hit"]:
            with lock:
                while spans and spans[-1][1] > begin:
                    begin = min(begin, spans.pop()[0])
                spans.append((begin, end))
        if before is not None:
            before(**compiled)

    lock = Lock()
    knobs.compilation.listener = hear
    try:
        yield lambda: sum(end - begin for begin, end in spans)
    finally:
        knobs.compilation.listener = before
