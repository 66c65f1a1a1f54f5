"""What is measured once the tables stand: full rows of the settings that search is about to choose,
and held-out prompts that stand out.

An eighth of the query tiles tells the errors of hundreds of settings. Search picks those that look
best, and so those that the eighth flatters, or the prices. What it picks near the budget, at most
four settings of a head, is therefore run once more as a plan runs it: all heads of a layer with
their mixture, every query row; and, on a CPU, clocked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration.assemble import SiteData, assemble
from accelkit.calibration.candidates import Family, stored
from accelkit.calibration.capture import capture
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.prefill import prices
from accelkit.calibration.prefill.measure import judged_rows
from accelkit.calibration.search import DENSE, Choice, Solution, predicted, search
from accelkit.calibration.session import Run
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import facts
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.patch import PatchHandle
from accelkit.patches.plan import Budget, Limits

PASSES = (0.5, 1.0, 2.0), (1.0,)
"""Predicted errors ÷ ε at which search names the finalists, at most four of a head: at first, and
anew where full rows told more than they were thought to.
"""
CLOCKED = (1.0, 2.0), (1.5,)
"""The same where they are clocked, so that each takes several runs: plans mostly end in between,
for errors cancel in part.
"""
SURPRISE = 1.1
"""Predicted error with full rows ÷ the one before from which finalists are named anew."""
BROKEN = 1e3
"""Error of what is not finite."""
Ran = tuple[Sequence[float], float | None]
"""Errors of the heads of a choice, and what it took ÷ dense attention if that was clocked."""


@dataclass
class Errors:
    """Of a place on one prompt: `[H]` for each option and loan, by their places in its table; NaN
    for heads that were not measured. `shares` is what choices took ÷ dense attention beside them.
    """

    options: dict[int, np.ndarray] = field(default_factory=dict)
    loans: dict[int, np.ndarray] = field(default_factory=dict)
    shares: dict[Choice, float] = field(default_factory=dict)


def with_full_rows(
    run: Run,
    prefix: str,
    sample: Sample,
    data: Sequence[SiteData],
    epsilon: float,
    weights: Mapping[str, Sequence[float]],
    costs: CostTable,
    tokens: int,
    clocked: bool = True,
) -> list[SiteData]:
    """The tables with what full rows of a prompt, on which the heads have these weights, say of the
    finalists around `epsilon`: errors and, where they are `clocked`, prices; journal units begin
    with `prefix`.
    """
    data = told = list(data)
    shares: list[dict[Choice, float]] = [{} for _ in data]
    known: list[set[Choice]] = [set() for _ in data]
    # On a GPU calls one by one wait for the host, as those of a model do not.
    clocked = clocked and run.device.type == "cpu"
    for n, times in enumerate(CLOCKED if clocked else PASSES):
        key = f"{prefix}{n}/"
        with run.planning(f"finalists of {key}"):
            some = finalists(data, [t * epsilon for t in times])
        errors = full_rows(run, key, sample, data, some, tokens, known, clocked)
        for mine, e in zip(shares, errors, strict=True):
            mine.update(e.shares)
        told = worse(told, errors, weights)
        data = prices.as_they_ran(told, shares, costs, tokens)
        # Prices that were clocked lead search to others, which look cheap for want of a clock.
        priced = any(e.shares for e in errors)
        if not priced and all(_predicted(data, s) <= SURPRISE * s.error for s in some):
            break
        for seen, choices in zip(known, zip(*(s.choices for s in some), strict=True), strict=True):
            seen.update(choices)
    return data


def finalists(data: Sequence[SiteData], epsilons: Sequence[float]) -> list[Solution]:
    """The different plans that search chooses, but for a dense one."""
    tables, fronts = [d.table for d in data], dict[str, Any]()
    found = {s.choices: s for s in (search(tables, e, fronts) for e in epsilons)}
    return [s for s in found.values() if not all(c.dense for c in s.choices)]


def _predicted(data: Sequence[SiteData], solution: Solution) -> float:
    return predicted([d.table for d in data], solution.choices)


def full_rows(
    run: Run,
    prefix: str,
    sample: Sample,
    data: Sequence[SiteData],
    some: Sequence[Solution],
    tokens: int,
    known: Sequence[Collection[Choice]],
    clocked: bool = True,
) -> list[Errors]:
    """Errors on every query row of a prompt, and apart on its scored rows, when each layer runs as
    in the plans of these solutions for `tokens`; the larger of the two counts. What is `known` of a
    place is not run again; what runs may be `clocked`. A journal unit for each place, its key
    beginning with `prefix`.
    """
    fingerprint, order = facts(run.model)[0], [d.site for d in data]
    plans = [assemble(data, s, fingerprint, Budget(), tokens, Limits()) for s in some]
    handles = [PatchHandle(plan, run.model) for plan in plans]
    ran = [
        dict.fromkeys(c for c in (s.choices[n] for s in some) if not c.dense and c not in seen)
        for n, seen in enumerate(known)
    ]
    keys = {path: f"{prefix}{path}" for path, choices in zip(order, ran, strict=True) if choices}
    waiting = {path for path, key in keys.items() if key not in run.journal}
    scored = torch.from_numpy(judged_rows(run, sample)).to(run.device)

    def see(call: AttentionCall, dense: Partial) -> None:
        path = call.site.path
        mine = ran[order.index(path)]

        def work() -> list[Ran | None]:
            runs = dict[Choice, Callable[[], Tensor | None]]()
            for handle, solution in zip(handles, some, strict=True):
                choice = solution.choices[order.index(path)]
                if choice in mine and choice not in runs:
                    runs[choice] = partial(handle.run, call)
                else:
                    lend(handle)
            each = [runs[c] for c in mine]
            outs: Iterable[Tensor | None] = (run() for run in each)
            shares: Sequence[float | None] = [None for _ in each]
            if clocked:
                outs, shares = prices.beside_dense(call, each)
            return [
                None if out is None else (_errors(out, dense.out, scored), share)
                for out, share in zip(outs, shares, strict=True)
            ]

        def lend(handle: PatchHandle) -> None:
            """Leave lists for later sites."""
            if path in handle.state.anchors:
                handle.run(call)

        if path in waiting:
            run.tell("measuring all rows of finalists")
            run.journal.unit(keys[path], work)
        else:
            for handle in handles:
                lend(handle)

    if waiting:
        lenders = set().union(*(h.state.anchors for h in handles))
        needed = waiting | lenders
        capture(run.model, sample.ids, see, lambda path: path in needed, run.dense_rows)
    return [
        _of_choices(dict(zip(ran[n], run.journal[keys[path]], strict=True)))
        if path in keys
        else Errors()
        for n, path in enumerate(order)
    ]


def _errors(found: Tensor, true: Tensor, scored: Tensor) -> list[float]:
    """Relative L1 error of each head of `found` `[B, N, H, D]` against `true` `[B, H, N, D]`."""
    errors = []
    for h in range(true.shape[1]):  # one at a time takes no memory to speak of
        size = true[:, h].float()
        gap = (found[:, :, h] - size).abs().sum((0, 2))
        size = size.abs().sum((0, 2))
        places = [slice(None)] + ([scored] if scored.numel() else [])
        each = [gap[at].sum() / size[at].sum().clamp(min=1e-30) for at in places]
        errors.append(torch.stack(each).nan_to_num(BROKEN, BROKEN).max())
    return [float(f"{e:.6g}") for e in torch.stack(errors).tolist()]


def _of_choices(rows: Mapping[Choice, Ran | None]) -> Errors:
    """What a unit says of the options and loans that its choices ran."""
    found = Errors()
    for choice, row in rows.items():
        errors, share = row or ((), None)
        if share is not None:
            found.shares[choice] = share
        for h, error in enumerate(errors):
            lent = bool(choice.borrowed) and choice.borrowed[h]
            at = choice.loan if lent else choice.heads[h]
            if at is not None and at != DENSE:
                mine = found.loans if lent else found.options
                mine.setdefault(at, np.full(len(choice.heads), np.nan))[h] = error
    return found


def listed(
    data: Sequence[SiteData],
    families: Mapping[str, Sequence[Family]],
    unit: Mapping[str, Any],
) -> list[Errors]:
    """Errors of options and loans on a further prompt that was measured as the first ones were, one
    unit a place. What is sparser than a setting found hopeless is at least as bad as that.
    """
    found = []
    for d in data:
        rows: dict[AttentionMethod, list[float]] = {}
        for family in families[d.site]:
            record = unit[d.site]["families"].get(family.name)
            if record is not None:
                known = dict(zip(map(str, record["settings"]), record["error"], strict=True))
                least = record["error"][0]
                rows |= {m: known.get(str(stored(m)), least) for m in family.settings}
        lent = {row["anchor"]: row["error"] for row in unit[d.site]["loans"]}
        loans = {n: lent.get(data[x.anchor].site) for n, x in enumerate(d.table.loans)}
        found.append(
            Errors(
                {n: np.array(rows[o.method]) for n, o in enumerate(d.options) if o.method in rows},
                {n: np.array(row) for n, row in loans.items() if row is not None},
            )
        )
    return found


def worse(
    data: Sequence[SiteData], errors: Sequence[Errors], weights: Mapping[str, Sequence[float]]
) -> list[SiteData]:
    """The tables with the larger of the errors that they hold and those of one prompt, on which the
    heads have these weights.
    """
    found = []
    for d, e in zip(data, errors, strict=True):
        share = np.array(weights[d.site]) / d.table.weight
        table = replace(
            d.table,
            options=_raised(d.table.options, e.options, "error", share),
            loans=_raised(d.table.loans, e.loans, "error", share),
        )
        seen = [
            _raised(_raised(rows, new, "error"), new, "counted", share)
            for rows, new in ((d.options, e.options), (d.loans, e.loans))
        ]
        found.append(replace(d, table=table, options=seen[0], loans=seen[1]))
    return found


def _raised(
    rows: Sequence[Any], errors: Mapping[int, np.ndarray], name: str, share: Any = 1.0
) -> tuple[Any, ...]:
    """Rows with the field `name` at least as large as a share of the errors."""
    return tuple(
        replace(x, **{name: np.fmax(getattr(x, name), share * errors[n])}) if n in errors else x
        for n, x in enumerate(rows)
    )
