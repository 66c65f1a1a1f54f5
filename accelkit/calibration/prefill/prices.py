"""What lists cost on the user's prompts, beside what the cost table says of random data.

How far neighbouring tiles agree, and how long runs of keys are, follows from the data: a CPU reads
lists that agree in few large pieces, others in many small ones, and by the table alone a method
whose lists agree on noise would look cheaper than it is on text. Lists are clocked twice: while
methods are screened, one setting of each, and where search is about to choose, as a plan runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from accelkit.calibration.assemble import Measured, SiteData, head_ms, own_ms
from accelkit.calibration.candidates import Bench
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit.methods import lists
from accelkit.calibration.refine import short
from accelkit.calibration.search import DENSE, Choice, cost
from accelkit.calibration.stages import family_of
from accelkit.calibration.timing import steady_ms
from accelkit.kernels.cost import CostTable
from accelkit.patches.call import AttentionCall

TYPICAL = 0.03
"""Error of a head near which plans run a family; its setting next to it is clocked."""
PLACES = 3
"""Sites that clock: what lists cost beside their density differs little from one to another."""
BOUNDS = (0.25, 4.0)
"""Factors beyond these are a disturbed reading."""
READINGS = 2
"""Of a layer as a plan runs it, and of dense attention beside it."""
JITTER = 0.06
"""How far such a reading is usually off, as a share."""
SPREADS = (0.2, 0.15, 0.15)
"""How far factors usually differ: a family's from 1, a site's from its family's, a head's from its
site's.
"""
Key = tuple[str | int, ...]
"""A family; a family and a site; a family, a site and a head."""


@dataclass(frozen=True)
class Reading:
    """Milliseconds that lists took together, their likely error, and what the prices say of each
    family, site and head in them.
    """

    took: float
    error: float
    said: Mapping[Key, float]


def places(sites: Sequence[str]) -> set[str]:
    """The sites that clock, from the first to the last."""
    ends = np.linspace(0, len(sites) - 1, min(PLACES, len(sites)))
    return {sites[round(at)] for at in ends}


def beside_table(bench: Bench, found: Mapping[str, Any], costs: CostTable) -> dict[str, float]:
    """By family of those that were measured on a bench, what the kernels over its lists take for
    all rows ÷ what the table says of them. Both count in units of dense attention, which is clocked
    before and after: a process may find its machine slower than the one that made the table.

    Nothing on a GPU, whose kernels take one block after another whatever its neighbours read.
    """
    call = bench.call
    if call.q.device.type != "cpu":
        return {}
    dense = [steady_ms(partial(dense_attention, call))]
    took: dict[str, float] = {}
    for name, record in found.items():
        at = _typical(record["error"])
        if record["ms"][at] is not None:
            continue  # clocked as a whole
        method = family_of(name, record).settings[at]
        answers = bench.answers(method)
        if answers is None:
            continue
        own, spent = lists(answers[0], method, steady_ms)
        launches = sum(costs.launch_ms(size) for size, _ in own)
        said = sum(sum(costs.lists_ms(method.kind, size, call.n_q, each)) for size, each in own)
        took[name] = max(spent - launches, 0.0) / said if said else 1.0
    dense.append(steady_ms(partial(dense_attention, call)))
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
    both the mean of some readings in turns.
    """
    found: list[Any] = []

    def kept(run: Callable[[], Any]) -> None:
        found.append(run())

    dense = partial(dense_attention, call)
    turns: list[list[Callable[[], Any]]] = [[*runs, dense] for _ in range(READINGS)]
    turns[0][:-1] = [partial(kept, run) for run in runs]
    ms = [[steady_ms(run) for run in turn] for turn in turns]
    *took, whole = map(fmean, zip(*ms, strict=True))
    return found, [short(one / whole) for one in took]


def as_they_ran(
    data: Sequence[SiteData],
    ran: Sequence[Mapping[Choice, float]],
    costs: CostTable,
    tokens: int,
) -> list[SiteData]:
    """Tables whose lists cost what choices of each site took, given as shares of dense attention:
    search picks what looks cheap, and so what prices flatter.
    """
    readings = [
        r for d, one in zip(data, ran, strict=True) for r in _readings(d, one, costs, tokens)
    ]
    if not readings:
        return list(data)
    known = factors(readings)
    found: list[SiteData] = []
    for d in data:
        heads = range(d.table.heads)
        options = [
            replace(o, factor=o.factor * np.array([_nearest(known, o, d.site, h) for h in heads]))
            for o in d.options
        ]
        # Lists that are lent cost what they cost where they come from.
        lent = [
            replace(m, factor=found[x.anchor].options[x.option].factor[list(x.heads)])
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


def _readings(
    d: SiteData, shares: Mapping[Choice, float], costs: CostTable, tokens: int
) -> Iterator[Reading]:
    """What the lists of a site's choices took, beside what they are said to."""
    for choice, share in shares.items():
        some = [(h, d.options[at]) for h, at in enumerate(choice.heads) if at != DENSE]
        if not some or any(choice.borrowed) or any(one.ms is not None for _, one in some):
            continue  # lists of another site, or clocked as a whole
        said: dict[Key, float] = {
            (one.family, d.site, h): float(own_ms(one, costs, tokens)[h]) for h, one in some
        }
        whole = share * costs.ride_ms(tokens) * d.table.heads
        took = whole - cost(d.table, choice) + sum(said.values())
        yield Reading(took, JITTER * whole, said)


def factors(readings: Sequence[Reading]) -> dict[Key, float]:
    """The likeliest factors of families, of families at sites, and of heads there: a head is like
    its site, a site like the others, and a family like what was thought before, each within its
    spread, and readings are what they sum up to, within their errors.
    """
    keys = dict.fromkeys(cell[:n] for r in readings for cell in r.said for n in (1, 2, 3))
    place: dict[Key, int] = {key: i for i, key in enumerate(keys)}
    rows: list[np.ndarray] = []
    wanted: list[float] = []

    def equal(terms: Mapping[Key, float], value: float, error: float) -> None:
        row = np.zeros(len(place))
        for key, times in terms.items():
            row[place[key]] = times / error
        rows.append(row)
        wanted.append(value / error)

    for key in place:
        if len(key) == 1:
            equal({key: 1.0}, 1.0, SPREADS[0])
        else:
            equal({key: 1.0, key[:-1]: -1.0}, 0.0, SPREADS[len(key) - 1])
    for r in readings:
        equal(r.said, r.took, r.error)
    found = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0].clip(*BOUNDS)
    return dict(zip(place, found.tolist(), strict=True))


def _nearest(known: Mapping[Key, float], one: Measured, site: str, head: int) -> float:
    """By which a setting's price for a head is multiplied."""
    key: Key = (one.family, site, head)
    return next((known[key[:n]] for n in (3, 2, 1) if key[:n] in known), 1.0)


def _typical(errors: Any) -> int:
    """The setting whose heads' median error is nearest to the typical one, `[setting][head]`."""
    middle = np.log(np.maximum(np.median(errors, axis=1), 1e-9))
    return int(np.abs(middle - np.log(TYPICAL)).argmin())
