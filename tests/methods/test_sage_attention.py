"""SageAttention answers with the arithmetic, and goes with any index."""

from dataclasses import replace

import planted
import pytest
import torch

from accelkit.errors import InvalidInputError
from accelkit.kernels.index import ALL
from accelkit.patches.method import Execution
from accelkit.patches.methods.gna import GNA
from accelkit.patches.methods.paro_attention import PAROAttention
from accelkit.patches.methods.sage_attention import SageAttention
from accelkit.patches.plan import Policy
from accelkit.patches.sites import attention

EIGHT = Execution(qk="int8", pv="fp8", smooth_k=True)


def test_alone_it_reads_everything():
    answer = planted.ask(SageAttention(), planted.video())
    assert answer.execution == EIGHT
    (index,) = answer.pieces
    assert (index.count == ALL).all()


def test_with_an_index_it_says_how():
    policy = Policy(methods=(GNA(), SageAttention()))
    (answer,) = attention.answer(planted.video(), policy)
    assert answer.execution == EIGHT and answer.order is not None


def test_two_arithmetics_are_refused():
    with pytest.raises(InvalidInputError, match="both answer 'execution'"):
        Policy(methods=(PAROAttention(int8=True), SageAttention()))


def test_precisions_have_names():
    with pytest.raises(InvalidInputError, match="qk"):
        SageAttention(qk="int3")


def test_eight_bits_are_near():
    """Alone and over GNA's lists; a mean that all keys share does no harm."""
    call = planted.video(grid=(4, 8, 8))
    call = replace(
        call, k=call.k + 6.0 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    )
    for others in ((), (GNA(window=(1.0, 0.5, 0.5), block=64),)):
        (exact,) = attention.answer(call, Policy(methods=others)) or (None,)
        expected = planted.dense(call) if exact is None else attention.compute(exact).out
        (answer,) = attention.answer(call, Policy(methods=(*others, SageAttention())))
        out = attention.compute(answer).out
        assert 0 < (out - expected).norm() / expected.norm() < 0.05


def test_some_pairs_are_tried_without_smoothing():
    calibrator = SageAttention().calibrator(planted.video().site)
    assert [m.smooth_k for m in calibrator.settings()] == [True] * 4
    call = planted.video()
    calibrator.see(call, call.q, call.q[..., 0])
    assert call.clock.phase == "denoise"
    rough = [m for m in calibrator.settings() if not m.smooth_k]
    assert [(m.qk, m.pv) for m in rough] == [("fp8", "fp8"), ("int8", "fp8")]
    assert len(calibrator.settings()) == 6
    causal = planted.make_call(*planted.noise(64))
    calibrator.see(causal, causal.q, causal.q[..., 0])
    rough = [m for m in calibrator.settings() if not m.smooth_k]
    assert [(m.qk, m.pv) for m in rough] == [("int8", "native")]
