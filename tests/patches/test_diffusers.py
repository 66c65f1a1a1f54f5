"""Every diffusers family in its real pipeline class: sites, geometry, clock, sparse runs, undo."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import accelkit
from accelkit.errors import DenseFallbackWarning
from accelkit.patches.adapters import facts, sites, watch
from accelkit.patches.call import AttentionCall, Clock, Geometry, Span
from accelkit.patches.method import load
from accelkit.patches.patch import from_pretrained, handle_of, plan_of, save_pretrained
from accelkit.patches.plan import Policy
from tests.patches.conftest import attributes
from tests.tiny_pipes import NARROW, PIPES, Near, latents, tiny_pipe

pytestmark = pytest.mark.filterwarnings("error::accelkit.errors.DenseFallbackWarning")


WIDE = Near(sink_tokens=10_000, window_tokens=17, block=16)  # every block, on the sparse path
VIDEO = ("video", 0, 192)
# Family: kinds of its sites in running order, spans and grid of the first, branches of a step.
EXPECTED = {
    "wan": ("ss", [VIDEO], (3, 8, 8), ("cond", "uncond")),
    "wan22": ("ssss", [VIDEO], (3, 8, 8), ("cond", "uncond")),
    "hunyuan": ("jjj", [VIDEO, ("text", 192, 198)], (3, 8, 8), ("cond",)),
    "hunyuan15": (
        "jj",
        [("video", 0, 768), ("text", 768, 780)],
        (3, 16, 16),
        ("cond", "uncond"),
    ),
    "cogvideox": ("jj", [("text", 0, 12), ("video", 12, 204)], (3, 8, 8), ("cond_uncond",)),
    "cogvideox15": ("jj", [("text", 0, 12), ("video", 12, 140)], (2, 8, 8), ("cond_uncond",)),
    "ltx": ("ss", [("video", 0, 768)], (3, 16, 16), ("cond_uncond",)),
    "mochi": ("jj", [VIDEO, ("text", 192, 193)], (3, 8, 8), ("cond_uncond",)),
    "cosmos": ("ss", [VIDEO], (3, 8, 8), ("cond", "uncond")),
    "cosmos2": ("ss", [VIDEO], (3, 8, 8), ("cond", "uncond")),
    "cosmos2_image": ("ss", [("image", 0, 64)], (1, 8, 8), ("cond", "uncond")),
    "cosmos25": ("ss", [VIDEO], (3, 8, 8), ("cond", "uncond")),
    "flux": ("jjj", [("text", 0, 12), ("image", 12, 140)], (1, 16, 8), ("cond",)),
    "qwen_image": (
        "jj",
        [("text", 0, 6), ("image", 6, 102)],
        (1, 12, 8),
        ("cond", "uncond"),
    ),
    "sd3": ("jsj", [("image", 0, 64), ("text", 64, 88)], (1, 8, 8), ("cond",)),
    "pixart": ("ss", [("image", 0, 64)], (1, 8, 8), ("cond",)),
}
PROMPTS = ("a red ball moves left", "the cube falls")


@pytest.mark.parametrize("family", PIPES)
def test_every_family_patches_runs_and_undoes(family):
    pipe = tiny_pipe(family)
    n = len(EXPECTED[family][0])
    dense = [latents(pipe, family, p, steps=4) for p in PROMPTS]
    # Wan 2.2 runs one of its denoisers in a step.
    forwards = 4 * len(EXPECTED[family][3]) * (2 if family == "mochi" else 1)
    calls = forwards * (n // 2 if family == "wan22" else n)
    before = [attributes(m) for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    scheduler, attention = dict(vars(pipe.scheduler)), functional.scaled_dot_product_attention

    with accelkit.patch(pipe, WIDE) as handle:
        wide = latents(pipe, family, PROMPTS[0], steps=4)
        assert handle.report().sparse_calls == calls
    torch.testing.assert_close(wide, dense[0], atol=2e-4, rtol=1e-3)

    with accelkit.patch(pipe, NARROW) as handle, handle.measuring():
        for prompt, expected in zip(PROMPTS, dense, strict=True):
            assert not torch.equal(latents(pipe, family, prompt, steps=4), expected)
        assert set(handle.report().sites) == {s.path for s in sites(pipe)}
        assert handle.report().sparse_calls == 2 * calls
        assert 0.05 < handle.report().density < 0.9
        swapped = type(pipe.scheduler).from_config(pipe.scheduler.config)
        pipe.scheduler, original = swapped, pipe.scheduler
        handle.reset_report()
        latents(pipe, family, steps=3)
        assert handle.report().sparse_calls == calls * 3 // 4
    pipe.scheduler = original

    assert vars(swapped).keys() == vars(original).keys()
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert functional.scaled_dot_product_attention is attention
    after = [attributes(m) for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    assert after == before
    assert torch.equal(latents(pipe, family, PROMPTS[0], steps=4), dense[0])


@pytest.mark.parametrize("family", PIPES)
def test_sites_geometry_and_clock(family):
    kinds, spans, grid, branches = EXPECTED[family]
    pipe = tiny_pipe(family)
    found = sites(pipe)
    assert [s.kind[0] for s in found] == list(kinds)
    assert [s.order for s in found] == sorted({s.order for s in found})
    calls: list[AttentionCall] = []
    with watch(pipe, calls.append):
        latents(pipe, family, steps=2)
    first = [c for c in calls if c.site == found[0]]
    assert first[0].geometry.spans == tuple(Span(*s) for s in spans)
    assert first[0].geometry.grid == grid
    assert first[0].n_q == first[0].n_k == spans[-1][2]
    clocks = dict.fromkeys(c.clock for c in calls)
    assert list(clocks) == [Clock("denoise", step, 2, b) for step in range(2) for b in branches]


@pytest.mark.parametrize("family", ["wan22", "flux"])
def test_facts_and_one_plan_for_pipeline_and_denoiser(family):
    pipe = tiny_pipe(family)
    fingerprint, heads = facts(pipe)
    assert fingerprint.library == "diffusers"
    assert fingerprint.class_name == type(pipe.transformer).__name__
    expected = {"wan22": ("transformer", "transformer_2"), "flux": ("transformer",)}[family]
    assert tuple(fingerprint.components) == expected
    assert {(c.q_heads, c.head_dim) for c in fingerprint.components.values()} == {(2, 16)}
    assert set(heads.values()) == {2}
    assert {s.component for s in sites(pipe)} == set(expected)
    if family == "flux":
        assert facts(pipe.transformer)[1] == heads
        plan = plan_of(pipe, NARROW)
        assert plan.check(pipe.transformer) == []
        sparse = latents(pipe, family)
        with accelkit.patch(pipe, plan):
            sparse = latents(pipe, family)
        with accelkit.patch(pipe.transformer, plan):
            torch.testing.assert_close(latents(pipe, family), sparse)


def test_a_class_derived_from_a_known_one():
    pipe = tiny_pipe("wan")
    paths = [s.path for s in sites(pipe)]
    pipe.transformer.__class__ = type("MyWan", (type(pipe.transformer),), {})
    assert [s.path for s in sites(pipe)] == paths
    with accelkit.patch(pipe, NARROW) as handle:
        latents(pipe, "wan", steps=1)
        assert handle.report().sparse_calls == 4


def test_several_resolutions_with_one_plan():
    pipe = tiny_pipe("wan")
    sizes = [(128, 128, 9), (64, 128, 9), (128, 64, 9), (128, 128, 5)]
    expected = []
    for height, width, frames in sizes:
        with accelkit.patch(pipe, NARROW):
            expected.append(
                latents(pipe, "wan", height=height, width=width, num_frames=frames, steps=1)
            )
    with accelkit.patch(pipe, NARROW) as handle:
        for (height, width, frames), latent in zip(sizes, expected, strict=True):
            again = latents(pipe, "wan", height=height, width=width, num_frames=frames, steps=1)
            assert torch.equal(again, latent)
        assert handle.report().dense == {}


def test_coordinates_instead_of_sizes_leave_the_grid_open():
    model = tiny_pipe("ltx").transformer
    seen: list[AttentionCall] = []
    with torch.no_grad(), watch(model, seen.append):
        model(
            torch.randn(1, 96, 8),
            encoder_hidden_states=torch.randn(1, 5, 16),
            timestep=torch.tensor([900.0]),
            encoder_attention_mask=torch.ones(1, 5),
            video_coords=torch.rand(1, 3, 96),
        )
    assert seen[0].geometry == Geometry((Span("video", 0, 96),), None)


def test_one_frame_is_an_image():
    pipe = tiny_pipe("wan")
    seen: list[AttentionCall] = []
    with watch(pipe, seen.append):
        latents(pipe, "wan", num_frames=1, steps=1)
    assert seen[0].geometry == Geometry((Span("image", 0, 64),), (1, 8, 8))


@pytest.mark.parametrize(("family", "image"), [("hunyuan", 192), ("qwen_image", 96)])
def test_batch_of_prompts_and_padding_of_different_length(family, image):
    """Text of unequal length cannot be cut: a key mask at the end or in the middle."""
    pipe = tiny_pipe(family)
    prompts = ["a red ball moves left", "ball"]
    options = {"negative_prompt": ["the ring"] * 2} if family == "qwen_image" else {}
    dense = latents(pipe, family, prompts, **options)
    seen: list[AttentionCall] = []
    with watch(pipe, seen.append):
        latents(pipe, family, prompts, **options)
    assert seen[0].key_mask.sum(-1).tolist() == [image + 6, image + 2]
    with accelkit.patch(pipe, WIDE) as handle:
        wide = latents(pipe, family, prompts, **options)
        torch.testing.assert_close(wide, dense, atol=2e-4, rtol=1e-3)
        assert handle.report().dense == {}


def test_dense_plan_is_what_ran_before():
    pipe = tiny_pipe("wan")
    dense = latents(pipe, "wan")
    plan = plan_of(pipe, NARROW)
    plan = plan.model_copy(update={"sites": {}})
    with accelkit.patch(pipe, plan) as handle:
        assert torch.equal(latents(pipe, "wan"), dense)
        assert handle.report().dense == {"no policy": 8}


def test_gradients_stay_whole():
    pipe = tiny_pipe("wan")
    model = pipe.transformer
    latent = torch.randn(1, 16, 3, 16, 16, requires_grad=True)
    arguments = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.randn(1, 5, 16)}
    with accelkit.patch(pipe, NARROW) as handle:
        with pytest.warns(DenseFallbackWarning, match="gradients"):
            model(latent, **arguments).sample.sum().backward()
        assert handle.report().dense == {"gradients are enabled": 2}
    assert latent.grad.abs().sum() > 0


def test_a_pipeline_is_saved_with_its_plan_and_opens_patched(tmp_path):
    pipe = tiny_pipe("pixart")
    method = load("window")(sink_tokens=16, window_tokens=17, block=16)
    plan = plan_of(pipe, NARROW).model_copy(update={"policies": (Policy(methods=(method,)),)})
    with accelkit.patch(pipe, plan):
        sparse = latents(pipe, "pixart")
        save_pretrained(pipe, tmp_path)
    again = from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, "pixart"), sparse)
    assert handle_of(again).report().sparse_calls == 4
    accelkit.unpatch(again)
    assert handle_of(again) is None
