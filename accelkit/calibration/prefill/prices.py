"""What lists cost on the user's prompts, beside what the cost table says of random data.

How far neighbouring tiles agree, and how long runs of keys are, follows from the data: a CPU reads
lists that agree in few large pieces, others in many small ones, and by the table alone a method
whose lists agree on noise would look cheaper than it is on text. Lists are clocked twice: while
methods are screened, one setting of each, and where search is about to choose, as a plan runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from accelkit.calibration.assemble import Measured, SiteData, head_ms, own_ms
from accelkit.calibration.candidates import Bench
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit.methods import lists
from accelkit.calibration.refine import short
from accelkit.calibration.search import DENSE, Choice, cost
from accelkit.calibration.stages import family_of
from accelkit.calibration.timing import times_ms
from accelkit.kernels.cost import CostTable
from accelkit.patches.call import AttentionCall

TYPICAL = 0.03
"""Error of a head near which plans run a family; its setting next to it is clocked."""
PLACES = 3
"""Sites that clock: what lists cost beside their density differs little from one to another."""
BOUNDS = (0.25, 4.0)
"""Factors beyond these are a disturbed reading."""
BEFORE = 0.5
"""What a price from random lists and short prompts counts beside a site that was surely read."""
READINGS = 2
"""Of a layer as a plan runs it, and of dense attention beside it."""
JITTER, SPREAD = 0.06, 0.15
"""How far such a reading is usually off, and how far a family's factors differ among sites, both as
shares.
"""


def places(sites: Sequence[str]) -> set[str]:
    """The sites that clock, from the first to the last."""
    ends = np.linspace(0, len(sites) - 1, min(PLACES, len(sites)))
    return {sites[round(at)] for at in ends}


def beside_table(bench: Bench, found: Mapping[str, Any], costs: CostTable) -> dict[str, float]:
    """By family of those that were measured on a bench, what the kernels over its lists take for
    all rows ÷ what the table says of them. Both count in units of dense attention, which is clocked
    before and after: a machine is not always as fast as it was for the table.

    Nothing on a GPU, whose kernels take one block after another whatever its neighbours read.
    """
    call, device = bench.call, bench.call.q.device
    if device.type != "cpu":
        return {}

    def ms(run: Callable[[], Any], _: int = 1) -> float:
        return times_ms(run, 1, 0, device)[0]

    dense = [ms(partial(dense_attention, call))]
    took: dict[str, float] = {}
    for name, record in found.items():
        at = _typical(record["error"])
        if record["ms"][at] is not None:
            continue  # clocked as a whole
        method = family_of(name, record).settings[at]
        answers = bench.answers(method)
        if answers is None:
            continue
        own, spent = lists(answers[0], method, ms)
        launches = sum(costs.launch_ms(size) for size, _ in own)
        said = sum(sum(costs.lists_ms(method.kind, size, call.n_q, each)) for size, each in own)
        took[name] = max(spent - launches, 0.0) / said if said else 1.0
    dense.append(ms(partial(dense_attention, call)))
    speed = float(np.mean(dense)) / (costs.ride_ms(call.n_q) * len(call.heads))
    return {name: short(one / speed) for name, one in took.items()}


def on_prompts(costs: CostTable, seen: Iterable[Mapping[str, float]]) -> CostTable:
    """The table with each family's factor: the median of the places that clocked it."""
    rows: dict[str, list[float]] = {}
    for place in seen:
        for name, factor in place.items():
            rows.setdefault(name, []).append(factor)
    factors = {name: float(np.clip(np.median(some), *BOUNDS)) for name, some in rows.items()}
    return replace(costs, on_prompts=factors)


def beside_dense(
    call: AttentionCall, runs: Sequence[Callable[[], Any]]
) -> tuple[list[Any], list[float]]:
    """What runs of a layer's call on a CPU give, and the time of each ÷ that of dense attention,
    the lesser of some readings in turns.
    """
    found: list[Any] = []

    def kept(run: Callable[[], Any]) -> None:
        found.append(run())

    dense = partial(dense_attention, call)
    turns: list[list[Callable[[], Any]]] = [[*runs, dense] for _ in range(READINGS)]
    turns[0][:-1] = [partial(kept, run) for run in runs]
    device = call.q.device
    ms = [[times_ms(run, 1, 0, device)[0] for run in turn] for turn in turns]
    *took, least = map(min, zip(*ms, strict=True))
    return found, [short(one / least) for one in took]


def as_they_ran(
    data: Sequence[SiteData],
    ran: Sequence[Mapping[Choice, float]],
    costs: CostTable,
    tokens: int,
) -> list[SiteData]:
    """Tables whose lists cost what choices of each site took, given as shares of dense attention:
    search picks what looks cheap, and so what prices flatter. What a family took at a site is the
    mean of the choices that run it there, drawn towards what it took elsewhere as far as the clock
    may be wrong.
    """
    took: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for d, shares in zip(data, ran, strict=True):
        for choice, share in shares.items():
            some = [(d.options[at], h) for h, at in enumerate(choice.heads) if at != DENSE]
            if any(choice.borrowed) or any(one.ms is not None for one, _ in some):
                continue  # lists of another site, or clocked as a whole
            said = sum(own_ms(one, costs, tokens)[h] for one, h in some)
            if said:
                whole = share * costs.ride_ms(tokens) * d.table.heads
                factor = (whole - cost(d.table, choice) + said) / said
                for family in {one.family for one, _ in some}:
                    took.setdefault(family, {}).setdefault(d.site, []).append(
                        (factor, JITTER * whole / said)
                    )
    if not took:
        return list(data)
    factors = {family: _factors(sites) for family, sites in took.items()}
    found: list[SiteData] = []
    for d in data:
        options = [replace(o, factor=o.factor * _factor(factors, o, d.site)) for o in d.options]
        # Lists that are lent cost what they cost where they come from.
        lent = [
            replace(m, factor=found[x.anchor].options[x.option].factor)
            for m, x in zip(d.loans, d.table.loans, strict=True)
        ]
        table = replace(
            d.table,
            options=tuple(
                replace(row, ms=head_ms(o, costs, tokens))
                for row, o in zip(d.table.options, options, strict=True)
            ),
            loans=tuple(
                replace(row, ms=head_ms(m, costs, tokens, 0.0))
                for row, m in zip(d.table.loans, lent, strict=True)
            ),
        )
        found.append(replace(d, table=table, options=tuple(options), loans=tuple(lent)))
    return found


def _factors(sites: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str | None, float]:
    """Factors of a family by site from readings `(factor, its error)` there, and for any other site
    (None) the mean of them and of what was thought before, in which surer ones count for more.
    """
    trust, seen = {}, {}
    for site, rows in sites.items():
        seen[site], error = np.mean(rows, axis=0).tolist()
        trust[site] = SPREAD**2 / (SPREAD**2 + error**2 / len(rows))
    total = BEFORE + sum(trust[site] * factor for site, factor in seen.items())
    common = total / (BEFORE + sum(trust.values()))
    own = {site: common + trust[site] * (factor - common) for site, factor in seen.items()}
    return {None: common} | own


def _factor(factors: Mapping[str, Mapping[str | None, float]], one: Measured, site: str) -> float:
    """By which a setting's price at a site is multiplied."""
    mine = factors.get(one.family, {None: 1.0})
    return float(np.clip(mine.get(site, mine[None]), *BOUNDS))


def _typical(errors: Any) -> int:
    """The setting whose heads' median error is nearest to the typical one, `[setting][head]`."""
    middle = np.log(np.maximum(np.median(errors, axis=1), 1e-9))
    return int(np.abs(middle - np.log(TYPICAL)).argmin())
