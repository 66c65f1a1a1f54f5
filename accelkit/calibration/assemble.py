"""From measurements to the tables that search reads, and from its choices to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from accelkit.calibration.candidates import Family, Parts, lists_ms, parts_of, stored
from accelkit.calibration.search import DENSE, Choice, Loan, Option, Solution, Table, search
from accelkit.kernels.cost import CostTable
from accelkit.patches.call import Phase
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import (
    Budget,
    Evidence,
    Fingerprint,
    LayerPlan,
    Limits,
    Plan,
    Policy,
    Reuse,
    Rule,
    evidence_key,
)

NEAR = (0.5, 1.0, 2.0)
"""Predicted errors ÷ the budget at which search tells what is worth measuring further."""


Row = tuple[int, Mapping[str, Any], np.ndarray]
"""What one prompt measured at a site: its tokens, the unit, weights there ÷ the largest `[H]`."""


@dataclass(frozen=True)
class Measured:
    """One setting of a family at one site, over all prompts; arrays are per query head.

    `error` is the worst over prompts, `recall` the least; `density` by length in tokens is a mean.
    `counted` is the error that search counts at the heads' largest weights: the worst of what a
    prompt's own weights make of its own error. `parts` are the units of its lists with their shares
    of the computed pairs, `factor` what the cost table says of them is multiplied by, one number or
    one for each head.
    """

    family: str
    method: AttentionMethod
    field: str | None
    parts: Parts
    error: np.ndarray
    counted: np.ndarray
    recall: np.ndarray
    density: dict[int, np.ndarray]
    ms: float | None = None
    factor: Any = 1.0


@dataclass(frozen=True)
class SiteData:
    """Everything measured at one place: the search's table, and what stands behind its rows.

    A place is a site, or a site during some share of the denoising steps.
    """

    table: Table
    options: tuple[Measured, ...]
    loans: tuple[Measured, ...]
    site: str
    steps: tuple[float, float] = (0.0, 1.0)


def site_data(
    places: Sequence[str],
    families: Mapping[str, Sequence[Family]],
    screen: Mapping[str, Any],
    units: Sequence[tuple[int, Mapping[str, Any]]],
    screen_tokens: int,
    weights: Sequence[Mapping[str, Sequence[float]]],
    costs: CostTable,
    calls: Mapping[str, int] | None = None,
    refresh: Mapping[str, int] | None = None,
) -> list[SiteData]:
    """Tables in running order. `units` are the measured prompts with their lengths in tokens,
    `weights` those of the heads on each: a head may matter to one task and hardly to another.
    `calls`, how often a place is called, multiplies its milliseconds; `refresh`, for how many calls
    its lists are kept, divides those of choosing.
    """
    tokens = max(n for n, _ in units)
    found: list[SiteData] = []
    for path in places:
        times = 1 if calls is None else calls[path]
        anew = 1.0 if refresh is None else 1 / refresh[path]
        own = np.maximum([some[path] for some in weights], 1e-6)
        weight = own.max(0)
        rows = [
            (n, u[path], mine / weight)
            for (n, u), mine in zip(units, own, strict=False)
            if path in u
        ]
        options = []
        for family in families.get(path, ()):
            sparse = screen[path]["families"][family.name]
            for at, method in enumerate(family.settings):
                brief = _between(family, at, sparse)
                short = {} if brief is None else {screen_tokens: brief}
                one = _join(family, method, rows, tokens, short)
                if one is not None:
                    factor = costs.on_prompts.get(family.name, 1.0)
                    options.append(replace(one, factor=factor))
        loans, lent = _loans(places, rows, found, tokens)
        fixed = {o.family: times * _once(o, costs, tokens, anew) for o in options}
        table = Table(
            path,
            weight,
            times * costs.dense_ms(tokens),
            times * costs.ride_ms(tokens),
            tuple(
                Option(o.family, i, o.counted, times * head_ms(o, costs, tokens, anew))
                for i, o in enumerate(options)
            ),
            fixed,
            tuple(
                Loan(anchor, option, heads, m.counted, head_ms(m, costs, tokens, 0.0))
                for (anchor, option, heads), m in zip(lent, loans, strict=True)
            ),
        )
        found.append(SiteData(table, tuple(options), tuple(loans), path))
    return found


def nothing(heads: Mapping[str, int], costs: CostTable, tokens: int) -> list[SiteData]:
    """Tables of places of which nothing was measured: all heads run dense."""
    unit: dict[str, Any] = {path: {"families": {}, "loans": []} for path in heads}
    ones = {path: [1.0] * n for path, n in heads.items()}
    return site_data(list(heads), {}, {}, [(tokens, unit)], tokens, [ones], costs)


def wanted(
    data: Sequence[SiteData], families: Mapping[str, Sequence[Family]], budget: float
) -> dict[str, list[Family]]:
    """The families that search picks somewhere near the budget, with the settings from one sparser
    to one denser than those that it picks: others are not worth measuring on further prompts.
    """
    tables, fronts = [d.table for d in data], dict[str, Any]()
    picked: list[set[int]] = [set() for _ in data]
    for times in NEAR:
        for n, choice in enumerate(search(tables, times * budget, fronts).choices):
            picked[n].update(at for at in choice.heads if at != DENSE)
            if choice.loan is not None:
                loan = tables[n].loans[choice.loan]
                picked[loan.anchor].add(loan.option)
    kept: dict[str, list[Family]] = {d.site: [] for d in data}
    for d, places in zip(data, picked, strict=True):
        methods = [d.options[at].method for at in places]
        for family in families[d.site]:
            at = [i for i, m in enumerate(family.settings) if m in methods]
            if at:
                some = family.settings[max(0, min(at) - 1) : max(at) + 2]
                kept[d.site].append(replace(family, settings=some))
    return kept


def head_ms(one: Measured, costs: CostTable, tokens: int, anew: float = 1.0) -> np.ndarray:
    """Milliseconds that each head adds at a length; lists are made in the share `anew` of calls."""
    heads = len(one.error)
    if one.ms is not None:
        return np.full(heads, one.ms / heads)
    each = costs.method_ms(one.method.kind, tokens, anew)[1] if anew else 0.0
    return each + own_ms(one, costs, tokens)


def own_ms(one: Measured, costs: CostTable, tokens: int) -> np.ndarray:
    """Milliseconds that each head's lists take at a length."""
    share = density_at(one, tokens)
    return lists_ms(costs, one.method.kind, one.parts, tokens, share, one.factor)


def density_at(one: Measured, tokens: int) -> np.ndarray:
    """Density at a length: straight lines on logarithmic axes between measured lengths."""
    known = sorted(one.density)
    if len(known) == 1:
        return one.density[known[0]]
    right = next((i for i, n in enumerate(known) if n >= tokens), len(known) - 1)
    a, b = known[max(right, 1) - 1], known[max(right, 1)]
    low, high = np.maximum(one.density[a], 1e-6), np.maximum(one.density[b], 1e-6)
    return np.minimum(low * (high / low) ** (np.log(tokens / a) / np.log(b / a)), 1.0)


def crossover(
    data: Sequence[SiteData], solution: Solution, costs: CostTable, tokens: int, shortest: int
) -> int:
    """The shortest length, in quarters of powers of two, from which the plan should win; shorter
    ones than `shortest` are not asked for.
    """
    least = tokens
    for n in sorted({int(256 * 2 ** (i / 4)) for i in range(64)}, reverse=True):
        if n > tokens:
            continue
        if least <= shortest:
            break
        ms = sum(ms_at(d, c, costs, n) for d, c in zip(data, solution.choices, strict=True))
        if ms >= len(data) * costs.dense_ms(n):
            break
        least = n
    return least


def ms_at(data: SiteData, choice: Choice, costs: CostTable, tokens: int) -> float:
    """Milliseconds of a place at another length."""
    if choice.dense:
        return costs.dense_ms(tokens)
    ms, paid, known = 0.0, dict[str, float](), dict[int, np.ndarray]()
    for h, at in enumerate(choice.heads):
        if choice.borrowed and choice.borrowed[h]:
            ms += float(head_ms(data.loans[choice.loan], costs, tokens, 0.0)[h])  # type: ignore[index]
        elif at == DENSE:
            ms += costs.ride_ms(tokens)
        else:
            one = data.options[at]
            if at not in known:
                known[at] = head_ms(one, costs, tokens)
            if one.family not in paid:
                paid[one.family] = _once(one, costs, tokens)
            ms += float(known[at][h])
    return ms + sum(paid.values())


def assemble(
    data: Sequence[SiteData],
    solution: Solution,
    fingerprint: Fingerprint,
    budget: Budget,
    tokens: int,
    limits: Limits,
    phase: Phase = "prefill",
) -> Plan:
    """The plan of a solution, without what the end-to-end check measures."""
    policies: list[Policy] = [Policy()]
    names: dict[Any, str] = {}
    tables: dict[str, torch.Tensor] = {}
    rules: dict[str, list[Rule]] = {}
    evidence: dict[str, dict[str, Evidence]] = {}

    def place(policy: Policy) -> int:
        if policy not in policies:
            policies.append(policy)
        return policies.index(policy)

    for d, choice in zip(data, solution.choices, strict=True):
        rows = []
        for h, at in enumerate(choice.heads):
            if choice.borrowed and choice.borrowed[h]:
                loan = d.table.loans[choice.loan]  # type: ignore[index]
                reuse = Reuse(site=data[loan.anchor].site, heads=loan.heads)
                rows.append(place(Policy(reuse=reuse)))
            elif at == DENSE:
                rows.append(0)
            else:
                one = d.options[at]
                method = one.method
                if one.field is not None:
                    family = (one.family, d.steps)
                    name = names.setdefault(family, f"p{len(names)}/{one.field}")
                    key = f"{d.site}/{name}"
                    densest = max(
                        getattr(o.method, one.field) for o in d.options if o.family == one.family
                    )
                    values = tables.setdefault(key, torch.full((d.table.heads,), float(densest)))
                    values[h] = getattr(one.method, one.field)
                    method = per_head(method, one.field, name) or method
                rows.append(place(Policy(methods=(method,))))
        mine = rules.setdefault(d.site, [])
        if not choice.dense:
            mine.append(Rule(phase=phase, steps=d.steps, policies=tuple(rows)))
        seen = _evidence(d, choice, tokens)
        evidence.setdefault(d.site, {})[evidence_key(phase, d.steps)] = seen
    sites = {
        site: LayerPlan(rules=tuple(some), evidence=_with_whole(evidence[site], phase))
        for site, some in rules.items()
    }
    plan = Plan(
        fingerprint=fingerprint,
        policies=tuple(policies),
        sites=sites,
        limits=limits,
        budget=budget,
    )
    return plan.with_tables(tables)


def _with_whole(seen: dict[str, Evidence], phase: str) -> dict[str, Evidence]:
    """Beside what was seen in shares of the steps, the sum: worst errors, mean densities."""
    if phase in seen:
        return seen
    parts = list(seen.values())
    dense = sum(e.dense_ms for e in parts)
    share = [e.dense_ms / dense for e in parts]
    whole = Evidence(
        tokens=parts[0].tokens,
        error=rounded(np.max([e.error for e in parts], axis=0).tolist()),
        recall=rounded(np.min([e.recall for e in parts], axis=0).tolist()),
        density=rounded(np.average([e.density for e in parts], axis=0, weights=share).tolist()),
        weight=rounded(np.sum([e.weight for e in parts], axis=0).tolist()),
        ms=round(sum(e.ms for e in parts), 5),
        dense_ms=round(dense, 5),
    )
    return {phase: whole, **seen}


def per_head(method: AttentionMethod, field: str, name: str) -> AttentionMethod | None:
    """The method with its dial read from a side tensor; None if the field takes numbers only."""
    try:
        return type(method).model_validate({**method.model_dump(), field: name})
    except ValidationError:
        return None


def _evidence(data: SiteData, choice: Choice, tokens: int) -> Evidence:
    t = data.table
    error, recall, density = [0.0] * t.heads, [1.0] * t.heads, [1.0] * t.heads
    for h, at in enumerate(choice.heads):
        if choice.borrowed and choice.borrowed[h]:
            one = data.loans[choice.loan]  # type: ignore[index]
        elif at == DENSE:
            continue
        else:
            one = data.options[at]
        error[h], recall[h] = float(one.error[h]), float(one.recall[h])
        density[h] = float(one.density[tokens][h])
    from accelkit.calibration.search import cost

    return Evidence(
        tokens=tokens,
        error=rounded(error),
        recall=rounded(recall),
        density=rounded(density),
        weight=rounded(t.weight.tolist()),
        ms=round(cost(t, choice), 5),
        dense_ms=round(t.dense_ms, 5),
    )


def _join(
    family: Family,
    method: AttentionMethod,
    rows: Sequence[Row],
    tokens: int,
    brief: Mapping[int, np.ndarray],
) -> Measured | None:
    """One setting over all prompts; None where a prompt found it hopeless or no long one ran it."""
    wanted = stored(method)
    parts: list[Parts] = []
    shares: dict[int, list[list[float]]] = {}
    errors, counted, recalls, ms = [], [], [], []
    for n, row, share in rows:
        found = row["families"].get(family.name)
        if found is None:
            continue  # the method leaves this prompt dense
        if wanted not in found["settings"]:
            return None
        at = found["settings"].index(wanted)
        errors.append(found["error"][at])
        counted.append(share * found["error"][at])
        recalls.append(found["recall"][at])
        shares.setdefault(n, []).append(found["density"][at])
        if n == tokens:
            parts.append(parts_of(found, at))
        if found["ms"][at] is not None and n == tokens:
            ms.append(found["ms"][at])
    if tokens not in shares:
        return None
    density = {**brief, **{n: np.mean(d, axis=0) for n, d in shares.items()}}
    field, name = family.field, family.name
    if field is not None and per_head(method, field, "name") is None:
        # Heads with other values cannot share a policy: each setting stands alone.
        name, field = f"{name} {field}={getattr(method, field)}", None
    return Measured(
        name, method, field, _mean_parts(parts), np.max(errors, axis=0),
        np.max(counted, axis=0), np.min(recalls, axis=0), density,
        float(np.mean(ms)) if ms else None,
    )  # fmt: skip


def _loans(
    places: Sequence[str],
    rows: Sequence[Row],
    earlier: Sequence[SiteData],
    tokens: int,
) -> tuple[list[Measured], list[tuple[int, int, tuple[int, ...]]]]:
    """Borrowed lists that every prompt measured, with their anchor, its option and the head map."""
    out: list[Measured] = []
    lent: list[tuple[int, int, tuple[int, ...]]] = []
    for loan in rows[0][1]["loans"] if rows else ():
        anchor = loan["anchor"]
        seen = [x | {"tokens": n, "share": s} for n, row, s in rows for x in row["loans"]]
        seen = [x for x in seen if x["anchor"] == anchor]
        longest = [x for x in seen if x["tokens"] == tokens]
        place = list(places).index(anchor)
        options = earlier[place].options
        option = next(
            (i for i, o in enumerate(options) if stored(o.method) == loan["setting"]), None
        )
        if len(seen) < len(rows) or option is None or not longest:
            continue
        out.append(
            Measured(
                f"reuse of {anchor}",
                options[option].method,
                None,
                ((tuple(loan["size"]), 1.0),),
                np.max([x["error"] for x in seen], axis=0),
                np.max([x["share"] * x["error"] for x in seen], axis=0),
                np.min([x["recall"] for x in seen], axis=0),
                {tokens: np.mean([x["density"] for x in longest], axis=0)},
                factor=options[option].factor,
            )
        )
        lent.append((place, option, tuple(loan["heads"])))
    return out, lent


def _between(family: Family, at: int, screen: Mapping[str, Any]) -> np.ndarray | None:
    """Density of a setting on the screening prompt: measured, or between its neighbours'."""
    names = [stored(m) for m in family.settings]
    known = [i for i, s in enumerate(screen["settings"]) if s in names]
    places = [names.index(screen["settings"][i]) for i in known]
    if not known:
        return None
    rows = np.array(screen["density"])[known]
    return np.array([np.interp(at, places, rows[:, h]) for h in range(rows.shape[1])])


def _once(one: Measured, costs: CostTable, tokens: int, anew: float = 1.0) -> float:
    launches = sum(costs.launch_ms(size) for size, _ in one.parts)
    return costs.method_ms(one.method.kind, tokens, anew)[0] + launches


def _mean_parts(some: Sequence[Parts]) -> Parts:
    """Units with their mean shares over prompts."""
    sizes = [size for size, _ in some[0]]
    return tuple(
        (size, np.mean([parts[i][1] for parts in some], axis=0)) for i, size in enumerate(sizes)
    )


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{v:.5g}") for v in values)
