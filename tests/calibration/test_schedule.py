"""Which steps to compute: against denoisings whose outputs do not depend on the latents, so
that what is true to first order is true.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny_pipes import latents, tiny_pipe

from accelkit.calibration.denoise import schedule
from accelkit.calibration.denoise.schedule import Given
from accelkit.calibration.evaluation.quality import relative

STEPS = 8
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


def denoised(scheduler, outputs: list[torch.Tensor]) -> Given:
    """A run that is given these outputs."""
    scheduler.set_timesteps(STEPS)
    pipe = SimpleNamespace(scheduler=scheduler)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    with schedule.recorded(pipe) as kept:
        for t, out in zip(scheduler.timesteps, outputs, strict=True):
            x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
    assert "step" not in vars(scheduler)
    return kept


def outputs(changes: dict[int, float]) -> list[torch.Tensor]:
    """Outputs that stay as they are but for these steps, at which they change by so much."""
    made = torch.Generator().manual_seed(0)
    now, found = torch.randn(2, 3, 4, generator=made), []
    for step in range(STEPS):
        now = now + changes.get(step, 0.0) * torch.randn(2, 3, 4, generator=made)
        found.append(now)
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_losses_are_what_reused_outputs_change(name) -> None:
    given = outputs({s: 0.1 * s for s in range(STEPS)})
    kept = denoised(SCHEDULERS[name](), given)
    loss = schedule.losses(kept.outputs, schedule.carried(kept), kept.last)
    reused = [given[2] if 2 < n < 6 else v for n, v in enumerate(given)]
    changed = denoised(SCHEDULERS[name](), reused).last
    rows = [relative(a, b) for a, b in zip(changed, kept.last, strict=True)]
    # Torch's median of two is the lower. Late rows count little more here, for the last is the 6th.
    counts = 1 / (schedule.EARLY + 2 / 8) + schedule.LATE * (5 / 7) ** 8
    assert loss(2, 6) == pytest.approx(counts * min(rows), rel=1e-3)
    assert loss(2, 3) == 0.0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_steps_whose_output_is_new_are_computed(name) -> None:
    found = schedule.schedules(denoised(SCHEDULERS[name](), outputs({2: 1.0, 5: 1.0})))
    assert [len(steps) for steps in found] == list(range(1, STEPS + 1))
    assert found[0] == [0] and found[-1] == list(range(STEPS))
    assert found[2] == [0, 2, 5]
    assert all({0, 2, 5} <= {*steps} for steps in found[3:])


def test_every_schedule_is_the_best_of_its_length() -> None:
    kept = denoised(SCHEDULERS["euler"](), outputs({s: 0.5 + s % 3 for s in range(STEPS)}))
    loss = schedule.losses(kept.outputs, schedule.carried(kept), kept.last)

    def whole(steps) -> float:
        return sum(loss(a, b) for a, b in pairwise([*steps, STEPS]))

    for n, found in enumerate(schedule.schedules(kept), 1):
        every = ((0, *rest) for rest in combinations(range(1, STEPS), n - 1))
        assert whole(found) == pytest.approx(min(map(whole, every)))


def test_a_scheduler_that_does_more_than_weigh_has_no_order() -> None:
    kept = denoised(SCHEDULERS["euler"](), outputs({3: 1.0}))
    kept.last = 2 * kept.last
    assert schedule.schedules(kept) == []
    assert schedule.schedules(Given()) == []


def test_a_scheduler_that_looks_at_shapes_has_no_order() -> None:
    class Shaped(FlowMatchEulerDiscreteScheduler):
        def step(self, out, timestep, latents, **kwargs):
            _, _, _ = latents.shape
            return super().step(out, timestep, latents, **kwargs)

    assert schedule.schedules(denoised(Shaped(shift=3.0), outputs({3: 1.0}))) == []


def test_a_pipeline_is_recorded() -> None:
    pipe = tiny_pipe("wan")
    with schedule.recorded(pipe) as kept:
        made = latents(pipe, "wan", steps=STEPS)
    assert torch.equal(kept.last, made.flatten(1)[:, :: -(-made[0].numel() // 4096)])
    assert len(schedule.schedules(kept)) == STEPS
