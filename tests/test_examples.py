"""Every example runs, offline, on the small Llama that lies beside it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from accelkit.patches.method import load

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TINY = EXAMPLES / "models" / "tiny-llama"


def run(name: str, *arguments: str) -> str:
    return started(str(EXAMPLES / name), *arguments)


def started(*arguments: str, given: str | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        input=given,
        env=environment,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_example_is_run_here():
    here = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in here, f"{path.name} has no test"


HELP = """
import contextlib, io, json, runpy, sys
for path, words in json.load(sys.stdin):
    sys.argv, told = [path, *words, "--help"], io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(told):
        runpy.run_path(path, run_name="__main__")
    print(path, "usage:" in told.getvalue())
"""
"""One process for all of them: each would import torch first."""


def test_the_commands_of_the_pages_are_understood():
    """Options are read in turn, so `--help` at the end is only reached behind right ones."""
    pages = [ROOT / "README.md", ROOT / "Makefile", *EXAMPLES.glob("*.py")]
    text = "\n".join(p.read_text("utf-8").replace("\\\n", " ") for p in pages)
    found = [
        (str(EXAMPLES / name), shlex.split(re.sub(r"[\[\]$()]", "", words)))
        for name, words in re.findall(r"python examples/(\S+\.py)(.*--.*)", text)
    ]
    assert len(found) >= 5
    asked = started("-c", HELP, given=json.dumps(found)).splitlines()
    assert asked == [f"{path} True" for path, _ in found]


QUICK = ("--methods", "window", "--preset", "fast", "--budget", "0.3")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> str:
    """The first layers of the shipped model."""
    folder = str(tmp_path_factory.mktemp("shallow"))
    AutoModelForCausalLM.from_pretrained(TINY, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.mark.timeout(320)
def test_llm(shallow, tmp_path):
    out = run("llm.py", shallow, "--lengths", "1024", *QUICK, "--out", str(tmp_path))
    assert "calls ran sparse" in out
    assert (tmp_path / "accelkit_plan.json").exists()


@pytest.mark.timeout(320)
def test_video(tmp_path):
    small = ("--height", "32", "--width", "32", "--frames", "9", "--steps", "4")
    quick = ("--methods", "mag_cache", "--preset", "fast", "--budget", "0.3")
    out = run("video.py", *small, *quick, "--out", str(tmp_path))
    for name in ("dense.mp4", "patched.mp4", "sheet.png", "accelkit_plan.json"):
        assert (tmp_path / name).stat().st_size > 500, name
    assert re.search(r"\d × as fast, .*'psnr'", out)


def test_one_method():
    out = run("one_method.py", "window", "--tokens", "2048")
    assert "density 0." in out
    assert "relative error" in out


def test_add_a_method():
    densities = [float(line.split()[-1]) for line in run("add_a_method.py").splitlines()]
    assert densities[0] == 1.0, "every block: dense"
    assert densities == sorted(densities, reverse=True), "fewer blocks, lower density"
    assert densities[-1] < 0.35


def test_the_page_s_method_is_the_one_of_the_house():
    """`docs/add-a-method.md` shows `window` whole, short of its bounds and its other phases."""
    page = (ROOT / "docs" / "add-a-method.md").read_text("utf-8")
    room: dict[str, Any] = {"__name__": "page"}
    exec(re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1], room)
    shown, real = room["Window"], load("window")
    assert (shown.static, shown.dial, shown.full) == (real.static, real.dial, real.full)
    assert shown().model_dump() == real().model_dump()
    assert shown.answers() == real.answers()
    q, k, v = torch.randn(3, 1, 1, 2304, 16, generator=torch.Generator().manual_seed(0))
    call = planted.make_call(q, k, v)
    lists = [method().index(call).to_mask(18) for method in (shown, real)]
    assert torch.equal(*lists)
    assert not lists[0].tril().all()


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_tiny_llama_is_trained_by_its_script(tmp_path):
    """A few steps on the CPU, saved, scored as transformers opens it, with its card."""
    out = run("train/tiny_llama.py", "--out", str(tmp_path), "--smoke", "--minutes", "0.1")
    assert "| held-out source text, bits per byte |" in out
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "A Llama model of 6,363,392 parameters" in card
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 8


@pytest.mark.timeout(320)
def test_verify_real(shallow, tmp_path):
    """Long enough that a window beats dense attention on a CPU, too."""
    arguments = ["--lengths", "3072", *QUICK, "--samples", "1", "--tasks", "needle"]
    out = run("verify_real.py", shallow, *arguments, "--out", str(tmp_path))
    assert (tmp_path / "accelkit_plan.json").exists()
    assert (tmp_path / "report.html").exists()
    if "dense everywhere" in out:
        pytest.skip("this machine found nothing faster than dense")
    assert "your path" in out
    found = json.loads((tmp_path / "verify.json").read_text())
    assert [s["task"] for s in found["scores"]] == ["needle"]
    assert found["results"][0]["speedup_vs_own"] > 0
