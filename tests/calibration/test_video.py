"""Prompts, runs of a pipeline and comparisons of their results; what is written for people."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from imageio import v3
from tiny_pipes import tiny_pipe

from accelkit.calibration.denoise import fidelity as fidelities
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.fidelity import fidelity, ssim
from accelkit.calibration.denoise.shots import CHECK_SEED, Shot, gather, together
from accelkit.calibration.denoise.video import Enough, Settings, Take
from accelkit.calibration.show import frames
from accelkit.errors import InvalidInputError

SIZE = Settings(128, 128, 9, 3)


def test_prompts_are_split_and_seeded():
    shots = gather(["a", "b", "c", "d"], 2, 2, 2)
    assert [s.arguments["prompt"] for s in shots.measure] == ["a", "c"]
    assert [s.arguments["prompt"] for s in shots.check] == ["b", "d"]
    assert [s.seed for s in shots.measure] == [2000, 2001]
    assert [s.seed for s in shots.check] == [CHECK_SEED + 2000, CHECK_SEED + 2001]


def test_one_prompt_is_checked_with_another_seed():
    shots = gather("a red ball", 0, 2, 2)
    assert shots.measure[0].arguments == shots.check[0].arguments == {"prompt": "a red ball"}
    assert shots.measure[0].seed != shots.check[0].seed


def test_prompts_of_a_file(tmp_path):
    plain = tmp_path / "prompts.txt"
    plain.write_text("a red ball\n\n a blue cube \n")
    assert [s.name for s in gather(plain, 0, 1, 1).check] == ["a blue cube"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a", "guidance_scale": 3.0, "seed": 7}\n"b"\n')
    (one,) = gather(str(rows), 0, 1, 1).measure
    assert (one.seed, one.arguments) == (7, {"prompt": "a", "guidance_scale": 3.0})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no prompts"),
        ("", "no prompts"),
        ([3], "prompt 1 is 3"),
        ([{}], "prompt 1"),
        (5, "int"),
    ],
)
def test_what_is_no_prompt(data, words):
    with pytest.raises(InvalidInputError, match=words):
        gather(data, 0, 1, 1)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n")
    with pytest.raises(InvalidInputError, match="is empty"):
        gather(path, 0, 1, 1)
    with pytest.raises(InvalidInputError, match="no_such\\.txt: cannot be read"):
        gather("no_such.txt", 0, 1, 1)


def test_smaller_sizes_fit_the_same_pipelines():
    some = Settings(480, 832, 81, 50).smaller()
    assert [(s.height, s.width, s.num_frames) for s in some] == [
        (240, 416, 17), (240, 416, 41), (240, 416, 81), (480, 832, 81),
    ]  # fmt: skip
    assert Settings(None, None, None, 4).smaller() == [Settings(None, None, None, 4)]


def test_a_run_is_seeded_and_can_be_cut_short():
    pipe, shot = tiny_pipe("wan"), gather("a red ball", 0, 1, 1).measure[0]
    whole = video.run(pipe, SIZE, shot, decode=True)
    assert whole.whole and len(whole.ends) == 3
    assert whole.frames.shape == (9, 128, 128, 3)
    seen = []

    def each(step, latents):
        seen.append(latents.clone())
        if step == 1:
            raise Enough

    part = video.run(pipe, SIZE, shot, each=each)
    assert not part.whole and len(part.ends) == 2
    assert torch.equal(part.latents, seen[1].float())
    again = video.run(pipe, SIZE, shot)
    assert torch.equal(again.latents, whole.latents)
    assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_is_not_given_what_it_does_not_know():
    with pytest.raises(InvalidInputError, match="num_frames"):
        SIZE.arguments(tiny_pipe("flux"))


@pytest.mark.parametrize(
    ("size", "arguments", "words"),
    [
        ({"height": 47}, {}, "divisible by 16 but are 47"),
        ({}, {"guidance": 3.0}, "no argument guidance; it has .*guidance_scale"),
    ],
)
def test_what_a_pipeline_refuses_is_bad_input(size, arguments, words):
    pipe = tiny_pipe("wan")
    shot = Shot("a", {"prompt": "a", **arguments}, 0)
    with pytest.raises(InvalidInputError, match=words):
        video.run(pipe, replace(SIZE, **size), shot)


def take(latents, pictures=None):
    return Take(torch.tensor(latents), pictures, 0.0)


def test_fidelity_by_hand():
    found = fidelity(take([1.0, 2.0, 3.5, 4.0]), take([1.0, 2.0, 3.0, 4.0]))
    assert found["error"] == pytest.approx(0.05)
    assert found["latent_psnr"] == pytest.approx(10 * math.log10(9 / 0.0625))
    assert found["psnr"] is None and found["ssim"] is None


def test_psnr_and_ssim_of_frames():
    g = np.random.default_rng(0)
    a = g.random((2, 24, 32, 3), dtype=np.float32)
    same = fidelity(take([1.0], a), take([1.0], a))
    assert same["psnr"] == 100.0 and same["ssim"] == pytest.approx(1.0)
    lighter = np.full_like(a, 0.5), np.full_like(a, 0.6)
    assert fidelity(take([1.0], lighter[1]), take([1.0], lighter[0]))["psnr"] == pytest.approx(
        20.0, abs=1e-4
    )
    # Constant pictures: structure is equal, only the means differ.
    means = (2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4)
    assert ssim(*lighter) == pytest.approx(means, abs=1e-5)
    assert ssim(a, g.random(a.shape, dtype=np.float32)) < 0.2


def test_lpips_only_where_its_weights_are(tmp_path, monkeypatch):
    """A stand-in for the package: the mean distance of frames in −1 … 1."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, x, y):
            assert x.shape == (1, 3, 24, 32)
            return (x - y).abs().mean().view(1, 1, 1, 1)

    a = np.zeros((2, 24, 32, 3), np.float32)
    pair = take([1.0], a + np.float32([0.25, 0.5])[:, None, None, None]), take([1.0], a)
    module = ModuleType("lpips")
    module.LPIPS, module.__spec__ = LPIPS, ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fidelities.network.cache_clear()
    assert fidelity(*pair)["lpips"] is None, "the package alone is not enough"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt.pth").touch()
    fidelities.network.cache_clear()
    assert fidelity(*pair)["lpips"] == pytest.approx(2 * 0.375)
    fidelities.network.cache_clear()


def test_videos_and_sheets_are_written(tmp_path):
    g = np.random.default_rng(0)
    a, b = g.random((8, 33, 40, 3)), g.random((8, 33, 40, 3))
    path = frames.write(a, tmp_path / "deep" / "a.mp4", fps=8)
    back = v3.imread(path)
    assert back.shape == (8, 34, 40, 3)
    sheet = v3.imread(frames.contact_sheet(a, b, tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (3 * (33 + 8), 6 * (40 + 8), 3)
    np.testing.assert_array_equal(sheet[4:37, 4:44], (a[0] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(sheet[45:78, 4:44], (b[0] * 255).round().astype(np.uint8))
    picture = v3.imread(frames.write(a[:1], tmp_path / "a.png"))
    assert picture.shape == (33, 40, 3)


def test_a_video_is_no_picture(tmp_path):
    with pytest.raises(InvalidInputError, match=r"\.mp4"):
        frames.write(np.zeros((2, 16, 16, 3)), tmp_path / "a.png")
    with pytest.raises(InvalidInputError, match=r"\.png"):
        frames.write(np.zeros((1, 16, 16, 3)), tmp_path / "a.mp4")


def test_shots_are_drawn_at_once_where_they_can_be() -> None:
    def shot(**arguments):
        return Shot("", arguments, 3)

    text = [shot(prompt=p, guidance_scale=3.0) for p in ("a", "b")]
    assert together(text).arguments == {"prompt": ["a", "b"], "guidance_scale": 3.0}
    embeds = [shot(prompt_embeds=torch.full((1, 4, 8), float(n))) for n in range(3)]
    assert together(embeds).arguments["prompt_embeds"][:, 0, 0].tolist() == [0, 1, 2]
    assert together([shot(prompt="a", guidance_scale=g) for g in (1.0, 2.0)]) is None
    assert together([shot(prompt_embeds=torch.zeros(1, n, 8)) for n in (3, 4)]) is None
    assert together([shot(prompt="a"), shot(prompt="a", image=object())]) is None


def test_what_is_not_finite_is_no_success() -> None:
    true = Take(torch.ones(1, 4), None, 0.0)
    found = Take(torch.tensor([[1.0, 1.0, math.nan, 1.0]]), None, 0.0)
    rows = fidelity(found, true)
    assert rows["error"] > 100
    assert rows["latent_psnr"] < 0
