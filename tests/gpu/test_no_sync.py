"""Choosing, listing and computing never make the host wait for the device: every method of the
folder under torch's own check.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import planted
import pytest
import torch

from accelkit.patches import methods
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, load
from accelkit.patches.sites.attention import compute

pytestmark = pytest.mark.gpu

NAMES = [
    name
    for name in sorted(f.stem for f in Path(methods.__path__[0]).glob("[!_]*.py"))
    if issubclass(load(name), AttentionMethod)
    and "index" in load(name).answers()
    and name != "paro_attention"  # dense without the maps of a calibration
]
SMALL = {"free_swim": {"base": (4, 6)}}
"""The default is the size of frames of thousands of tokens."""
CASES = [(n, p) for n in NAMES for p in ("prefill", "denoise") if p in load(n).phases]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cache
def call(phase: str) -> AttentionCall:
    made = planted.planted(4096) if phase == "prefill" else planted.video()
    moved = {x: getattr(made, x).cuda().bfloat16() for x in "qkv"}
    return replace(made, **moved, _shared={})


@pytest.mark.parametrize(("name", "phase"), CASES)
def test_a_call_does_not_wait(name: str, phase: str) -> None:
    method = load(name)(**SMALL.get(name, {}))
    first = planted.ask(method, call(phase))
    assert first is not None, "dense: nothing is tested"
    compute(first)  # kernels are compiled, tables that follow from geometry are on the device
    again = replace(call(phase), _shared={})
    with no_waiting():
        # What follows from geometry alone is made once, on the host.
        found = first if method.static else planted.ask(method, again)
        assert found is not None
        compute(found)


def test_the_check_sees_waiting() -> None:
    numbers = torch.ones(4, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        numbers.nonzero()
