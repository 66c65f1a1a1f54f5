"""`accelkit calibrate`: its options, what it writes and how it fails; the flow is replaced."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from test_cli import failed, run
from tiny_cases import save_tiny, tiny_plan

from accelkit import console
from accelkit.calibration.opening import pipelines
from accelkit.errors import AlreadyPatchedError

pytestmark = pytest.mark.usefixtures("probes")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def flow(monkeypatch):
    """Calibration's flow, replaced: the command only reads options, calls and prints."""
    module = ModuleType("accelkit.calibration.calibrate")
    module.seen = {}

    def calibrate(model, data=None, **options):
        module.seen.update(options, data=data)
        return tiny_plan(model)

    module.calibrate = calibrate
    module.dry_run = lambda model, **options: [
        {"length": n, "attention_share": 0.5} for n in options["lengths"] or (8192,)
    ]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_calibrate_writes_plan_and_report(model, flow, tmp_path):
    out = tmp_path / "out"
    words = (
        "calibrate",
        model,
        "--out",
        str(out),
        "--budget",
        "3%",
        "--lengths",
        "1k,2k",
        "--time-limit",
        "15m",
        "--methods",
        "probe_window",
        "--seed",
        "7",
        "--preset",
        "fast",
    )
    document = json.loads(run(*words, "--json").stdout)
    assert (out / "accelkit_plan.json").exists()
    assert (out / "report.html").exists()
    assert document["files"]["plan"] == str(out / "accelkit_plan.json")
    seen = flow.seen
    assert seen["budget"].max_rel_error == 0.03
    assert (seen["lengths"], seen["methods"], seen["seed"]) == ((1024, 2048), ("probe_window",), 7)
    assert (seen["time_limit"], seen["preset"], seen["resume"]) == (900, "fast", False)
    assert seen["journal"] == out / "journal.jsonl"
    # A second time the plan would be replaced.
    assert "--yes" in failed(*words, code=2)
    assert "report.html" in run(*words, "--yes").stdout
    run(*words, "--resume")
    assert flow.seen["resume"] is True


def test_calibrate_dry_run_writes_nothing(model, flow, tmp_path):
    rows = json.loads(
        run("calibrate", model, "--out", str(tmp_path / "o"), "--dry-run", "--json").stdout
    )
    assert rows == [{"length": 8192, "attention_share": 0.5}]
    assert not (tmp_path / "o").exists()


def test_a_plan_without_a_report(model, flow, tmp_path, monkeypatch):
    """matplotlib belongs to an extra: a calibration must not fail for it in the end."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("calibrate", model, "--out", str(tmp_path))
    assert "accelkit_plan.json" in result.stdout
    assert "report.html" not in result.stdout
    assert 'pip install "accelkit[report]", then accelkit show' in result.stderr


def test_nothing_to_resume_is_said(model, flow, tmp_path):
    words = ("calibrate", model, "--out", str(tmp_path), "--resume")
    assert "no journal to take up" in run(*words).stderr
    (tmp_path / "journal.jsonl").write_text("")
    assert "no journal to take up" not in run(*words).stderr


def test_calibrate_refuses_before_it_works(model, flow, tmp_path):
    assert "--budget" in failed("calibrate", model, "--budget", "200%", code=2)
    assert "--time-limit" in failed("calibrate", model, "--time-limit", "soon", code=2)
    assert "--lengths" in failed("calibrate", model, "--lengths", "long", code=2)
    assert "none.txt" in run("calibrate", model, "--data", "none.txt", code=2).stderr
    assert not flow.seen


def test_what_needs_no_weights_is_refused_before_they_are_loaded(
    model, flow, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipelines, "open_any", lambda *_, **__: pytest.fail("the model was opened"))
    words = ("calibrate", model, "--out", str(tmp_path / "o"))
    assert "fast, balanced, careful" in failed(*words, "--preset", "quick", code=2)
    assert "did you mean 'window'" in failed(*words, "--methods", "window,winow", code=2)
    text = tmp_path / "prompts.txt"
    text.write_text("a red ball")
    said = failed(*words, "--height", "64", "--frames", "9", "--prompts", str(text), code=2)
    assert "a language model has no use for --prompts and --height and --frames" in said
    (tmp_path / "model_index.json").write_text("{}")
    words = ("calibrate", str(tmp_path), "--out", str(tmp_path / "o"))
    said = failed(*words, "--data", str(text), "--lengths", "1k", "--batch", "2", code=2)
    assert "a pipeline has no use for --data and --lengths and --batch" in said


def test_an_unfinished_journal_is_not_begun_anew_unasked(model, flow, tmp_path):
    """What an interrupted calibration measured is lost only if somebody says so."""
    kept = tmp_path / "journal.jsonl"
    kept.write_text('{"journal": 3}\n{"unit": "fit"}\n')
    words = ("calibrate", model, "--out", str(tmp_path))
    assert "journal.jsonl exists; add --yes to replace it, or --resume" in failed(*words, code=2)
    assert not flow.seen
    run(*words, "--dry-run")
    run(*words, "--resume")
    assert flow.seen["resume"] is True


def test_a_journal_without_a_finished_unit_is_nothing_to_keep(model, flow, tmp_path):
    (tmp_path / "journal.jsonl").write_text('{"journal": 3}\n')
    run("calibrate", model, "--out", str(tmp_path))
    assert flow.seen["resume"] is False


def test_an_interruption_says_how_to_go_on(model, flow, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    flow.calibrate = stop
    monkeypatch.setattr(sys, "argv", ["accelkit", "calibrate", "my model", "--out", "x"])
    said = run("calibrate", model, "--out", str(tmp_path), code=130).stderr
    assert "accelkit calibrate 'my model' --out x --resume" in said
    assert console.resume_command(["calibrate", "m", "--resume"]) == "accelkit calibrate m --resume"


def test_unexpected_and_deliberate_errors(model, flow, tmp_path):
    def fail(*_, **__):
        raise AlreadyPatchedError("the model already runs a plan")

    flow.calibrate = fail
    assert "already runs" in failed("calibrate", model, "--out", str(tmp_path), code=1)

    class OutOfMemoryError(RuntimeError):
        pass

    def swell(*_, **__):
        raise OutOfMemoryError("CUDA out of memory")

    flow.calibrate = swell
    assert "memory is full" in failed("calibrate", model, "--out", str(tmp_path), code=5)

    def broken(*_, **__):
        raise RuntimeError("a bug")

    flow.calibrate = broken
    assert isinstance(
        run("calibrate", model, "--out", str(tmp_path), code=1).exception, RuntimeError
    )
