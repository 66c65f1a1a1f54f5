"""Search and check in turns: a plan is predicted, run on held-out prompts, and ε follows.

A round first looks at the prompt that told most so far; all prompts are run only where that one
says that the plan uses most of the budget and stays within it. ε is found between the largest that
seemed to hold and the smallest that failed, for as long as the check may still run. What failed for
a cause of its own is learnt and tried again. The fastest plan that held on every prompt wins; if
none held, or none was faster, the plan is dense and says so.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from accelkit.calibration import session
from accelkit.calibration.session import Run
from accelkit.patches.plan import Plan

log = logging.getLogger("accelkit")
MARGIN = 0.9
"""Share of the budget that the next round aims at."""
FIRST = 1.0
"""ε of the first round ÷ the budget."""
DUE = 0.85
"""Share of the budget that a look has to expect for all prompts to be run."""
ENOUGH = 0.7
"""Share of the budget whose use by all prompts ends the rounds: checking the next plan on all of
them would cost more than it finds.
"""
CLOSE = 1.1
"""Rounds end when the largest ε that held and the smallest that failed are this close."""
SLOPES = (0.4, 1.0)
"""Least and most change of the logarithm of the error by that of ε which is believed."""
MIDDLE = (0.2, 0.8)
"""Between two values of ε the next one is at least and at most this share of the way."""
WIDEN = 8.0
"""Most by which one round may widen ε as long as no error was seen."""
STEP = 3.0
"""The same once one was, and most by which one narrows it: what follows from errors is not believed
far away from them.
"""
LAST = 2
"""Rounds beyond a preset's, which run all prompts if nothing has held, whatever room they leave."""
RESCUES = 3
"""Further rounds, each at a quarter of the smallest ε so far, if nothing has held."""
RESCUE = 4.0
LARGEST = 100.0
"""ε ÷ the budget beyond which no plan is looked for."""
WORTH = 0.98
"""Share of the dense sides' time from which a plan is not worth its error: readings differ by as
much.
"""


@dataclass(frozen=True)
class Proposal:
    """The cheapest plan within some ε, with its predicted error and milliseconds beside those of
    dense: of a prefill's attention, or of a whole denoising, whose step cache saves more than
    attention. Equal proposals have equal `choice`.
    """

    plan: Plan
    choice: Any
    ms: float
    dense_ms: float
    error: float
    dense: bool


@dataclass
class Round:
    """One proposal and its check. `rows` are the prompts that were run; a failure stops early.

    `measured` is the worst error of them; `bound`, at least that, what further ones may reach.
    `judged` says that it held or failed; without that, only some prompts were looked at. `looked`
    is the reach that a look expected of all, if it did not fail at once. `taught`: proposals of
    equal ε are others since. `apart`: it failed for a cause of its own, and its error says nothing
    of ε.
    """

    epsilon: float
    proposal: Proposal
    rows: list[dict[str, Any]] = field(default_factory=list)
    measured: float = 0.0
    bound: float = 0.0
    held: bool = False
    judged: bool = False
    looked: float = float("inf")
    taught: bool = False
    apart: bool = False

    @property
    def plan(self) -> Plan:
        return self.proposal.plan

    @property
    def failed(self) -> bool:
        return self.judged and not self.held

    @property
    def reach(self) -> float:
        """The error that must stay within the budget."""
        return max(self.measured, self.bound)


class Timer(Protocol):
    """Times plans."""

    def speed(self, plan: Plan) -> dict[str, float]:
        """`ms` and `dense_ms` of the whole run; `trimmed_ms`, where the plan trims the last layer
        beside its rules, of that alone.
        """


class Checker(Timer, Protocol):
    """Runs plans on held-out inputs."""

    def look(self, now: Round, allowed: float) -> None:
        """Run the input that told most so far and fill in the round's rows and errors, `bound` for
        all inputs; judged only if it failed.
        """

    def expect(self, now: Round) -> None:
        """Fill in the bound of a round that was only looked at anew, after checks of others."""

    def check(self, now: Round, allowed: float) -> None:
        """Run the inputs that are left until one fails, and judge whether the round held."""

    def affords(self) -> bool:
        """Whether another plan may be looked at, and one be checked on all inputs."""

    def seconds(self) -> float:
        """What a check of a plan on all inputs may take, its timing included."""


@dataclass(frozen=True)
class Outcome:
    """The fastest plan that held and its speed; without one, why the plan is dense."""

    rounds: tuple[Round, ...]
    best: Round | None = None
    speed: dict[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def composition(self) -> float:
        """κ of the rounds besides the best: what predicted the best one. What a round failed for is
        no longer in proposals once it has been learnt.
        """
        rest = [r for r in self.rounds if r is not self.best and r.proposal.error]
        rest = [r for r in rest if not r.taught] or rest
        return statistics.median([r.measured / r.proposal.error for r in rest]) if rest else 1.0


def in_turns(
    run: Run,
    propose: Callable[[float], Proposal],
    checker: Checker,
    allowed: float,
    learn: Callable[[Round, Sequence[Round]], bool] = lambda now, rounds: False,
    others: Sequence[Proposal] = (),
) -> Outcome:
    """Propose, look and check until ε is found. `learn` from a round that failed, beside all rounds
    so far, says whether proposals of equal ε are others now. `others` compete in the end.
    """
    turns = _Turns(checker, allowed, run.preset.rounds)
    epsilon, again = FIRST * allowed, False  # again: what was learnt has changed proposals
    while turns.open and epsilon <= LARGEST * allowed:
        rounds = turns.rounds
        name = f"round {len(rounds) + 1} of the end-to-end check"
        if run.late(0.9 if rounds else 1.0, name, checker.seconds()):
            break
        if turns.held and not checker.affords():
            break
        if turns.settled and not again:
            now = turns.largest()
            if now is None:
                if turns.bracket.low is not None and not turns.bracket.low[1]:
                    break  # plans are dense below what failed
                turns.bracket.below()
                epsilon = turns.bracket.next()
                continue
            epsilon = now.epsilon
        else:
            now = turns.look(epsilon, propose(epsilon))
        done = now.taught or turns.uses_enough(turns.below(now.epsilon))
        again = now.failed and not done and learn(now, rounds)
        if again:
            now.taught = True
            turns.most += 1
            continue
        turns.note(epsilon, now)
        if now.held and (now.reach >= ENOUGH * allowed or turns.bracket.closed):
            break
        epsilon = turns.next(now)
    waiting = bool(others) or any(not r.judged for r in turns.rounds)
    if waiting and not run.late(1.0, "plans that were only looked at", checker.seconds()):
        turns.end(others)
    for _ in range(RESCUES):
        late = partial(run.late, 0.9, "smaller errors for the check", checker.seconds())
        if turns.held or not turns.rounds or late():
            break
        turns.rescue(propose)
    found = fastest(turns.rounds, checker)
    if run.skipped and not turns.rounds:
        return replace(found, why="no time was left to check a plan")
    return found


class _Turns:
    """The rounds so far, and what they say of ε."""

    def __init__(self, checker: Checker, allowed: float, rounds: int) -> None:
        self.checker, self.allowed, self.most = checker, allowed, rounds + LAST
        self.rounds: list[Round] = []
        self.bracket = Bracket(allowed)
        self.looks_tell = True

    @property
    def held(self) -> list[Round]:
        return [r for r in self.rounds if r.held]

    @property
    def seemed(self) -> list[Round]:
        """Rounds that were only looked at and may hold, as far as is known by now."""
        return [r for r in self.rounds if not r.judged and r.reach <= self.allowed]

    @property
    def open(self) -> bool:
        """Whether a further round may find more."""
        done = self.bracket.closed and self.held
        return len(self.rounds) < self.most and not done

    @property
    def settled(self) -> bool:
        """Whether no ε is left to look at: then what seemed to fit is checked, and if nothing did,
        smaller ones follow.
        """
        return self.bracket.closed or (bool(self.seemed) and not self.checker.affords())

    def largest(self) -> Round | None:
        """The round of largest ε that was only looked at, checked; None: there is none."""
        now = self.below(float("inf"))
        if now is not None:
            self.check(now)
        return now

    def check(self, now: Round) -> None:
        """Judge a round, and what that says of those that were only looked at."""
        self.checker.check(now, self.allowed)
        for other in self.rounds:
            if not other.judged:
                self.checker.expect(other)

    def look(self, epsilon: float, proposal: Proposal) -> Round:
        """A round of this proposal, looked at, and checked where that tells more, or where its ε
        comes up again.
        """
        known = next((r for r in self.rounds if r.proposal.choice == proposal.choice), None)
        now = known or Round(epsilon, proposal)
        if proposal.dense:
            return now
        if known is None:
            self.rounds.append(now)
            self.checker.look(now, self.allowed)
            now.looked = float("inf") if now.judged else now.reach
        due = not self.looks_tell or now.reach >= DUE * self.allowed or not self.checker.affords()
        due = due or (now is known and now.epsilon == epsilon)
        if not now.judged and (due or (len(self.rounds) > self.most - LAST and not self.held)):
            self.check(now)
        return now

    def note(self, epsilon: float, now: Round) -> None:
        """Put a round into the bracket. Once one has failed that seemed to fit, looks tell nothing
        any more, and what else only seemed to fit is forgotten.
        """
        if now.proposal.dense:
            self.bracket.put(epsilon, 0.0, True)
            return
        if now.failed and now.looked <= self.allowed:
            self.bracket.restart([(r.epsilon, r.reach) for r in self.held])
            self.looks_tell = False
        self.bracket.put(epsilon, now.reach, not now.failed)

    def below(self, epsilon: float) -> Round | None:
        """The round of largest ε below this one that still seems to fit."""
        some = [r for r in self.seemed if r.epsilon < epsilon]
        return max(some, key=lambda r: r.epsilon, default=None)

    def uses_enough(self, some: Round | None) -> bool:
        """Whether there is such a round, and it should use enough of the budget: to learn from what
        failed beyond it costs more than it finds.
        """
        return some is not None and some.reach >= ENOUGH * self.allowed

    def next(self, now: Round) -> float:
        """The ε to look at next. After a failure, that is the largest one that still seems to fit,
        to be checked, where it should use enough of the budget by what is known now, or where the
        failure says nothing of ε. One that was looked at and uses enough comes before one that is
        a little larger.
        """
        low, high = self.bracket.low, self.bracket.high
        if now.failed and high is not None:
            best = self.below(high[0])
            if best is not None:
                apart = now.apart and (low is None or low[0] < best.epsilon)
                if apart or self.uses_enough(best):
                    return best.epsilon
        epsilon = self.bracket.next()
        if not now.failed:
            return epsilon
        seen = [r.epsilon for r in self.rounds if not r.judged and self.uses_enough(r)]
        return max((e for e in seen if epsilon / CLOSE < e <= epsilon), default=epsilon)

    def rescue(self, propose: Callable[[float], Proposal]) -> None:
        """Check a proposal that is far more careful than all before."""
        epsilon = min(r.epsilon for r in self.rounds) / RESCUE
        now = Round(epsilon, propose(epsilon))
        if not now.proposal.dense:
            self.rounds.append(now)
            self.check(now)

    def end(self, others: Sequence[Proposal]) -> None:
        """Check what was only looked at and further proposals, the fastest first, until one
        holds.
        """
        further = [Round(p.error, p) for p in others]
        for now in sorted([*self.rounds, *further], key=lambda r: r.proposal.ms):
            if not now.judged and now.reach <= self.allowed:
                if not now.rows:
                    self.rounds.append(now)
                self.check(now)
            if now.held:
                break


class Bracket:
    """Values of ε with the errors that they reached, and the next one to try."""

    def __init__(self, allowed: float) -> None:
        self.allowed = allowed
        self.points: list[tuple[float, float]] = []
        self.low: tuple[float, float] | None = None
        self.high: tuple[float, float] | None = None

    def put(self, epsilon: float, reach: float, fits: bool) -> None:
        """Note what `epsilon` reached, and whether that was within the budget."""
        point = (epsilon, reach)
        self.points.append(point)
        if fits and (self.low is None or self.low[0] < epsilon):
            self.low = point
        if not fits and (self.high is None or epsilon < self.high[0]):
            self.high = point
        # What failed at a smaller ε than this one makes luck of it.
        if self.low and self.high and self.high[0] <= self.low[0]:
            below = [p for p in self.points if p[0] < self.high[0]]
            self.low = max(below, default=None)

    def restart(self, points: Sequence[tuple[float, float]]) -> None:
        """Keep these alone of the values that fitted."""
        self.points = list(points)
        self.low = max(self.points, default=None)

    def below(self) -> None:
        """Look below the smallest that failed."""
        if self.high is not None:
            self.points, self.low = [self.high], None

    @property
    def closed(self) -> bool:
        """Whether nothing is left between what fits and what does not."""
        return bool(self.low and self.high and self.high[0] / self.low[0] < CLOSE)

    def next(self) -> float:
        """The ε at which the aim should be reached, on logarithmic axes."""
        aim = MARGIN * self.allowed
        if self.low is not None and self.high is not None:
            (a, found), (b, failed) = self.low, self.high
            share = 0.5
            # Right answers may be lost within the budget: then the error says nothing.
            if failed > self.allowed and 0 < found < aim:
                share = float(np.log(aim / found) / np.log(failed / found))
            return a * (b / a) ** float(np.clip(share, *MIDDLE))
        epsilon, reach = self.points[-1]
        change = (aim / max(reach, 1e-9)) ** (1 / self._slope())
        if self.high is None:
            blind = all(not p[1] for p in self.points)
            most = WIDEN if blind else STEP if reach else 2.0
            return epsilon * float(np.clip(change, CLOSE, most))
        if reach <= self.allowed:
            return epsilon / 2
        return epsilon * float(np.clip(change, 1 / STEP, 1 / CLOSE))

    def _slope(self) -> float:
        """How the error followed ε in the last two rounds; errors that hardly follow ask for larger
        changes of it.
        """
        known = [p for p in self.points if p[1]]
        if len(known) < 2 or known[-1][0] == known[-2][0]:
            return 1.0
        (e0, m0), (e1, m1) = known[-2:]
        return float(np.clip(np.log(m1 / m0) / np.log(e1 / e0), *SLOPES))


def fastest(rounds: Sequence[Round], timer: Timer) -> Outcome:
    """Of the rounds that held the one with the fastest plan, if it clearly beats dense."""
    held = sorted((r for r in rounds if r.held), key=lambda r: r.proposal.ms)
    for best in held:
        speed = timer.speed(best.plan)
        if speed["ms"] < WORTH * min(speed["dense_ms"], speed.get("trimmed_ms", np.inf)):
            return Outcome(tuple(rounds), best, speed)
    why = (
        "no plan was faster than dense attention"
        if held
        else "no sparse plan held within the budget"
        if rounds
        else "no method was predicted to be faster than dense attention"
    )
    return Outcome(tuple(rounds), why=why)


def outcome_numbers(found: Outcome, dense_ms: float) -> dict[str, Any]:
    """What a plan keeps of its rounds: errors, attention's milliseconds; why it is dense."""
    rounds = _rounds(found.rounds)
    if found.best is None:
        ms = {"ms": short(dense_ms), "dense_ms": short(dense_ms)}
        errors = {"predicted_error": 0.0, "measured_error": 0.0}
        return {**errors, **ms, "note": f"dense: {found.why}", "rounds": rounds}
    best, kappa = found.best, found.composition
    return {
        "predicted_error": short(kappa * best.proposal.error),
        "measured_error": short(best.measured),
        "further_error": short(best.reach),
        "composition": short(kappa),
        "ms": short(best.proposal.ms),
        "dense_ms": short(dense_ms),
        "attention_speedup": short(dense_ms / best.proposal.ms),
        "rounds": rounds,
    }


def _rounds(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    return [
        {
            "epsilon": short(r.epsilon),
            "predicted_error": short(r.proposal.error),
            "measured_error": short(r.measured),
            "further_error": short(r.reach),
            "predicted_ms": short(r.proposal.ms),
            "predicted_dense_ms": short(r.proposal.dense_ms),
            "prompts": len(r.rows),
            "held": r.held,
        }
        for r in rounds
    ]


def plan_digest(plan: Plan) -> str:
    """Key of a plan's choices: policies, rules and side tensors."""
    parts = [plan.model_dump_json(include={"policies", "sites", "limits"}).encode()]
    parts += [k.encode() + session.bare(v) for k, v in sorted(plan.tables.items())]
    return session.digest(parts)


def short(value: float) -> float:
    """Five digits, as plans hold numbers."""
    return float(f"{value:.5g}")
