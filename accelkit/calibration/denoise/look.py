"""What a pipeline calls, when and how often.

A place is a site during a bucket, a share of the denoising steps: what is measured and planned
apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Enough, Settings
from accelkit.calibration.session import Run
from accelkit.errors import NothingPatchedError
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall, Geometry, Span

EDGES = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Where buckets begin and end; what early steps decide, later ones cannot mend."""
SMALL = 512
"""Tokens that the small geometry has at least, if the whole one has them."""


@dataclass(frozen=True)
class Look:
    """What a dense run at the small geometry calls: steps of each place, calls of each place,
    branches, and the denoising steps in all.
    """

    settings: Settings
    total: int
    tokens: int
    branches: tuple[str, ...]
    steps: Mapping[str, Sequence[int]]
    calls: Mapping[str, int]

    @property
    def places(self) -> list[str]:
        """Buckets one after the other, sites in running order."""
        return sorted(self.steps, key=lambda p: bucket_of(p))


def buckets(total: int) -> tuple[tuple[float, float], ...]:
    """The shares of `total` steps that are planned apart; a share without a step joins the one
    before it.
    """
    starts = [e for e, end in pairwise(EDGES) if _within(e, end, total)]
    return tuple(zip(starts, [*starts[1:], 1.0], strict=True))


def _within(low: float, high: float, total: int) -> list[int]:
    return [s for s in range(total) if low <= s / total < high]


def scaled(step: int, of: int, total: int) -> int:
    """The step of `total` that stands where `step` of `of` stands."""
    return min(int((step + 0.5) * total / of), total - 1)


def place_of(site: str, bucket: int) -> str:
    return f"{site}@{bucket}"


def site_of(place: str) -> str:
    return place.rpartition("@")[0]


def bucket_of(place: str) -> int:
    return int(place.rpartition("@")[2])


def look(run: Run, settings: Settings, shot: Shot) -> Look:
    """A dense run at the smallest geometry that the pipeline takes. Raises `NothingPatchedError`
    where no self- or joint-attention is called.
    """

    def work() -> dict[str, Any]:
        sizes = settings.filled(run.model).smaller()
        for small in sizes:
            try:
                tokens = max(glance(run.model, small, shot)["tokens"].values(), default=0)
            except (ValueError, RuntimeError):
                continue  # not a size of this pipeline's
            if tokens >= SMALL:
                break
        else:
            small = settings
        seen: dict[tuple[str, int], int] = Counter()
        facts: dict[str, Any] = {"tokens": 0, "total": 1, "branches": []}

        def visit(call: AttentionCall) -> None:
            seen[call.site.path, call.clock.step] += 1
            facts["tokens"] = max(facts["tokens"], call.n_k)
            facts["total"] = call.clock.total
            if call.clock.branch not in facts["branches"]:
                facts["branches"].append(call.clock.branch)

        with watch(run.model, visit):
            video.run(run.model, small, shot)
        if not seen:
            raise NothingPatchedError(
                f"{type(run.model).__name__}: no self- or joint-attention was called"
            )
        return {**facts, "settings": vars(small), "seen": [[*k, n] for k, n in seen.items()]}

    run.tell("looking at the pipeline")
    found = run.journal.unit("look", work)
    shares = buckets(found["total"])
    steps: dict[str, list[int]] = {}
    calls: dict[str, int] = Counter()
    for site, step, n in found["seen"]:
        at = step / found["total"]
        bucket = next(b for b, (low, high) in enumerate(shares) if low <= at < high)
        steps.setdefault(place_of(site, bucket), []).append(step)
        calls[place_of(site, bucket)] += n
    return Look(
        Settings(**found["settings"]), found["total"], found["tokens"],
        tuple(found["branches"]), steps, calls,
    )  # fmt: skip


def glance(pipe: Any, settings: Settings, shot: Shot) -> dict[str, Any]:
    """Tokens of each site, grid, spans and batch in a run's first forward; the run ends there."""
    tokens: dict[str, int] = {}
    seen: list[Geometry] = []
    last, batch = (-1, -1), 1

    def visit(call: AttentionCall) -> None:
        nonlocal last, batch
        place = (call.site.order, call.ordinal)
        if place <= last:
            raise Enough
        last, batch = place, call.q.shape[0]
        tokens[call.site.path] = call.n_k
        if not seen or call.n_k == max(tokens.values()):
            seen[:] = [call.geometry]

    with watch(pipe, visit):
        video.begin(pipe, settings, shot)
    if not seen:
        return {"tokens": {}, "grid": None, "spans": [], "batch": 1}
    spans = [[s.kind, s.start, s.stop] for s in seen[0].spans]
    return {"tokens": tokens, "grid": seen[0].grid, "spans": spans, "batch": batch}


def geometry_of(glanced: Mapping[str, Any]) -> Geometry:
    """The geometry that `glance` noted."""
    grid = glanced["grid"]
    return Geometry(tuple(Span(*s) for s in glanced["spans"]), tuple(grid) if grid else None)
