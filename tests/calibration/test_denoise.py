"""The whole flow on a tiny pipeline with a planted pattern: one head looks at its neighbourhood
only, one everywhere. Costs are given, so that timings do not decide.
"""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from planted import video as planted_video

import accelkit
from accelkit.calibration import candidates
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.denoise import check as denoise_check
from accelkit.calibration.denoise import measure as denoise_measure
from accelkit.calibration.denoise.look import buckets
from accelkit.calibration.denoise.weights import weighed_at
from accelkit.calibration.evaluation.quality import site_weights
from accelkit.calibration.fit import fit
from accelkit.errors import InvalidInputError, PlanTransferWarning
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.kernels.index import Partial
from accelkit.patches.call import Geometry, Span
from accelkit.patches.method import load
from accelkit.patches.plan import Plan, Policy
from accelkit.patches.sites.attention import answer, compute

pytestmark = pytest.mark.usefixtures("probes")
LOCAL, DIFFUSE = 0, 1
SIZE = {"height": 512, "width": 512, "num_frames": 1, "steps": 4}
TOKENS = 1024
STEP_SECONDS = 0.06  # of which the toy costs below give attention about half
SITES = [f"transformer.blocks.{n}.attn1" for n in range(2)]


@pytest.fixture(autouse=True)
def _costs(monkeypatch):
    """A device on which skipping pays and choosing is nearly free."""
    table = CostTable(
        "toy", "float32", 2, 2, 32, ((TOKENS, 16.0),), ((TOKENS, 16.0),),
        {"64x64": Kernel(0.01, 0.001, 7.0), "128x128": Kernel(0.01, 0.001, 7.0)},
        {"probe_window": MethodCost(((TOKENS, 0.04),))}, {}, False,
    )  # fmt: skip
    monkeypatch.setattr(fit, "fit", lambda *a, **k: table)
    speed = {"dense_ms": 2.0, "ms": 1.0}
    monkeypatch.setattr(denoise_check.Checker, "speed", lambda self, plan: speed)
    measured = denoise_measure.measured

    def given(*args):
        return replace(measured(*args), step_seconds=STEP_SECONDS)

    monkeypatch.setattr(denoise_measure, "measured", given)


def planted() -> diffusers.WanPipeline:
    """Constant queries and keys: rotary positions alone make the logits, highest at distance 0."""
    torch.manual_seed(0)
    denoiser = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    for block in denoiser.blocks:
        attention = block.attn1
        for part in (attention.to_q, attention.to_k):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.ones_(part.bias)
        attention.to_q.bias.data.view(2, 32)[DIFFUSE] = 0.0
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.data.fill_(4.0)
        # Averages over many tokens are small; the model shall need them all the same.
        attention.to_v.weight.data *= 20.0
        attention.to_out[0].weight.data[:, 32:] *= 20.0
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(None, None, None, scheduler, denoiser)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(count: int = 4) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    return [
        {"prompt_embeds": torch.randn(1, 4, 16, generator=g), "guidance_scale": 1.0}
        for _ in range(count)
    ]


def run(pipe, **changes) -> Plan:
    options = {
        "budget": 0.05, **SIZE, "methods": ["probe_window"], "preset": "fast", "progress": False,
    }  # fmt: skip
    return accelkit.calibrate(pipe, prompts(), **{**options, **changes})


def latents(pipe, steps: int = 4, **size):
    call = {k: v for k, v in {**SIZE, **size}.items() if k != "steps"}
    return pipe(
        **call, **prompts(1)[0], num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(9),
    ).frames  # fmt: skip


def test_planted_patterns_are_found() -> None:
    pipe = planted()
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    dense = latents(pipe)
    plan = run(pipe)
    assert [*plan.sites] == SITES
    for layer in plan.sites.values():
        assert len(layer.rules) == len(buckets(4)) == 3
        # Wherever anything is sparse, the head with the planted window is.
        assert all(not plan.policies[rule.policies[LOCAL]].dense for rule in layer.rules)
        assert sum(k.startswith("denoise ") for k in layer.evidence) == 3
        seen = layer.evidence["denoise"]
        assert seen.error[LOCAL] < 0.1
        assert seen.density[LOCAL] < 0.2
        assert seen.recall[LOCAL] > 0.9
        assert seen.ms < seen.dense_ms
    # Late steps decide the result: there the head that needs every token stays dense.
    last = plan.sites[SITES[0]].rules[-1]
    assert last.steps == (0.5, 1.0)
    assert plan.policies[last.policies[DIFFUSE]].dense
    assert plan.measured["measured_error"] <= 0.05
    assert plan.limits.grid == (1, 32, 32)
    assert (plan.limits.max_length, plan.limits.steps) == (TOKENS, 4)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    with accelkit.patch(pipe, plan) as handle:
        found = latents(pipe)
        assert handle.report().sparse_calls == 2 * 4
    error = float((found - dense).abs().sum() / dense.abs().sum())
    assert 0 < error <= 0.05, "the budget holds for a prompt and seed that nobody looked at"
    assert torch.equal(latents(pipe), dense)


def test_a_small_budget_stays_dense() -> None:
    plan = run(planted(), budget=1e-7)
    assert all(not layer.rules for layer in plan.sites.values())
    assert plan.measured["note"].startswith("dense")
    assert not plan.check(planted())


def test_a_step_cache_is_planned_beside_attention() -> None:
    pipe = planted()
    dense = latents(pipe, 8)
    plan = run(pipe, steps=8, budget=0.3, methods=["probe_window", "first_block_cache"])
    cache = plan.sites["transformer"].block
    assert cache is not None and cache.kind == "first_block_cache"
    assert plan.measured["step_cache"] == "first_block_cache"
    assert plan.measured["measured_error"] <= 0.3
    assert any(layer.rules for layer in plan.sites.values())
    assert plan.measured["predicted_speedup"] > 1
    # Rounds compare like with like: both sides are the whole denoising.
    ratios = [r["predicted_dense_ms"] / r["predicted_ms"] for r in plan.measured["rounds"]]
    assert any(ratio == pytest.approx(plan.measured["predicted_speedup"], 1e-3) for ratio in ratios)
    with accelkit.patch(pipe, Plan.from_json(plan.to_json())) as handle:
        latents(pipe, 8)
        calls = handle.report().sites
        assert calls[SITES[0]].calls == 8
        assert calls[SITES[1]].calls < 8, "the second block is left out at some steps"
    assert torch.equal(latents(pipe, 8), dense)


def test_the_same_journal_gives_the_same_plan(tmp_path) -> None:
    pipe, path = planted(), tmp_path / "journal.jsonl"
    first = run(pipe, journal=path)
    again = run(pipe, journal=path, resume=True)
    assert again.to_json() == first.to_json()


def test_killed_and_resumed(tmp_path, monkeypatch) -> None:
    pipe, path = planted(), tmp_path / "journal.jsonl"
    first = run(pipe, journal=path)
    lines = path.read_text().splitlines(keepends=True)
    seconds = sum(json.loads(line).get("seconds", 0.0) for line in lines[1:])
    assert seconds <= first.calibration["seconds"]["whole"], "no time stands there twice"
    keep = next(n for n, line in enumerate(lines) if '"influence/1/0"' in line)
    path.write_text("".join(lines[:keep]) + lines[keep][:20])
    # What stands in the journal is not done again: neither screening nor measuring runs.
    monkeypatch.setattr("accelkit.calibration.denoise.measure.prime", None)
    monkeypatch.setattr("accelkit.calibration.denoise.measure.calibrated_settings", None)
    again = run(pipe, journal=path, resume=True)
    repeated = path.read_text().splitlines(keepends=True)
    assert repeated[:keep] == lines[:keep]
    assert len(repeated) == len(lines)
    a, b = json.loads(first.to_json()), json.loads(again.to_json())
    for key in ("policies", "sites", "limits", "budget", "fingerprint"):
        assert a[key] == b[key]


def test_time_is_up() -> None:
    plan = run(planted(), time_limit=1e-6)
    assert plan.calibration["skipped"]
    assert not plan.check(planted())


def test_early_steps_weigh_what_they_do() -> None:
    """How much a bucket decides is measured with the methods themselves; early ones count for no
    less than what late ones show.
    """
    plan = run(planted())
    influence = plan.calibration["influence"]
    assert len(influence) == 3
    assert all(0.01 < v < 10 for v in influence)
    # Buckets of 1, 1 and 2 steps, in the middle at 1/8, 3/8 and 3/4; nothing is decided early here.
    assert influence == pytest.approx([3 * influence[2], influence[2], influence[2]], rel=1e-3)
    for now in plan.measured["rounds"]:
        assert 0.5 < now["measured_error"] / now["predicted_error"] < 2


def test_weights_come_from_what_a_method_leaves_out() -> None:
    """Noise of the same size may cancel on its way; what is always left out does not."""
    weight = torch.ones(8, 4)

    def show(copies, see):
        out = torch.randn(1, 1, 64, 4, generator=torch.Generator().manual_seed(0)) + 2
        dense = Partial(out.expand(copies, -1, -1, -1).clone(), torch.zeros(copies, 1, 64))
        see(None, dense)
        return dense.out.mean(2) @ weight.T  # every row counts alike

    groups = {"site": [[0]]}
    noise = site_weights(show, groups)
    bias = site_weights(show, groups, lambda _: lambda call, dense: 0.1 * dense.out[0].abs())
    nothing = site_weights(show, groups, lambda _: lambda call, dense: 0 * dense.out[0])
    assert bias["site"][0] > 5 * noise["site"][0]
    assert nothing == noise


def test_other_grids_and_fewer_steps_are_told() -> None:
    pipe = planted()
    plan = run(pipe)
    with accelkit.patch(pipe, plan), pytest.warns(PlanTransferWarning, match="2 steps"):
        latents(pipe, 2)
    with accelkit.patch(pipe, plan), pytest.warns(PlanTransferWarning, match=r"\(1, 32, 16\)"):
        latents(pipe, width=256)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 1.5}, "budget"),
        ({"preset": "best"}, "preset"),
        ({"methods": []}, "methods"),
        ({"steps": 1}, "steps"),
        ({"time_limit": 0}, "time_limit"),
        ({"lengths": [1024]}, "no use for lengths"),
        ({"batch": 2}, "no use for batch"),
    ],
)
def test_bad_arguments(changes: dict, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        run(planted(), **changes)


def test_a_bare_denoiser_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="pipeline"):
        run(planted().transformer)


def test_a_patched_pipeline_is_refused() -> None:
    pipe = planted()
    plan = run(pipe)
    with accelkit.patch(pipe, plan), pytest.raises(InvalidInputError, match="patched"):
        run(pipe)


def test_rows_in_another_order_are_judged_there(monkeypatch) -> None:
    """Of an ordered method only some tiles are computed, in its own order; with all of them the
    errors are those of the whole call.
    """
    geometry = Geometry((Span("video", 0, TOKENS),), (4, 16, 16))
    shape = fit.Shape(2, 2, 32, causal=False, geometry=geometry)
    call = fit.random_call(shape, torch.float32, torch.device("cpu"), TOKENS)
    dense = dense_attention(call)
    method = load("sparse_vdit")(mode="multi_diagonal", density=0.3)
    answers = answer(call, Policy(methods=(method,)))
    assert answers[0].order is not None
    whole = compute(answers[0])
    gap = (whole.out - dense.out).abs().sum((0, 2, 3)) / dense.out.abs().sum((0, 2, 3))
    recall = (whole.lse - dense.lse).exp().mean((0, 2))
    monkeypatch.setattr(candidates, "SHARE", 1)
    found = candidates.Bench(call, dense, denoise_measure.NO_ROWS).measure(answers)
    assert found["error"] == pytest.approx(gap.tolist(), rel=1e-4)
    assert found["recall"] == pytest.approx(recall.tolist(), rel=1e-4)
    monkeypatch.setattr(candidates, "SHARE", 4)
    some = candidates.Bench(call, dense, denoise_measure.NO_ROWS).measure(answers)
    assert some["error"] == pytest.approx(gap.tolist(), rel=0.2)


def test_lists_are_kept_as_long_as_they_hold_the_mass() -> None:
    """The same patterns with a little noise: kept for the steps between; moved away: made anew."""
    call = planted_video(text_first=True, grid=(8, 12, 12))
    noise = torch.Generator().manual_seed(0)
    near = call.k + 0.01 * torch.randn(call.k.shape, generator=noise)
    later = replace(call, k=near, _shared={})
    moved = replace(call, k=call.k.roll(call.n_k // 2, 2), _shared={})
    method = load("xattention")(coverage=0.6, block=32)
    lists = answer(call, Policy(methods=(method,)))
    then = denoise_measure._Begun([], {}, {}, method, lists)

    def aged(now, gap: int) -> dict:
        bench = candidates.Bench(now, dense_attention(now), denoise_measure.NO_ROWS)
        return denoise_measure._aged(bench, then, gap)

    assert aged(later, 5)["good_for"] == 5
    assert aged(later, 5)["share"] > 0.95
    assert aged(moved, 5)["good_for"] == 1
    assert aged(moved, 5)["share"] < 0.5
    assert aged(later, 0) == {"good_for": 1}


def test_many_places_are_looked_at_less_often() -> None:
    few = [f"block{n}@{b}" for b in range(4) for n in range(7)]
    many = [f"block{n}@{b}" for b in range(4) for n in range(30)]
    assert denoise_measure.looked_at(few, 1) == few == denoise_measure.looked_at(few, 0)
    assert denoise_measure.looked_at(many, 0) == many
    again = denoise_measure.looked_at(many, 1)
    assert len(again) == 12
    assert {p.partition("@")[2] for p in again} == set("0123")
    assert set(weighed_at(few).values()) == set(few)
    at = weighed_at(many)
    assert set(at) == set(many)
    assert set(at.values()) == {f"block{n}@2" for n in range(30)}
