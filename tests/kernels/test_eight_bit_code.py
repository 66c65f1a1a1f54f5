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
    ("gluon", "fp8", "fp8", 128, False),
    ("gluon", "int8", "native", 128, False),
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
        assert found["LDL"] == found["STL"] == found["stack"] == 0, (case, found)
        # Products of 32 (16) terms for each kind of consumer warp: those of a row's first and other
        # tiles, and on Hopper those of the next row's first.
        consumers, scores = (2, 3) if form == "gluon" else (1, 2)
        products = dict.fromkeys(("IGMMA", "QGMMA", "HGMMA"), 0)
        products["IGMMA" if case[1] == "int8" else "QGMMA"] += scores * consumers * d // 32
        kind, depth = ("QGMMA", 32) if case[2] == "fp8" else ("HGMMA", 16)
        products[kind] += 2 * consumers * 128 // depth
        assert products == {name: found[name] for name in products}, (case, found)
        # One wait for each product, not for each of its instructions.
        assert found["waits"] == (scores + 2) * consumers, (case, found)
        # P stays in its registers as long as a product reads them.
        assert found["unheld" if form == "gluon" else "loose"] == 0, (case, found)
        # One program of twelve warps on a multiprocessor, two of four warps.
        threads, programs = (384, 1) if form == "gluon" else (128, 2)
        assert 65536 // (threads * -(-found["registers"] // 8) * 8) >= programs, (case, found)
        assert 233472 // (found["shared"] + 1024) >= programs, (case, found)
