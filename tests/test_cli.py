"""Every command, every exit code; the heavy libraries stay asleep until they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cases import byte_tokenizer, save_tiny, tiny_model, tiny_plan
from typer.testing import CliRunner

from accelkit import console
from accelkit.cli import app
from accelkit.errors import InvalidInputError

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("probes")
COMMANDS = ("calibrate", "patch", "show", "methods", "bench", "eval", "doctor")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plan")
    tiny_plan(tiny_model()).save_pretrained(folder)
    return str(folder)


def run(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def failed(*arguments: str, code: int) -> str:
    """The one line on stderr; nothing on stdout, no traceback."""
    result = run(*arguments, code=code)
    assert not result.stdout
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()
    assert any(line.startswith("error: ") for line in last), result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("calibrate", "--batch", "0"),
        ("calibrate", "--height", "0"),
        ("calibrate", "--frames", "-1"),
        ("patch", "--repeat", "0"),
        ("patch", "--max-new-tokens", "0"),
        ("patch", "--fps", "0"),
        ("bench", "--repeat", "0"),
        ("bench", "--warmup", "-1"),
        ("bench", "--batch", "0"),
        ("bench", "--seed", "-1"),
        ("eval", "--samples", "0"),
        ("eval", "--answers", "-1"),
    ],
)
def test_counts_that_are_none(command, option, value):
    said = run(command, "model", option, value, code=2).stderr
    assert option in said
    assert "greater than or equal to" in said


# -- start --------------------------------------------------------------------------------------


def test_help_wakes_nothing_heavy():
    code = """
import sys
sys.argv = ["accelkit", "--help"]
from accelkit.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "numpy", "matplotlib", "pydantic", "rich", "markdown_it"}
    assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(c in done.stdout for c in COMMANDS)


def test_help_of_a_command_has_panels():
    said = run("calibrate", "--help").stdout
    assert console.OF_PICTURES in said
    assert "[bold]" not in said + run("--help").stdout


def test_methods_and_plans_are_read_without_torch(plan):
    code = f"""
import sys
sys.modules["torch"] = None
sys.path.insert(0, {str(ROOT / "tests")!r})
from accelkit.patches import method, methods
methods.__path__.append({str(ROOT / "tests" / "probe_methods")!r})
from typer.testing import CliRunner
from accelkit.cli import app
for words in (["methods"], ["methods", "probe_window", "--json"], ["show", {plan!r}, "--json"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_python_m_accelkit_is_the_same_command():
    words = [sys.executable, "-m", "accelkit", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith("accelkit ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    assert "Usage" in run(command, "--help").stdout


def test_wrong_usage_is_exit_2():
    assert CliRunner().invoke(app, []).exit_code == 2
    run("no-such-command", code=2)
    run("patch", code=2)


# -- reading what people write -------------------------------------------------------------------


def test_sizes_times_and_shares():
    assert console.sizes("32k, 8k,8192") == (8192, 32768)
    assert console.seconds("15m") == 900
    assert console.seconds("1.5h") == 5400
    assert console.share("2%") == console.share("0.02") == 0.02
    for read, text in (
        (console.sizes, "8q"),
        (console.sizes, "0"),
        (console.seconds, "soon"),
        (console.seconds, "0s"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            read(text)
    for text in ("0", "1", "150%", "much", "-0.1"):
        with pytest.raises(InvalidInputError, match="--budget"):
            console.share(text)


def test_json_has_no_nan():
    assert console.plain({"a": float("nan"), "b": (1, 2.5), "c": Path("x")}) == {
        "a": None,
        "b": [1, 2.5],
        "c": "x",
    }


# -- show, methods, doctor -------------------------------------------------------------------------


def test_show_a_plan(plan, tmp_path):
    out, picture = tmp_path / "r.html", tmp_path / "p.png"
    result = run("show", plan, "--out", str(out), "--plot", str(picture))
    assert "probe_window" in result.stdout
    assert out.exists()
    assert picture.read_bytes()[1:4] == b"PNG"
    document = json.loads(run("show", plan, "--json").stdout)
    assert document["shares"] == {"probe_window": 0.75, "dense": 0.25}
    assert document["heads_by_site"]["model.layers.0.self_attn"] == [0, 1, 1, 2]


def test_show_a_model(model):
    document = json.loads(run("show", model, "--json").stdout)
    assert len(document["sites"]) == 2
    assert "no plan" in failed("show", model, "--plot", "x.png", code=2)
    assert "prefill, decode, denoise" in failed("show", model, "--phase", "later", code=2)


def test_methods(monkeypatch):
    assert "probe_window" in run("methods").stdout
    document = json.loads(run("methods", "probe_window", "--json").stdout)
    assert document["fields"][0]["field"] == "blocks"
    assert document["dial"] == {"field": "blocks", "values": [1, 2]}
    assert "known are" in failed("methods", "nothing_like_it", code=2)


def test_doctor():
    document = json.loads(run("doctor", "--json").stdout)
    assert document["versions"]["torch"]
    assert "backend" in run("doctor").stdout


# -- patch -----------------------------------------------------------------------------------------


def test_patch_runs_both_sides(model, plan):
    result = run(
        "patch",
        model,
        "--plan",
        plan,
        "--demo",
        "--length",
        "600",
        "--max-new-tokens",
        "4",
        "--repeat",
        "1",
        "--json",
    )
    document = json.loads(result.stdout)
    assert document["prompt_tokens"] >= 600
    assert len(document["sparse"]["tokens"]) == len(document["dense"]["tokens"]) == 4
    assert document["counts"]["sparse_calls"] > 0
    assert 0 < document["density"] < 1
    assert 0 <= document["agreement"] <= 1
    assert document["plan"].endswith("accelkit_plan.json")


def test_patch_a_short_prompt_says_that_it_runs_dense(model, plan, tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("def f(x):")
    result = run(
        "patch",
        model,
        "--plan",
        plan,
        "--prompt-file",
        str(text),
        "--max-new-tokens",
        "3",
        "--repeat",
        "1",
    )
    assert "the plan begins at 512" in result.stdout
    result = run(
        "patch",
        model,
        "--plan",
        plan,
        "--prompt",
        "x",
        "--max-new-tokens",
        "3",
        "--repeat",
        "1",
        "--no-compare",
        "--json",
    )
    assert json.loads(result.stdout)["dense"] is None


def test_patch_saves_a_model_that_opens_patched(model, plan, tmp_path):
    import accelkit
    from accelkit.patches.patch import handle_of

    folder = tmp_path / "saved"
    run("patch", model, "--plan", plan, "--save", str(folder))
    opened = accelkit.from_pretrained(folder)
    assert handle_of(opened) is not None
    accelkit.unpatch(opened)
    # The folder holds its plan, so --plan can be left out.
    run("patch", str(folder), "--prompt", "x", "--max-new-tokens", "2", "--repeat", "1")
    assert "--yes" in failed("patch", model, "--plan", plan, "--save", str(folder), code=2)


def test_patch_needs_one_prompt(model, plan):
    assert "--demo" in failed("patch", model, "--plan", plan, code=2)
    assert "one of" in failed("patch", model, "--plan", plan, "--demo", "--prompt", "x", code=2)
    assert "--plan is missing" in failed("patch", model, "--prompt", "x", code=2)
    words = ("--plan", plan, "--prompt", "x")
    said = failed("patch", model, *words, "--frames", "9", "--output", "x.mp4", code=2)
    assert "a language model has no use for --output and --frames; leave it out" in said
    assert "no use for --prompt" in failed("bench", model, *words, code=2)


def test_nothing_ran_sparse_is_exit_6(model, tmp_path):
    tiny_plan(tiny_model(), sparse=False).save_pretrained(tmp_path)
    words = ("--plan", str(tmp_path), "--demo", "--length", "600", "--max-new-tokens", "2")
    assert "dense everywhere" in failed("patch", model, *words, code=6)


# -- what may be wrong -----------------------------------------------------------------------------


def test_unknown_models(plan, tmp_path):
    words = ("--plan", plan, "--prompt", "x")
    assert "no such folder" in failed("patch", "./nowhere", *words, code=2)
    assert "config.json" in failed("patch", str(tmp_path), *words, code=2)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    assert "no_such_type" in failed("patch", str(tmp_path), *words, code=5)


def test_a_model_that_is_no_language_model(plan, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "ViTConfig" in failed("patch", str(tmp_path), "--plan", plan, "--prompt", "x", code=5)


def test_damaged_weights(plan, tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert "cannot be read" in failed(
        "patch", str(tmp_path), "--plan", plan, "--prompt", "x", code=2
    )


def test_a_plan_for_another_model_is_exit_4(plan, tmp_path):
    save_tiny(tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    said = failed("patch", str(tmp_path), "--plan", plan, "--demo", "--length", "600", code=4)
    assert "does not fit" in said
    assert "the plan has 4, the model 2" in said


def test_unreadable_plans_are_exit_4(model, plan, tmp_path):
    bad = tmp_path / "p.json"
    bad.write_text("{")
    assert "not valid JSON" in failed("show", str(bad), code=4)
    data = json.loads((Path(plan) / "accelkit_plan.json").read_text())
    bad.write_text(json.dumps(data | {"schema_version": 99}))
    assert "schema 99" in failed("show", str(bad), code=4)
    assert "no plan at" in failed("bench", model, "--plan", str(tmp_path / "none.json"), code=4)


def test_devices_and_dtypes(model, plan):
    words = ("patch", model, "--plan", plan, "--prompt", "x")
    assert "--device" in failed(*words, "--device", "cuda:99", code=2)
    assert "--dtype" in failed(*words, "--dtype", "int3", code=2)


def test_tracebacks_only_with_v(plan):
    words = ("patch", "./nowhere", "--plan", plan, "--prompt", "x")
    assert "Traceback" in run(*words, "-v", code=2).stderr
    assert "Traceback" not in run(*words, code=2).stderr


# -- bench and eval --------------------------------------------------------------------------------


def test_bench(model, plan, tmp_path):
    kept = tmp_path / "r" / "results.jsonl"
    words = ("bench", model, "--plan", plan, "--lengths", "600", "--repeat", "2")
    rows = json.loads(run(*words, "--json", "--out", str(kept)).stdout)
    assert rows[0]["speedup_vs_own"] > 0
    assert rows[0]["environment"]["torch"]
    assert [json.loads(x) for x in kept.read_text().splitlines()] == rows
    assert "× best dense" in run(*words).stdout
    missed = run(*words, "--min-speedup", "1000", code=3)
    assert "wanted 1000" in missed.stderr
    shown = run(*words, "--json", "--out", str(kept / "below a file"), code=2)
    assert "cannot be written" in shown.stderr
    assert json.loads(shown.stdout)[0]["speedup_vs_own"] > 0, "what was timed is not lost"


def test_bench_fits_the_cost_table(model, monkeypatch):
    from accelkit.calibration import candidates
    from accelkit.patches.method import load

    monkeypatch.setattr(candidates, "chosen_methods", lambda _: [load("probe_window")()])
    words = ("bench", model, "--fit", "--lengths", "512")
    costs = json.loads(run(*words, "--json").stdout)
    assert costs["dense"][-1][0] == 512
    assert "probe_window" in {**costs["methods"], **costs["refused"]}
    assert "Dense attention of a layer" in run(*words).stdout


def test_bench_dry_run(model, plan):
    rows = json.loads(
        run("bench", model, "--plan", plan, "--lengths", "100,1k", "--dry-run", "--json").stdout
    )
    assert rows[0]["heads"] == {"dense": 8}
    assert rows[1]["heads"] == {"dense": 2, "probe_window": 6}
    assert rows[1]["backend"] != "none"
    for words in (("--dry-run", "--out", "x.jsonl"), ("--fit", "--plan", plan)):
        said = failed("bench", model, *words, code=2)
        assert f"{words[0]} has no use for {words[1]}; leave it out" in said


def test_bench_below_the_minimum_is_exit_6(model, plan):
    assert "begins at 512" in failed(
        "bench", model, "--plan", plan, "--lengths", "256", "--repeat", "1", code=6
    )


def test_bench_leaves_out_what_is_below_the_minimum(model, plan):
    words = ("--plan", plan, "--lengths", "256,600", "--repeat", "1", "--json")
    result = run("bench", model, *words)
    assert [row["length"] for row in json.loads(result.stdout)] == [600]
    assert "256 tokens: the plan begins at 512 and runs dense; left out" in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("calibrate", "--lengths", ""), "--lengths: nothing given"),
        (("patch", "--plan", "{plan}", "--prompt", " "), "the prompt is empty"),
        (("patch", "--plan", "{plan}", "--demo", "--length", "8k"), "positions for 4096 tokens"),
        (("bench", "--plan", "{plan}", "--lengths", "8k"), "positions for 4096 tokens"),
        (("eval", "--plan", "{plan}", "--lengths", "8k"), "positions for 4096 tokens"),
        (("eval", "--max-drop", "1"), "--max-drop compares a plan with dense; give --plan"),
        (("eval", "--plan", "{plan}", "--max-drop", "1", "--against", "none"), "--max-drop compar"),
    ],
)
def test_what_could_not_end_well_is_refused_at_once(model, plan, words, told):
    command, *rest = words
    assert told in failed(command, model, *(w.format(plan=plan) for w in rest), code=2)


def test_eval(model, plan):
    words = ("eval", model, "--plan", plan, "--lengths", "600", "--samples", "1")
    rows = json.loads(run(*words, "--tasks", "needle,text", "--json").stdout)
    assert [r["task"] for r in rows] == ["needle", "text"]
    assert rows[1]["dense_perplexity"] > 1
    assert "needle" in run(*words, "--tasks", "needle", "--max-drop", "100").stdout
    assert "unknown" in failed(*words, "--tasks", "nothing", code=2)
    assert "--against" in failed(*words, "--against", "gpt", code=2)


def test_eval_without_a_plan_scores_dense(model):
    rows = json.loads(
        run("eval", model, "--lengths", "600", "--samples", "1", "--tasks", "text", "--json").stdout
    )
    assert rows[0]["sparse"] is None
    assert rows[0]["dense_bits"] > 0


def test_tokenizer_is_needed_for_words(plan, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert "no tokenizer" in failed("patch", str(tmp_path), "--plan", plan, "--prompt", "x", code=2)
    assert byte_tokenizer().encode("a") == [256, 97]
