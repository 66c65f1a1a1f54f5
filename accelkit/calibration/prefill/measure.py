"""The measuring half of calibration: fit, screening, candidates, weights; one journal unit each.

Every method meets one short prompt first; at each site a few families survive and are measured on
the long prompts. Which families those are, and whose lists are lent to later sites, follows from
stored units alone, so a resumed run repeats nothing and decides alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from accelkit.calibration import data
from accelkit.calibration.candidates import (
    REUSE_UNIT,
    Bench,
    Family,
    calibrated_settings,
    lists_ms,
    parts_of,
    stored,
    thinned,
)
from accelkit.calibration.capture import See, capture
from accelkit.calibration.evaluation import quality
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.fit import fit
from accelkit.calibration.journal import Journal
from accelkit.calibration.profile import UNIT, profile
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.patches.call import AttentionCall, Site
from accelkit.patches.method import AttentionMethod, load
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import answer

TOLERANCES = (0.02, 0.05, 0.1, 0.2)
"""Errors of a head at which families are compared after screening."""
LENDABLE = 0.15
"""Error up to which a head's lists are worth lending."""
PROBE_TOKENS = 512
"""Length of the prompts on which weights are measured."""
LEAST_WEIGHT = 0.1
"""Share of the median weight that no head is below: noise that seems to do nothing was drowned."""
PROBES = 2048
"""Heads that get noise of their own; models with more share probes among neighbours."""


@dataclass(frozen=True)
class Preset:
    """How much is measured: families kept at a site, settings of each while screening and on long
    prompts, how far lists are lent, rounds of the end-to-end check, prompts to weigh heads on.
    """

    families: int
    settings: int
    finest: int
    lookback: int
    rounds: int
    weigh: tuple[str, ...]


PRESETS = {
    "fast": Preset(2, 4, 5, 0, 4, ("multi_key", "text")),
    "balanced": Preset(4, 5, 7, 2, 5, ("multi_key", "text")),
    "careful": Preset(5, 6, 8, 4, 5, ("multi_key", "variables", "text")),
}


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
    trimmed: str | None = None
    """Attention of the last layer where that is computed for the kept rows only; not a site."""

    def late(self, share: float, what: str) -> bool:
        """Whether this share of the time limit is used up, in which case `what` is skipped. Part of
        the journal, for a resumed run must skip the same.
        """
        key = f"skipped/{what}"
        spent = time.monotonic() - self.begun
        if key not in self.journal:
            if self.deadline is None or spent < share * self.deadline:
                return False
            self.journal.put(key, True, 0.0)
        if what not in self.skipped:
            self.skipped.append(what)
        return True


def fitted(
    run: Run, shape: fit.Shape, dtype: torch.dtype, tokens: int, methods: Sequence[AttentionMethod]
) -> CostTable:
    """The cost table of this device."""
    run.tell("timing kernels and methods")
    table = run.journal.unit(
        "fit", lambda: fit.fit(shape, dtype, run.device, tokens, methods).to_dict()
    )
    return CostTable.from_dict(table)


def screened(run: Run, sample: Sample, methods: Sequence[AttentionMethod]) -> dict[str, Any]:
    """Profile of every site and errors of every method on one short prompt."""
    keys = {s.path: f"screen/{s.path}" for s in run.sites}
    rows = data.judged_rows(sample)
    heavy: dict[str, torch.Tensor] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        site = call.site
        bench = Bench(call, dense, rows, batch=run.batch)
        tiles = bench.tiles(UNIT[0])[0]
        found, heavy[site.path] = profile(call, dense, tiles, heavy)

        def work() -> dict[str, Any]:
            wanted, _ = calibrated_settings(methods, site, call, dense)
            few = [thinned(f, run.preset.settings) for f in wanted]
            measured = {f.name: bench.family(f, len(f.settings)) for f in few}
            return {
                "profile": asdict(found),
                "families": {k: v for k, v in measured.items() if v is not None},
            }

        run.tell(f"screening {len(methods)} methods")
        run.journal.unit(keys[site.path], work)

    if any(k not in run.journal for k in keys.values()):
        capture(run.model, sample.ids, see, lambda path: path in keys)
    return {path: run.journal[key] for path, key in keys.items()}


def kept(
    record: Mapping[str, Any],
    costs: CostTable,
    tokens: int,
    screened_on: int,
    most: int,
    tolerances: Sequence[float] = TOLERANCES,
) -> list[Family]:
    """The families of a site that are worth measuring on long prompts, the best first.

    One after another, the family that makes the layer cheapest beside those before it, summed over
    the tolerated errors: each head runs the cheapest setting of any of them, or dense.
    """
    found = record["families"]
    once: dict[str, float] = {}
    ms: dict[str, np.ndarray] = {}  # [tolerance, head]
    for name, f in found.items():
        kind = f["settings"][0]["kind"]
        if kind not in costs.methods:
            continue
        once[name], each = costs.method_ms(kind, tokens)
        error, share = np.array(f["error"]), np.array(f["density"])
        grown = costs.dense_ms(tokens) / costs.dense_ms(screened_on) / share.shape[1]
        cost = np.array(
            [
                each + lists_ms(costs, kind, parts_of(f, at), tokens, row)
                if clocked is None
                else [each + clocked * grown] * len(row)
                for at, (row, clocked) in enumerate(zip(share, f["ms"], strict=True))
            ]
        )
        ms[name] = np.array([np.where(error <= t, cost, np.inf).min(0) for t in tolerances])
    chosen: list[str] = []
    best: Any = costs.ride_ms(tokens)
    while len(chosen) < min(most, len(ms)):
        rest = [n for n in ms if n not in chosen]
        total = {n: float(np.minimum(best, ms[n]).sum()) + len(tolerances) * once[n] for n in rest}
        chosen.append(min(rest, key=lambda n: (total[n], n)))
        best = np.minimum(best, ms[chosen[-1]])
    return [family_of(n, found[n]) for n in chosen]


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


def _measure(
    run: Run,
    sample: Sample,
    n: int,
    keys: Mapping[str, str],
    screen: Mapping[str, Any],
    families: Mapping[str, Sequence[Family]],
    kept_by: Mapping[str, Sequence[Family]],
) -> None:
    rows = data.judged_rows(sample)
    order = [s.path for s in run.sites]
    waiting = {p for p in order if keys[p] not in run.journal}
    back = run.preset.lookback
    # Sites that wait, and those whose lists they may want to read.
    needed = {p for i, p in enumerate(order) if set(order[i : i + back + 1]) & waiting}
    # Settings between those of the dial are chosen on the first prompt and kept.
    finest = 0 if n else run.preset.finest
    lists: dict[str, Offer] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        path = call.site.path
        at = order.index(path)
        bench = Bench(call, dense, rows, batch=run.batch)

        def work() -> dict[str, Any]:
            found = {f.name: bench.family(f, finest) for f in families[path]}
            return {
                "families": {k: v for k, v in found.items() if v is not None},
                "loans": _loans(run, bench, path, order[max(0, at - back) : at], lists),
            }

        run.tell(f"measuring, prompt {n + 1}")
        run.journal.unit(keys[path], work)
        offer = _offer(call, bench, screen[path], kept_by[path]) if back else None
        if offer is not None:
            lists[path] = offer
        for old in order[: max(0, at - back + 1)]:
            lists.pop(old, None)

    capture(run.model, sample.ids, see, lambda path: path in needed)


def _offer(
    call: AttentionCall, bench: Bench, record: Mapping[str, Any], families: Sequence[Family]
) -> Offer | None:
    """What this site may lend: lists of its best family."""
    found = lendable(record, families[0].name) if families else None
    if found is None:
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


def weighed(
    run: Run,
    heads: Mapping[str, int],
    probes: Sequence[Callable[[str], quality.Show]],
    left_out: Callable[[str], quality.LeftOut | None] = lambda place: None,
) -> dict[str, list[float]]:
    """Weight of every head of each place, the worst over the probes; `probe(place)` is what runs,
    `left_out(place)` what disturbs there instead of noise. Places that time did not allow get the
    median.
    """
    every = max(1, -(-sum(heads.values()) // PROBES))
    found: dict[str, list[float]] = {}
    for place, count in heads.items():
        groups = [list(range(h, min(h + every, count))) for h in range(0, count, every)]
        for n, probe in enumerate(probes):
            key = f"weight/{n}/{place}"
            if key not in run.journal and run.late(0.7, "weights of some sites"):
                continue
            run.tell("weighing heads")
            work = partial(_weigh, probe, place, groups, left_out(place))
            weights = run.journal.unit(key, work)
            spread = [weights[h // every] for h in range(count)]
            found[place] = np.maximum(found.get(place, spread), spread).tolist()
    known = [w for ws in found.values() for w in ws]
    middle = float(np.median(known)) if known else 1.0
    least = LEAST_WEIGHT * middle
    return {
        place: [max(w, least) for w in found.get(place, [middle] * count)]
        for place, count in heads.items()
    }


def _weigh(
    probe: Callable[[str], quality.Show],
    place: str,
    groups: Sequence[Sequence[int]],
    left_out: quality.LeftOut | None,
) -> list[float]:
    return quality.site_weights(probe(place), groups, left_out)


def probe_of(model: Any, sample: Sample) -> Callable[[str], quality.Show]:
    """A short prompt on which weights are measured: last hidden states at its scored rows."""
    rows = torch.from_numpy(data.scored_rows(sample))

    def probe(site: str) -> quality.Show:
        def show(copies: int, see: See) -> torch.Tensor:
            ids = np.repeat(sample.ids[None], copies, 0)
            return capture(model, ids, see, lambda path: path == site)[:, rows]

        return show

    return probe


def family_of(name: str, record: Mapping[str, Any]) -> Family:
    """A family as the journal holds it."""
    settings: list[Any] = []
    for row in record["settings"]:
        fields = dict(row)
        settings.append(load(fields.pop("kind")).model_validate(fields))
    return Family(name, tuple(settings), record["field"])
