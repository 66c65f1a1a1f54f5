"""The step clock of diffusion, and lists that are kept or reused over computed steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import diffusers
import pytest
import torch

import accelkit
from accelkit.errors import PlanTransferWarning
from accelkit.kernels.index import BlockIndex
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, Order
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import LayerPlan, Limits, Plan, Policy, Reuse, Rule, Schedule
from tests.tiny_pipes import NARROW, latents, tiny_pipe

SITE = "transformer.blocks.0.attn1"
ASKED: list[tuple[int, str]] = []
"""Step and branch of every time that `Chosen` was asked at the first site."""


class Chosen(AttentionMethod):
    """The blocks of the largest pooled scores, a third of them, in backward order of the tokens
    if asked for.
    """

    phases: ClassVar = ("denoise",)
    backwards: bool = False

    def order(self, call: AttentionCall) -> Order | None:
        if not self.backwards:
            return None
        table = torch.arange(call.n_k - 1, -1, -1, dtype=torch.int32)[None]
        return Order(table, table, torch.zeros(len(call.heads), dtype=torch.int32))

    def index(self, call: AttentionCall) -> BlockIndex:
        if call.site.path == SITE:
            ASKED.append((call.clock.step, call.clock.branch))
        q, k = (t.unflatten(2, (-1, 16)).mean(3) for t in (call.q, call.k))
        scores = q[:, list(call.heads)] @ k[:, call.kv_of_head].transpose(2, 3)
        keep = scores >= scores.topk(scores.shape[-1] // 3, -1).values[..., -1:]
        return BlockIndex.from_mask(keep, (16, 16))


@pytest.fixture(autouse=True)
def asked():
    ASKED.clear()
    return ASKED


def at_first_site(pipe, run: Callable[[], object]) -> list[AttentionCall]:
    """Calls of the first site while `run` runs, without their tensors' memory being shared."""
    seen: list[AttentionCall] = []
    with watch(pipe, seen.append):
        run()
    return [c for c in seen if c.site.order == seen[0].site.order]


def steps_of(calls: list[AttentionCall]) -> list[tuple[int, int]]:
    return [(c.clock.step, c.clock.total) for c in calls]


def test_two_prompts_and_another_number_of_steps():
    pipe = tiny_pipe("flux")
    calls = at_first_site(pipe, lambda: [latents(pipe, "flux", steps=n) for n in (3, 3, 2)])
    three = [(0, 3), (1, 3), (2, 3)]
    assert steps_of(calls) == [*three, *three, (0, 2), (1, 2)]


SCHEDULERS = {
    "unipc": ("wan", diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), 4),
    "heun": ("wan", diffusers.FlowMatchHeunDiscreteScheduler(), 3),
    "ddim": ("pixart", diffusers.DDIMScheduler(), 4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_put_in_afterwards(name):
    """Heun takes two forwards a step but the last; DDIM keeps no index of its own."""
    family, scheduler, steps = SCHEDULERS[name]
    pipe = tiny_pipe(family)
    seen: list[AttentionCall] = []
    with watch(pipe, seen.append):
        pipe.scheduler = scheduler
        latents(pipe, family, steps=steps)
    conditional = [c for c in seen if c.site.order == 0 and c.clock.branch == "cond"]
    total = len(scheduler.timesteps)
    assert steps_of(conditional) == [(n, total) for n in range(total)]
    assert {"step", "set_timesteps"}.isdisjoint(vars(scheduler))


def test_a_copied_scheduler_is_its_own():
    pipe = tiny_pipe("wan")
    with watch(pipe, lambda call: None):
        other = copy.deepcopy(pipe.scheduler)
        pipe.scheduler.set_timesteps(4)
        other.set_timesteps(2)
        assert len(pipe.scheduler.timesteps) == 4
        assert other.step.__self__ is other


def test_wan22_switches_the_denoiser():
    pipe = tiny_pipe("wan22")
    seen: list[AttentionCall] = []
    with watch(pipe, seen.append):
        latents(pipe, "wan22", steps=4)
    by_step = {c.clock.step: c.site.component for c in seen}
    assert by_step == {0: "transformer", 1: "transformer", 2: "transformer_2", 3: "transformer_2"}
    assert {c.clock.branch for c in seen if c.clock.step == 2} == {"cond", "uncond"}


def test_a_bare_denoiser_goes_by_its_timestep():
    model = tiny_pipe("wan").transformer
    latent, text = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 5, 16)

    @torch.no_grad()
    def run() -> None:
        for _ in range(2):
            for t in (1000.0, 750.0, 500.0, 250.0):
                for _ in range(2):
                    model(latent, timestep=torch.tensor([t]), encoder_hidden_states=text)

    calls = at_first_site(model, run)
    once = [(0, 1), (1, 4), (2, 4), (3, 4)]
    assert steps_of(calls[::2]) == steps_of(calls[1::2]) == [*once, *once]
    assert {c.clock.branch for c in calls[::2]} == {"cond"}
    assert {c.clock.branch for c in calls[1::2]} == {"uncond"}


def kept(pipe, every: int, **fields) -> Plan:
    plan = plan_of(pipe, Chosen(**fields))
    layers = {
        path: layer.model_copy(update={"schedule": Schedule(refresh_every=every)})
        for path, layer in plan.sites.items()
    }
    return plan.model_copy(update={"sites": layers})


def test_lists_are_kept_over_steps_for_each_branch(asked):
    pipe = tiny_pipe("wan")
    for every, steps in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])):
        asked.clear()
        with accelkit.patch(pipe, kept(pipe, every)) as handle:
            for _ in range(2):  # a new prompt begins anew
                latents(pipe, "wan", steps=5)
            assert handle.report().sparse_calls == 2 * 2 * 2 * 5
        once = [(s, b) for s in steps for b in ("cond", "uncond")]
        assert asked == [*once, *once]


def test_only_computed_steps_count(asked):
    """A step cache that leaves a step out does not age the lists."""
    pipe = tiny_pipe("wan")
    forward = pipe.transformer.forward
    left_out = []

    def skipping(*args, **kwargs):
        if pipe.scheduler.step_index in (1, 2):
            left_out.append(pipe.scheduler.step_index)
            return (kwargs["hidden_states"],)
        return forward(*args, **kwargs)

    pipe.transformer.forward = skipping
    with accelkit.patch(pipe, kept(pipe, 2)):
        latents(pipe, "wan", steps=6)
    assert left_out == [1, 1, 2, 2]
    assert [s for s, branch in asked if branch == "cond"] == [0, 4]


def search_then_reuse(pipe, **fields) -> Plan:
    """`Chosen` in the first half of the steps, its last lists in the second half."""
    base = plan_of(pipe, Chosen(**fields))
    early = Rule(phase="denoise", steps=(0.0, 0.3), policies=(0, 0))
    late = Rule(phase="denoise", policies=(1, 1))
    return base.model_copy(
        update={
            "policies": (*base.policies, Policy(reuse=Reuse())),
            "sites": {path: LayerPlan(rules=(early, late)) for path in base.sites},
        }
    )


@pytest.mark.parametrize("backwards", [False, True])
def test_reuse_reads_the_lists_of_an_earlier_step(backwards, asked):
    pipe = tiny_pipe("wan")
    with accelkit.patch(pipe, search_then_reuse(pipe, backwards=backwards)) as handle:
        reused = latents(pipe, "wan", steps=4)
        assert handle.report().dense == {}
        assert asked == [(s, b) for s in (0, 1) for b in ("cond", "uncond")]
    with accelkit.patch(pipe, kept(pipe, 1, backwards=backwards)):
        fresh = latents(pipe, "wan", steps=4)
    # Keeping from the second step on is the same thing said in another way.
    with accelkit.patch(pipe, search_then_reuse(pipe, backwards=backwards)):
        assert torch.equal(latents(pipe, "wan", steps=4), reused)
    assert not torch.equal(fresh, reused)


def test_kept_orders_lay_the_tokens_out_again():
    """Backward tokens give the same blocks, mirrored, so the output is that of forward ones."""
    pipe = tiny_pipe("wan")
    outputs = []
    for backwards in (False, True):
        with accelkit.patch(pipe, kept(pipe, 4, backwards=backwards)):
            outputs.append(latents(pipe, "wan", steps=4))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)


def test_reuse_before_anything_was_kept_is_dense():
    pipe = tiny_pipe("wan")
    plan = search_then_reuse(pipe)
    layers = {p: LayerPlan(rules=layer.rules[1:]) for p, layer in plan.sites.items()}
    dense = latents(pipe, "wan")
    with accelkit.patch(pipe, plan.model_copy(update={"sites": layers})) as handle:
        assert torch.equal(latents(pipe, "wan"), dense)
        assert handle.report().dense == {"every head chose dense": 8}


def test_steps_of_a_rule_are_shares():
    pipe = tiny_pipe("wan")
    plan = plan_of(pipe, Chosen())
    rules = {
        path: LayerPlan(rules=(layer.rules[0].model_copy(update={"steps": (0.5, 1.0)}),))
        for path, layer in plan.sites.items()
    }
    plan = plan.model_copy(update={"sites": rules, "limits": Limits(steps=8, grid=(3, 8, 8))})
    for steps in (4, 6):
        with (
            accelkit.patch(pipe, plan) as handle,
            pytest.warns(PlanTransferWarning, match=f"{steps} steps") as told,
        ):
            _ = [latents(pipe, "wan", steps=steps) for _ in range(2)]
        assert handle.report().sparse_calls == handle.report().dense["no policy"] == 2 * 2 * steps
        assert len([w for w in told if w.category is PlanTransferWarning]) == 1


def test_another_grid_is_told_once():
    pipe = tiny_pipe("wan")
    plan = plan_of(pipe, Chosen()).model_copy(update={"limits": Limits(grid=(3, 8, 8))})
    with accelkit.patch(pipe, plan):
        latents(pipe, "wan", steps=1)  # nothing to tell: warnings are errors in these tests
        with pytest.warns(PlanTransferWarning, match=r"\(3, 4, 8\)") as told:
            _ = [latents(pipe, "wan", steps=1, **{side: 64}) for side in ("height", "width")]
    assert len([w for w in told if w.category is PlanTransferWarning]) == 1


def test_static_lists_of_old_geometries_make_room(monkeypatch):
    monkeypatch.setattr(accelkit.patches.state, "GEOMETRIES", 2)
    pipe = tiny_pipe("wan")
    with accelkit.patch(pipe, NARROW) as handle:
        for height in (128, 64, 192, 64):
            latents(pipe, "wan", steps=1, height=height)
        grids = [shape[-1].grid for shape in handle.state.answers]
        assert grids == [(3, 4, 8), (3, 12, 8)]
        assert all(len(shelf) == 1 for shelf in handle.state.answers.values())
