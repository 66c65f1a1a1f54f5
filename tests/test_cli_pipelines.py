"""The commands on a folder that holds a pipeline, from calibration to a video."""

from __future__ import annotations

import json
import warnings

import pytest
from diffusers import DiffusionPipeline
from imageio import v3
from test_cli import failed, run
from tiny_cases import probe_methods, tiny_model, tiny_plan
from tiny_pipes import tiny_pipe

import accelkit
from accelkit.calibration.compare import videos
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.show.pictures import figure
from accelkit.patches.method import load
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import Limits

SIZE = ("--height", "128", "--width", "128", "--frames", "9", "--steps", "4")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pipe")
    tiny_pipe("wan").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red ball moves left\na blue cube falls\n")
    return str(path)


@pytest.fixture(scope="module")
def plan(pipe, prompts, tmp_path_factory) -> str:
    """A calibrated plan: at this size nothing but a step cache can win. The clock is given, so that
    a busy machine does not decide.
    """
    speed = {"dense_ms": 2.0, "ms": 1.0}
    with pytest.MonkeyPatch.context() as m:
        m.setattr("accelkit.calibration.denoise.check.Checker.speed", lambda self, plan: speed)
        return calibrated(pipe, prompts, tmp_path_factory)


def calibrated(pipe, prompts, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("plan")
    caches = ("--methods", "first_block_cache,mag_cache", "--preset", "fast", "--budget", "50%")
    result = run("calibrate", pipe, "--prompts", prompts, *SIZE, *caches, "--out", str(out),
                 "--json", "-q")  # fmt: skip
    found = json.loads(result.stdout)
    assert found["phase"] == "denoise"
    assert found["sites"] == 2
    assert found["calibration"]["num_frames"] == 9
    assert found["calibration"]["data"] == "2 of the user's"
    assert (out / "report.html").exists() and (out / "journal.jsonl").exists()
    return str(out)


def test_patch_writes_both_videos_and_a_sheet(pipe, plan, tmp_path):
    out = tmp_path / "out.mp4"
    result = run("patch", pipe, "--plan", plan, "--prompt", "a red ball", "--output", str(out),
                 "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert found["fidelity"]["psnr"] > 10
    assert found["dense"]["denoise_seconds"] > 0
    assert v3.imread(out).shape == (9, 128, 128, 3)
    assert v3.imread(tmp_path / "out-dense.mp4").shape == (9, 128, 128, 3)
    assert v3.imread(tmp_path / "out-sheet.png").shape == (3 * 136, 6 * 136, 3)


def test_a_plan_of_another_model_is_refused_before_anything_runs(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("accelkit.calibration.denoise.video.run", None)
    with probe_methods():
        tiny_plan(tiny_model()).save_pretrained(tmp_path)
        for command in ("patch", "bench"):
            assert "no such component" in failed(command, pipe, "--plan", str(tmp_path), code=4)


def test_patch_warms_up_both_sides(pipe, plan, monkeypatch):
    """What is compiled and chosen in a first run is no part of either side's seconds."""
    steps, real = [], video.run

    def seen(pipe, settings, *rest, **how):
        steps.append(settings.num_inference_steps)
        return real(pipe, settings, *rest, **how)

    monkeypatch.setattr(video, "run", seen)
    run("patch", pipe, "--plan", plan, "--prompt", "a red ball", "--steps", "6")
    assert steps == [4, 6, 4, 6]


@pytest.mark.parametrize(("steps", "told"), [(6, 1), (9, 0)])
def test_only_the_real_run_is_told_of_its_steps(pipe, steps, told):
    """The warm-up, which is shorter than any plan, says nothing and silences nothing."""
    opened = DiffusionPipeline.from_pretrained(pipe)
    made = plan_of(opened, load("window")(window_tokens=17))
    made = made.model_copy(update={"limits": Limits(steps=9)})
    shot = Shot("a red ball", {"prompt": "a red ball"}, 0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        videos.compare(opened, made, video.Settings(128, 128, 9, steps), shot)
    said = [str(w.message) for w in seen if w.category is accelkit.errors.PlanTransferWarning]
    assert len(said) == told
    assert all(f"{steps} steps, the plan was calibrated with 9" in text for text in said)


def test_patch_as_a_person_reads_it(pipe, plan):
    text = run("patch", pipe, "--plan", plan, "--prompt", "a red ball", "--no-compare").stdout
    assert "a red ball" in text and "denoising alone" in text
    assert "times faster" not in text, "nothing to compare with"


def test_a_pipeline_is_saved_with_its_plan(pipe, plan, tmp_path):
    run("patch", pipe, "--plan", plan, "--no-compare", "--save", str(tmp_path / "both"))
    opened = accelkit.from_pretrained(tmp_path / "both")
    assert opened.transformer.is_cache_enabled
    accelkit.unpatch(opened)
    assert not opened.transformer.is_cache_enabled


def test_bench_times_every_path(pipe, plan, tmp_path):
    out = tmp_path / "bench.jsonl"
    result = run("bench", pipe, "--plan", plan, "--json", "--out", str(out))
    rows = json.loads(result.stdout)
    assert (rows[0]["path"], rows[-1]["path"]) == ("own", "plan")
    assert any(r["path"].endswith(" alone") for r in rows)
    assert rows[0]["seconds_a_step"] == pytest.approx(rows[0]["seconds"] / 4)
    assert rows[-1]["plan_is_faster_by"] == 1
    assert 0 < rows[0]["attention_share"] <= 1
    assert len(out.read_text().splitlines()) == len(rows)
    run("bench", pipe, "--plan", plan, "--min-speedup", "1000", code=3)


def test_bench_dry_run_tells_steps_apart(pipe, plan, tmp_path):
    """A window in the second half of the steps: nothing is timed."""
    made = plan_of(DiffusionPipeline.from_pretrained(pipe), load("window")(window_tokens=17))
    late = {
        path: layer.model_copy(
            update={"rules": (layer.rules[0].model_copy(update={"steps": (0.5, 1.0)}),)}
        )
        for path, layer in made.sites.items()
    }
    made.model_copy(update={"sites": late}).save_pretrained(tmp_path)
    words = ("bench", pipe, "--plan", str(tmp_path), "--steps", "6", "--dry-run", "--json")
    first, second = json.loads(run(*words).stdout)
    assert (first["steps"], first["heads"]) == ("1 … 3", {"dense": 4})
    assert (second["steps"], second["heads"]) == ("4 … 6", {"window": 4})
    assert second["backend"] == "torch"
    assert "--fit" in failed("bench", pipe, "--plan", plan, "--fit", code=2)


def test_show_draws_steps_and_layers(pipe, plan, tmp_path):
    picture = tmp_path / "plan.svg"
    text = run("show", plan, "--plot", str(picture)).stdout
    assert "final latents, worst prompt" in " ".join(text.split())
    assert "3 × 8 × 8 tokens, 4 denoising steps" in text
    assert "transformer.blocks.1.attn1" in text
    assert picture.read_text().lstrip().startswith("<?xml")
    titles = [a.get_title(loc="left") for a in figure(accelkit.Plan.from_pretrained(plan)).axes]
    assert titles[0] == "Density over steps"
    listed = json.loads(run("show", pipe, "--json").stdout)["sites"]
    kinds = [(r["site"][-5:], r["kind"], r["may_run_sparse"]) for r in listed]
    assert kinds == [("attn1", "self", "yes"), ("attn2", "cross", "no")] * 2
    assert "cross" in run("show", pipe).stdout


def test_dry_run(pipe):
    result = run("calibrate", pipe, *SIZE, "--dry-run", "--json")
    assert "two dense steps at 128 × 128, 9 frames" in result.stderr
    (row,) = json.loads(result.stdout)
    assert row["tokens"] == 3 * 8 * 8
    assert 0 < row["attention_share"] <= 1


def test_what_cannot_be_used(pipe, plan, tmp_path, monkeypatch):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "empty" in failed("calibrate", pipe, "--prompts", str(empty), *SIZE, "--out",
                             str(tmp_path / "p"), code=2)  # fmt: skip
    assert "lengths" in failed("calibrate", pipe, "--lengths", "1k", "--out", str(tmp_path / "q"),
                               code=2)  # fmt: skip
    assert ".mp4" in failed("patch", pipe, "--plan", plan, "--output", str(tmp_path / "a.png"),
                            code=2)  # fmt: skip
    (tmp_path / "taken").write_text("")
    there = str(tmp_path / "taken" / "a.mp4")
    monkeypatch.setattr(video, "run", lambda *_, **__: pytest.fail("nothing is run for it"))
    assert "cannot be written" in failed("patch", pipe, "--plan", plan, "--output", there, code=2)
    assert "pipeline" in failed("eval", pipe, code=2)
    assert "no use for --demo" in failed("patch", pipe, "--plan", plan, "--demo", code=2)
    assert "no use for --batch" in failed("bench", pipe, "--plan", plan, "--batch", "2", code=2)
    assert "use for --lengths" in failed("bench", pipe, "--plan", plan, "--lengths", "1k", code=2)
    said = failed("calibrate", pipe, "--lengths", "1k", "--dry-run", code=2)
    assert "a pipeline has no use for" in said and "lengths" in said
    assert "accelkit calibrate" in failed("bench", pipe, code=2)


def test_a_dense_plan_says_why_nothing_ran_sparse(pipe, plan, tmp_path):
    found = accelkit.Plan.from_pretrained(plan)
    dense = found.model_copy(
        update={"sites": {}, "measured": {"note": "dense: nothing was faster"}}
    )
    dense.save_pretrained(tmp_path)
    text = failed("patch", pipe, "--plan", str(tmp_path), "--prompt", "a red ball", "--no-compare",
                  code=6)  # fmt: skip
    assert "dense: nothing was faster" in text
