"""What a method costs beside the kernels that read its lists, or why it cannot win here.

Choosing is timed twice: with nothing known, and with the estimates that an earlier call left, which
is selection alone. Order and merging are timed over pieces that are computed already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from accelkit.calibration.candidates import arithmetic_only, calibrated_settings, families, prime
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit.inputs import Shape, fresh
from accelkit.kernels.cost import Check, CostTable, MethodCost, Points, interpolate
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.select import density
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import PLAIN, Answer, answer, compute, in_kernel_order, run

MOST = 0.8
"""A method whose estimate alone takes this share of dense attention is refused."""
MOST_BRIEF = 0.5
"""The same in a search, which hardly takes a method that could halve attention at best, and on a
CPU.
"""
Size = tuple[int, int]
Lists = tuple[tuple[Size, list[float]], ...]
"""Units, each with the share of the visible pairs that a method lists for every head."""
LEAST_LISTS = 0.05
"""Share of a measurement that is left to the lists when launches seem to take all of it, and least
factor of rows and pairs.
"""
ALIKE, ALIKE_ON_CPU = 0.25, 0.75
"""Weight of the belief that the factors of rows and pairs are alike, beside that of a reading: on a
CPU, readings are disturbed by as much as lists of two densities differ.
"""
Clocked = Callable[..., float]
"""Milliseconds of a piece of work, given it and how often to run it."""


@dataclass(frozen=True)
class Found:
    """A method's cost without the factors of its lists; by length its lists and the milliseconds
    of their kernels, at the middle of its dial and thinner; units of its variants; whether its
    lists are made once.
    """

    cost: MethodCost
    lists: Mapping[int, Sequence[tuple[Lists, float]]]
    others: Sequence[Size]
    kept: bool

    @property
    def sizes(self) -> list[Size]:
        """Every unit of its lists and its variants' lists."""
        seen = chain(*self.lists.values())
        return [size for own, _ in seen for size, _ in own] + list(self.others)


def _summed(terms: Mapping[str, Points]) -> Points:
    """What the terms take together at each length."""
    each = zip(*terms.values(), strict=True)
    return tuple((at[0][0], sum(ms for _, ms in at)) for at in each)


def cost(
    method: AttentionMethod,
    calls: Mapping[int, AttentionCall],
    dense: Points,
    clocked: Clocked,
    shape: Shape,
    *,
    thin: bool = False,
    brief: bool = False,
) -> Found | str:
    """Cost of a method's estimate, selection, order and merging at the lengths of `calls`, and of
    the kernels over its lists; with `thin` over thinner ones, too. Or why it is refused. `brief`:
    estimate and selection are not told apart and read once, kernels at the longest call alone.
    """
    setting, longest = middle(method), max(calls)

    def once(run: Callable[[], Any], _: int = 1) -> float:
        return clocked(run, 1)

    found: dict[str, list[tuple[int, float]]] = {t: [] for t in MethodCost.TERMS}
    own: dict[int, list[tuple[Lists, float]]] = {}
    ms = once if brief else clocked
    for n, bare in calls.items():
        try:
            call, now = prepared(bare, method, setting)
            answers = asked(call, now)
            if answers is None:
                continue
            one = answers[0]
            if not units(answers):
                return "it computes its pieces by itself, which the cost table cannot predict"
            # Static lists are made once for all layers and, in a denoiser, for all steps and runs.
            share = 1.0 if not method.static else 1 / shape.layers if call.causal else 0.0
            chosen = [share * each for each in choosing(call, now, one, ms, brief)]
            most = MOST_BRIEF if brief or not call.q.is_cuda else MOST
            if reason := _hopeless(found, (n, sum(chosen)), call, longest, dense, most):
                return reason
            if n < longest and call.q.device.type == "cpu" and one.execution != PLAIN:
                return "skipping tiles and 8-bit products save no time on a CPU"
            if n == longest and (reason := no_faster(one, method, interpolate(dense, n), clocked)):
                return reason
            spent = (*chosen, permutation(call, one, ms))
            for term, each in zip(found.values(), spent, strict=True):
                term.append((n, each))
            if n == longest or not brief:
                fewer = thinner(method) if thin and now == setting else None
                own[n] = _both_lists(call, one, now, fewer, clocked)
        except Exception as error:  # a method that fails must not end the calibration of the others
            return f"it does not run here: {type(error).__name__}: {error}"
    if not own:
        return f"it leaves prompts of {longest} tokens dense"
    terms = {name: tuple(points) for name, points in found.items()}
    summed = _summed(terms)
    common = _share(now, call, summed[-1][1], ms)
    others = other_units(method, bare) if bare.causal else []
    return Found(MethodCost(summed, common, terms=terms), own, others, method.static)


def _hopeless(
    found: Mapping[str, Sequence[tuple[int, float]]],
    now: tuple[int, float],
    call: AttentionCall,
    longest: int,
    dense: Points,
    most: float,
) -> str | None:
    """Why a method whose choosing takes so many milliseconds at a length cannot win at the longest,
    where it may take the share `most` of dense attention. What it took at two lengths goes on at
    least as fast.
    """
    n, ms = now
    before = (
        [sum(found[t][-1][1] for t in ("estimator", "selection"))] if found["estimator"] else []
    )
    # On a CPU nothing is launch-bound; on a GPU one short call says nothing of longer ones.
    grown = ms * (longest / n if call.q.device.type == "cpu" else 1.0)
    if before and call.q.is_cuda:
        grown = max(ms, interpolate([(found["estimator"][-1][0], before[0]), now], longest))
    if grown <= most * interpolate(dense, longest):
        return None
    whole = interpolate(dense, n)
    return f"choosing takes {ms:.1f} ms at {n} tokens, dense attention {whole:.1f} ms"


def asked(call: AttentionCall, method: AttentionMethod) -> tuple[Answer, ...] | None:
    """What a method answers to a call that nobody has estimated yet; a method with a memory, once
    that is filled.
    """
    policy = Policy(methods=(method,))
    answers = answer(fresh(call), policy)
    if answers is not None and method.renewed(call.clock.total):
        prime(answers)
        answers = answer(fresh(call), policy)
    return answers


def units(answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """Units of the lists of what a method answered first."""
    return [p.size for a in answers[:1] for p in a.pieces if isinstance(p, BlockIndex)]


def lists(one: Answer, method: AttentionMethod, ms: Clocked) -> tuple[Lists, float]:
    """The lists of an answer and the milliseconds that their kernels take."""
    found = [p for p in one.pieces if isinstance(p, BlockIndex)]

    def kernels() -> None:
        for p in found:
            # What kernels keep with a list lasts as long as the list: lists that follow from
            # geometry are made once, others anew in every layer.
            run(one.call, p if method.static else replace(p), one.execution)

    return own_lists(one), ms(kernels)


def _both_lists(
    call: AttentionCall,
    one: Answer,
    method: AttentionMethod,
    fewer: AttentionMethod | None,
    ms: Clocked,
) -> list[tuple[Lists, float]]:
    """The lists of an answer and, where there is one, of a thinner setting's, as `lists` has
    them.
    """
    found = [lists(one, method, ms)]
    if fewer is not None and (answers := asked(call, fewer)) is not None:
        found.append(lists(answers[0], fewer, ms))
    return found


def own_lists(one: Answer) -> Lists:
    """Units of an answer's lists, each with its density by head."""
    found = [p for p in one.pieces if isinstance(p, BlockIndex)]
    return tuple((p.size, density([p], one.call).tolist()) for p in found)


def beside_random(
    table: CostTable, tokens: int, seen: Sequence[tuple[Lists, float]], kept: bool = False
) -> tuple[float, float]:
    """What lists took ÷ what `table` predicts for random ones of the same densities, without the
    launches: of their rows, and of the pairs in them. Lists that are thinner than others tell the
    two apart; as far as they do not, both are alike. `kept`: of lists that ran before.
    """
    parts = []
    for own, took in seen:
        launches = sum(table.launch_ms(size, kept) for size, _ in own)
        rows = sum(table.rows_ms(size, tokens) * len(each) for size, each in own)
        heads = sum(table.head_ms(size, tokens, d) for size, each in own for d in each)
        spent = max(took - launches, LEAST_LISTS * took)
        parts.append((rows / spent, (heads - rows) / spent))
    thinnest = parts[-1][0]
    if not any(map(sum, parts)):
        return 1.0, 1.0
    alike = thinnest * (ALIKE_ON_CPU if table.device == "cpu" else ALIKE)
    x = np.array([*parts, (alike, -alike)])
    found = np.linalg.lstsq(x, np.array([1.0] * len(parts) + [0.0]), rcond=None)[0]
    of_rows, of_pairs = found.clip(LEAST_LISTS).tolist()
    return of_rows, of_pairs


def checked(
    table: CostTable,
    method: AttentionMethod,
    bare: AttentionCall,
    ms: Clocked,
    setting: AttentionMethod | None = None,
) -> Check | None:
    """A whole call of a method, or of one of its settings, with all that a layer pays for, beside
    what the table says of it. None where it stays dense or has arithmetic of its own.
    """
    call, now = prepared(bare, method, setting or middle(method))
    answers = asked(call, now)
    if answers is None or answers[0].execution != PLAIN:
        return None
    one, policy = answers[0], Policy(methods=(now,))

    def whole() -> None:
        # Lists that were made before meet rows in token order, as they do in a layer.
        kept = (_laid_out(one, fresh(call)),) if now.static else ()
        for a in kept or answer(fresh(call), policy) or ():
            compute(a)

    own, n = own_lists(one), call.n_q
    want = table.call_ms(now.kind, n, own, 0.0 if now.static else 1.0)
    share = float(sum(sum(each) for _, each in own)) / len(call.heads)
    return Check("call", now.kind, n, len(call.heads), share, want, ms(whole))


def _laid_out(one: Answer, call: AttentionCall) -> Answer:
    """An answer for another call, whose rows are still in token order."""
    return one if one.order is None else replace(one, call=in_kernel_order(call, one.order))


def other_units(method: AttentionMethod, call: AttentionCall) -> list[tuple[int, int]]:
    """Units of the variants that a method's calibrator names without having seen a call."""
    found: list[tuple[int, int]] = []
    for family in families(method.calibrator(call.site).settings()):
        variant = family.settings[len(family.settings) // 2]
        dial = {family.field or ""}
        if variant.model_dump(exclude=dial) == method.model_dump(exclude=dial):
            continue
        answers = answer(fresh(call), Policy(methods=(variant,)))
        found += units(answers) if answers else []
    return found


def middle(method: AttentionMethod) -> AttentionMethod:
    """The method at the middle of its dial."""
    dial = method.dial
    if dial is None:
        return method
    return method.model_copy(update={dial.field: dial.values[len(dial.values) // 2]})


def thinner(method: AttentionMethod) -> AttentionMethod | None:
    """The method near the thin end of its dial, if that lies before the middle."""
    dial = method.dial
    if dial is None or len(dial.values) < 4:
        return None
    return method.model_copy(update={dial.field: dial.values[1]})


def ends(method: AttentionMethod) -> list[AttentionMethod]:
    """The method at both ends of its dial."""
    dial = method.dial
    values = () if dial is None else (dial.values[0], dial.values[-1])
    return [method.model_copy(update={dial.field: v}) for v in values if dial is not None]


def prepared(
    call: AttentionCall, method: AttentionMethod, setting: AttentionMethod
) -> tuple[AttentionCall, AttentionMethod]:
    """The call with the side tensors that the method's calibrator makes of it, and a setting that
    reads them; both as they are for a method without any.
    """
    if type(method).calibrator is AttentionMethod.calibrator or call.causal:
        return call, setting
    dense = dense_attention(call)
    families, tables = calibrated_settings([method], call.site, call, dense)
    if not tables:
        return call, setting
    settings = families[len(families) // 2].settings
    return replace(call, tables={**call.tables, **tables}), settings[len(settings) // 2]


def precisions(one: Answer, method: AttentionMethod) -> list[Any]:
    """The answer's 8-bit arithmetic and every other that the method's calibrator names."""
    if one.execution.qk == "native":
        return []
    settings = chain(*(f.settings for f in families(method.calibrator(one.call.site).settings())))
    others = (e for s in settings if (e := s.execution(one.call)) is not None)
    return [one.execution, *(e for e in others if e.qk != "native" and e != one.execution)]


def no_faster(one: Answer, method: AttentionMethod, whole: float, ms: Clocked) -> str | None:
    """Why 8-bit products are not offered for such a call: none of the method's precisions,
    quantising included, beats dense attention and, where the method leaves keys out, the same lists
    in the inputs' own.
    """
    named = precisions(one, method)
    if not named:
        return None
    least, other = whole, "dense attention"
    if not arithmetic_only(method):
        native = replace(one.execution, qk="native", pv="native", smooth_k=False)
        own = ms(lambda: compute(replace(one, execution=native)), 2)
        least, other = min((least, other), (own, "the inputs' own"))
    spent = {(e.qk, e.pv): ms(lambda e=e: compute(replace(one, execution=e)), 2) for e in named}
    (qk, pv), best = min(spent.items(), key=lambda s: s[1])
    if best < least:
        return None
    return f"8-bit products take {best:.2f} ms ({qk} QK, {pv} PV), {other} {least:.2f} ms"


def choosing(
    call: AttentionCall, method: AttentionMethod, one: Answer, ms: Clocked, brief: bool = False
) -> tuple[float, float]:
    """Milliseconds of a method's estimate and of its selection. Estimates of rows in another order
    are not left with the call and count as selection; on a CPU, where they would be timed for
    seconds, or `brief`, everything counts as estimate.
    """
    policy, moved = Policy(methods=(method,)), _moved(call, one, ms)
    whole = max(0.0, ms(lambda: answer(fresh(call), policy)) - moved)
    if brief or not call.q.is_cuda:
        return whole, 0.0
    known = fresh(call)
    answer(known, policy)
    selection = min(max(0.0, ms(lambda: answer(known, policy)) - moved), whole)
    return whole - selection, selection


def permutation(call: AttentionCall, one: Answer, ms: Clocked) -> float:
    """Milliseconds of laying out rows, merging, putting rows back and finishing."""
    return _moved(call, one, ms) + around(one, ms)


def _moved(call: AttentionCall, one: Answer, ms: Clocked) -> float:
    """Milliseconds of laying out the rows in the answer's order."""
    order = one.order
    return 0.0 if order is None else ms(lambda: in_kernel_order(fresh(call), order))


def around(one: Answer, ms: Clocked) -> float:
    """What order, merging and finishing add to the kernels of the pieces."""
    if one.order is None and len(one.pieces) == 1 and not one.finishers:
        return 0.0
    pieces = [p if isinstance(p, Partial) else run(one.call, p, one.execution) for p in one.pieces]
    return ms(partial(compute, replace(one, pieces=tuple(pieces))))


def _share(method: AttentionMethod, call: AttentionCall, whole: float, ms: Clocked) -> float:
    """How much of the cost remains when one KV group takes part instead of all heads."""
    groups = call.k.shape[1]
    if groups == 1 or method.static:
        return 1.0
    few = call.heads[: len(call.heads) // groups]
    part = ms(lambda: answer(fresh(call).take(few), Policy(methods=(method,))), 2)
    # whole = a + b, part = a + b / groups
    fixed = (part * groups - whole) / (groups - 1)
    return min(1.0, max(0.0, fixed / whole)) if whole else 1.0
