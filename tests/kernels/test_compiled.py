"""The machine code of every shipped kernel configuration, compiled for sm_90a without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
gluon_skip = pytest.importorskip("accelkit.kernels._triton.gluon_skip")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
missing = [tool for tool in ("ptxas", "cuobjdump") if not (TOOLS / tool).exists()]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"triton comes without {missing}")

# Programs that registers and shared memory of a multiprocessor must leave room for; one elsewhere.
TOGETHER = {"triton d64 64x128": 3, "triton d64 64x64": 3, "triton d128 64x64": 2}


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_shipped.py")],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_register_is_spilled(reports) -> None:
    assert len(reports) > 10
    assert [r["name"] for r in reports if r["local"] or r["stack"]] == []


def test_no_product_is_serialised(reports) -> None:
    """A product is one group of several instructions with one wait; serialised, each of its
    instructions is a group that is waited for.
    """
    assert all(r["products"] for r in reports)
    assert [r["name"] for r in reports if r["groups"] * r["steps"] > r["products"]] == []
    assert [r["name"] for r in reports if r["waits"] > r["groups"]] == []


def test_a_vote_is_one_instruction(reports) -> None:
    """Each of two warpgroups votes on its scores without another exchange among threads, and the
    kernel's processor barriers are none of Triton's own.
    """
    found = [r for r in reports if "skip" in r["name"]]
    assert found and all((r["votes"], r["exchanges"]) == (2, 0) for r in found)
    assert all(r["barriers"] < int(gluon_skip.K_FREE.value) for r in found)


def test_programs_share_a_multiprocessor_as_promised(reports) -> None:
    found = {r["name"]: r["programs"] for r in reports}
    assert set(TOGETHER) <= set(found)
    assert {n: p for n, p in found.items() if p < TOGETHER.get(n, 1)} == {}
