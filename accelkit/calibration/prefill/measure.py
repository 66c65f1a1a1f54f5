"""Screening and measuring of candidates, one journal unit each.

Every method meets one short prompt first; at each site a few families survive and are measured on
the long prompts. Which families those are, and whose lists are lent to later sites, follows from
stored units alone, so a resumed run repeats nothing and decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from accelkit.calibration import memory
from accelkit.calibration.candidates import Bench, Family, calibrated_settings, thinned
from accelkit.calibration.capture import See, capture
from accelkit.calibration.evaluation import quality, tasks
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.prefill import loans, prices
from accelkit.calibration.profile import UNIT, profile
from accelkit.calibration.session import Preset, Run
from accelkit.calibration.stages import family_of
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import Partial
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod

DEAR = 0.25
"""Share of dense attention from which a method's own work makes it an unlikely winner."""
PROBE_TOKENS = 512
"""Length of the prompts on which weights are measured."""
PROBED = 8
"""One in so many rows of such a text is looked at, where last rows stay dense."""
PRESETS = {
    "fast": Preset(2, 4, 5, 0, 4, ("variables", "text")),
    "balanced": Preset(4, 5, 7, 2, 5, ("needle", "key_value", "variables", "text")),
    "careful": Preset(5, 6, 8, 4, 5, ("needle", "multi_key", "key_value", "variables", "text")),
}


def dear(run: Run, costs: CostTable, tokens: int) -> set[str]:
    """Methods that are screened with two settings only: their own work takes much of dense
    attention's time, and on a GPU the host takes as long for it on a short prompt as on a long one.
    """
    if run.device.type != "cuda":
        return set()
    whole = {k: np.dot(costs.method_ms(k, tokens), (1, costs.heads)) for k in costs.methods}
    return {k for k, ms in whole.items() if ms > DEAR * costs.dense_ms(tokens)}


def screened(
    run: Run,
    sample: Sample,
    methods: Sequence[AttentionMethod],
    costs: CostTable,
    dear: Collection[str] = (),
) -> dict[str, Any]:
    """Profile of every site, errors of every method on one short prompt, and what its lists took
    there.

    Lists are run, not weighed by the mass that they hold alone: windows hold much of it and still
    miss keys that outputs are made of, so that families chosen by mass made dearer plans, while
    settings that share a launch take no longer to run than their masses take to gather.
    """
    keys = {s.path: f"screen/{s.path}" for s in run.sites}
    rows = judged_rows(run, sample)
    priced = prices.places(list(keys))
    heavy: dict[str, torch.Tensor] = {}
    shelves: dict[Any, dict[Any, Any]] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        site = call.site
        bench = _bench(run, call, dense, rows, shelves)
        tiles = bench.tiles(UNIT[0])[0]
        found, heavy[site.path] = profile(call, dense, tiles, heavy)

        def work() -> dict[str, Any]:
            wanted, _ = calibrated_settings(methods, site, call, dense)
            most = run.preset.settings
            few = [thinned(f, 2 if f.settings[0].kind in dear else most) for f in wanted]
            seen = bench.families(few)
            factors = prices.beside_table(bench, seen, costs) if site.path in priced else {}
            return {"profile": asdict(found), "families": seen, "on_prompt": factors}

        run.tell("screening methods")
        run.journal.unit(keys[site.path], work)

    if any(k not in run.journal for k in keys.values()):
        capture(run.model, sample.ids, see, lambda path: path in keys, run.dense_rows)
    return {path: run.journal[key] for path, key in keys.items()}


def judged_rows(run: Run, sample: Sample) -> np.ndarray:
    """Positions that are judged beside evenly spread ones; none where the last rows, which have
    them, stay dense.
    """
    return np.zeros(0, np.int64) if run.dense_rows else tasks.judged_rows(sample)


def _bench(
    run: Run, call: AttentionCall, dense: Partial, rows: np.ndarray, shelves: dict[Any, Any]
) -> Bench:
    """The bench of a site; all sites of one prompt that have the same shape share a shelf."""
    shelf = shelves.setdefault((call.heads, call.q.shape, call.k.shape, call.v.shape), {})
    room = memory.room(run.device, run.most_bytes)
    return Bench(call, dense, rows, shelf=shelf, batch=run.batch, room=room)


def measured(
    run: Run,
    samples: Sequence[Sample],
    screen: Mapping[str, Any],
    kept_by: Mapping[str, Sequence[Family]],
    narrow: Callable[[dict[str, list[Family]], Mapping[str, Any]], dict[str, list[Family]]],
) -> tuple[dict[str, list[Family]], list[dict[str, Any]]]:
    """Errors of the surviving families on each prompt, and of lists borrowed from earlier sites.

    `narrow(families, units)` says which of them, with the settings that were found worth adding on
    the first prompt, are measured on the others. Returns those and the units by prompt and site.
    """
    out: list[dict[str, Any]] = []
    families = {path: list(some) for path, some in kept_by.items()}
    for n, sample in enumerate(samples):
        what = f"prompt {n + 1} of {len(samples)} ({sample.task}, {len(sample.ids)} tokens)"
        if n and run.late(0.6, what):
            break
        keys = {s.path: f"measure/{n}/{s.path}" for s in run.sites}
        if any(k not in run.journal for k in keys.values()):
            _measure(run, sample, n, keys, screen, families, kept_by)
        out.append({path: run.journal[key] for path, key in keys.items()})
        if not n:
            for path, unit in out[0].items():
                families[path] = [family_of(k, v) for k, v in unit["families"].items()]
            if len(samples) > 1:
                families = narrow(families, out[0])
    return families, out


def further(
    run: Run,
    sample: Sample,
    prefix: str,
    screen: Mapping[str, Any],
    families: Mapping[str, Sequence[Family]],
    kept_by: Mapping[str, Sequence[Family]],
) -> dict[str, Any]:
    """One more prompt measured as the others were, by site; journal units begin with `prefix`."""
    keys = {s.path: f"{prefix}{s.path}" for s in run.sites}
    if any(k not in run.journal for k in keys.values()):
        _measure(run, sample, 1, keys, screen, families, kept_by)
    return {path: run.journal[key] for path, key in keys.items()}


def _measure(
    run: Run,
    sample: Sample,
    n: int,
    keys: Mapping[str, str],
    screen: Mapping[str, Any],
    families: Mapping[str, Sequence[Family]],
    kept_by: Mapping[str, Sequence[Family]],
) -> None:
    rows = judged_rows(run, sample)
    order = [s.path for s in run.sites]
    waiting = [p for p in order if keys[p] not in run.journal]
    lenders = _lenders(run, order[: order.index(waiting[-1])], n, screen, families, kept_by)
    # Settings between those of the dial are chosen on the first prompt and kept.
    finest = 0 if n else run.preset.finest
    offers: dict[str, loans.Offer] = {}
    shelves: dict[Any, dict[Any, Any]] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        path = call.site.path
        bench = _bench(run, call, dense, rows, shelves)

        def work() -> dict[str, Any]:
            found = bench.families(families[path], finest)
            if n:
                maps = {x["anchor"]: x["heads"] for x in run.journal[f"measure/0/{path}"]["loans"]}
            else:
                maps = loans.promising(bench, offers, run.preset.anchors)
            return {"families": found, "loans": loans.measured(bench, offers, maps)}

        run.tell(f"measuring, prompt {n + 1}")
        run.journal.unit(keys[path], work)
        offer = loans.offered(bench, lenders[path]) if path in lenders else None
        if offer is not None:
            offers[path] = offer

    needed = {*waiting, *lenders}
    capture(run.model, sample.ids, see, lambda path: path in needed, run.dense_rows)


def _lenders(
    run: Run,
    earlier: Sequence[str],
    n: int,
    screen: Mapping[str, Any],
    families: Mapping[str, Sequence[Family]],
    kept_by: Mapping[str, Sequence[Family]],
) -> dict[str, loans.Lender]:
    """Sites that lend on prompt `n`: all that can on the first one, later those that were worth
    running there.
    """
    if not run.preset.anchors:
        return {}
    wanted = set(earlier)
    if n:
        first = [run.journal[f"measure/0/{s.path}"] for s in run.sites]
        wanted = {x["anchor"] for unit in first for x in unit["loans"]}
    found = {p: loans.lender(screen[p], kept_by[p], families[p]) for p in earlier if p in wanted}
    return {path: one for path, one in found.items() if one is not None}


def probe_of(run: Run, sample: Sample) -> Callable[[Sequence[str]], quality.Show]:
    """A short prompt on which weights are measured: last hidden states at its scored rows. Where
    last rows stay dense, these are among them, with the question before them, and few of a text.
    """
    tokens, dense_rows = len(sample.ids), 0
    scored = tasks.scored_rows(sample)
    if run.dense_rows:
        scored = tasks.scored_rows(sample, tokens // PROBED)
        dense_rows = min(tokens - 1, tokens - int(scored[0]) + tasks.QUESTION)
    rows = torch.from_numpy(scored)

    def probe(places: Sequence[str]) -> quality.Show:
        def show(copies: int, see: See) -> torch.Tensor:
            ids = np.repeat(sample.ids[None], copies, 0)
            found = capture(run.model, ids, see, lambda path: path in places, dense_rows)
            return found[:, rows]

        return show

    return probe
