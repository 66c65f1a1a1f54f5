"""Screening and measuring of candidates, one journal unit each.

Every method meets one short prompt first; at each site a few families survive and are measured on
the long prompts. Which families those are, and whose lists are lent to later sites, follows from
stored units alone, so a resumed run repeats nothing and decides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from accelkit.calibration.candidates import (
    REUSE_UNIT,
    Bench,
    Family,
    calibrated_settings,
    stored,
    thinned,
)
from accelkit.calibration.capture import See, capture
from accelkit.calibration.evaluation import quality, tasks
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.profile import UNIT, profile
from accelkit.calibration.session import Preset, Run
from accelkit.calibration.stages import family_of
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import answer

LENDABLE = 0.15
"""Error up to which a head's lists are worth lending."""
DEAR = 0.25
"""Share of dense attention from which a method's own work makes it an unlikely winner."""
PROBE_TOKENS = 512
"""Length of the prompts on which weights are measured."""
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
    run: Run, sample: Sample, methods: Sequence[AttentionMethod], dear: Collection[str] = ()
) -> dict[str, Any]:
    """Profile of every site and errors of every method on one short prompt."""
    keys = {s.path: f"screen/{s.path}" for s in run.sites}
    rows = tasks.judged_rows(sample)
    heavy: dict[str, torch.Tensor] = {}
    shelves: dict[Any, dict[Any, Any]] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        site = call.site
        bench = Bench(call, dense, rows, shelf=_shelf(shelves, call), batch=run.batch)
        tiles = bench.tiles(UNIT[0])[0]
        found, heavy[site.path] = profile(call, dense, tiles, heavy)

        def work() -> dict[str, Any]:
            wanted, _ = calibrated_settings(methods, site, call, dense)
            most = run.preset.settings
            few = [thinned(f, 2 if f.settings[0].kind in dear else most) for f in wanted]
            return {"profile": asdict(found), "families": bench.families(few)}

        run.tell("screening methods")
        run.journal.unit(keys[site.path], work)

    if any(k not in run.journal for k in keys.values()):
        capture(run.model, sample.ids, see, lambda path: path in keys)
    return {path: run.journal[key] for path, key in keys.items()}


def _shelf(shelves: dict[Any, dict[Any, Any]], call: AttentionCall) -> dict[Any, Any]:
    """What follows from geometry alone at all sites of one prompt that have the shape of `call`."""
    return shelves.setdefault((call.heads, call.q.shape, call.k.shape, call.v.shape), {})


@dataclass(frozen=True)
class Offer:
    """Lists of a site that later ones may read: one setting's, and the heads good at it."""

    method: AttentionMethod
    good: list[int]
    index: BlockIndex


def lendable(record: Mapping[str, Any], name: str) -> tuple[AttentionMethod, list[int]] | None:
    """The sparsest setting of a family at which half of the heads stay below the lendable error,
    and those heads.
    """
    found = record["families"][name]
    if found["size"][0][1] < REUSE_UNIT:
        return None
    for method, row in zip(family_of(name, found).settings, found["error"], strict=True):
        good = [h for h, e in enumerate(row) if e <= LENDABLE]
        if 2 * len(good) >= len(row):
            return method, good
    return None


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
    rows = tasks.judged_rows(sample)
    order = [s.path for s in run.sites]
    waiting = {p for p in order if keys[p] not in run.journal}
    back = run.preset.lookback
    # Sites that wait, and those whose lists they may want to read.
    needed = {p for i, p in enumerate(order) if set(order[i : i + back + 1]) & waiting}
    # Settings between those of the dial are chosen on the first prompt and kept.
    finest = 0 if n else run.preset.finest
    lists: dict[str, Offer] = {}
    shelves: dict[Any, dict[Any, Any]] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        path = call.site.path
        at = order.index(path)
        bench = Bench(call, dense, rows, shelf=_shelf(shelves, call), batch=run.batch)

        def work() -> dict[str, Any]:
            return {
                "families": bench.families(families[path], finest),
                "loans": _loans(run, bench, path, order[max(0, at - back) : at], lists),
            }

        run.tell(f"measuring, prompt {n + 1}")
        run.journal.unit(keys[path], work)
        lender = kept_by[path] if back else ()
        offer = _offer(call, bench, screen[path], lender, families[path])
        if offer is not None:
            lists[path] = offer
        for old in order[: max(0, at - back + 1)]:
            lists.pop(old, None)

    capture(run.model, sample.ids, see, lambda path: path in needed)


def _offer(
    call: AttentionCall,
    bench: Bench,
    record: Mapping[str, Any],
    kept: Sequence[Family],
    families: Sequence[Family],
) -> Offer | None:
    """What this site may lend: lists of its best family, if that setting is still measured here."""
    found = lendable(record, kept[0].name) if kept else None
    if found is None or not any(found[0] in f.settings for f in families):
        return None
    method, good = found
    index = bench.lent.get(method)
    if index is None:
        answers = answer(call, Policy(methods=(method,)))
        if answers is None or not answers[0].plain:
            return None
        piece = answers[0].pieces[0]
        index = piece if isinstance(piece, BlockIndex) else None
    return None if index is None else Offer(method, good, index)


def _loans(
    run: Run, bench: Bench, path: str, earlier: Sequence[str], lists: Mapping[str, Offer]
) -> list[dict[str, Any]]:
    """This site with the lists of each earlier one; head maps are those of the first prompt."""
    first = f"measure/0/{path}"
    maps = None
    if first in run.journal:
        maps = {x["anchor"]: x["heads"] for x in run.journal[first]["loans"]}
    out = []
    for anchor in earlier:
        offer = lists.get(anchor)
        if offer is None or (maps is not None and anchor not in maps):
            continue
        heads = None if maps is None else maps[anchor]
        row = bench.borrow(anchor, offer.index, offer.good, heads)
        if row is not None:
            out.append({"anchor": anchor, "setting": stored(offer.method), **row})
    return out


def probe_of(model: Any, sample: Sample) -> Callable[[Sequence[str]], quality.Show]:
    """A short prompt on which weights are measured: last hidden states at its scored rows."""
    rows = torch.from_numpy(tasks.scored_rows(sample))

    def probe(places: Sequence[str]) -> quality.Show:
        def show(copies: int, see: See) -> torch.Tensor:
            ids = np.repeat(sample.ids[None], copies, 0)
            return capture(model, ids, see, lambda path: path in places)[:, rows]

        return show

    return probe
