"""A fit on a CPU that other programs disturb."""

from __future__ import annotations

import torch

from accelkit.calibration.fit import fit, turns
from accelkit.calibration.fit.inputs import Shape
from accelkit.kernels.cost import CostTable

CPU = torch.device("cpu")


def test_each_piece_keeps_its_least_reading(monkeypatch) -> None:
    readings = iter([10.0, 1.0, 4.0, 8.0, 5.0])
    monkeypatch.setattr(turns, "times_ms", lambda *_: (next(readings),))
    clock = turns.Timer(CPU)
    assert [clock(lambda: None) for _ in range(2)] == [10.0, 1.0]
    clock.begin()
    assert [clock(lambda: None) for _ in range(3)] == [4.0, 1.0, 5.0]


def test_a_busy_while_does_not_make_a_unit_dear(monkeypatch) -> None:
    """One whole turn in which everything takes longer, by more and more, changes nothing."""
    count = 0

    def fitted(busy: range) -> CostTable:
        nonlocal count
        count = 0

        def reading(run, *_) -> tuple[float]:
            nonlocal count
            count += 1
            run()
            return (1.0 + (count if count in busy else 0),)

        monkeypatch.setattr(turns, "times_ms", reading)
        return fit.fit(Shape(2, 1, 16, 1, 1), torch.float32, CPU, 1024, (), limit_s=0.0)

    calm = fitted(range(0))
    assert calm.dense_ms(1024) == 1.0
    turn = count // turns.TURNS[0]
    assert fitted(range(1, turn + 1)) == calm
    assert fitted(range(turn + 1, 2 * turn + 1)) == calm
