"""What measuring a candidate costs, which settings are tried, and what the computed eighth of the
query tiles says of all of them.
"""

from __future__ import annotations

import numpy as np
import planted
import pytest

from accelkit.calibration import candidates
from accelkit.calibration.candidates import Bench, Family, between, finer, thinned
from accelkit.calibration.capture import dense_attention
from accelkit.patches.method import load

TOKENS = 4096
X = load("xattention")
NO_ROWS = np.zeros(0, dtype=np.int64)


@pytest.fixture(scope="module")
def call():
    return planted.planted(TOKENS, everywhere=False)


@pytest.fixture(scope="module")
def dense(call):
    return dense_attention(call)


def family(*values: float) -> Family:
    return Family("xattention", tuple(X(coverage=c, qk="native") for c in values), "coverage")


def test_a_setting_is_one_launch_of_all_heads_over_an_eighth_of_the_tiles(
    call, dense, monkeypatch
) -> None:
    """And no family has more than eight."""
    launches = []
    compute = candidates.compute

    def counted(answer, rows=None):
        launches.append((len(answer.call.heads), rows))
        return compute(answer, rows=rows)

    monkeypatch.setattr(candidates, "compute", counted)
    found = Bench(call, dense, NO_ROWS).families([family(*np.linspace(0.6, 0.98, 12))])
    assert len(found["xattention"]["settings"]) == len(launches) == 8
    tiles = TOKENS // 128
    assert {heads for heads, _ in launches} == {planted.HEADS}
    assert {len(rows) for _, rows in launches} == {tiles // 8}
    # Spread over the prompt: one in each eighth of it.
    assert {(rows // (tiles // 4)).tolist() == [0, 1, 2, 3] for _, rows in launches} == {True}


def test_rows_whose_answers_are_judged_are_computed_too(call, dense) -> None:
    """The last tiles with scored rows, half as many as are spread."""
    rows, even, scored = Bench(call, dense, np.array([5, 130, 4000, 4095])).tiles(128)
    assert set(rows.tolist()) == {4, 12, 20, 28, 1, 31}
    assert len(even) == 4 * 128
    assert scored.tolist() == [130, 4000, 4095]


@pytest.mark.parametrize(
    ("everywhere", "off"), [(False, 1.25), (True, 2.5)], ids=["rows alike", "rows that differ"]
)
@pytest.mark.parametrize("name", ["xattention", "sparge_attn", "flash_prefill", "power_attention"])
def test_an_eighth_of_the_tiles_tells_the_error_of_all(name, everywhere, off, monkeypatch) -> None:
    """Four tiles here. Where each quarter of the rows reads keys of its own they are few, and what
    is left to tell is told by the whole model, in the end-to-end check.
    """
    call = planted.planted(TOKENS, everywhere=everywhere)
    one, true = Family(name, (load(name)(),), None), dense_attention(call)
    some = Bench(call, true, NO_ROWS).families([one])[name]
    monkeypatch.setattr(candidates, "SHARE", 1)
    whole = Bench(call, true, NO_ROWS).families([one])[name]
    ratios = np.maximum(some["error"][0], 1e-3) / np.maximum(whole["error"][0], 1e-3)
    assert (1 / off < ratios).all() and (ratios < off).all(), ratios
    assert some["recall"][0] == pytest.approx(whole["recall"][0], abs=0.1)
    assert some["density"] == whole["density"]  # of all rows in any case


def test_values_are_halved_where_errors_jump(call, dense) -> None:
    """Two ends become as many settings as are asked for, in the order of the dial."""
    found = Bench(call, dense, NO_ROWS).families([family(0.4, 0.995)], 5)["xattention"]
    values = [s["coverage"] for s in found["settings"]]
    assert len(values) == 5
    assert values == sorted(values)
    medians = [float(np.median(e)) for e in found["error"]]
    assert medians == sorted(medians, reverse=True)
    jumps = np.abs(np.diff(np.log(np.clip(medians, *candidates.USEFUL))))
    widths = np.abs(np.diff(np.log(1 - np.array(values))))
    # The steepest piece of the dial was cut at least twice.
    assert widths[jumps.argmax()] < 0.3 * widths.sum()


def test_settings_behind_a_hopeless_one_are_not_run(call, dense, monkeypatch) -> None:
    monkeypatch.setattr(candidates, "HOPELESS", 0.0)
    found = Bench(call, dense, NO_ROWS).families([family(0.6, 0.8, 0.9)])["xattention"]
    assert [s["coverage"] for s in found["settings"]] == [0.9]


def test_finer_by_hand() -> None:
    settings = family(0.5, 0.8, 0.9).settings
    at, made = finer(settings, "coverage", [[0.2, 0.2], [0.02, 0.02], [0.015, 0.015]])
    assert (at, made.coverage) == (1, between(0.5, 0.8))
    assert finer(settings, "coverage", [[0.02], [0.021], [0.022]]) is None  # no jump is worth it
    assert finer(settings, "coverage", [[0.9], [0.5], [0.4]]) is None  # beyond what a plan wants


def test_between_by_hand() -> None:
    assert between(0.4, 0.6) == 0.5
    assert between(0.9, 0.99) == pytest.approx(1 - (0.1 * 0.01) ** 0.5, abs=1e-4)
    assert between(1e-3, 1e-1) == pytest.approx(1e-2)
    assert between(64, 1024) == 256
    assert between(3, 4) in (3, 4)


def test_thinned_keeps_both_ends() -> None:
    some = thinned(family(*np.linspace(0.5, 0.98, 9)), 4)
    assert len(some.settings) == 4
    assert (some.values[0], some.values[-1]) == (0.5, 0.98)
    assert thinned(some, 4) is some
