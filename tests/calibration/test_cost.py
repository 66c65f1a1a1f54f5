"""The cost table: coefficients are found again, lengths interpolated, data survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from accelkit.calibration import fit, fit_inputs, fit_methods
from accelkit.kernels.cost import (
    CostTable,
    Kernel,
    MethodCost,
    interpolate,
    least_squares,
    visible_pairs,
)

TABLE = CostTable(
    "cpu", "float32", 4, 2, 64, ((1024, 1.0), (4096, 16.0)), ((1024, 1.2), (4096, 17.0)),
    {"128x128": Kernel(0.5, 0.01, 2.0), "64x1": Kernel(0.1, 0.02, 5.0)},
    {"m": MethodCost(((1024, 0.5), (4096, 2.0)), 0.25)}, {"n": "too slow"},
)  # fmt: skip

SMALL = fit.Shape(2, 1, 16)


def test_json_round_trip() -> None:
    assert CostTable.from_dict(json.loads(json.dumps(TABLE.to_dict()))) == TABLE


def test_interpolation_follows_powers() -> None:
    points = ((1000, 1.0), (4000, 16.0))
    assert interpolate(points, 2000) == pytest.approx(4.0)
    assert interpolate(points, 8000) == pytest.approx(64.0)
    assert interpolate(points, 500) == pytest.approx(0.25)
    assert interpolate(((1000, 3.0),), 2000) == pytest.approx(6.0)


def test_a_head_costs_rows_and_pairs() -> None:
    ms = TABLE.head_ms((128, 128), 4096, 0.5)
    assert ms == pytest.approx(0.01 * 32 + 2.0 * 0.5 * visible_pairs(4096) / 1e6)
    assert TABLE.ride_ms(4096) == pytest.approx(17.0 / 4)
    assert TABLE.method_ms("m", 4096) == pytest.approx((0.5, 1.5 / 4))


def test_a_call_without_causality_has_all_pairs() -> None:
    ms = replace(TABLE, causal=False).head_ms((128, 128), 4096, 0.5)
    assert ms == pytest.approx(0.01 * 32 + 2.0 * 0.5 * 4096**2 / 1e6)


def test_an_unknown_unit_takes_the_nearest_of_its_kind() -> None:
    assert TABLE.head_ms((64, 64), 4096, 0.1) != TABLE.head_ms((128, 1), 4096, 0.1)
    assert TABLE.launch_ms((2048, 1)) == 0.1
    assert TABLE.launch_ms((64, 64)) == 0.5


def test_coefficients_are_found_again() -> None:
    true = (0.3, 0.02, 1.7)
    rows = [[1.0, r, p] for r in (8, 32, 64) for p in (0.1, 1.0, 7.0)]
    ms = [sum(a * b for a, b in zip(true, r, strict=True)) for r in rows]
    assert least_squares(rows, ms) == pytest.approx(true)
    # A launch that costs nothing does not go negative.
    assert min(least_squares(rows, [r[2] * 2 - 0.05 for r in rows])) >= 0


@pytest.mark.parametrize("causal", [True, False])
def test_fit_on_this_device(causal: bool) -> None:
    shape = fit.Shape(heads=2, kv_heads=1, head_dim=16, causal=causal)
    table = fit.fit(shape, torch.float32, torch.device("cpu"), 1024, repeat=1, limit_s=2.0)
    assert table.causal is causal
    assert table.dense_ms(1024) > table.dense_ms(512) > 0
    assert table.head_ms((128, 128), 1024, 1.0) >= table.head_ms((128, 128), 1024, 0.1)
    assert set(table.kernels) == {"128x128"}
    assert table.kernels["128x128"].backend == "torch"


def test_an_inner_length_tells_how_well_lines_fit() -> None:
    assert fit_methods.between(((1000, 1.0), (2000, 4.0), (4000, 16.0))) == pytest.approx(0.0)
    assert fit_methods.between(((1000, 1.0), (2000, 5.0), (4000, 16.0))) == pytest.approx(0.2)
    assert fit_methods.between(((1000, 1.0), (4000, 16.0))) == 0.0


def test_random_lists_are_visible_and_hold_the_diagonal() -> None:
    call = fit.random_call(SMALL, torch.float32, torch.device("cpu"), 512)
    index = fit_inputs.random_index(call, (128, 128), 0.1)
    mask = index.to_mask(4)
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    both = fit.random_call(replace(SMALL, causal=False), torch.float32, torch.device("cpu"), 512)
    assert fit_inputs.random_index(both, (128, 128), 1.0).to_mask(4).all()
