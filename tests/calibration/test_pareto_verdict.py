"""Which settings lie above the mixtures' curve, by a curve that a reader can draw."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("pareto_verdict")


def row(cost: float, psnr: float, shown: str = "1111") -> dict[str, Any]:
    return {
        "cost": cost, "finite": True, "setting": {}, "mean": {"psnr": psnr, "ssim": psnr / 100},
        "right": shown.count("1"), "of": len(shown), "shown": shown,
    }  # fmt: skip


def test_above_beside_and_faster_than_the_mixture(verdict: ModuleType) -> None:
    """The mixture runs from 20 dB at a quarter of the cost to dense at 60: 30 dB at .4375."""
    mixed = [row(0.25, 20.0, "1000"), row(0.5, 18.0)]  # the second one is worse at a higher cost
    other = [row(0.4375, 30.1), row(0.4375, 29.9), row(0.2, 10.0), row(1.2, 70.0)]
    found = {"dense": row(1.0, 99.0), "curves": {"mixture": mixed, "window": other}}
    found["places"] = verdict.places(found)
    assert [p["by"] for p in found["places"]] == [0.1, -0.1, None]
    above = verdict.beaten(found)
    told = verdict.verdict(found, "psnr", above)
    assert (told["settings"], told["above"], told["faster_than_any_mixture"]) == (3, 1, 1)
    assert told["most"] == 0.1
    mixed[0]["again"] = {"psnr": 20.2}  # equal runs differ by more than that
    assert [p["by"] for p in verdict.beaten(found)] == [None]
    assert verdict.speed_at(mixed, 30.0, found["dense"]) == round(1 / 0.4375, 2)
    assert verdict.speed_at(mixed, 19.0, found["dense"]) is None


def test_videos_are_compared_prompt_by_prompt(verdict: ModuleType) -> None:
    """Halfway between one video of four and all of them; the setting shows two others."""
    points = [row(0.2, 20.0, "1000"), row(0.6, 40.0)]
    found = verdict.by_videos(row(0.4, 30.0, "0011"), (0.2, 0.6), points)
    assert found == {"videos": -0.5, "error": 1.5}
