"""Which families of settings go on to the long prompts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from accelkit.calibration import candidates, stages, timing
from accelkit.calibration.candidates import (
    Bench,
    calibrated_settings,
    lists_ms,
    parts_of,
    stored,
)
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit.inputs import Shape, random_call
from accelkit.calibration.journal import Journal
from accelkit.calibration.prefill.measure import dear
from accelkit.calibration.stages import kept
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches.method import load
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import answer, compute

COSTS = CostTable(
    "cpu", "float32", 2, 1, 64, ((1024, 10.0), (4096, 160.0)), ((1024, 10.0), (4096, 160.0)),
    {"128x128": Kernel(0.0, 0.0, 80.0 / 8.39)},
    {name: MethodCost(((4096, 1.0),)) for name in ("window", "a_shape", "xattention")},
)  # fmt: skip


def family(name: str, error: list[float], density: list[float]) -> dict[str, Any]:
    """One setting with an error and a density for each of two heads."""
    one = {"settings": [stored(load(name)())], "field": None, "size": [(128, 128)], "ms": [None]}
    return one | {"error": [error], "density": [density]}


def test_families_complement_each_other() -> None:
    """The best single family comes first, then what helps the other head; the second best for the
    first head adds nothing to that.
    """
    record = {
        "families": {
            "window": family("window", [0.01, 0.9], [0.1, 0.1]),
            "a_shape": family("a_shape", [0.01, 0.9], [0.15, 0.1]),
            "xattention": family("xattention", [0.9, 0.15], [0.1, 0.1]),
        }
    }
    assert [f.name for f in kept(record, COSTS, 4096, 1024, 1)] == ["window"]
    assert [f.name for f in kept(record, COSTS, 4096, 1024, 9)] == ["window", "xattention"]


def test_few_variants_of_a_method_are_kept_where_prices_are_in_doubt() -> None:
    """Three variants help a head each, another method the fourth one a little."""
    good, bad = 0.01, 0.9
    errors = [[good if h == n else bad for h in range(4)] for n in range(4)]
    record = {
        "families": {
            **{f"window{n}": family("window", errors[n], [0.1] * 4) for n in range(3)},
            "xattention": family("xattention", errors[3], [0.5] * 4),
        }
    }
    for device, names in (
        ("cpu", {"window0", "window1", "xattention"}),
        ("toy", set(record["families"])),
    ):
        some = kept(record, replace(COSTS, device=device), 4096, 1024, 9)
        assert {f.name for f in some} == names


def test_lists_of_two_units_cost_what_each_unit_costs() -> None:
    """Single keys take ten times as long a pair; shares of both differ from head to head."""
    costs = CostTable(
        "toy", "float32", 2, 1, 64, ((1024, 10.0),), ((1024, 10.0),),
        {"128x128": Kernel(0.0, 0.0, 1.0), "1024x1": Kernel(0.0, 0.0, 10.0)},
        {"window": MethodCost(((1024, 0.0),))}, causal=False,
    )  # fmt: skip
    record: dict[str, Any] = {"size": [(128, 128)] * 2, "parts": [None, None]}
    pairs = 1024**2 / 1e6
    alone = lists_ms(costs, "window", parts_of(record, 0), 1024, [0.5, 1.0])
    assert alone == pytest.approx([0.5 * pairs, pairs])
    record["parts"][1] = [[(128, 128), [1.0, 0.25]], [(1024, 1), [0.0, 0.75]]]
    both = lists_ms(costs, "window", parts_of(record, 1), 1024, np.array([0.5, 0.4]))
    assert both == pytest.approx([0.5 * pairs, 0.4 * pairs * (0.25 + 7.5)])


def test_settings_that_share_a_launch_read_as_they_do_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = random_call(Shape(4, 2, 16), torch.float32, torch.device("cpu"), 2048)
    dense, scored = dense_attention(call), np.arange(2030, 2048)
    names = (
        "xattention", "flash_prefill", "window", "sparge_attn", "vertical_slash", "pbs_attn",
        "anchor_attention",
    )  # fmt: skip
    some, _ = calibrated_settings([load(n)() for n in names], call.site, call, dense)
    alone = Bench(call, dense, scored).families(some)
    launches: list[int] = []
    both = candidates.joined
    monkeypatch.setattr(candidates, "joined", lambda a: launches.append(len(a)) or both(a))
    monkeypatch.setattr(candidates, "most_together", lambda call, room: 3)
    assert Bench(call, dense, scored, shelf={}).families(some) == alone
    assert max(launches) == 3 and sum(launches) > 18


def test_settings_share_a_launch_as_far_as_memory_goes() -> None:
    """2¹⁶ outputs of two bytes, and what judging them takes."""
    on_gpu = SimpleNamespace(is_cuda=True)
    call: Any = SimpleNamespace(
        q=on_gpu, v=torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16), heads=(0, 1, 2, 3), n_q=256
    )
    each = (2 + candidates.JUDGED_BYTES) * 2**16
    assert candidates.most_together(call) == candidates.MOST_TOGETHER // 2**16
    assert candidates.most_together(call, 5 * each + 1) == 5
    assert candidates.most_together(call, each - 1) == 0
    on_gpu.is_cuda = False
    assert candidates.most_together(call, 5 * each) == 1


def test_methods_whose_own_work_is_long_are_dear_on_a_gpu() -> None:
    slow = replace(COSTS.methods["window"], points=((4096, 50.0),))
    costs = replace(COSTS, methods={**COSTS.methods, "xattention": slow})
    gpu, cpu = (SimpleNamespace(device=torch.device(d)) for d in ("cuda", "cpu"))
    assert dear(gpu, costs, 4096) == {"xattention"}  # 50 ms of 160
    assert dear(gpu, COSTS, 4096) == dear(cpu, costs, 4096) == set()


@pytest.mark.parametrize("kind", ["blasst", "sage_attention"])
def test_a_short_call_is_clocked_as_several_prompts_at_once(kind: str) -> None:
    """They compute what one does; what is finished by a method stays as it is."""
    call = random_call(Shape(4, 2, 64), torch.float32, torch.device("cpu"), 1024)
    (one,) = answer(call, Policy(methods=(load(kind)(),))) or ()
    assert [timing._copies(one, batch) for batch in (1, 8, 64)] == [1, 8, 32]
    assert timing._copies(replace(one, finishers=(load("re_ttention")(),)), 8) == 1
    several = compute(timing._repeated(one, 3)).out
    assert torch.equal(several, compute(one).out.expand(3, -1, -1, -1))
    assert timing._repeated(one, 1) is one


def test_milliseconds_are_those_of_a_batch(monkeypatch) -> None:
    call = random_call(Shape(2, 1, 64), torch.float32, torch.device("cpu"), 512)
    (one,) = answer(call, Policy(methods=(load("sage_attention")(),))) or ()
    monkeypatch.setattr(timing, "times_ms", lambda *_: (3.0, 2.0))
    assert timing.answers_ms([one, one], 8) == [16.0, 16.0]
    assert timing.answers_ms([], 8) == []


@pytest.mark.parametrize(("device", "fits"), [("cuda", 2), ("cpu", 4)])
def test_a_gpu_is_fitted_once_for_all_calibrations_of_a_process(monkeypatch, device, fits) -> None:
    """Unless shape, length or methods differ; a CPU may have been busy with something else."""
    made: list[int] = []
    monkeypatch.setattr(stages, "_tables", {})
    monkeypatch.setattr(stages.fit, "fit", lambda *a, **k: made.append(1) or COSTS)
    shape, methods = Shape(2, 1, 64), [load("window")()]
    for tokens in (4096, 4096, 8192, 4096):
        book = Journal(None, {}, False)
        run = SimpleNamespace(device=torch.device(device), journal=book, tell=print)
        assert stages.fitted(run, shape, torch.float32, tokens, methods) == COSTS  # type: ignore[arg-type]
        assert "fit" in book
    assert len(made) == fits
