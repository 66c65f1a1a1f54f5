"""The measuring half of a pipeline's calibration.

One dense run of each prompt shows every place twice: methods are screened early in a bucket, the
best families measured some steps later.
"""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration import video
from accelkit.calibration.candidates import (
    Bench,
    Family,
    calibrated_settings,
    for_call,
    prime,
    thinned,
)
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.denoise_look import Look, bucket_of, scaled, site_of
from accelkit.calibration.measure import Run, family_of, kept
from accelkit.calibration.profile import UNIT, profile
from accelkit.calibration.video import Enough, Settings, Shot
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import Answer, answer

STATIC = 0.95
"""Lists that still hold this share of the mass that fresh ones hold may be kept for some steps."""
GAP = 3
"""Steps between the two looks at a place."""
SCREENED = 40
"""Most places at which every method is tried."""
MOST_PRIMED = 2
"""Settings of a method that lives over several steps: each holds memory between the looks."""
NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Measurements:
    """By place: families, records of the screening, the units of each prompt and side tensors; and,
    by site, for how many computed steps lists stay good.
    """

    families: dict[str, list[Family]]
    screen: dict[str, Any]
    units: list[dict[str, Any]]
    tables: dict[str, dict[str, Tensor]]
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
    """Dense runs of the prompts; the first one also screens. Runs have half or a quarter of the
    steps and end behind the last one that is looked at.
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
            by = screened_by(seen.places)
            screen = {p: run.journal[f"screen/{by[p]}"] for p in units[0]}
            for place, unit in units[0].items():
                families[place] = [family_of(k, v) for k, v in unit["families"].items()]
    refresh: dict[str, int] = {}
    for place, unit in units[0].items():
        site, gap = site_of(place), unit["lists"]["good_for"]
        refresh[site] = min(refresh.get(site, gap), gap)
    tables = {p: _unpacked(unit["tables"]) for p, unit in units[0].items()}
    return Measurements(families, screen, units, tables, refresh, run.journal["measure/step"])


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
    # The first prompt in half of the steps, further ones in a quarter: early and late are the same
    # shares of them.
    total = min(seen.total, max(8, seen.total // (4 if n else 2)))
    branch = seen.branches[n % len(seen.branches)]
    finest = 0 if n else run.preset.finest
    late = {p: scaled(s[len(s) // 2], seen.total, total) for p, s in seen.steps.items()}
    early = {p: max(scaled(s[0], seen.total, total), late[p] - GAP) for p, s in seen.steps.items()}
    stands_for = screened_by(seen.places)
    last, step = max(late.values()), 0
    heavy: dict[int, dict[str, Tensor]] = {}
    begun: dict[str, _Begun] = {}
    shelf: dict[Any, Any] = {}
    by_step: dict[tuple[str, int], list[str]] = {}
    for places in (early, late):
        for p, s in places.items():
            by_step.setdefault((site_of(p), s), []).append(p)

    def see(call: AttentionCall, dense: Partial) -> None:
        for place in dict.fromkeys(by_step[call.site.path, step]):
            if step == early[place]:
                begun[place] = first(place, call, dense)
            if step == late[place]:
                second(place, call, dense, begun.pop(place))

    def first(place: str, call: AttentionCall, dense: Partial) -> _Begun:
        """Screen the methods on the first prompt, and begin what lives over several steps."""
        if n:
            earlier = run.journal[f"measure/0/{place}"]
            families = [family_of(k, v) for k, v in earlier["families"].items()]
            tables = _unpacked(earlier["tables"])
            return _begin(families, replace(call, tables=tables, memory={}))
        key, suffix = f"screen/{stands_for[place]}", f"_{bucket_of(place)}"
        tables = {}
        if stands_for[place] == place:

            def work() -> dict[str, Any]:
                wanted, mine = calibrated_settings(methods, call.site, call, dense, suffix)
                tables.update(mine)
                there = replace(call, tables=mine, memory={})
                bench = Bench(there, dense, NO_ROWS, shelf=shelf)
                alike = heavy.setdefault(bucket_of(place), {})
                found, mask = profile(call, dense, bench.tiles(UNIT[0])[0], alike)
                alike[call.site.path] = mask
                few = [thinned(f, run.preset.settings) for f in wanted]
                rows = {f.name: bench.family(f, len(f.settings)) for f in few}
                return {
                    "profile": asdict(found),
                    "families": {k: v for k, v in rows.items() if v is not None},
                }

            run.tell(f"screening {len(methods)} methods")
            run.journal.unit(key, work)
        families = kept(run.journal[key], costs, tokens, tokens, run.preset.families)
        kinds = {f.settings[0].kind for f in families}
        some = [m for m in methods if m.kind in kinds]
        if not tables:
            _, tables = calibrated_settings(some, call.site, call, dense, suffix)
        return _begin(families, replace(call, tables=tables, memory={}))

    def second(place: str, call: AttentionCall, dense: Partial, then: _Begun) -> None:
        there = replace(call, tables=then.tables, memory={})
        fresh = Bench(there, dense, NO_ROWS, shelf=shelf)
        later = Bench(replace(there, memory=then.memory), dense, NO_ROWS, primed=True)

        def work() -> dict[str, Any]:
            rows = {
                f.name: (later if _renews(f) else fresh).family(f, 0 if _renews(f) else finest)
                for f in then.families
            }
            return {
                "families": {k: v for k, v in rows.items() if v is not None},
                "loans": [],
                "lists": _aged(fresh, then, late[place] - early[place]),
                "tables": _packed(then.tables, then.families),
            }

        run.tell(f"measuring, prompt {n + 1}")
        run.journal.unit(f"measure/{n}/{place}", work)

    def visit(call: AttentionCall) -> Tensor | None:
        here = call.clock.branch == branch and call.ordinal == 0
        if not here or (call.site.path, step) not in by_step:
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


def screened_by(places: Sequence[str]) -> dict[str, str]:
    """The place whose screening counts for each: its own where places are few, else that of the
    nearest earlier site of the same bucket among some evenly spread.
    """
    every = -(-len(places) // SCREENED)
    found: dict[str, str] = {}
    for bucket in {bucket_of(p) for p in places}:
        mine = [p for p in places if bucket_of(p) == bucket]
        found |= {p: mine[i // every * every] for i, p in enumerate(mine)}
    return found


@dataclass(frozen=True)
class _Begun:
    """What an earlier step of a bucket leaves to the later one: the families that are worth it, the
    memory of those that live over several steps, and the lists of the best one.
    """

    families: list[Family]
    tables: dict[str, Tensor]
    memory: dict[str, Any]
    best: AttentionMethod | None
    lists: tuple[Answer, ...]


def _renews(family: Family) -> bool:
    return family.settings[0].renewed(2) > 0


def _begin(families: Sequence[Family], call: AttentionCall) -> _Begun:
    few = [thinned(f, MOST_PRIMED) if _renews(f) else f for f in families]
    for family in few:
        for method in family.settings if _renews(family) else ():
            prime(answer(call, Policy(methods=(method,))) or ())
    plain = next((f for f in few if not _renews(f) and not f.settings[0].static), None)
    best = plain.settings[len(plain.settings) // 2] if plain else None
    lists = answer(call, Policy(methods=(best,))) if best else None
    return _Begun(few, dict(call.tables), call.memory, best, lists or ())


def _aged(bench: Bench, then: _Begun, gap: int) -> dict[str, Any]:
    """Whether lists made some steps ago still hold the mass that fresh ones hold, by the captured
    mass exp(LSE_sparse − LSE_full); `good_for` is the number of steps that was tried, or one.
    """
    fresh = answer(bench.call, Policy(methods=(then.best,))) if then.best else None
    if fresh is None or not then.lists or gap < 1:
        return {"good_for": 1}
    aged = tuple(for_call(a, bench.call) for a in then.lists)
    now, before = bench.measure(fresh)["recall"], bench.measure(aged)["recall"]
    share = min(b / max(a, 1e-6) for a, b in zip(now, before, strict=True))
    return {"good_for": gap if share >= STATIC else 1, "share": round(share, 4), "gap": gap}


def _packed(tables: Mapping[str, Tensor], families: Sequence[Family]) -> dict[str, Any]:
    """The side tensors that some setting reads, as text for the journal."""
    read = {v for f in families for m in f.settings for _, v in m if isinstance(v, str)}
    return {
        name: {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "data": b64encode(t.cpu().contiguous().numpy().tobytes()).decode(),
        }
        for name, t in tables.items()
        if name in read
    }


def _unpacked(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, t in packed.items():
        flat = torch.frombuffer(bytearray(b64decode(t["data"])), dtype=getattr(torch, t["dtype"]))
        found[name] = flat.reshape(t["shape"])
    return found
