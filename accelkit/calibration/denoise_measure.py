"""The measuring half of a pipeline's calibration: what is called when, and candidates.

A place is a site during a bucket, a share of the denoising steps. One dense run of each prompt
shows every place once or twice: methods are screened early in a bucket, the best families measured
late in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from accelkit.calibration import video
from accelkit.calibration.candidates import Bench, Family, calibrated_settings, thinned
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.measure import Run, family_of, kept
from accelkit.calibration.profile import UNIT, profile
from accelkit.calibration.video import Enough, Settings, Shot
from accelkit.errors import NothingPatchedError
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall, Geometry, Span
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import Answer, answer, in_kernel_order

EDGES = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Where buckets begin and end; what early steps decide, later ones cannot mend."""
SMALL = 512
"""Tokens that the small geometry has at least, if the whole one has them."""
STATIC = 0.95
"""Lists that still hold this share of the mass that fresh ones hold may be kept for some steps."""
NO_ROWS = np.zeros(0, dtype=np.int64)


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


def place_of(site: str, bucket: int) -> str:
    return f"{site}@{bucket}"


def site_of(place: str) -> str:
    return place.rpartition("@")[0]


def bucket_of(place: str) -> int:
    return int(place.rpartition("@")[2])


def look(run: Run, settings: Settings, shot: Shot) -> Look:
    """A dense run at the smallest geometry that the pipeline takes."""

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
    last, batch = -1, 1

    def visit(call: AttentionCall) -> None:
        nonlocal last, batch
        if call.site.order <= last:
            raise Enough
        last, batch = call.site.order, call.q.shape[0]
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


# -- candidates -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurements:
    """By place: families, records of the screening and the units of each prompt; and, by site, for
    how many computed steps lists stay good.
    """

    families: dict[str, list[Family]]
    screen: dict[str, Any]
    units: list[dict[str, Any]]
    refresh: dict[str, int]
    step_seconds: float


def measured(
    run: Run,
    seen: Look,
    settings: Settings,
    shots: Sequence[Shot],
    methods: Sequence[AttentionMethod],
    costs: CostTable,
    tokens: int,
) -> Measurements:
    """Dense runs of the prompts; the first one also screens. Runs have at most half of the steps
    and end behind the last one that is looked at.
    """
    screen: dict[str, Any] = {}
    families: dict[str, list[Family]] = {}
    units: list[dict[str, Any]] = []
    for n, shot in enumerate(shots):
        if n and run.late(0.6, f"prompt {n + 1} of {len(shots)}"):
            break
        keys = {p: f"measure/{n}/{p}" for p in seen.places}
        if any(k not in run.journal for k in keys.values()):
            _measure(run, seen, settings, shot, n, methods, costs, tokens)
        units.append({p: run.journal[k] for p, k in keys.items() if k in run.journal})
        if not n:
            screen = {p: run.journal[f"screen/{p}"] for p in units[0]}
            for place, unit in units[0].items():
                families[place] = [family_of(k, v) for k, v in unit["families"].items()]
    refresh: dict[str, int] = {}
    for place, unit in units[0].items():
        site, gap = site_of(place), unit["lists"]["good_for"]
        refresh[site] = min(refresh.get(site, gap), gap)
    return Measurements(families, screen, units, refresh, run.journal["measure/step"])


def _measure(
    run: Run,
    seen: Look,
    settings: Settings,
    shot: Shot,
    n: int,
    methods: Sequence[AttentionMethod],
    costs: CostTable,
    tokens: int,
) -> None:
    total = min(seen.total, max(8, seen.total // 2))
    branch = seen.branches[n % len(seen.branches)]
    finest = 0 if n else run.preset.finest
    early = {p: _scaled(s[len(s) // 4], seen.total, total) for p, s in seen.steps.items()}
    late = {p: _scaled(s[3 * len(s) // 4], seen.total, total) for p, s in seen.steps.items()}
    last, step = max(late.values()), 0
    heavy: dict[str, dict[str, Tensor]] = {}
    old: dict[str, tuple[AttentionMethod, tuple[Answer, ...]]] = {}
    by_step: dict[tuple[str, int], list[str]] = {}
    for places in (early, late):
        for p, s in places.items():
            by_step.setdefault((site_of(p), s), []).append(p)

    def see(call: AttentionCall, dense: Partial) -> None:
        bench = Bench(call, dense, NO_ROWS)
        for place in dict.fromkeys(by_step[call.site.path, step]):
            if step == early[place] and not n:
                first(place, bench)
            if step == late[place]:
                second(place, bench)

    def first(place: str, bench: Bench) -> None:
        call, dense = bench.call, bench.dense
        alike = heavy.setdefault(str(bucket_of(place)), {})
        found, alike[call.site.path] = profile(call, dense, bench.tiles(UNIT[0])[0], alike)

        def work() -> dict[str, Any]:
            wanted = calibrated_settings(methods, call.site, call, dense)
            few = [thinned(f, run.preset.settings) for f in wanted]
            rows = {f.name: bench.family(f, len(f.settings)) for f in few}
            return {
                "profile": asdict(found),
                "families": {k: v for k, v in rows.items() if v is not None},
            }

        run.tell(f"screening {len(methods)} methods")
        record = run.journal.unit(f"screen/{place}", work)
        best = kept(record, costs, tokens, tokens, 1)
        if best:
            method = best[0].settings[len(best[0].settings) // 2]
            answers = answer(call, Policy(methods=(method,)))
            if answers is not None:
                old[place] = (method, answers)

    def second(place: str, bench: Bench) -> None:
        record = run.journal[f"screen/{place}"]
        if n:
            earlier = run.journal[f"measure/0/{place}"]["families"]
            families = [family_of(k, v) for k, v in earlier.items()]
        else:
            families = kept(record, costs, tokens, tokens, run.preset.families)

        def work() -> dict[str, Any]:
            rows = {f.name: bench.family(f, finest) for f in families}
            return {
                "families": {k: v for k, v in rows.items() if v is not None},
                "loans": [],
                "lists": _aged(bench, old.get(place), late[place] - early[place]),
            }

        run.tell(f"measuring, prompt {n + 1}")
        run.journal.unit(f"measure/{n}/{place}", work)

    def visit(call: AttentionCall) -> Tensor | None:
        if call.clock.branch != branch or (call.site.path, step) not in by_step:
            return None
        dense = dense_attention(call)
        see(call, dense)
        return dense.out

    def each(done: int, latents: Tensor) -> None:
        nonlocal step
        step = done + 1
        if done >= last:
            raise Enough

    begin = time.perf_counter()
    with watch(run.model, visit):
        shorter = Settings(**{**vars(settings), "num_inference_steps": total})
        take = video.run(run.model, shorter, shot, each=each)
    run.journal.put(f"run/{n}", {"steps": last + 1}, time.perf_counter() - begin)
    # Steps at which nothing was looked at tell how long one takes; without any, the fastest does.
    spent = np.diff([0.0, *take.ends])
    looked = {s for _, s in by_step}
    free = [float(t) for i, t in enumerate(spent) if i and i not in looked]
    if "measure/step" not in run.journal:
        run.journal.put("measure/step", float(np.median(free)) if free else float(min(spent)), 0.0)


def _scaled(step: int, of: int, total: int) -> int:
    return min(int((step + 0.5) * total / of), total - 1)


def _aged(
    bench: Bench, old: tuple[AttentionMethod, tuple[Answer, ...]] | None, gap: int
) -> dict[str, Any]:
    """Whether lists made some steps ago still hold the mass that fresh ones hold, by the captured
    mass exp(LSE_sparse − LSE_full); `good_for` is the number of steps that was tried, or one.
    """
    if old is None or gap < 1:
        return {"good_for": 1}
    method, answers = old
    fresh = answer(bench.call, Policy(methods=(method,)))
    if fresh is None:
        return {"good_for": 1}
    aged = tuple(
        replace(a, call=c if a.order is None else in_kernel_order(c, a.order))
        for a in answers
        for c in [bench.call.take(a.call.heads)]
    )
    now, then = bench.measure(fresh)["recall"], bench.measure(aged)["recall"]
    share = min(b / max(a, 1e-6) for a, b in zip(now, then, strict=True))
    return {"good_for": gap if share >= STATIC else 1, "share": round(share, 4), "gap": gap}
