"""The whole flow on a tiny model with planted patterns: heads that look at their neighbourhood
only, and one that looks everywhere. Costs are given, so that timings do not decide.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted_model import DIFFUSE, LENGTH, planted, prompts, toy_costs
from tiny_cases import byte_tokenizer, tiny_model

from accelkit.calibration import calibrate as flow
from accelkit.calibration import session
from accelkit.calibration.evaluation import quality
from accelkit.calibration.fit import fit
from accelkit.calibration.journal import Journal
from accelkit.calibration.prefill import last_rows
from accelkit.calibration.prefill import plan as prefill_plan
from accelkit.calibration.prefill.calibrate import least_dense
from accelkit.calibration.prefill.check import Checker
from accelkit.calibration.search import DENSE, Choice, Solution
from accelkit.calibration.show import report
from accelkit.errors import (
    DenseFallbackWarning,
    InvalidInputError,
    UnknownMethodError,
    UnsupportedModelError,
)
from accelkit.patches.patch import ANY_ROW, patch
from accelkit.patches.plan import Evidence, LayerPlan, Plan

pytestmark = pytest.mark.usefixtures("probes")


@pytest.fixture(autouse=True)
def _costs(monkeypatch):
    toy_costs(monkeypatch)


def run(model, **changes) -> Plan:
    options = {
        "budget": 0.05, "lengths": [LENGTH], "methods": ["probe_window"], "preset": "fast",
        "progress": False, "every_row": True,
    }  # fmt: skip
    return flow.calibrate(model, prompts(), **{**options, **changes})


def test_planted_patterns_are_found() -> None:
    model = planted()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = run(model)
    assert len(plan.sites) == 2
    for layer in plan.sites.values():
        (rule,) = layer.rules
        sparse = [not plan.policies[row].dense for row in rule.policies]
        assert sparse == [True, True, True, False]
        seen = layer.evidence["prefill"]
        assert max(seen.error[:DIFFUSE]) < 0.02
        assert max(seen.density[:DIFFUSE]) < 0.5
        assert min(seen.recall[:DIFFUSE]) > 0.95
        assert seen.ms < seen.dense_ms
    assert plan.measured["measured_error"] <= 0.05
    assert plan.limits.max_length == LENGTH
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with patch(model, plan) as handle, torch.no_grad():
        model(prompts(1)[0][None])
        assert handle.report().sparse_calls == 2


def test_the_last_layer_is_trimmed_and_no_site() -> None:
    """Unless every row is asked for: all of the budget is for the other layers."""
    model = planted()
    plan = run(model, every_row=False)
    first, last = plan.sites.values()
    assert plan.trim_last_layer
    assert first.rules and not last.rules
    assert last.evidence["prefill"].error == (0.0,) * 4
    assert last.evidence["prefill"].ms < last.evidence["prefill"].dense_ms / 100
    whole = run(model)
    assert plan.measured["dense_ms"] == whole.measured["dense_ms"]
    assert plan.measured["ms"] < whole.measured["ms"]
    assert plan.measured["measured_error"] < whole.measured["measured_error"]
    ids = prompts(1)[0][None]
    with patch(model, plan) as handle, torch.no_grad():
        model(ids, logits_to_keep=1)
        assert (handle.report().sparse_calls, handle.report().trimmed_calls) == (1, 1)
    only = planted(slice(None))
    nothing = run(only, every_row=False, budget=1e-5)
    assert nothing.measured["note"].startswith("dense")
    assert nothing.trim_last_layer
    assert nothing.measured["prefill_speedup"] == 2.0  # the fixture's


def test_nothing_is_trimmed_where_that_is_slower(monkeypatch) -> None:
    """A model that waits for its host gains nothing from what the device is spared."""
    slow = {"dense_ms": 2.0, "ms": 1.99, "tokens": LENGTH}
    monkeypatch.setattr(Checker, "speed", lambda self, plan: slow)
    model = planted()
    plan = run(model, every_row=False)
    assert plan.measured["note"].startswith("dense: no plan was faster")
    assert not plan.trim_last_layer and not plan.dense_rows
    assert all(policy.dense for policy in plan.policies)
    assert "prefill_ms" not in plan.measured
    (seen,) = (layer.evidence["prefill"] for layer in plan.sites.values())
    assert (seen.tokens, set(seen.density)) == (LENGTH, {1.0})
    assert seen.ms == seen.dense_ms
    ids = prompts(1)[0][None]
    with torch.no_grad():
        dense = model(ids, logits_to_keep=1).logits
        with patch(model, plan) as handle:
            assert torch.equal(model(ids, logits_to_keep=1).logits, dense)
            assert handle.report().trimmed_calls == 0


def test_the_last_rows_stay_dense() -> None:
    """The budget is for the rows before them; evidence is that of whole prompts, errors apart."""
    model = planted()
    plan, whole = run(model, every_row=False), run(model)
    rows = LENGTH // last_rows.SHARE
    assert (plan.dense_rows, whole.dense_rows) == (rows, 0)
    seen, beside = (next(iter(p.sites.values())).evidence["prefill"] for p in (plan, whole))
    assert seen.tokens == beside.tokens == LENGTH
    assert seen.dense_ms == pytest.approx(beside.dense_ms, rel=1e-3)
    ids = prompts(1)[0][None]
    first = next(iter(plan.sites))
    with patch(model, plan) as handle, torch.no_grad(), handle.measuring():
        model(ids, logits_to_keep=1)
        found = handle.report().sites[first].density
        with pytest.warns(DenseFallbackWarning):
            model(ids)
        assert handle.report().sites[first].dense == {ANY_ROW: 1}
    assert found == pytest.approx(np.mean(seen.density), rel=0.1)
    assert seen.density[DIFFUSE] == 1.0
    body = (LENGTH - rows) * (LENGTH - rows + 1) / (LENGTH * (LENGTH + 1))
    assert min(seen.density) > 1 - body


def test_evidence_of_whole_prompts() -> None:
    seen = Evidence(tokens=768, error=(0.1,), recall=(0.9,), density=(0.25,), ms=2.0, dense_ms=9.0)
    costs = SimpleNamespace(dense_ms=lambda n: n * n / 2**16)
    plan = run(planted()).model_copy(update={"sites": {"a": LayerPlan(evidence={"prefill": seen})}})
    made = last_rows.for_generation(plan, "b", seen, 256, costs)  # type: ignore[arg-type]
    assert made.trim_last_layer and made.sites["b"].evidence["prefill"] is seen
    done = made.sites["a"].evidence["prefill"]
    assert (done.tokens, done.error, done.recall) == (1024, (0.1,), (0.9,))
    share = 768 * 769 / (1024 * 1025)
    assert done.density == (pytest.approx(1 - 0.75 * share, rel=1e-4),)
    assert (done.ms, done.dense_ms) == (2.0 + 7.0, 9.0 + 7.0)


def test_a_small_budget_stays_dense() -> None:
    plan = run(planted(slice(None)), budget=1e-5)
    assert all(not layer.rules for layer in plan.sites.values())
    assert plan.measured["note"].startswith("dense")
    assert not plan.check(planted())


def test_the_same_journal_gives_the_same_plan(tmp_path) -> None:
    model, path = planted(), tmp_path / "journal.jsonl"
    first = run(model, journal=path)
    again = run(model, journal=path, resume=True)
    assert again.to_json() == first.to_json()
    assert set(again.tables) == set(first.tables)


def test_a_tighter_budgets_plan_competes(tmp_path, monkeypatch) -> None:
    """With the same journal a wider budget is never slower, even where it proposes nothing else."""
    model, path = planted(), tmp_path / "journal.jsonl"
    narrow = run(model, journal=path)
    dense = lambda tables, *_: Solution(  # noqa: E731
        tuple(Choice((DENSE,) * t.heads) for t in tables), sum(t.dense_ms for t in tables), 0.0
    )
    monkeypatch.setattr(prefill_plan, "search", dense)
    assert "note" in run(model, budget=0.1).measured
    wide = run(model, budget=0.1, journal=path, resume=True)
    assert wide.sites == narrow.sites
    assert wide.measured["measured_error"] == narrow.measured["measured_error"]
    assert wide.budget.max_rel_error == 0.1
    tighter = run(model, budget=0.02, journal=path, resume=True)
    assert "note" in tighter.measured


def test_killed_and_resumed(tmp_path) -> None:
    model, path = planted(), tmp_path / "journal.jsonl"
    first = run(model, journal=path)
    lines = path.read_text().splitlines(keepends=True)
    keep = len(lines) * 6 // 10
    path.write_text("".join(lines[:keep]) + lines[keep][: len(lines[keep]) // 2])
    again = run(model, journal=path, resume=True)
    repeated = path.read_text().splitlines(keepends=True)
    # What was finished is kept as it was; only the rest was done again.
    assert repeated[:keep] == lines[:keep]
    assert len(repeated) == len(lines)
    a, b = json.loads(first.to_json()), json.loads(again.to_json())
    for key in ("policies", "sites", "limits", "budget", "fingerprint"):
        assert a[key] == b[key]
    assert a["measured"]["rounds"] == b["measured"]["rounds"]
    assert all(torch.equal(first.tables[k], again.tables[k]) for k in first.tables)


def test_interrupted_by_hand(tmp_path, monkeypatch) -> None:
    model, path = planted(), tmp_path / "journal.jsonl"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(quality, "site_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, journal=path)
    assert "screen/" in path.read_text()
    assert run(model, journal=path, resume=True).measured["measured_error"] <= 0.05


def test_anothers_journal_is_refused(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    run(planted(), journal=path)
    with pytest.raises(InvalidInputError, match="belongs to another"):
        run(planted(), journal=path, resume=True, seed=1)
    other = planted()
    other.lm_head.weight.data += 1.0
    with pytest.raises(InvalidInputError, match="weights"):
        run(other, journal=path, resume=True)


def test_the_search_itself_is_summed_apart(tmp_path) -> None:
    """From the journal's lines: neither fit, dense runs, checks nor timing are the search."""
    path = tmp_path / "journal.jsonl"
    about = run(planted(), journal=path).calibration
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    others = ("open", "dense", "fit", "check/", "blame/", "speed/", "plan/", "peak", "took/")
    mine = [u for u in lines if not u["unit"].startswith(others)]
    stages = {u["unit"].split("/")[0] for u in mine}
    assert stages == {"screen", "measure", "weight", "final", "planning"}
    spent = 1e3 * sum(u["seconds"] - u["compiling"] for u in mine)
    assert about["search_prefills"] == pytest.approx(
        spent / about["dense_prefill_ms"], abs=25 / about["dense_prefill_ms"] + 0.1
    )
    assert 0 < about["search_prefills"] < about["dense_prefills"]
    shown = dict(report.headline(run(planted(), journal=path, resume=True)))["calibration"]
    assert f"{about['search_prefills']:.1f} dense prefills for the search itself" in shown
    assert f"{about['dense_prefills']:.1f} with fit, end-to-end check and timing" in shown


def test_time_is_up() -> None:
    plan = run(planted(), time_limit=1e-6)
    late = ["what methods cost", "screening and measuring", "round 1 of the end-to-end check"]
    assert plan.calibration["skipped"] == late
    assert plan.measured["note"] == "dense: no time was left to check a plan"
    assert not plan.check(planted())


def test_when_time_is_up_the_checked_plan_is_kept(monkeypatch) -> None:
    """Rounds that were not begun are named; the one that held is the plan."""

    def late(self, share: float, what: str, seconds: float = 0.0) -> bool:
        if "round 2" in what:
            self.skipped.append(what)
        return "round 2" in what

    monkeypatch.setattr(session.Run, "late", late)
    plan = run(planted(), time_limit=3600)
    assert len(plan.measured["rounds"]) == 1
    assert plan.measured["rounds"][0]["held"]
    assert plan.calibration["skipped"] == ["round 2 of the end-to-end check"]
    assert any(layer.rules for layer in plan.sites.values())


def test_two_seeds_alike() -> None:
    assert run(planted()).sites == run(planted()).sites


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"budget": "much"}, "budget"),
        ({"lengths": [100_000]}, "positions"),
        ({"lengths": [10]}, "lengths"),
        ({"lengths": []}, "lengths"),
        ({"preset": "best"}, "preset"),
        ({"methods": []}, "methods"),
        ({"time_limit": 0}, "time_limit"),
        ({"time_limit": "15m"}, "time_limit is '15m'; expected a positive number, in seconds"),
        ({"lengths": 512}, "lengths is 512; expected numbers of tokens"),
        ({"lengths": ["8k"]}, "expected numbers of tokens, such as"),
        ({"methods": "window"}, "methods is 'window'; expected a list"),
        ({"methods": [3]}, "expected a list of names, classes or instances"),
        ({"preset": ["fast"]}, "preset"),
        ({"batch": "2"}, "batch is '2'; expected a whole number from 1 on"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 on"),
        ({"seed": None}, "seed is None"),
        ({"height": 0}, "height is 0; expected a whole number"),
        ({"journal": 3}, "journal is 3; expected a path"),
    ],
)
def test_bad_arguments(changes: dict, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        run(tiny_model(), **changes)


def test_unknown_method() -> None:
    with pytest.raises(UnknownMethodError, match="nonsense"):
        run(tiny_model(), methods=["nonsense"])


def test_no_tokenizer() -> None:
    with pytest.raises(InvalidInputError, match="tokenizer"):
        flow.calibrate(tiny_model(), lengths=[LENGTH])


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        run(tiny_model().model)


def test_a_patched_model_is_refused() -> None:
    model = planted()
    plan = run(model)
    with patch(model, plan), pytest.raises(InvalidInputError, match="patched"):
        run(model)


def test_built_in_prompts() -> None:
    plan = flow.calibrate(
        planted(), tokenizer=byte_tokenizer(), lengths=[512, LENGTH], methods=["probe_window"],
        preset="fast", progress=False,
    )  # fmt: skip
    assert plan.calibration["data"].startswith("built-in")
    assert plan.calibration["lengths"] == [512, LENGTH]
    assert plan.limits.min_length <= LENGTH


def test_dry_run_bounds_the_gain(monkeypatch) -> None:
    rows = flow.dry_run(tiny_model(), lengths=[512, 1024])
    assert [r["tokens"] for r in rows] == [512, 1024]
    for row in rows:
        assert 0 < row["attention_share"] <= 1
        assert row["most_speedup"] >= 1


def test_refused_methods_are_named(monkeypatch) -> None:
    table = fit.fit()
    refused = replace(table, methods={}, refused={"probe_window": "too slow here"})
    monkeypatch.setattr(fit, "fit", lambda *a, **k: refused)
    plan = run(planted())
    assert plan.calibration["refused"] == {"probe_window": "too slow here"}
    assert all(not layer.rules for layer in plan.sites.values())


def test_a_dense_prefill_counts_by_its_least_reading() -> None:
    book = Journal(None, {}, resume=False)
    assert least_dense(book, 120.0, LENGTH) == 120.0
    book.put("speed/a", {"dense_ms": 100.00004, "ms": 80.0, "tokens": LENGTH}, 0.0)
    book.put("speed/b", {"dense_ms": 130.0, "ms": 80.0, "tokens": LENGTH}, 0.0)
    book.put("speed/c", {"dense_ms": 50.0, "ms": 40.0, "tokens": LENGTH // 2}, 0.0)
    assert least_dense(book, 120.0, LENGTH) == 100.0
    assert least_dense(book, 90.0, LENGTH) == 90.0
