"""A fit on a CPU that other programs disturb."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelkit.calibration import timing
from accelkit.calibration.fit import fit, turns
from accelkit.calibration.fit.inputs import Shape
from accelkit.kernels.cost import CostTable

CPU = torch.device("cpu")


def test_each_piece_has_the_mean_of_its_readings(monkeypatch) -> None:
    readings = iter([10.0, 1.0, 4.0, 8.0, 5.0])
    monkeypatch.setattr(turns, "steady_ms", lambda _: next(readings))
    clock = turns.Timer()
    assert [clock(lambda: None) for _ in range(2)] == [10.0, 1.0]
    clock.begin()
    assert [clock(lambda: None) for _ in range(3)] == [7.0, 4.5, 5.0]


class Machine:
    """A clock that runs of one millisecond and probes of half a one move on, as far as other
    programs let them.
    """

    def __init__(self, monkeypatch, busy) -> None:
        self.now, self.runs, self.busy = 0.0, 0, busy
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timing, "scaled_dot_product_attention", lambda *_, **__: self(0.5))
        clock = timing.Steady()
        monkeypatch.setattr(timing, "_clock", lambda _: clock)

    def __call__(self, ms: float = 1.0) -> None:
        self.runs += ms == 1.0
        self.now += ms / 1e3 * self.busy(self.runs)


def test_a_busy_while_does_not_make_a_run_dear(monkeypatch) -> None:
    """Twice as slow from the tenth run to the twentieth; only the first of them looks dear."""
    clock = Machine(monkeypatch, lambda n: 2.0 if 10 <= n < 20 else 1.0)
    took = [timing.steady_ms(clock) for _ in range(30)]
    assert took == pytest.approx([2.0 if n == 10 else 1.0 for n in range(1, 31)])


def test_probes_are_made_anew_after_a_pause(monkeypatch) -> None:
    slow = False
    clock = Machine(monkeypatch, lambda n: 3.0 if slow else 1.0)
    assert timing.steady_ms(clock) == pytest.approx(1.0)
    slow, clock.now = True, clock.now + 2 * timing.FRESH_S
    assert timing.steady_ms(clock) == pytest.approx(1.0)


def test_a_fit_reads_everything_in_turns(monkeypatch) -> None:
    """What two turns read is read once by each, one turn after the other."""
    ran: list[float] = []

    def fitted(count: int, ms: Callable[[], float]) -> CostTable:
        ran.clear()
        monkeypatch.setattr(turns, "TURNS", (count, count))

        def reading(run: Callable[[], Any]) -> float:
            run()
            ran.append(ms())
            return ran[-1]

        monkeypatch.setattr(turns, "steady_ms", reading)
        return fit.fit(Shape(2, 1, 16, 1, 1), torch.float32, CPU, 1024, (), limit_s=0.0)

    once = fitted(1, lambda: 1.0)
    turn = len(ran)
    twice = fitted(2, lambda: 1.0 if len(ran) < turn else 3.0)
    assert len(ran) == 2 * turn > 2
    assert once.dense_ms(1024) == 1.0
    assert twice.dense_ms(1024) == twice.ride_ms(1024) * 2 == 2.0
