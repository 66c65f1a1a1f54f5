"""Re-ttention: what a dense step measures, and what sparse steps make of it."""

from dataclasses import replace

import planted
import torch

from accelkit.patches.methods.re_ttention import ReTtention
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy, Schedule
from accelkit.patches.sites import attention
from accelkit.patches.state import PatchState


def small():
    q, k, v = planted.noise(4 * 40 + 10)
    return planted.video_call(q, k, v, (4, 5, 8), step=0)


METHOD = ReTtention(window=0.2, block=16)


def at(call, step):
    return replace(call, clock=replace(call.clock, step=step), _shared={})


def run(call, method=METHOD):
    answer = planted.ask(method, call)
    return attention.compute(answer).out, len(answer.pieces)


def test_a_caching_step_is_dense_and_the_next_one_too():
    """Pieces are disjoint and complete; on equal input ρ · out + R is the dense output."""
    call = small()
    for step, pieces in ((0, 2), (1, 1)):
        out, number = run(at(call, step))
        assert number == pieces
        torch.testing.assert_close(out, planted.dense(call), atol=1e-4, rtol=1e-4)


def test_what_is_kept_is_what_the_window_leaves_out():
    call = small()
    run(call)
    ((step, ratio, rest),) = call.memory.values() if len(call.memory) == 1 else [
        v for v in call.memory.values() if isinstance(v, tuple)
    ]  # fmt: skip
    seen = planted.select(METHOD, at(call, 1)).seen
    p = planted.probabilities(call)
    assert step == 0
    torch.testing.assert_close(ratio, (p * seen).sum(-1), atol=1e-5, rtol=1e-4)
    v = call.v[:, call.kv_of_head]
    torch.testing.assert_close(rest, (p * ~seen) @ v, atol=1e-4, rtol=1e-4)


def test_drift_and_period():
    """ρ grows by 0.04 a step and never beyond one; after five steps it is measured again."""
    call = small()
    run(call)
    ratios = []
    for step in range(1, 6):
        kept = METHOD._kept(at(call, step))
        ratios.append(None if kept is None else kept[1].clone())
        _, pieces = run(at(call, step))
        assert pieces == (2 if step == 5 else 1)
    torch.testing.assert_close(ratios[3], (ratios[0] + 3 * 0.04).clamp(max=1.0))
    assert ratios[3].max() <= 1.0 and ratios[4] is None


def test_two_branches_and_two_prompts_keep_apart():
    """What is kept lies in the memory of the branch, which a new prompt finds empty."""
    call = small()
    run(call)
    other = replace(call, memory={}, q=call.q.flip(2))
    assert METHOD._kept(at(other, 1)) is None
    assert METHOD._kept(at(call, 1)) is not None
    assert METHOD._kept(at(call, 0)) is not None
    assert METHOD._kept(replace(at(call, 1), heads=(0, 1))) is None


def test_a_schedule_does_not_keep_what_a_step_measured():
    """Where other lists would last three steps, ρ and R still belong to their own pieces."""
    call, policy = small(), Policy(methods=(METHOD,))
    schedule = Schedule(refresh_every=3)
    sites = {call.site.path: LayerPlan(schedule=schedule)}
    state = PatchState(Plan.model_construct(policies=(policy,), sites=sites))
    for step in range(3):
        out = torch.empty_like(call.q)
        groups = [HeadGroup(call.heads, policy, 0)]
        assert attention.attend(at(call, step), groups, state, out)
        expected = planted.dense(call)
        if step < 2:
            torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        else:  # one drift later
            assert (out - expected).norm() / expected.norm() < 0.1
