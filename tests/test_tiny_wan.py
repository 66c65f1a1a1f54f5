"""The small video pipeline and the shapes it was trained on: `examples/models/tiny-wan`."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "tiny-wan"
sys.path.insert(0, str(ROOT / "examples" / "train"))
import shapes  # noqa: E402

pytest.importorskip("diffusers")


# -- shapes -------------------------------------------------------------------------------------


def drawn(scenes, frames=13, height=48, width=48, seed=0):
    """Videos as `look` takes them: (n, frames, height, width, 3) in [0, 1]."""
    video = shapes.draw(scenes, frames, height, width, torch.Generator().manual_seed(seed))
    assert video.shape == (len(scenes), 3, frames, height, width)
    return (video.permute(0, 2, 3, 4, 1) + 1) / 2


@pytest.mark.parametrize(
    ("frames", "height", "width", "things"), [(13, 48, 48, 1), (13, 48, 48, 2), (9, 32, 64, 2)]
)
def test_the_detector_reads_drawn_scenes(frames, height, width, things):
    rng = random.Random(things)
    scenes = [shapes.random_scene(rng, things, bool(i % 2)) for i in range(100)]
    videos = drawn(scenes, frames, height, width)
    seen = [shapes.look(v) for v in videos]
    marks = [shapes.score(a, s) for a, s in zip(scenes, seen, strict=True)]
    assert sum(m["all"] and m["background"] for m in marks) >= 99


def test_every_combination_is_read():
    things = [
        shapes.Thing(s, c, d)
        for s in shapes.SHAPES
        for c in shapes.COLOURS
        for d in shapes.DIRECTIONS
    ]
    videos = drawn([shapes.Scene((t,), "gray") for t in things], frames=5, height=32, width=32)
    assert [shapes.look(v).things for v in videos] == [(t,) for t in things]


def test_held_out_things_cover_every_value():
    things = [
        shapes.Thing(s, c, d)
        for s in shapes.SHAPES
        for c in shapes.COLOURS
        for d in shapes.DIRECTIONS
    ]
    held_out = [t for t in things if shapes.is_held_out(t)]
    assert (len(things), len(held_out)) == (96, 12)
    assert {t.shape for t in held_out} == set(shapes.SHAPES)
    assert {t.colour for t in held_out} == set(shapes.COLOURS)
    assert {t.direction for t in held_out} == set(shapes.DIRECTIONS)
    rng = random.Random(0)
    for held in (True, False):
        scenes = [shapes.random_scene(rng, 2, held) for _ in range(50)]
        assert all(shapes.is_held_out(t) == held for s in scenes for t in s.things)


def test_one_wrong_attribute_is_one_wrong_mark():
    thing, other = shapes.Thing("circle", "red", "left"), shapes.Thing("cross", "blue", "up")
    asked = shapes.Scene((thing, other), "gray")
    right = shapes.score(asked, asked)
    assert all(right.values())

    def wrong(*things, background="gray"):
        marks = shapes.score(asked, shapes.Scene(things, background))
        return {k for k, v in marks.items() if not v}

    assert wrong(other, thing) == set(), "the order does not count"
    assert wrong(replace(thing, shape="square"), other) == {"shape", "all"}
    assert wrong(replace(thing, direction="right"), other) == {"direction", "all"}
    assert wrong(thing, other, background="white") == {"background"}
    assert wrong(thing) == {"colour", "shape", "direction", "all"}
    assert wrong(thing, other, shapes.Thing("square", "cyan", "up")) == {"all"}


def test_what_stands_still_moves_nowhere_and_nothing_is_nothing():
    video = drawn([shapes.Scene((shapes.Thing("square", "green", "up"),), "black")])[0]
    still = video[:1].expand_as(video)
    assert shapes.look(still).things == (shapes.Thing("square", "green", "nowhere"),)
    assert shapes.look(torch.full((5, 32, 32, 3), 0.45)) == shapes.Scene((), "gray")


def test_prompts_are_parsed():
    rng = random.Random(3)
    for things in (1, 2):
        scene = shapes.random_scene(rng, things, False)
        assert shapes.Scene.parse(scene.prompt) == scene
    with pytest.raises(ValueError, match="a purple cow"):
        shapes.Scene.parse("a purple cow moving left slowly")


# -- pipeline -----------------------------------------------------------------------------------


@cache
def pipeline():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(str(MODEL))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(prompts, frames=9, height=32, width=32, steps=8, seed=0, **options):
    return pipeline()(
        prompts,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).frames


def test_size_and_parts():
    pipe = pipeline()
    assert type(pipe).__name__ == "WanPipeline"
    parts = (pipe.transformer, pipe.text_encoder, pipe.vae)
    assert sum(p.numel() for m in parts for p in m.parameters()) <= 6_000_000
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 13_000_000
    assert pipe.transformer.config.attention_head_dim == 64
    assert all(r["steps"] > 0 for r in json.loads((MODEL / "training.json").read_text()))


def test_words_of_the_prompts_are_known():
    tokenizer = pipeline().tokenizer
    scene = shapes.random_scene(random.Random(0), 2, True)
    ids = tokenizer(scene.prompt).input_ids
    assert tokenizer.unk_token_id not in ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id in tokenizer("a purple cow").input_ids


def test_it_draws_what_was_asked_and_the_same_again():
    prompts = [
        "a red circle moving left on a black background",
        "a blue square moving down on a white background",
    ]
    videos = run(prompts)
    assert videos.shape == (2, 9, 32, 32, 3)
    for prompt, video in zip(prompts, videos, strict=True):
        assert shapes.look(torch.from_numpy(video)).prompt == prompt
    again = run(prompts)
    assert torch.equal(torch.from_numpy(videos), torch.from_numpy(again))


def test_latents_have_the_geometry_of_the_card():
    latents = run(["a green cross moving up"], 5, 32, 48, steps=2, output_type="latent")
    assert latents.shape == (1, 8, 3, 16, 24)


def test_the_autoencoder_keeps_the_shapes_and_whole_clips_are_the_same_function():
    from tiny_wan import WholeClips

    vae = pipeline().vae
    scenes = [shapes.random_scene(random.Random(5), 2, True)]
    video = drawn(scenes, 9, 48, 48).permute(0, 4, 1, 2, 3) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
        again = vae.decode(latents).sample
        whole = WholeClips(vae)
        mean, _ = whole.encode(video)
        torch.testing.assert_close(mean, latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(whole.decode(mean).clamp(-1, 1), again, atol=1e-4, rtol=1e-4)
    error = ((again - video) / 2).square().mean()
    assert -10 * error.log10() >= 30
    assert shapes.look((again[0].permute(1, 2, 3, 0) + 1) / 2).things != ()


# -- training -----------------------------------------------------------------------------------


def test_muon_steps_are_orthogonal():
    from tiny_wan import Muon

    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.zeros(s)) for s in ((64, 32), (32, 64), (64, 32))]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape)
    Muon(matrices).step(0.5)
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix.detach()) / (0.5 * 0.2 * 64**0.5)
        assert 0.6 < values.min() < values.max() < 1.25
        assert (matrix * matrix.grad).sum() < 0, "downhill"


def test_a_new_autoencoder_already_passes_colours():
    from tiny_wan import WholeClips, make_vae

    torch.manual_seed(0)
    scenes = [shapes.random_scene(random.Random(1), 1, False)]
    video = drawn(scenes, 9, 32, 32).permute(0, 4, 1, 2, 3) * 2 - 1
    whole = WholeClips(make_vae())
    with torch.no_grad():
        again = whole.decode(whole.encode(video)[0])
    assert ((again - video) / 2).square().mean().sqrt() < 0.15
