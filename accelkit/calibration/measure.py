"""The measuring half of calibration: fit, screening, candidates, weights; one journal unit each.

Every method meets one short prompt first; at each site a few families survive and are measured on
the long prompts. Which families those are, and whose lists are lent to later sites, follows from
stored units alone, so a resumed run repeats nothing and decides alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from accelkit.calibration import data, fit, quality
from accelkit.calibration.candidates import (
    REUSE_UNIT,
    Bench,
    Family,
    calibrated_settings,
    finer,
    stored,
    thinned,
)
from accelkit.calibration.capture import capture
from accelkit.calibration.journal import Journal
from accelkit.calibration.profile import UNIT, profile
from accelkit.calibration.tasks import Sample
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
    "fast": Preset(2, 4, 5, 0, 4, ("multi_key",)),
    "balanced": Preset(3, 5, 7, 2, 5, ("multi_key", "text")),
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
    deadline: float | None = None
    begun: float = field(default_factory=time.monotonic)
    skipped: list[str] = field(default_factory=list)

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
    rows = data.scored_rows(sample)
    heavy: dict[str, torch.Tensor] = {}

    def see(call: AttentionCall, dense: Partial) -> None:
        site = call.site
        bench = Bench(call, dense, rows)
        tiles = bench.tiles(UNIT[0])[0]
        found, heavy[site.path] = profile(call, dense, tiles, heavy)

        def work() -> dict[str, Any]:
            wanted = calibrated_settings(methods, site, call, dense)
            measured = {
                f.name: bench.family(thinned(f, run.preset.settings), False) for f in wanted
            }
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
    record: Mapping[str, Any], costs: CostTable, tokens: int, most: int, finest: int
) -> list[Family]:
    """The families of a site that are worth measuring on long prompts, the best first.

    At each tolerated error in turn the family that would cost the layer least is kept. Its dial
    gets values in between, up to `finest` settings.
    """
    found = record["families"]
    rank: dict[str, list[float]] = {}
    for name, f in found.items():
        kind = f["settings"][0]["kind"]
        if kind not in costs.methods:
            continue
        once, each = costs.method_ms(kind, tokens)
        error, share = np.array(f["error"]), np.array(f["density"])
        ms = np.array(
            [[each + costs.head_ms(tuple(s), tokens, d) for d in row]
             for s, row in zip(f["size"], share, strict=True)]
        )  # fmt: skip
        ride = costs.ride_ms(tokens)
        rank[name] = [
            once + float(np.minimum(np.where(error <= t, ms, np.inf).min(0), ride).sum())
            for t in TOLERANCES
        ]
    chosen: list[str] = []
    for i in [*range(len(TOLERANCES))] * most:
        rest = [n for n in rank if n not in chosen]
        if not rest or len(chosen) == most:
            break
        chosen.append(min(rest, key=lambda n: (rank[n][i], n)))
    return [finer(_family(n, found[n]), found[n]["error"], finest) for n in chosen]


def lent(record: Mapping[str, Any], family: Family) -> list[tuple[int, list[int]]]:
    """Settings of a family whose lists are offered to later sites, with the heads that are good at
    them: the sparsest setting at which half of the heads stay below the lendable error.
    """
    found = record["families"][family.name]
    if found["size"][0][1] < REUSE_UNIT:
        return []
    names = [stored(m) for m in family.settings]
    for setting, row in zip(found["settings"], found["error"], strict=True):
        good = [h for h, e in enumerate(row) if e <= LENDABLE]
        if 2 * len(good) >= len(row):
            return [(names.index(setting), good)]
    return []


def measured(
    run: Run,
    samples: Sequence[Sample],
    screen: Mapping[str, Any],
    kept_by: Mapping[str, list[Family]],
) -> list[dict[str, Any]]:
    """Errors of the surviving families on each prompt, and of lists borrowed from earlier sites."""
    out: list[dict[str, Any]] = []
    for n, sample in enumerate(samples):
        if n and run.late(
            0.6, f"prompt {n + 1} of {len(samples)} ({sample.task}, {len(sample.ids)} tokens)"
        ):
            continue
        keys = {s.path: f"measure/{n}/{s.path}" for s in run.sites}
        if any(k not in run.journal for k in keys.values()):
            _measure(
                run, sample, keys, screen, kept_by, f"measuring, prompt {n + 1} of {len(samples)}"
            )
        out.append({path: run.journal[key] for path, key in keys.items()})
    return out


def _measure(
    run: Run,
    sample: Sample,
    keys: Mapping[str, str],
    screen: Mapping[str, Any],
    kept_by: Mapping[str, list[Family]],
    stage: str,
) -> None:
    rows = data.scored_rows(sample)
    order = [s.path for s in run.sites]
    # Lists of the last few sites; older ones are dropped as the forward goes on.
    lists: dict[str, list[tuple[Family, int, list[int], BlockIndex]]] = {}
    waiting = {p for p in order if keys[p] not in run.journal}
    back = run.preset.lookback
    needed = {p for i, p in enumerate(order) if set(order[i : i + back + 1]) & waiting}

    def see(call: AttentionCall, dense: Partial) -> None:
        path = call.site.path
        at = order.index(path)
        bench = Bench(call, dense, rows)

        def work() -> dict[str, Any]:
            found = {f.name: bench.family(f, True) for f in kept_by[path]}
            return {
                "families": {k: v for k, v in found.items() if v is not None},
                "loans": _loans(run, bench, path, order[max(0, at - back) : at], lists),
            }

        run.tell(stage)
        run.journal.unit(keys[path], work)
        if back:
            lists[path] = list(_offers(call, bench, screen[path], kept_by[path]))
            for old in order[: max(0, at - back)]:
                lists.pop(old, None)

    capture(run.model, sample.ids, see, lambda path: path in needed)


def _offers(
    call: AttentionCall, bench: Bench, record: Mapping[str, Any], families: Sequence[Family]
) -> Iterator[tuple[Family, int, list[int], BlockIndex]]:
    """Lists of this site that later ones may read."""
    for family in families[:1]:
        for at, good in lent(record, family):
            index = bench.lent.get(family.settings[at])
            if index is None:
                answers = answer(call, Policy(methods=(family.settings[at],)))
                if answers is None or not answers[0].plain:
                    continue
                index = answers[0].pieces[0]
            yield family, at, good, index


def _loans(
    run: Run, bench: Bench, path: str, earlier: Sequence[str], lists: Mapping[str, list]
) -> list[dict[str, Any]]:
    """This site with the lists of each earlier one; head maps are those of the first prompt."""
    first = f"measure/0/{path}"
    maps = {}
    if first in run.journal:
        maps = {
            (x["anchor"], x["family"], x["at"]): x["heads"] for x in run.journal[first]["loans"]
        }
    out = []
    for anchor in earlier:
        for family, at, good, index in lists.get(anchor, ()):
            key = (anchor, family.name, at)
            if maps and key not in maps:
                continue
            row = bench.borrow(anchor, index, good, maps.get(key))
            if row is not None:
                out.append({"anchor": anchor, "family": family.name, "at": at, **row})
    return out


def weighed(run: Run, prompts: Sequence[Sample]) -> dict[str, list[float]]:
    """Weight of every head, the worst over the prompts. Sites that time did not allow get the
    median.
    """
    every = max(1, -(-sum(run.heads[s.path] for s in run.sites) // PROBES))
    found: dict[str, list[float]] = {}
    for site in run.sites:
        heads = run.heads[site.path]
        groups = [list(range(h, min(h + every, heads))) for h in range(0, heads, every)]
        for n, sample in enumerate(prompts):
            key = f"weight/{n}/{site.path}"
            if key not in run.journal and run.late(0.7, "weights of some sites"):
                continue
            run.tell("weighing heads")
            rows = data.scored_rows(sample)
            weights = run.journal.unit(
                key,
                lambda s=sample, r=rows, p=site.path, g=groups: quality.site_weights(
                    run.model, s.ids, r, p, g
                ),
            )
            spread = [weights[h // every] for h in range(heads)]
            found[site.path] = np.maximum(found.get(site.path, spread), spread).tolist()
    known = [w for ws in found.values() for w in ws]
    middle = float(np.median(known)) if known else 1.0
    return {s.path: found.get(s.path, [middle] * run.heads[s.path]) for s in run.sites}


def _family(name: str, record: Mapping[str, Any]) -> Family:
    """A family as the journal holds it."""
    settings = []
    for row in record["settings"]:
        fields = dict(row)
        settings.append(load(fields.pop("kind")).model_validate(fields))
    return Family(name, tuple(settings), record["field"])
