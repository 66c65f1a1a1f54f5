"""8-bit products are offered where their measured time, quantising included, is the least."""

from __future__ import annotations

import planted
import pytest

from accelkit.calibration.candidates import families
from accelkit.calibration.fit import methods as fit_methods
from accelkit.patches.methods.gna import GNA
from accelkit.patches.methods.paro_attention import PAROAttention
from accelkit.patches.methods.sage_attention import PRECISIONS, SageAttention
from accelkit.patches.plan import Policy
from accelkit.patches.sites import attention

SLOW = dict.fromkeys(PRECISIONS, 12.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that knows what each pair of precisions costs."""

    def make(prices):
        ran = []

        def compute(one):
            ran.append((one.execution.qk, one.execution.pv))

        monkeypatch.setattr(fit_methods, "compute", compute)

        def ms(job, _runs):
            job()
            return {("native", "native"): 10.0, **prices}[ran[-1]]

        return ms

    return make


def alone(method):
    (one,) = attention.answer(planted.video(), Policy(methods=(method,)))
    return one


def test_none_is_faster(clock):
    reason = fit_methods.no_faster(alone(SageAttention()), SageAttention(), 11.0, clock(SLOW))
    assert "8-bit products take 12.00 ms" in reason and "dense attention 11.00 ms" in reason


def test_the_kernel_that_is_faster_than_dense_attention_is_no_rival_of_it(clock):
    """All heads of a layer run what the model runs, or 8 bits."""
    ms = clock(SLOW | {("int8", "native"): 10.5})
    assert fit_methods.no_faster(alone(SageAttention()), SageAttention(), 11.0, ms) is None


def test_dense_attention_is_faster(clock):
    ms = clock(SLOW | {("int8", "native"): 9.0})
    assert fit_methods.no_faster(alone(SageAttention()), SageAttention(), 11.0, ms) is None
    reason = fit_methods.no_faster(alone(SageAttention()), SageAttention(), 8.0, ms)
    assert "9.00 ms (int8 QK, native PV)" in reason and "8.00 ms" in reason


def test_over_lists_the_lists_count(clock):
    paro = PAROAttention(int8=True)
    ms = clock(SLOW)
    one = alone(paro)
    assert "12.00 ms (int8 QK, fp8 PV)" in fit_methods.no_faster(one, paro, 100.0, ms)
    assert fit_methods.no_faster(one, paro, 100.0, clock({("int8", "fp8"): 9.9})) is None


def test_other_arithmetic_is_not_asked(clock):
    assert fit_methods.no_faster(alone(GNA()), GNA(), 0.0, clock({})) is None


def test_search_may_choose_among_all_precisions():
    named = families(SageAttention().calibrator(planted.video().site).settings())
    assert [(f.settings[0].qk, f.settings[0].pv) for f in named] == list(PRECISIONS)
