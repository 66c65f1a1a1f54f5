"""The search for step caches: which settings are run, in which order, and when it ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from accelkit.calibration.denoise import caches as denoise_caches
from accelkit.calibration.denoise.caches import Cached
from accelkit.errors import UnsupportedModelError
from accelkit.patches.method import load

PLACES = {"a@0": 2, "a@1": 2}
SECONDS = 3.0


@pytest.fixture
def ran(monkeypatch) -> list[Any]:
    """Runs whose error follows the dial: the third densest of its values has 0.09, and what lies
    between that and the next sparser one at a third of the way 0.1.
    """
    seen: list[Any] = []

    def run(_: Any, small: Any, cache: Any) -> Cached:
        if cache.kind == "mag_cache":
            raise UnsupportedModelError("not here")
        seen.append(cache)
        values = cache.dial.values  # from sparsest to densest
        line = sorted(zip(values, range(len(values), 0, -1), strict=True))
        at = float(np.interp(getattr(cache, cache.dial.field), *zip(*line, strict=True)))
        return Cached(cache, 0.03 * at, dict.fromkeys(PLACES, 1 / (1 + at)), SECONDS)

    monkeypatch.setattr(denoise_caches, "_run", run)
    monkeypatch.setattr(denoise_caches, "_fitted", lambda run, small, cache: cache)
    return seen


def options(afford: float) -> tuple[list[Cached], dict[str, str]]:
    run = SimpleNamespace(late=lambda share, what: False)
    small = SimpleNamespace(seen=SimpleNamespace(calls=PLACES, places=[*PLACES], total=200))
    names = ("first_block_cache", "mag_cache", "step_schedule", "taylor_seer")
    return denoise_caches.options(run, small, [load(n)() for n in names], 0.1, afford)  # type: ignore[arg-type]


def test_techniques_take_turns_and_end_when_the_time_is_up(ran) -> None:
    """What knows the model begins, and what has found the least work within 0.1 goes on: all begin
    with a value of error 0.09.
    """
    found, refused = options(4 * SECONDS)
    kinds = [c.kind for c in ran]
    assert kinds == ["step_schedule", "step_schedule", "first_block_cache", "taylor_seer"]
    assert [c.share for c in ran[:2]] == [0.5, 0.3], "the first held, the second did not"
    assert refused == {"mag_cache": "not here"}
    assert found[0].method is None
    ran.clear()
    options(0.5 * SECONDS)
    assert len(ran) == 1, "one is run in any case"


def test_without_a_limit_every_variant_is_bisected(ran) -> None:
    found, _ = options(float("inf"))
    assert [c.kind for c in ran].count("first_block_cache") == denoise_caches.RUNS
    assert {c.lite for c in ran if c.kind == "taylor_seer"} == {True, False}
    values = load("step_schedule").dial.values
    held = [c for c in found if c.method and c.method.kind == "step_schedule" and c.error <= 0.1]
    best = min(held, key=lambda c: c.left["a@0"])
    assert best.method.share not in values, "the sparsest that holds lies between them"
    assert best.error > 0.095


def test_of_what_is_alike_the_one_that_knows_more_is_kept() -> None:
    small = SimpleNamespace(seen=SimpleNamespace(calls=PLACES, total=20))

    def one(kind: str, error: float, work: float) -> Cached:
        return Cached(load(kind)(), error, dict.fromkeys(PLACES, work))

    def kept(*some: Cached) -> list[Cached]:
        found = denoise_caches._front([none, *some], ["step_schedule", "mag_cache"], small)  # type: ignore[arg-type]
        assert found.pop(0) is none
        return found

    none = Cached(None, 0.0, dict.fromkeys(PLACES, 1.0))
    fixed, mag = one("step_schedule", 0.11, 0.4), one("mag_cache", 0.1, 0.4)
    assert kept(mag, fixed) == [fixed]
    assert kept(one("mag_cache", 0.09, 0.4), fixed)[1:] == [fixed], "less by more than a sixth"
    assert kept(one("mag_cache", 0.1, 0.38), fixed) == [fixed], "within half a step"
    sparser = one("mag_cache", 0.11, 0.35)
    assert kept(sparser, fixed) == [sparser], "no more error and a whole step less"
    assert kept(one("mag_cache", 0.12, 0.4), fixed) == [fixed]
