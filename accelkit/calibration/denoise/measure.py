"""The measuring half of a pipeline's calibration.

One dense run of each prompt shows every place twice: methods are screened early in a bucket, the
best families measured some steps later.
"""

from __future__ import annotations

import time
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration.candidates import (
    Bench,
    Family,
    arithmetic_only,
    calibrated_settings,
    for_call,
    prime,
    thinned,
)
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.look import Look, bucket_of, scaled, site_of
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Enough, Settings
from accelkit.calibration.profile import UNIT, profile
from accelkit.calibration.session import Run
from accelkit.calibration.stages import family_of, kept
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
"""Steps that are run between the two looks at a place, at most."""
PART = (4, 6)
"""One in so many steps is run, for the first prompt and for further ones."""
LEAST_STEPS = 8
SCREENED = 12
"""Most places at which every method is tried, but for those of small models."""
FEW = 40
"""So many places are all screened, on every prompt; of more, further prompts look at those that
were screened.
"""
EXACT = (0.01,)
"""Errors of a head at which one family must be good: small budgets have no use for others."""
FEW_EXACT = 3
"""Settings of that family."""
MOST_PRIMED = 2
"""Settings of a method that lives over several steps: each holds memory between the looks."""
ALIKE = 1.1
"""Arithmetic of all pairs that takes at most this multiple of the fastest is compared by error."""
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
    """Dense runs of the prompts; the first one also screens. Runs have a part of the steps and end
    behind the last one that is looked at.
    """
    screen: dict[str, Any] = {}
    families: dict[str, list[Family]] = {}
    units: list[dict[str, Any]] = []
    shelf: dict[Any, Any] = {}
    for n, shot in enumerate(shots):
        if n and run.late(0.6, f"prompt {n + 1} of {len(shots)}"):
            break
        keys = {p: f"measure/{n}/{p}" for p in looked_at(seen.places, n)}
        if any(k not in run.journal for k in keys.values()):
            _DenseRun(run, seen, n, methods, costs, tokens, shelf).go(settings, shot)
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


class _DenseRun:
    """One dense run of the n-th prompt in few of the steps: early and late are the same shares of
    them. `shelf` is that of all runs, for they have one geometry.
    """

    def __init__(
        self,
        run: Run,
        seen: Look,
        n: int,
        methods: Sequence[AttentionMethod],
        costs: CostTable,
        tokens: int,
        shelf: dict[Any, Any],
    ) -> None:
        self.run, self.n, self.methods, self.costs, self.tokens = run, n, methods, costs, tokens
        self.shelf = shelf
        self.total = min(seen.total, max(LEAST_STEPS, seen.total // PART[min(n, 1)]))
        self.branch = seen.branches[n % len(seen.branches)]
        self.of = seen.total
        self.stands_for = screened_by(seen.places)
        self.late = {
            p: scaled(s[len(s) // 2], seen.total, self.total) for p, s in seen.steps.items()
        }
        self.early = {
            p: max(scaled(s[0], seen.total, self.total), self.late[p] - GAP)
            for p, s in seen.steps.items()
        }
        self.steps = {p: len(s) for p, s in seen.steps.items()}
        self.looks: dict[tuple[str, int], list[str]] = {}
        for places in (self.early, self.late):
            for p in looked_at(seen.places, n):
                # Further prompts look where the first one did.
                if not n or f"measure/0/{p}" in run.journal:
                    self.looks.setdefault((site_of(p), places[p]), []).append(p)
        self.heavy: dict[int, dict[str, Tensor]] = {}
        self.begun: dict[str, _Begun] = {}

    def go(self, settings: Settings, shot: Shot) -> None:
        """Run it; it ends behind the last look."""
        step, last = 0, max(step for _, step in self.looks)

        def visit(call: AttentionCall) -> Tensor | None:
            wanted = call.clock.branch == self.branch and call.ordinal == 0
            if not wanted or (call.site.path, step) not in self.looks:
                return None
            dense = dense_attention(call)
            for place in dict.fromkeys(self.looks[call.site.path, step]):
                if step == self.early[place]:
                    self.begun[place] = self.first(place, call, dense)
                if step == self.late[place]:
                    self.second(place, call, dense, self.begun.pop(place))
            return dense.out

        def each(done: int, latents: Tensor) -> None:
            nonlocal step
            step = done + 1
            if done >= last:
                raise Enough

        book = self.run.journal

        def elapsed() -> tuple[float, float]:  # beside the looks, which are units of their own
            return time.perf_counter() - book.seconds(), book.compiled() - book.compiling()

        begin = elapsed()
        with watch(self.run.model, visit):
            size = replace(settings, num_inference_steps=self.total)
            take = video.run(self.run.model, size, shot, each=each)
        took = [b - a for a, b in zip(begin, elapsed(), strict=True)]
        book.put(f"run/{self.n}", {"steps": last + 1}, *took)
        if "measure/step" not in book:
            # Steps without a look tell how long one takes; without any, the fastest does.
            spent = np.diff([0.0, *take.ends]).tolist()
            looked = {s for _, s in self.looks}
            free = [t for i, t in enumerate(spent) if i and i not in looked]
            book.put("measure/step", float(np.median(free)) if free else min(spent), 0.0)

    def gap(self, place: str) -> int:
        """How many of all steps lie between the two looks at a place."""
        return (self.late[place] - self.early[place]) * self.of // self.total

    def first(self, place: str, call: AttentionCall, dense: Partial) -> _Begun:
        """Screen the methods on the first prompt, and begin what lives over several steps."""
        book, suffix = self.run.journal, f"_{bucket_of(place)}"
        if self.n:
            earlier = book[f"measure/0/{place}"]
            families = [family_of(k, v) for k, v in earlier["families"].items()]
            tables = _unpacked(earlier["tables"])
        else:
            key = f"screen/{self.stands_for[place]}"
            if self.stands_for[place] == place:
                if self.methods:
                    self.run.tell("screening methods")
                book.unit(key, partial(self._screen, place, call, dense, suffix))
            families = self.worth(place, book[key]["families"])
            kinds = {f.settings[0].kind for f in families}
            some = [m for m in self.methods if m.kind in kinds]
            _, tables = calibrated_settings(some, call.site, call, dense, suffix)
        return _begin(families, replace(call, tables=tables, memory={}))

    def worth(self, place: str, screened: Mapping[str, Any]) -> list[Family]:
        """The families that are worth measuring: the best ones, the best where errors must be
        small, arithmetic that computes every pair, and the best of those that live over several
        steps.
        """
        best = partial(
            kept, costs=self.costs, tokens=self.tokens, screened_on=self.tokens,
        )  # fmt: skip
        lasting = {k: v for k, v in screened.items() if _renews(family_of(k, v))}
        # What is a little faster in fewer bits tips results over that the others do not.
        whole = {k: v for k, v in screened.items() if arithmetic_only(family_of(k, v).settings[0])}
        rest = {k: v for k, v in screened.items() if k not in lasting and k not in whole}
        others = {"families": rest}
        found = best(others, most=max(1, self.run.preset.families - 1))
        exact = best(others, most=1, tolerances=EXACT)
        found += [thinned(f, FEW_EXACT) for f in exact if f.name not in {g.name for g in found}]
        found += [family_of(k, whole[k]) for k in _most_exact(whole)]
        if self.early[place] == self.late[place]:
            return found  # nothing says what a memory is worth some steps later
        return found + best({"families": lasting}, most=1)

    def _screen(
        self, place: str, call: AttentionCall, dense: Partial, suffix: str
    ) -> dict[str, Any]:
        wanted, tables = calibrated_settings(self.methods, call.site, call, dense, suffix)
        there = replace(call, tables=tables, memory={})
        bench = Bench(there, dense, NO_ROWS, shelf=self.shelf, steps=self.steps[place])
        alike = self.heavy.setdefault(bucket_of(place), {})
        found, alike[call.site.path] = profile(call, dense, bench.tiles(UNIT[0])[0], alike)
        few = [thinned(f, self.run.preset.settings) for f in wanted]
        rows = {f.name: bench.family(f, len(f.settings)) for f in few}
        return {"profile": asdict(found), "families": _without_none(rows)}

    def second(self, place: str, call: AttentionCall, dense: Partial, then: _Begun) -> None:
        """Measure the best families; those that live over several steps with what they began."""
        there = replace(call, tables=then.tables, memory={})
        fresh = Bench(there, dense, NO_ROWS, shelf=self.shelf)
        later = Bench(
            replace(there, memory=then.memory), dense, NO_ROWS, primed=True,
            steps=self.steps[place],
        )  # fmt: skip
        finest = 0 if self.n else self.run.preset.finest

        def work() -> dict[str, Any]:
            rows = {
                f.name: later.family(f, 0) if _renews(f) else fresh.family(f, finest)
                for f in then.families
            }
            return {
                "families": _without_none(rows),
                "loans": [],
                "lists": _aged(fresh, then, self.gap(place)),
                "tables": _packed(then.tables, then.families),
            }

        self.run.tell(f"measuring, prompt {self.n + 1}")
        self.run.journal.unit(f"measure/{self.n}/{place}", work)


def _without_none(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in rows.items() if v is not None}


def screened_by(places: Sequence[str]) -> dict[str, str]:
    """The place whose screening counts for each: its own where places are few, else that of the
    nearest earlier site of the same bucket among some evenly spread.
    """
    every = 1 if len(places) <= FEW else -(-len(places) // SCREENED)
    found: dict[str, str] = {}
    for bucket in {bucket_of(p) for p in places}:
        mine = [p for p in places if bucket_of(p) == bucket]
        found |= {p: mine[i // every * every] for i, p in enumerate(mine)}
    return found


def looked_at(places: Sequence[str], prompt: int) -> list[str]:
    """The places that a prompt measures."""
    by = screened_by(places)
    return [p for p in places if not prompt or by[p] == p]


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


def _most_exact(whole: Mapping[str, Any]) -> list[str]:
    """Of arithmetic that computes every pair and is about as fast as the fastest, that whose worst
    head has the least error; none of none.
    """
    fast = [k for k, v in whole.items() if v["ms"][0] is not None]
    least = min((whole[k]["ms"][0] for k in fast), default=0.0)
    near = [k for k in fast if whole[k]["ms"][0] <= ALIKE * least]
    return sorted(near, key=lambda k: max(whole[k]["error"][0]))[:1]


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
