"""What `benchmarks/mixture.py` makes of its readings."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("mixture_table")


ENVIRONMENT = {"gpu": None}


def single(setting: str, error: float, stopped: str | None = None, **more: Any) -> dict[str, Any]:
    row = {"method": setting.partition("(")[0], "setting": setting, "worst_error": error}
    row |= {"ms": 80.0, "dense_ms": 100.0, "stopped": stopped, "prompts": 9, "worst_prompt": error}
    return {**row, "answers": 512, "points_lost": 0.0, "tasks": {}, "density": 0.5, **more}


def mixture(budget: float, error: float, plan: str) -> dict[str, Any]:
    row = single("", error) | {"budget": budget, "plan": plan}
    del row["method"], row["setting"]
    return row | {"calibration": {"refused": {"slow": "choosing takes long"}}}


def study(**ms: list[float]) -> dict[str, Any]:
    return {
        "model": "m", "tokens": 8, "dtype": "fp32", "environment": ENVIRONMENT,
        "mixtures": [mixture(0.05, 0.04, "aaaaaaaaaa"), mixture(0.02, 0.018, "bbbbbbbbbb")],
        "singles": [single("window(1)", 0.03), single("slow(1)", 0.01),
                    single("cut(1)", 0.3, "error")],
        "speed": {"ms": {"dense": [100.0, 90.0, 110.0], **ms}},
    }  # fmt: skip


TIMES = {
    "mixture 0.05 aaaaaaaa": [60.0], "mixture 0.02 bbbbbbbb": [85.0], "window(1)": [70.0],
    "slow(1)": [120.0],
}  # fmt: skip


def test_the_best_single_is_no_worse_and_dense_competes(table: ModuleType) -> None:
    rows = table.verdict(study(**TIMES))
    assert [row["budget"] for row in rows] == [0.02, 0.05]
    assert [row["best_single"] for row in rows] == ["dense", "window(1)"]
    assert [row["ratio"] for row in rows] == pytest.approx([100 / 85, 70 / 60])


def test_a_dense_mixture_gains_nothing_by_noise(table: ModuleType) -> None:
    found = study(**TIMES)
    found["mixtures"][1]["stopped"] = "every call ran dense"
    assert table.verdict(found)[0]["ratio"] == 1.0


def test_a_mixture_that_was_not_timed_is_no_dense_one(table: ModuleType) -> None:
    found = study(**{k: v for k, v in TIMES.items() if "0.05" not in k})
    assert [row["budget"] for row in table.verdict(found)] == [0.02]
    found["mixtures"][0]["stopped"] = "every call ran dense"
    assert [row["ratio"] for row in table.verdict(found)][1] == pytest.approx(0.7)


def test_losses_are_told(table: ModuleType) -> None:
    assert [(r["setting"], r["ratio"]) for r in table.losses(study(**TIMES))] == [
        ("window(1)", pytest.approx(85 / 70))
    ]
    assert table.losses(study(**{**TIMES, "mixture 0.02 bbbbbbbb": [65.0]})) == []


def test_a_setting_that_was_not_followed_is_no_rival(table: ModuleType) -> None:
    found = study(**TIMES, **{"cut(1)": [1.0]})
    assert "cut(1)" not in {row["best_single"] for row in table.verdict(found)}
    assert [s["setting"] for s in table.rivals(found, 1.1)] == ["window(1)", "slow(1)"]


def test_parts_are_joined_by_plan(table: ModuleType, tmp_path: Path) -> None:
    more = study(**TIMES)
    more["environment"] = {"gpu": "another"}
    more["singles"] = [single("window(1)", 0.02, prompts=100), single("new(1)", 0.1)]
    more["mixtures"] = [mixture(0.05, 0.01, "aaaaaaaaaa") | {"prompts": 3}]
    first = study()
    del first["speed"]
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, part in zip(paths, (first, more), strict=True):
        path.write_text(json.dumps(part))
    found = table.joined(paths)
    table.save(found, tmp_path / "c.json")
    by_name = {s["setting"]: s for s in found["singles"]}
    assert by_name["window(1)"]["worst_error"] == 0.02
    assert by_name["window(1)"]["asked_on"] == {"gpu": "another"}
    assert by_name["slow(1)"]["refused"] == "choosing takes long"
    assert by_name["window(1)"]["refused"] is None and "new(1)" in by_name
    assert found["mixtures"][0]["worst_error"] == 0.04  # fewer prompts do not replace more
    assert json.loads((tmp_path / "c.json").read_text())["table"][0]["budget"] == 0.02
    assert table.name_of(found["mixtures"][0]) in found["speed"]["ms"]


def test_other_models_are_not_joined(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(study()))
    (tmp_path / "b.json").write_text(json.dumps(study() | {"tokens": 9}))
    with pytest.raises(SystemExit, match="tokens"):
        table.joined([tmp_path / "a.json", tmp_path / "b.json"])


def test_a_matching_budget_is_scaled_from_the_nearest_mixture(table: ModuleType) -> None:
    """Plans keep a distance from their budgets, which another budget is told by."""
    mixtures = study(**TIMES)["mixtures"]
    assert table.matching(mixtures, 0.05) == pytest.approx(0.05 * 0.05 / 0.04)
    assert table.matching(mixtures, 0.03) == pytest.approx(0.02 * 0.03 / 0.018, rel=1e-2)
    assert table.matching(mixtures, 0.4) == pytest.approx(3 * 0.05)
    assert table.matching(mixtures, 0.01) == pytest.approx(0.02 * 0.01 / 0.018, rel=1e-2)
    assert table.matching([], 0.01) == 0.01
