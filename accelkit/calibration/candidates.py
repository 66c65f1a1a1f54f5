"""Asks every method what is worth trying at a site, runs it as it will run later, and measures.

A family is a method with all fields fixed but its dial; the settings of a family share an
estimate. The error of a head is `Σ|o − ô| / Σ|o|` against dense on a stratified eighth of the query
tiles and, apart, on tiles with scored positions; the larger of the two counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration.timing import answers_ms
from accelkit.errors import InvalidInputError
from accelkit.kernels.cost import CostTable
from accelkit.kernels.index import BlockIndex, Partial, ceil_div
from accelkit.kernels.select import density
from accelkit.patches import method as registry
from accelkit.patches.call import AttentionCall, Phase, Site
from accelkit.patches.method import AttentionMethod, Method
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import (
    PLAIN,
    Answer,
    answer,
    compute,
    in_kernel_order,
    joined,
)

SHARE = 8
"""One query tile in this many is looked at."""
HOPELESS = 0.5
"""A head whose error is above this is not tried at sparser settings."""
Parts = Sequence[tuple[tuple[int, int], Any]]
"""Units, each with its share of the computed pairs, one number or `[H]`."""
USEFUL = (0.002, 0.3)
"""Errors of a head that a plan may want; below and above, settings are all alike."""
SMALL_JUMP = 0.3
"""Difference of logarithms of two neighbours' errors between which no value is added."""
ROUNDS = 8
"""Most settings of a family that are measured at a site."""
ROW = ("error", "recall", "density", "ms", "size", "parts")
"""What is measured of a setting."""
MOST_TOGETHER = 1 << 26
"""Numbers in the outputs of the settings that share a launch on a GPU: launches of small calls take
the host longer than the device, those of large calls take memory.
"""
JUDGED_BYTES = 4
"""Bytes that judging takes beside a setting's outputs, for each number in them: several fp32 copies
of a part of the rows.
"""
REUSE_UNIT = 16
"""Lists of at least this many keys a block can be lent to later layers."""


@dataclass(frozen=True)
class Family:
    """Settings of one method, from sparsest to densest, that differ in `field` only."""

    name: str
    settings: tuple[AttentionMethod, ...]
    field: str | None

    @property
    def values(self) -> list[float]:
        """The dial's values; empty without a dial."""
        return [getattr(m, self.field) for m in self.settings] if self.field else []


def chosen_methods(
    methods: Sequence[str | Method | type[Method]] | None, phase: Phase = "prefill"
) -> list[AttentionMethod]:
    """The methods to try: names, classes or instances; None is every one at hand for the phase.

    Raises:
        InvalidInputError: one of them is no attention method for the phase.
        UnknownMethodError: no method of that name.
    """
    found = []
    for wish in registry.names() if methods is None else methods:
        cls = registry.load(wish) if isinstance(wish, str) else wish
        made = cls() if isinstance(cls, type) else cls
        able = made.answers() & {"index", "execution"}
        if isinstance(made, AttentionMethod) and phase in made.phases and able:
            found.append(made)
        elif methods is not None:
            raise InvalidInputError(
                f"method {made.kind!r} does not select keys in {phase}; calibration cannot try it"
            )
    if not found:
        raise InvalidInputError("methods is empty; name at least one, or None for all")
    return found


def arithmetic_only(method: Method) -> bool:
    """Whether a method computes every pair, in other arithmetic; a dial would leave some out."""
    return method.answers() == {"execution"} and method.dial is None


def families(settings: Iterable[Method]) -> list[Family]:
    """Group what a calibrator named by method and fixed fields."""
    groups: dict[str, list[AttentionMethod]] = {}
    for m in settings:
        fixed = m.model_dump(mode="json", exclude_defaults=True)
        if m.dial is not None:
            fixed.pop(m.dial.field, None)
        text = json.dumps(fixed, sort_keys=True)
        groups.setdefault(m.kind + (text if fixed else ""), []).append(m)  # type: ignore[arg-type]
    return [
        Family(name, tuple(ms), ms[0].dial.field if ms[0].dial and len(ms) > 1 else None)
        for name, ms in groups.items()
    ]


def thinned(family: Family, most: int) -> Family:
    """At most `most` settings, spread over the dial with both ends."""
    n = len(family.settings)
    if n <= most:
        return family
    keep = sorted({round(i * (n - 1) / (most - 1)) for i in range(most)}) if most > 1 else [n // 2]
    return Family(family.name, tuple(family.settings[i] for i in keep), family.field)


def finer(
    settings: Sequence[AttentionMethod], field: str, error: Sequence[Sequence[float]]
) -> tuple[int, AttentionMethod] | None:
    """A setting to insert, with its place, where the errors `[setting][head]` jump most from one
    value of the dial to the next. None: no jump is worth it.
    """
    level = [float(np.log(np.median(np.clip(row, *USEFUL)))) for row in error]
    gaps = sorted(((abs(a - b), -i) for i, (a, b) in enumerate(pairwise(level))), reverse=True)
    for gap, place in gaps:
        at = -place
        low, high = getattr(settings[at], field), getattr(settings[at + 1], field)
        value = between(low, high)
        if gap < SMALL_JUMP:
            return None
        if value not in (low, high):
            return at + 1, settings[at].model_copy(update={field: value})
    return None


def between(low: float, high: float) -> float:
    """A value half-way: of the logarithms for numbers far apart, of those of the complements for
    shares close to one.
    """
    a, b = sorted((low, high))
    if isinstance(low, int) and isinstance(high, int):
        return round((a * b) ** 0.5 if a > 0 and b > 2 * a else (a + b) / 2)
    if a > 0 and b > 2 * a:
        value = (a * b) ** 0.5
    elif b < 1 and 1 - a > 2 * (1 - b):
        value = 1 - ((1 - a) * (1 - b)) ** 0.5
    else:
        value = (a + b) / 2
    return float(f"{value:.4g}")


class Bench:
    """One site's dense call, on which candidates are measured.

    A method that now and then runs dense to renew its memory is measured at a later step; `primed`
    says that the call's memory is that of an earlier one, and it renews itself within `steps`
    (None: all of the run's). `shelf` keeps what follows from geometry alone, and from the scored
    rows, for other calls of the same shape. Clocked milliseconds are those of `batch` such calls.
    Settings that share a launch on a GPU find `room` bytes enough.
    """

    def __init__(
        self,
        call: AttentionCall,
        dense: Partial,
        scored: np.ndarray,
        primed: bool = False,
        shelf: dict[Any, Any] | None = None,
        batch: int = 1,
        steps: int | None = None,
        room: int | None = None,
    ) -> None:
        self.call, self.dense, self.primed = call, dense, primed
        self.room = room
        self.steps = call.clock.total if steps is None else steps
        self.shelf, self.batch = shelf, batch
        self.scored = torch.from_numpy(scored).to(call.q.device)
        self._tiles: dict[Any, tuple[Tensor, Tensor, Tensor]] = (
            {} if shelf is None else shelf.setdefault("tiles", {})
        )
        self.lent: dict[Method, BlockIndex] = {}
        # What is known of settings that are about to be measured.
        self._asked: dict[Method, tuple[Answer, ...] | None] = {}
        self._rows: dict[Method, dict[str, Any]] = {}
        # Rows of which only the clock tells the time, with their key on the shelf.
        self._unclocked: list[tuple[Any, dict[str, Any], Answer]] = []

    def tiles(self, height: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query tiles of `height` rows to compute, and the positions in them that are judged: of
        the stratified ones, and the scored ones.
        """
        n, key = self.call.n_q, (height, self.call.n_q)
        if key not in self._tiles:
            count = ceil_div(n, height)
            wanted = min(count, max(2, ceil_div(count, SHARE)))
            device = self.scored.device
            spread = ((torch.arange(wanted, device=device) + 0.5) * count / wanted).long()
            last = torch.unique(self.scored // height)[-max(1, wanted // 2) :]
            rows = torch.unique(torch.cat([spread, last]))
            even = (spread[:, None] * height + torch.arange(height, device=device)).flatten()
            scored = self.scored[torch.isin(self.scored // height, last)]
            self._tiles[key] = (rows, even[even < n], scored)
        return self._tiles[key]

    def families(self, some: Iterable[Family], most: int | None = None) -> dict[str, Any]:
        """Measure several families; see `family`. `most` None: no values between."""
        some = list(some)
        self._together([m for f in some for m in f.settings])
        found = {f.name: self.family(f, len(f.settings) if most is None else most) for f in some}
        self._asked.clear()
        self._rows.clear()
        return {name: one for name, one in found.items() if one is not None}

    def family(self, family: Family, most: int) -> dict[str, Any] | None:
        """Measure the settings of a family, from densest to sparsest, then values between them up
        to `most` settings. None: the method leaves this call dense. Lists are `[setting][head]`.
        """
        settings: list[AttentionMethod] = []
        rows: list[dict[str, Any]] = []
        for method in reversed(family.settings):
            row = self._setting(method)
            if row is None:
                continue
            settings.insert(0, method)
            rows.insert(0, row)
            if len(rows) == ROUNDS or min(row["error"]) > HOPELESS:
                break
        while family.field and len(rows) < min(most, ROUNDS):
            found = finer(settings, family.field, [r["error"] for r in rows])
            row = None if found is None else self._setting(found[1])
            if found is None or row is None:
                break
            settings.insert(*found)
            rows.insert(found[0], row)
        self._clock()
        if not rows:
            return None
        return {
            "settings": [stored(m) for m in settings],
            "field": family.field,
            **{k: [r[k] for r in rows] for k in ROW},
        }

    def _together(self, settings: Sequence[AttentionMethod]) -> None:
        """Ask for the lists of all settings, and measure those that can share a launch in one."""
        most = most_together(self.call, self.room)
        if most < 2:
            return
        lanes: dict[Any, list[AttentionMethod]] = {}
        for m in settings:
            if m.renewed(self.steps):
                continue
            answers = self._asked[m] = self.answers(m)
            kind = answers[0].kind if answers is not None and len(answers) == 1 else None
            if kind is not None:
                lanes.setdefault(kind, []).append(m)
        for lane in lanes.values():
            for n in range(0, len(lane), most):
                self._in_one(lane[n : n + most])

    def _in_one(self, settings: Sequence[AttentionMethod]) -> None:
        """Measure settings whose lists share a launch."""
        asked = [self._asked[m] for m in settings]
        one = joined([answers[0] for answers in asked if answers is not None])
        found = {**self._one(one), "density": one.density()}
        numbers = {k: v.reshape(len(settings), -1) for k, v in found.items()}
        parts, heads = _parts((one,)), len(self.call.heads)
        for n, m in enumerate(settings):
            row = {k: _numbers(v[n]) for k, v in numbers.items()}
            own = parts and [[unit, of[n * heads : (n + 1) * heads]] for unit, of in parts]
            self._rows[m] = {**row, "ms": None, "size": list(one.index.size), "parts": own}

    def _setting(self, method: AttentionMethod) -> dict[str, Any] | None:
        renewed = method.renewed(self.steps)
        answers = self._asked.pop(method) if method in self._asked else self.answers(method)
        row = self._rows.pop(method, None)
        if answers is not None and renewed and not self.primed:
            prime(answers)
            answers = answer(self.call, Policy(methods=(method,)))
        if answers is None:
            return None
        if row is None:
            row = self.measure(answers, self.shelf if method.static else None, method)
        row["density"] = [renewed + (1 - renewed) * d for d in row["density"]]
        one = answers[0]
        if one.execution != PLAIN:
            # Skipping and low precision save what no index shows: only the clock tells.
            # What computes all pairs takes as long in every call of a shelf.
            key = ("clock", repr(one.execution), one.call.heads)
            self._unclocked.append((key if arithmetic_only(method) else None, row, one))
        piece = one.pieces[0]
        in_order = one.plain
        if in_order and isinstance(piece, BlockIndex) and piece.size[1] >= REUSE_UNIT:
            self.lent[method] = piece
        return row

    def answers(self, method: AttentionMethod) -> tuple[Answer, ...] | None:
        """What a method answers to the call; what follows from geometry alone is kept."""
        if self.shelf is None or not method.static:
            return answer(self.call, Policy(methods=(method,)))
        if method not in self.shelf:
            found = answer(self.call, Policy(methods=(method,)))
            self.shelf[method] = found and tuple(replace(a, call=None) for a in found)  # type: ignore[arg-type]
        kept = self.shelf[method]
        return kept and tuple(for_call(a, self.call) for a in kept)

    def measure(
        self,
        answers: tuple[Answer, ...],
        shelf: dict[Any, Any] | None = None,
        name: Any = None,
    ) -> dict[str, Any]:
        """Error, recall and density per head of what a policy answered. Densities of the answers
        `name` are kept on a shelf.
        """
        order = [self.call.heads.index(h) for a in answers for h in a.call.heads]
        shares = None if shelf is None else shelf.get(("density", name))
        if shares is None:
            shares = [a.density() for a in answers]
            if shelf is not None:
                shelf["density", name] = shares
        parts = [{**self._one(a), "density": d} for a, d in zip(answers, shares, strict=True)]
        back = torch.tensor(order).argsort()
        size = answers[0].pieces[0].size if isinstance(answers[0].pieces[0], BlockIndex) else None
        return {
            **{
                k: _numbers(torch.cat([p[k] for p in parts])[back])
                for k in ("error", "recall", "density")
            },
            "ms": None,
            "size": list(size or (128, 128)),
            "parts": _parts(answers),
        }

    def _one(self, a: Answer) -> dict[str, Tensor]:
        at = [self.call.heads.index(h) for h in a.call.heads]
        # Pieces that are computed already have every row.
        heights = {p.size[0] for p in a.pieces if isinstance(p, BlockIndex)}
        order = a.order if a.order is not None and a.order.q_table is not None else None
        # Rows that lie in another order are judged there, if all of them are there.
        there = order is not None and order.whole and not self.scored.numel()
        partly = len(heights) == 1 and not a.finishers
        partly = partly and (order is None or there)
        rows, even, scored = self.tiles(max(heights) if partly else 128)
        part = compute(
            replace(a, order=None) if there and partly else a, rows=rows if partly else None
        )
        true = self.dense
        heads = None if at == list(range(len(self.call.heads))) else at
        if there and partly:
            assert order is not None
            true = Partial(_of_heads(true.out, heads), _of_heads(true.lse, heads))
            heads = None
            ids = order.q_table[order.row.long()]  # type: ignore[index]
            ids = (ids if ids.ndim == 3 else ids[None])[:, :, even]
            ids = ids.expand(true.out.shape[0], -1, -1).long()
            out = true.out.gather(2, ids[..., None].expand(*ids.shape, true.out.shape[3]))
            part = Partial(part.out[:, :, even], part.lse[:, :, even])
            true = Partial(out, true.lse.gather(2, ids))
            even = torch.arange(len(even), device=even.device)
        # Heads after rows: several settings' copies of dense rows would take as much as they do.
        errors = [_error(part, true, places, heads) for places in (even, scored) if places.numel()]
        lse, dense = part.lse[:, :, even].float(), _of_heads(true.lse[:, :, even], heads)
        recall = (lse - dense).clamp(max=0.0).exp().nan_to_num(0.0).mean((0, 2))
        return {"error": torch.stack(errors).amax(0).cpu(), "recall": recall.cpu()}

    def _clock(self) -> None:
        """Fill in the milliseconds of the rows that lack them."""
        shelf = {} if self.shelf is None else self.shelf
        new = [u for u in self._unclocked if u[0] not in shelf]
        for (key, row, _), ms in zip(new, answers_ms([u[2] for u in new], self.batch), strict=True):
            row["ms"] = ms
            if key is not None:
                shelf[key] = ms
        for key, row, _ in self._unclocked:
            row["ms"] = shelf.get(key, row["ms"])
        self._unclocked.clear()


def most_together(call: AttentionCall, room: int | None = None) -> int:
    """How many settings of a call may share a launch, whose outputs and judged rows find `room`
    bytes enough.
    """
    numbers = call.n_q * len(call.heads) * call.v.shape[-1]
    if not call.q.is_cuda or not numbers:
        return 1
    most, each = MOST_TOGETHER // numbers, numbers * (call.v.element_size() + JUDGED_BYTES)
    return most if room is None else min(most, room // each)


def for_call(a: Answer, call: AttentionCall) -> Answer:
    """An answer with its lists and order, for another call of the same shape."""
    call = call if a.call is None else call.take(a.call.heads)
    return replace(a, call=call if a.order is None else in_kernel_order(call, a.order))


def _parts(answers: Sequence[Answer]) -> list[Any] | None:
    """Units of several lists, each with its share of every head's computed pairs: one kernel's pair
    may cost several times another's. None: one list.
    """
    listed = [p for p in answers[0].pieces if isinstance(p, BlockIndex)]
    if len(answers) > 1 or len(listed) < 2:
        return None
    shares = torch.stack([density(p, answers[0].call).cpu() for p in listed])
    shares /= shares.sum(0).clamp(min=1e-9)
    return [[list(p.size), _numbers(row)] for p, row in zip(listed, shares, strict=True)]


def parts_of(record: Mapping[str, Any], at: int) -> Parts:
    """Units of a measured setting, each with its share of the computed pairs by head."""
    found = record.get("parts")
    if not found or found[at] is None:
        return ((tuple(record["size"][at]), 1.0),)
    return tuple((tuple(size), np.array(shares)) for size, shares in found[at])


def lists_ms(
    costs: CostTable,
    kind: str,
    parts: Parts,
    tokens: int,
    shares: Sequence[float] | np.ndarray,
    factor: float | np.ndarray = 1.0,
) -> np.ndarray:
    """Milliseconds that each head's lists take at its density, `factor` times what the table says.
    On a CPU their pairs are no cheaper than dense attention's, which has the same kernel.
    """
    shares = np.asarray(shares)
    ms = factor * np.sum([costs.lists_ms(kind, s, tokens, shares * part) for s, part in parts], 0)
    return np.maximum(ms, shares * costs.ride_ms(tokens)) if costs.device == "cpu" else ms


def _error(
    part: Partial, dense: Partial, places: Tensor, heads: Sequence[int] | None = None
) -> Tensor:
    """Relative L1 error of each head at some rows, fp32 `[H]`; `heads` of the dense call, all of
    them unless given.
    """
    true = _of_heads(dense.out[:, :, places].float(), heads)
    size = true.abs().sum((0, 2, 3))
    gap = (part.out[:, :, places].float() - true).abs_().sum((0, 2, 3))
    return (gap / size.clamp(min=1e-30)).nan_to_num(1e3, 1e3)


def _of_heads(t: Tensor, heads: Sequence[int] | None) -> Tensor:
    return t if heads is None else t[:, heads]


def prime(answers: Sequence[Answer]) -> None:
    """Run a method's renewing step, so that its memory holds what later steps live on."""
    for a in answers:
        compute(a)


def calibrated_settings(
    methods: Sequence[AttentionMethod],
    site: Site,
    call: AttentionCall,
    dense: Partial,
    suffix: str = "",
) -> tuple[list[Family], dict[str, Tensor]]:
    """What each method's calibrator names after it saw one dense call, and the side tensors that
    the settings read, whose names get `suffix`.
    """
    found: list[Method] = []
    tables: dict[str, Tensor] = {}
    for m in methods:
        calibrator = m.calibrator(site)
        calibrator.see(call, dense.out, dense.lse)
        mine = calibrator.tables()
        tables |= {k + suffix: v for k, v in mine.items()}
        for setting in calibrator.settings():
            named = {k: v + suffix for k, v in setting if isinstance(v, str) and v in mine}
            found.append(setting.model_copy(update=named) if named else setting)
    return families(found), tables


def stored(method: Method) -> dict[str, Any]:
    """A method as plain data, as the journal and the plan hold it."""
    return {"kind": method.kind, **method.model_dump(mode="json")}


def _numbers(values: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.tolist()]
