"""Which head loses an answer, found by halves: with which heads dense, or as in a plan that does
not lose it, is it given?

A head that looks up one key for one row is harmless on average, and its error on the prompts to
measure on, or on this one, says little about the one row that needed the key. The row need not be
that of the answer: a head may have lost there what later heads look for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from accelkit.calibration.search import DENSE, Choice, Option, Table

TIMES = 4.0
"""By which factor the errors of a blamed head's family are raised: search then prefers another
family, or much denser settings.
"""
BANNED = 1e4
"""The same for the setting that it ran, and for those with larger errors: none of them is tried
again.
"""
Head = tuple[int, int]
"""Site, by its place in the tables, and head."""


def culprit(
    choices: Sequence[Choice],
    mends: Callable[[Sequence[Choice]], bool],
    fine: Sequence[Choice] | None = None,
) -> Head | None:
    """The sparse head that spoils a prompt, if it is a single one; `mends` tells whether choices
    with some heads as in `fine`, which does not spoil it, do better; without it, with some heads
    dense. None: no head differs.
    """
    left = [
        (site, h)
        for site, choice in enumerate(choices)
        for h in range(len(choice.heads))
        if _runs(choice, h) not in (DENSE, None if fine is None else _runs(fine[site], h))
    ]
    while len(left) > 1:
        half = left[: len(left) // 2]
        left = half if mends(mended(choices, half, fine)) else left[len(half) :]
    return left[0] if left else None


def _runs(choice: Choice, h: int) -> Any:
    """What a head runs: an option's place, a loan's as a pair, or DENSE."""
    return (choice.loan,) if choice.borrowed and choice.borrowed[h] else choice.heads[h]


def mended(
    choices: Sequence[Choice], heads: Collection[Head], fine: Sequence[Choice] | None = None
) -> tuple[Choice, ...]:
    """The choices with some heads as in `fine`, or dense where there is none or it borrows."""
    return tuple(
        _mended(c, {h for s, h in heads if s == site}, None if fine is None else fine[site])
        for site, c in enumerate(choices)
    )


def raised(
    tables: Sequence[Table],
    choices: Sequence[Choice],
    blamed: Head,
    fine: Sequence[Choice] | None = None,
) -> list[Table]:
    """The tables with larger errors of one head in the family, or with the loan, that it ran; not
    of settings at least as exact as the one that it runs in `fine`.
    """
    site, h = blamed
    table, choice = tables[site], choices[site]
    if choice.borrowed and choice.borrowed[h]:
        loans = [_more(x, h, BANNED) if n == choice.loan else x for n, x in enumerate(table.loans)]
        changed = replace(table, loans=tuple(loans))
    else:
        ran = table.options[choice.heads[h]]
        good = DENSE if fine is None else fine[site].heads[h]
        known = good != DENSE and table.options[good].family == ran.family
        least = table.options[good].error[h] if known else -1.0

        def times(x: Option) -> float:
            if x.family != ran.family or x.error[h] <= least:
                return 1.0
            return BANNED if x.error[h] >= ran.error[h] else TIMES

        changed = replace(table, options=tuple(_more(x, h, times(x)) for x in table.options))
    return [changed if n == site else t for n, t in enumerate(tables)]


def _mended(choice: Choice, heads: set[int], fine: Choice | None) -> Choice:
    def good(h: int) -> int:
        lent = fine is None or (fine.borrowed and fine.borrowed[h])
        return DENSE if fine is None or lent else fine.heads[h]

    kept = tuple(good(h) if h in heads else at for h, at in enumerate(choice.heads))
    borrowed = tuple(b and h not in heads for h, b in enumerate(choice.borrowed))
    return Choice(kept, choice.loan, borrowed) if any(borrowed) else Choice(kept)


def _more(row: Any, h: int, times: float) -> Any:
    """An option or a loan with the error of one head raised."""
    error = row.error.copy()
    error[h] *= times
    return replace(row, error=error)
