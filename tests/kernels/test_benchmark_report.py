"""How `benchmarks/kernels.py` puts parts together, and makes the table of speeds of them."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("attention.report")


def case(part: str, ratio: float, **more: Any) -> dict[str, Any]:
    shape = {"head_size": 128, "unit": [128, 128], "causal": True, "tokens": 32768}
    return {"part": part, **shape, "ratio": {"gluon": ratio, "flex": 0.5}, **more}


def made(*results: dict[str, Any], gpu: str = "H100") -> dict[str, Any]:
    return {"gpu": gpu, "capability": "9.0", "results": list(results), "parts": []}


def test_the_last_reading_of_a_part_stays(report: ModuleType) -> None:
    old, new = made(case("a", 0.1), case("b", 0.2), case("b", 0.3)), made(case("b", 0.9))
    whole = report.merge([old, new], ["b", "a"])
    assert [(r["part"], r["ratio"]["gluon"]) for r in whole["results"]] == [("b", 0.9), ("a", 0.1)]
    with pytest.raises(ValueError, match="different machines"):
        report.merge([old, made(case("b", 0.9), gpu="H200")], ["a", "b"])


def test_speeds_are_means_over_densities(report: ModuleType) -> None:
    rows = report.speeds(made(case("a", 0.8), case("a", 1.0), case("b", 0.5, causal=False)))
    assert [(r["backend"], r["causal"], r["speed"]) for r in rows] == [
        ("gluon", False, 0.5),
        ("gluon", True, 0.9),
    ]
    assert rows[0]["capability"] == "9.0" and rows[0]["unit"] == [128, 128]
    newer = report.speeds(made(case("a", 0.7)), rows)
    assert [r["speed"] for r in newer] == [0.5, 0.7]


def test_single_keys_have_a_speed_of_their_own(report: ModuleType) -> None:
    whole = made(case("a", 0.8))
    shape = {"head_size": 128, "unit": [2048, 1], "causal": True, "tokens": 32768}
    whole["parts"] = [{"part": "gather", **shape, "rates": {"gluon": 0.7, "triton": 0.3}}]
    found = {(r["backend"], *r["unit"]): r["speed"] for r in report.speeds(whole)}
    assert found == {("gluon", 128, 128): 0.8, ("gluon", 128, 1): 0.7, ("triton", 128, 1): 0.3}


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 6])
def test_each_piece_of_work_follows_each_other_equally_often(
    report: ModuleType, pieces: int
) -> None:
    timing = importlib.import_module("attention.timing")
    rounds = [timing.turns(pieces, r) for r in range(2 * pieces)]
    assert all(sorted(order) == list(range(pieces)) for order in rounds)
    pairs = [(a, b) for order in rounds for a, b in pairwise(order)]
    assert {pairs.count(p) for p in set(pairs)} <= {2}
    assert len(set(pairs)) == pieces * (pieces - 1)
