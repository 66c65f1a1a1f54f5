"""Full rows of finalists, and held-out prompts that stand out: a head that looks far away at a few
rows which the eighth of the query tiles leaves out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted_model as planting
import pytest
import torch
from planted_model import LENGTH, toy_costs

from accelkit.calibration import calibrate as flow
from accelkit.calibration import session
from accelkit.calibration.assemble import Measured, SiteData
from accelkit.calibration.candidates import Family, stored
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.calibration.journal import Journal
from accelkit.calibration.prefill import calibrate as journey
from accelkit.calibration.prefill import finalists, prices
from accelkit.calibration.prefill.finalists import Errors, listed, worse
from accelkit.calibration.prefill.measure import PRESETS
from accelkit.calibration.search import DENSE, Choice, Loan, Option, Solution, Table
from accelkit.patches.adapters import sites
from accelkit.patches.method import load
from accelkit.patches.plan import Plan

pytestmark = pytest.mark.usefixtures("probes")
FAR = 7
"""The token at which head 0 of the first layer looks everywhere."""
LEFT_OUT = slice(8 * 64, 11 * 64)
"""Scored rows in tiles that nothing but full rows computes."""
FIRST = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def _costs(monkeypatch):
    toy_costs(monkeypatch)


def planted() -> Any:
    model = planting.planted()
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 0] = embedding[FAR] = 0.0
    embedding[FAR, 0] = 1.0  # 8 once it is normalised, which takes the query's bias away
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight.data[:8, 0] = -1.0
    attention.o_proj.weight.data[:, :16] *= 10.0
    return model


def prompts(*far: int) -> list[torch.Tensor]:
    """Four prompts, of which those at even places are measured and the others checked on; some of
    them have rows at which head 0 looks everywhere.
    """
    some = planting.prompts()
    for n, ids in enumerate(some):
        ids[ids == FAR] = FAR + 1
        if n in far:
            ids[LEFT_OUT] = FAR
    return some


def run(*far: int, **changes: Any) -> Plan:
    options = {
        "budget": 0.05, "lengths": [LENGTH], "methods": ["probe_window"], "preset": "fast",
        "progress": False, "every_row": True,
    }  # fmt: skip
    return flow.calibrate(planted(), prompts(*far), **{**options, **changes})


def units(path: Path, prefix: str) -> dict[str, Any]:
    entries = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {e["unit"]: e["value"] for e in entries if e["unit"].startswith(prefix)}


def heads(plan: Plan) -> tuple[bool, ...]:
    """Which heads of the first layer run sparse."""
    return tuple(not plan.policies[row].dense for row in plan.sites[FIRST].rules[0].policies)


def test_full_rows_find_what_the_eighth_leaves_out(tmp_path, monkeypatch) -> None:
    """Head 0 seems as local as its neighbours. All rows say otherwise, of one setting and, since
    search turns to it, of the other: the first round already leaves it dense.
    """
    path = tmp_path / "journal.jsonl"
    plan = run(0, 1, 2, 3, journal=path)
    (seen,) = units(path, f"measure/0/{FIRST}")[f"measure/0/{FIRST}"]["families"].values()
    assert np.array(seen["error"])[:, :3].max() < 1e-4
    found = units(path, "final/")
    for n in range(2):
        ((errors, _),) = found[f"final/0.05/{n}/{FIRST}"]
        assert errors[0] > 0.1 > 1e-4 > max(errors[1:])
    assert "model.layers.1" not in str([k for k in found if k.startswith("final/0.05/1/")])
    first = plan.measured["rounds"][0]
    assert first["held"]
    assert first["measured_error"] / first["predicted_error"] < 2.0
    assert heads(plan) == (False, True, True, False)

    as_found = lambda run, prefix, sample, data, *_: list(data)  # noqa: E731
    monkeypatch.setattr(journey, "with_full_rows", as_found)
    without = run(0, 1, 2, 3)
    assert not without.measured["rounds"][0]["held"]
    assert without.measured["ms"] > plan.measured["ms"]  # a small ε costs all heads


def test_a_prompt_that_stands_out_is_measured(tmp_path) -> None:
    """Only a held-out prompt has such rows: its heads tell which one spoils it, and ε stays."""
    path = tmp_path / "journal.jsonl"
    plan = run(1, journal=path)
    before, after = plan.measured["rounds"]
    assert (before["held"], after["held"]) == (False, True)
    assert before["epsilon"] == after["epsilon"] == 0.05
    assert heads(plan) == (False, True, True, False)
    told = units(path, "blame/0.05/0/")
    assert f"blame/0.05/0/{FIRST}" in told
    assert told[f"blame/0.05/0/final/0/{FIRST}"][0][0][0] > 0.1


@pytest.mark.parametrize("far", [(0, 1, 2, 3), (1,)])
def test_a_run_that_was_killed_among_finalists_goes_on(tmp_path, monkeypatch, far) -> None:
    path = tmp_path / "journal.jsonl"
    whole = run(*far, journal=path)
    lines = path.read_text().splitlines(keepends=True)
    last = max(n for n, line in enumerate(lines) if "final/" in json.loads(line).get("unit", ""))
    path.write_text("".join(lines[:last]))
    shown = []
    real = finalists.capture

    def capture(model, ids, see, only, dense_rows):
        shown.append([f"model.layers.{n}.self_attn" for n in range(2)])
        shown[-1] = [path for path in shown[-1] if only(path)]
        return real(model, ids, see, only, dense_rows)

    monkeypatch.setattr(finalists, "capture", capture)
    again = run(*far, journal=path, resume=True)
    assert shown == [[json.loads(lines[last])["unit"].rpartition("/")[2]]]
    assert again.sites == whole.sites
    assert again.measured["rounds"] == whole.measured["rounds"]


def test_without_time_the_tables_stay_as_they_are(monkeypatch, tmp_path) -> None:
    def late(self, share: float, what: str, seconds: float = 0.0) -> bool:
        if what in ("full rows of finalists", "measuring a prompt that stands out"):
            self.skipped.append(what)
        return what in self.skipped

    monkeypatch.setattr(session.Run, "late", late)
    path = tmp_path / "journal.jsonl"
    plan = run(1, time_limit=3600, journal=path)
    assert plan.calibration["skipped"] == [
        "full rows of finalists", "measuring a prompt that stands out",
    ]  # fmt: skip
    assert not units(path, ("final/", "blame/"))  # type: ignore[arg-type]
    assert plan.calibration["seconds"]["finalists"] == 0.0


def made(heads: int = 2) -> tuple[SiteData, SiteData, Family]:
    """Two sites with two settings of a family; the second may borrow from the first."""
    methods = tuple(load("probe_window")(blocks=b) for b in (1, 2))
    family = Family("probe_window", methods, "blocks")
    ones = np.ones(heads)

    def seen(name: str, method: Any, error: float) -> Measured:
        parts = (((64, 64), 1.0),)
        return Measured(name, method, "blocks", parts, error * ones, error * ones, ones, {64: ones})

    options = tuple(
        Option("probe_window", n, e * ones, (n + 1) * ones) for n, e in enumerate((0.1, 0.01))
    )
    loan = Loan(0, 0, tuple(range(heads)), 0.2 * ones, 0.5 * ones)
    rows = tuple(seen("probe_window", m, e) for m, e in zip(methods, (0.1, 0.01), strict=True))
    first = SiteData(Table("a", np.linspace(1.0, 4.0, heads), 9.0, 2.0, options), rows, (), "a")
    second = SiteData(
        Table("b", ones, 9.0, 2.0, (), {}, (loan,)), (), (seen("reuse", methods[0], 0.2),), "b"
    )
    return first, second, family


def test_the_larger_error_counts_at_the_prompts_own_weights() -> None:
    first, second, _ = made()
    nan = np.nan
    errors = [
        Errors({0: np.array([0.4, nan]), 1: np.array([0.001, 0.04])}),
        Errors(loans={0: np.array([0.3, 0.1])}),
    ]
    a, b = worse([first, second], errors, {"a": [0.5, 1.0], "b": [1.0, 2.0]})
    assert [o.error.tolist() for o in a.table.options] == [[0.2, 0.1], [0.01, 0.01]]
    assert [o.counted.tolist() for o in a.options] == [[0.2, 0.1], [0.01, 0.01]]
    assert [o.error.tolist() for o in a.options] == [[0.4, 0.1], [0.01, 0.04]]
    assert b.table.loans[0].error.tolist() == b.loans[0].counted.tolist() == [0.3, 0.2]
    assert first.table.options[0].error.tolist() == [0.1, 0.1]


def test_what_is_sparser_than_hopeless_is_as_bad() -> None:
    first, second, family = made()
    unit = {
        "a": {
            "families": {
                "probe_window": {"settings": [stored(family.settings[1])], "error": [[0.6, 0.7]]}
            },
            "loans": [],
        },
        "b": {"families": {}, "loans": [{"anchor": "a", "error": [0.5, 0.1]}]},
    }
    a, b = listed([first, second], {"a": [family], "b": []}, unit)
    assert {n: e.tolist() for n, e in a.options.items()} == {0: [0.6, 0.7], 1: [0.6, 0.7]}
    assert {n: e.tolist() for n, e in b.loans.items()} == {0: [0.5, 0.1]}
    unit["a"]["families"] = {}  # the method leaves this prompt dense
    assert not listed([first, second], {"a": [family], "b": []}, unit)[0].options


def test_a_borrowing_head_tells_of_the_loan() -> None:
    choices = (Choice((0, DENSE, DENSE), 1, (False, True, False)), Choice((1, 1, DENSE)))
    found = finalists._of_choices({choices[0]: ([0.1, 0.2, 0.0], 0.7), choices[1]: None})
    assert found.shares == {choices[0]: 0.7}
    assert found.loans.keys() == {1}
    np.testing.assert_array_equal(found.loans[1], [np.nan, 0.2, np.nan])
    assert found.options.keys() == {0}
    np.testing.assert_array_equal(found.options[0], [0.1, np.nan, np.nan])


def test_lists_are_lent_to_later_sites(monkeypatch) -> None:
    """A resumed run asks an anchor for its lists again, though its errors are known."""
    model = planted()
    first, second, _ = made(4)
    paths = [f"model.layers.{n}.self_attn" for n in range(2)]
    data = [
        replace(d, table=replace(d.table, site=path), site=path)
        for d, path in zip((first, second), paths, strict=True)
    ]
    lends = Choice((0,) * 4)
    some = [Solution((lends, Choice((DENSE,) * 4, 0, (True,) * 4)), 1.0, 0.1)]
    sample = Sample("prompt", prompts(0)[0].numpy(), ())
    whole, cut = (Journal(None, {}, False) for _ in range(2))

    def errors(book: Journal) -> list[Errors]:
        heads = dict.fromkeys(paths, 4)
        run = session.Run(
            model, model.device, sites(model), heads, book, PRESETS["fast"], lambda _: None
        )
        return finalists.full_rows(run, "final/", sample, data, some, 64, [(), ()], clocked)

    def beside_dense(call, runs):
        return [run() for run in runs], [0.5 for _ in runs]

    monkeypatch.setattr(prices, "beside_dense", beside_dense)
    clocked = True
    assert errors(Journal(None, {}, False))[0].shares == {lends: 0.5}
    clocked = False
    a, b = errors(whole)
    assert (a.options.keys(), b.loans.keys(), a.shares) == ({0}, {0}, {})
    assert a.options[0][0] > 0.1 > 1e-4 > b.loans[0][:3].max() > 0.0
    cut.put(f"final/{paths[0]}", whole[f"final/{paths[0]}"], 0.0)
    np.testing.assert_array_equal(errors(cut)[1].loans[0], b.loans[0])
