"""What every calibration has around it: its budget, what it belongs to, its progress."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from accelkit.calibration.journal import Journal
from accelkit.calibration.results import installed
from accelkit.errors import InvalidInputError
from accelkit.patches.call import Site
from accelkit.patches.patch import handle_of
from accelkit.patches.plan import Budget

_known: set[Hashable] = set()
"""What this process has done before."""
NEVER = 2**31 - 1
"""Collections of the middle generation after which the collector looks through everything."""


def as_budget(budget: float | Budget) -> Budget:
    """A budget from a number.

    Raises:
        InvalidInputError: no share between 0 and 1.
    """
    if isinstance(budget, Budget):
        return budget
    if not isinstance(budget, int | float) or not 0 < budget < 1:
        raise InvalidInputError(
            f"budget is {budget!r}; expected a share between 0 and 1, such as 0.02"
        )
    return Budget(max_rel_error=float(budget))


def checked_limit(seconds: float | None) -> float | None:
    """A time limit.

    Raises:
        InvalidInputError: not positive.
    """
    if seconds is not None and (not isinstance(seconds, int | float) or seconds <= 0):
        raise InvalidInputError(
            f"time_limit is {seconds!r}; expected a positive number, in seconds"
        )
    return seconds


def need_preset(preset: str, known: Mapping[str, Any]) -> None:
    """Refuse a name that is no preset.

    Raises:
        InvalidInputError: none of the known ones.
    """
    if not isinstance(preset, str) or preset not in known:
        raise InvalidInputError(f"preset {preset!r} is unknown; expected one of {', '.join(known)}")


def need_unpatched(model: Any, what: str) -> None:
    """Refuse a model, or whatever it is called here, that already runs a plan.

    Raises:
        InvalidInputError: it is patched.
    """
    if handle_of(model) is not None:
        raise InvalidInputError(
            f"the {what} is patched; call its handle's remove() before calibrating"
        )


def weights_digest(models: Iterable[Any]) -> str:
    """A digest of a few numbers of every weight: enough to tell fine-tuned models apart."""
    parts = []
    for model in models:
        for name, p in model.named_parameters():
            if p.is_meta:
                continue  # offloaded; its hook brings it when it is needed
            few = p.detach().reshape(-1)[:64].float().cpu().numpy()
            parts += [name.encode(), few.tobytes()]
    return digest(parts)


def digest(parts: Sequence[bytes]) -> str:
    """Sixteen hexadecimal digits of SHA-256."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()[:16]


def bare(value: Any) -> bytes:
    """A tensor's numbers as they lie in memory, or the text of anything else: what tells it from
    others.
    """
    if not isinstance(value, Tensor):
        return str(value).encode()
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{value.dtype} {tuple(value.shape)} ".encode() + flat.numpy().tobytes()


def version() -> str:
    """accelkit's own."""
    from accelkit import __version__

    return __version__


def producer(*libraries: str) -> dict[str, str | None]:
    """What made a plan."""
    packages = ("torch", "triton", *libraries)
    return {"name": "accelkit", "version": version(), **{p: installed(p) for p in packages}}


@contextmanager
def calm() -> Iterator[None]:
    """Python's collector of cycles looks through young objects only: it takes a third of a second
    to look through all of torch and what a calibration knows, now and then, for hardly anything.
    """
    usual = gc.get_threshold()
    gc.set_threshold(*usual[:2], NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def compile_clock(cached: bool = True) -> AbstractContextManager[Callable[[], float]]:
    """Gives a function that says how many seconds have gone into compiling Triton kernels since,
    and, with `cached`, into reading compiled ones, putting them on the device, and other things
    that a process does once; see `first_use`.
    """
    if find_spec("triton") is None:
        return nullcontext(lambda: 0.0)
    from accelkit.kernels._triton import compiling

    return compiling.clock(cached)


@contextmanager
def first_use(what: Hashable) -> Iterator[bool]:
    """Says whether this process does `what` for the first time. What it does in here then counts as
    compiling: importing modules, and letting libraries load their kernels and find the best ones.
    """
    begin, new = time.monotonic(), what not in _known
    _known.add(what)
    try:
        yield new
    finally:
        if new and find_spec("triton") is not None:
            from accelkit.kernels._triton import compiling

            compiling.count(begin)


def compile_once() -> AbstractContextManager[None]:
    """While it is open, threads that want the same kernel compile it once."""
    if find_spec("triton") is None:
        return nullcontext()
    from accelkit.kernels._triton import compiling

    return compiling.once()


class Stopwatch:
    """Seconds in all and in compiling, with those that a resumed journal has spent before."""

    def __init__(self, book: Journal, begun: float) -> None:
        self.book, self.begun = book, begun
        self.before = book.seconds(), book.compiling()

    def read(self, budget: Budget) -> dict[str, float]:
        """`whole` and `compiling`, kept in the journal for this budget."""
        return self.book.unit(
            f"took/{budget.max_rel_error}",
            lambda: {
                "compiling": round(self.book.compiled() + self.before[1], 2),
                "whole": round(time.monotonic() - self.begun + self.before[0], 2),
            },
        )


def by_stage(book: Journal, stages: Mapping[str, str | tuple[str, ...]]) -> dict[str, float]:
    """Seconds of the units of each stage, by the prefixes of their keys, without compiling."""
    return {
        stage: round(book.seconds(prefix) - book.compiling(prefix), 2)
        for stage, prefix in stages.items()
    }


@dataclass(frozen=True)
class Preset:
    """How much is measured: families kept at a site, settings of each while screening and on long
    prompts, earlier sites whose lists are run at a site, rounds of the end-to-end check, prompts to
    weigh heads on: each way to look something up has heads of its own, which other tasks hardly
    ask.
    """

    families: int
    settings: int
    finest: int
    anchors: int
    rounds: int
    weigh: tuple[str, ...]


@dataclass
class Run:
    """What all stages share: model, sites, journal, time and who is told."""

    model: Any
    device: torch.device
    sites: tuple[Site, ...]
    heads: Mapping[str, int]
    journal: Journal
    preset: Preset
    tell: Callable[[str], None]
    batch: int = 1
    deadline: float | None = None
    begun: float = field(default_factory=time.monotonic)
    skipped: list[str] = field(default_factory=list)
    dense_s: float = 0.0
    """Seconds of a dense run of the longest input, once it is known."""
    most_bytes: int | None = None
    """Memory of a GPU that nothing may exceed, once it is known."""
    trimmed: str | None = None
    """Attention of the last layer where that is computed for the kept rows only; not a site."""
    dense_rows: int = 0
    """Last rows of every prompt that no rule holds for."""

    def ruled(self, tokens: int) -> int:
        """Rows of a prompt that rules hold for."""
        return tokens - self.dense_rows

    def late(self, share: float, what: str, seconds: float = 0.0) -> bool:
        """Whether this share of the time limit is used up, or `what` may take so many seconds that
        it would not end in time; then it is skipped. Part of the journal, for a resumed run must
        skip the same.
        """
        key = f"skipped/{what}"
        spent = time.monotonic() - self.begun
        if key not in self.journal:
            if self.deadline is None or spent < min(share * self.deadline, self.deadline - seconds):
                return False
            self.journal.put(key, True, 0.0)
        if what not in self.skipped:
            self.skipped.append(what)
        return True

    @contextmanager
    def planning(self, what: str) -> Iterator[None]:
        """What is done in here is planning, which no other unit of the journal holds: choosing
        among what was measured.
        """
        key, begin = f"planning/{what}", time.perf_counter()
        yield
        if key not in self.journal:  # a finished journal gives the same plan again
            self.journal.put(key, None, time.perf_counter() - begin)


class Bar:
    """Progress on stderr: on a terminal the stage with the time that is left at most, in a log the
    name of every stage as it begins for the first time.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and os.environ.get("ACCELKIT_PROGRESS") != "0"
        self.told: set[str] = set()

    def __enter__(self) -> Bar:
        from tqdm.auto import tqdm

        self.drawn = self.wanted and sys.stderr.isatty()
        form = "{desc}{percentage:3.0f}% |{bar}| {elapsed} so far, at most {remaining} left"
        self.bar = tqdm(disable=not self.drawn, file=sys.stderr, total=1, bar_format=form)
        return self

    def expect(self, units: int) -> None:
        """The most units that this run can have."""
        self.bar.reset(total=units)

    def tell(self, stage: str) -> None:
        """Another unit of `stage` begins."""
        if self.wanted and not self.drawn and stage not in self.told:
            print(stage, file=sys.stderr, flush=True)
        self.bar.set_description(stage, refresh=stage not in self.told)
        self.told.add(stage)
        self.bar.update()

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
