"""Step caches: which blocks are left out follows the formula, and nothing stays behind.

The count of a block's forwards is hand-made: six steps of one guidance branch.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
from tiny_pipes import latents, tiny_pipe

import accelkit
from accelkit.errors import (
    InvalidInputError,
    UnsupportedConfigurationError,
    UnsupportedModelError,
)
from accelkit.patches.adapters import facts
from accelkit.patches.method import load
from accelkit.patches.methods.first_block_cache import FirstBlockCache
from accelkit.patches.methods.mag_cache import MagCache
from accelkit.patches.methods.step_schedule import StepSchedule
from accelkit.patches.methods.taylor_seer import TaylorSeer
from accelkit.patches.parts import step_cache
from accelkit.patches.plan import LayerPlan, Plan, Policy
from tests.patches.conftest import attributes

STEPS = 6
ALL = list(range(STEPS))
BEST = ((0,), (0, 3), (0, 2, 5), (0, 1, 2, 5), (0, 1, 2, 4, 5), (0, 1, 2, 3, 4, 5))


@pytest.fixture
def pipe():
    return tiny_pipe("wan")


def plan_of(pipe, cache) -> Plan:
    layers = {"transformer": LayerPlan(block=cache)}
    return Plan(fingerprint=facts(pipe)[0], policies=(Policy(),), sites=layers)


def run(pipe, part: str, inside: str):
    """Final latents, and the steps at which a module within a block really ran."""
    ran, step = [], [0]
    block = pipe.transformer.get_submodule(part)
    hook = block.get_submodule(inside).register_forward_hook(lambda *_: ran.append(step[0]))
    original = pipe.scheduler.step

    def counted(*args, **kwargs):
        step[0] += 1
        return original(*args, **kwargs)

    pipe.scheduler.step = counted
    try:
        return latents(pipe, "wan", steps=STEPS), sorted(set(ran))
    finally:
        pipe.scheduler.step = original
        hook.remove()


@pytest.mark.parametrize(
    ("cache", "part", "inside", "computed"),
    [
        (FirstBlockCache(threshold=1e-9), "blocks.1", "attn1.to_q", ALL),
        (FirstBlockCache(threshold=1e9), "blocks.1", "attn1.to_q", [0]),
        (FirstBlockCache(threshold=1e9), "blocks.0", "attn1.to_q", ALL),
        # Step 0 and 1 by the retention of a fifth; then |1 − 0.99| = 0.01 for each skipped step,
        # 0.0199 for the second: 0.0299 in all is over the threshold, so every second one is run.
        (MagCache(ratios=(0.99,) * 6, threshold=0.02), "blocks.0", "attn1.to_q", [0, 2, 4]),
        (MagCache(ratios=(1.0,) * 6, max_skip_steps=2), "blocks.0", "attn1.to_q", [0, 3]),
        (StepSchedule(share=0.5, schedules=BEST), "blocks.0", "attn1.to_q", [0, 2, 5]),
        (StepSchedule(share=0.2, schedules=BEST), "blocks.0", "attn1.to_q", [0]),
        # Three steps first, then one in three.
        (TaylorSeer(interval=3), "blocks.0", "attn1.to_q", [0, 1, 2, 4]),
        (TaylorSeer(interval=3), "blocks.1", "ffn.net.2", [0, 1, 2, 4]),
        (TaylorSeer(interval=3, lite=True), "blocks.1", "attn1.to_q", [0, 1, 2, 4]),
    ],
    ids=str,
)
def test_steps_that_are_computed(pipe, cache, part, inside, computed):
    dense, ran = run(pipe, part, inside)
    assert ran == ALL
    plan = Plan.from_json(plan_of(pipe, cache).to_json())
    with accelkit.patch(pipe, plan):
        found, ran = run(pipe, part, inside)
    assert ran == computed
    assert torch.isfinite(found).all()
    if cache == FirstBlockCache(threshold=1e-9):
        assert torch.equal(found, dense)


@pytest.mark.parametrize("name", ["first_block_cache", "mag_cache", "step_schedule", "taylor_seer"])
def test_nothing_stays_behind(pipe, name):
    dense = latents(pipe, "wan")  # the pipeline itself leaves an empty registry of hooks
    before = {n: dict(vars(m)) for n, m in pipe.transformer.named_modules()}
    with accelkit.patch(pipe, plan_of(pipe, load(name)())):
        with accelkit.disabled(pipe):
            assert torch.equal(latents(pipe, "wan"), dense)
    for n, m in pipe.transformer.named_modules():
        assert vars(m).keys() == before[n].keys(), n
    assert torch.equal(latents(pipe, "wan"), dense)


def test_a_second_cache_is_refused(pipe):
    with ExitStack() as undo:
        FirstBlockCache().rewire(pipe.transformer, undo)
        with pytest.raises(UnsupportedConfigurationError, match="FirstBlockCacheConfig is enabled"):
            accelkit.patch(pipe, plan_of(pipe, TaylorSeer()))
    with accelkit.patch(pipe, plan_of(pipe, TaylorSeer())):
        pass
    with pytest.raises(InvalidInputError, match="first_block_cache and taylor_seer both change"):
        accelkit.patch(pipe, [FirstBlockCache(), TaylorSeer()])


@pytest.mark.parametrize(
    ("family", "words"), [("pixart", "no step caches"), ("hunyuan15", "hunyu")]
)
def test_classes_without_are_named(family, words):
    """PixArt's class has no step caches; the blocks of HunyuanVideo-1.5 are unknown to this one."""
    root = tiny_pipe(family).transformer
    before = {n: dict(vars(m)) for n, m in root.named_modules()}
    with ExitStack() as undo, pytest.raises(UnsupportedModelError, match=f"(?i){words}"):
        FirstBlockCache().rewire(root, undo)
    assert {n: dict(vars(m)).keys() for n, m in root.named_modules()} == {
        n: v.keys() for n, v in before.items()
    }


def test_magnitudes_are_those_of_the_residual(pipe):
    """‖r_t‖ ÷ ‖r_{t−1}‖ of what the stack adds, against hooks on its first and last block."""
    blocks, sizes = pipe.transformer.blocks, []
    inputs = []
    hooks = [
        blocks[0].register_forward_pre_hook(lambda m, a: inputs.append(a[0])),
        blocks[-1].register_forward_hook(
            lambda m, a, out: sizes.append((out - inputs[-1]).float().norm(dim=-1))
        ),
    ]
    noted: list[float] = []
    with step_cache.magnitudes(pipe.transformer, STEPS) as ratios:

        def each(pipe_, step, timestep, given):
            noted[:] = ratios()
            return given

        latents(pipe, "wan", steps=STEPS, callback_on_step_end=each)
    for hook in hooks:
        hook.remove()
    mine = sizes[:: len(sizes) // STEPS]
    expected = [1.0] + [float((b / (a + 1e-8)).mean()) for a, b in pairwise(mine)]
    assert noted == pytest.approx(expected, rel=1e-4)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


@pytest.mark.parametrize(
    "schedules", [(), ((1,),), ((0,), (0, 2)), ((0,), (0, 0)), ((0,), (0,)), ((0, 1),)], ids=str
)
def test_schedules_that_cannot_be(schedules):
    with pytest.raises(ValueError, match="schedule"):
        StepSchedule(schedules=schedules)


def test_a_cache_removed_while_disabled_stays_removed():
    pipe = tiny_pipe("wan")
    before = attributes(pipe.transformer)
    accelkit.patch(pipe, FirstBlockCache())
    with accelkit.disabled(pipe):
        accelkit.unpatch(pipe)
    assert attributes(pipe.transformer) == before
