"""Stages of measuring that prefill and denoising share: the fit, which families are worth the long
prompts, and how much each head weighs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from accelkit.calibration.candidates import Family, lists_ms, parts_of
from accelkit.calibration.evaluation import quality
from accelkit.calibration.fit import fit
from accelkit.calibration.session import Run
from accelkit.kernels.cost import CostTable
from accelkit.patches.method import AttentionMethod, load

TOLERANCES = (0.02, 0.05, 0.1, 0.2)
"""Errors of a head at which families are compared after screening."""
LEAST_GAIN = 0.003
"""Share of a layer's time by which another family lowers it, if it is worth measuring."""
DOUBT = {"cpu": 0.3}
"""Share by which prices on short prompts may be too high, by device: other programs disturb a CPU,
and what a method does for each tile weighs more on a short prompt.
"""
VARIANTS = {"cpu": 2}
"""Families of one method that are kept, where prices are in doubt: they are wrong together."""
LEAST_WEIGHT = 0.1
"""Share of the median weight that no head is below: noise that seems to do nothing was drowned."""
Probe = Callable[[Sequence[str]], quality.Show]
"""What runs to weigh the heads of some places."""
PROBES = 2048
"""Heads that get noise of their own; models with more share probes among neighbours."""


_tables: dict[Hashable, dict[str, Any]] = {}
"""Cost tables of this process's GPUs."""


def fitted(
    run: Run,
    shape: fit.Shape,
    dtype: torch.dtype,
    tokens: int,
    methods: Sequence[AttentionMethod],
    room: int | None = None,
) -> CostTable:
    """The cost table of this device; `room` as in `fit`. A GPU's is the same for all calibrations
    of a process.
    """
    run.tell("timing kernels and methods")
    brief = run.device.type == "cuda"  # CPUs time few lengths anyway
    # Nothing is timed once more: a search has better use for the time.
    work = partial(
        fit.fit, shape, dtype, run.device, tokens, methods, limit_s=0.0, brief=brief, room=room
    )
    key = (shape, dtype, run.device, tokens, *(f"{m.kind} {m.model_dump_json()}" for m in methods))

    def known() -> dict[str, Any]:
        if not brief:
            return work().to_dict()
        if key not in _tables:
            _tables[key] = work().to_dict()
        return _tables[key]

    return CostTable.from_dict(run.journal.unit("fit", known))


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
    the tolerated errors: each head runs the cheapest setting of any of them, or dense. Beside the
    first one, others are judged as if they cost less by what a price may be in doubt, and few of
    them are of the same method.
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
        factor = costs.on_prompts.get(name, 1.0)
        cost = np.array(
            [
                each + lists_ms(costs, kind, parts_of(f, at), tokens, row, factor)
                if clocked is None
                else [each + clocked * grown] * len(row)
                for at, (row, clocked) in enumerate(zip(share, f["ms"], strict=True))
            ]
        )
        ms[name] = np.array([np.where(error <= t, cost, np.inf).min(0) for t in tolerances])
    chosen: list[str] = []
    best: Any = costs.ride_ms(tokens)
    sure, variants = 1.0 - DOUBT.get(costs.device, 0.0), VARIANTS.get(costs.device, most)
    kinds = {name: found[name]["settings"][0]["kind"] for name in ms}
    while len(chosen) < most:
        taken = Counter(kinds[n] for n in chosen)
        rest = [n for n in ms if n not in chosen and taken[kinds[n]] < variants]
        if not rest:
            break
        least = {n: np.minimum(best, (sure if chosen else 1.0) * ms[n]).sum() for n in rest}
        first = min(rest, key=lambda n: (float(least[n]) + len(tolerances) * once[n], n))
        if chosen and least[first] > (1 - LEAST_GAIN) * best.sum():
            break
        chosen.append(first)
        best = np.minimum(best, ms[first])
    return [family_of(n, found[n]) for n in chosen]


def weighed(
    run: Run,
    heads: Mapping[str, int],
    probes: Sequence[Probe],
    left_out: Callable[[str], quality.LeftOut | None] = lambda place: None,
) -> dict[str, list[float]]:
    """Weight of every head of each place, the worst over the probes; see `probed` and `worst`."""
    return worst(heads, probed(run, heads, probes, left_out))


def probed(
    run: Run,
    heads: Mapping[str, int],
    probes: Sequence[Probe],
    left_out: Callable[[str], quality.LeftOut | None] = lambda place: None,
    most: int = 1,
    exact: bool = False,
) -> list[dict[str, list[float]]]:
    """Weight of every head of each place on each probe; `probe(places)` is what runs,
    `left_out(place)` what disturbs there instead of noise. Places share a forward of at most `most`
    entries. In an `exact` model nothing is rounded to half precision. Those that time did not allow
    are not there.
    """
    every = max(1, -(-sum(heads.values()) // PROBES))
    groups = {
        place: [list(range(h, min(h + every, count))) for h in range(0, count, every)]
        for place, count in heads.items()
    }
    found: list[dict[str, list[float]]] = [{} for _ in probes]
    for some in _shared(groups, most, exact):
        for n, probe in enumerate(probes):
            key = f"weight/{n}/{some[0]}"
            if key not in run.journal and run.late(0.7, "weights of some sites"):
                continue
            run.tell("weighing heads")
            mine = {place: groups[place] for place in some}
            work = partial(_weigh, probe, mine, left_out, exact)
            for place, weights in run.journal.unit(key, work).items():
                found[n][place] = [weights[h // every] for h in range(heads[place])]
    return found


def _shared(groups: Mapping[str, Sequence[Any]], most: int, exact: bool) -> list[list[str]]:
    """Places whose groups fit into one forward of `most` entries, at least one place each."""
    found: list[list[str]] = []
    room = 0
    for place, some in groups.items():
        entries = quality.entries_of(some, exact)
        if not found or entries > room:
            found.append([])
            room = most - 1  # one without noise
        found[-1].append(place)
        room -= entries
    return found


def worst(
    heads: Mapping[str, int], found: Sequence[Mapping[str, Sequence[float]]]
) -> dict[str, list[float]]:
    """Weight of every head of each place, the worst over some probes, none below a share of the
    median, which places have that no probe saw.
    """
    known = {
        place: np.max([one[place] for one in found if place in one], axis=0)
        for place in heads
        if any(place in one for one in found)
    }
    middle = float(np.median(np.concatenate(list(known.values())))) if known else 1.0
    least = LEAST_WEIGHT * middle
    return {
        place: np.maximum(known.get(place, np.full(count, middle)), least).tolist()
        for place, count in heads.items()
    }


def _weigh(
    probe: Probe,
    groups: Mapping[str, Sequence[Sequence[int]]],
    left_out: Callable[[str], quality.LeftOut | None],
    exact: bool,
) -> dict[str, list[float]]:
    return quality.site_weights(probe(list(groups)), groups, left_out, exact)


def family_of(name: str, record: Mapping[str, Any]) -> Family:
    """A family as the journal holds it."""
    settings: list[Any] = []
    for row in record["settings"]:
        fields = dict(row)
        settings.append(load(fields.pop("kind")).model_validate(fields))
    return Family(name, tuple(settings), record["field"])
