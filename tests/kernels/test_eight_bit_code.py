"""The machine code of shipped 8-bit kernels: 8-bit products, no spills, no serialised products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = [
    ("gluon", "int8", "fp8", 128, True),
    ("gluon", "int8", "native", 128, False),
    ("tall", "int8", "fp8", 128, True),
    ("triton", "int8", "fp8", 64, False),
    ("triton", "int8", "native", 64, False),
]


@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_machine_code() -> None:
    root = Path(__file__).resolve().parents[2]
    script = Path(__file__).with_name("eight_bit_code.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(CASES)],
        capture_output=True, text=True, env=env, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for case, found in zip(CASES, json.loads(done.stdout), strict=True):
        form, d = case[0], case[3]
        # Three groups of consumers leave no register for what a row needs once: it waits in memory.
        assert found["stack"] <= (80 if form == "tall" else 0), (case, found)
        assert (found["LDL"] == found["STL"] == 0) or form == "tall", (case, found)
        # Products of 32 (16) terms for each kind of consumer warp; in two places, or PV by halves.
        consumers = {"triton": 1, "gluon": 2, "tall": 3}[form]
        scores, weighted = (1, 2) if form == "tall" else (2, 2)
        assert found["IGMMA"] == scores * consumers * d // 32, (case, found)
        products, depth = (found["QGMMA"], 32) if case[2] == "fp8" else (found["HGMMA"], 16)
        assert products == weighted * consumers * 128 // depth, (case, found)
        # One wait for each product, not for each of its instructions.
        assert found["waits"] == (scores + weighted) * consumers, (case, found)
        # P stays in its registers as long as a product reads them.
        assert found["loose" if form == "triton" else "unheld"] == 0, (case, found)
        # One program of twelve or sixteen warps on a multiprocessor, two of four warps.
        threads, programs = {"triton": (128, 2), "gluon": (384, 1), "tall": (512, 1)}[form]
        assert 65536 // (threads * -(-found["registers"] // 8) * 8) >= programs, (case, found)
        assert 233472 // (found["shared"] + 1024) >= programs, (case, found)
