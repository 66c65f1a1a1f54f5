"""Tables, pictures and the page are made from a plan alone, whatever it lacks."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from tiny_cases import SITES, probe_methods, tiny_model, tiny_plan

from accelkit.calibration.show import pictures, report
from accelkit.patches.plan import LayerPlan, Rule, evidence_key


@pytest.fixture(scope="module")
def plan():
    with probe_methods():
        yield tiny_plan(tiny_model())


def bare(plan):
    """The same plan without any measurement."""
    sites = {s: LayerPlan(rules=layer.rules) for s, layer in plan.sites.items()}
    return plan.model_copy(update={"sites": sites, "measured": {}, "budget": None, "producer": {}})


def text_of(plan) -> str:
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(report.tables(plan))
    return capture.get()


def test_summary_counts_heads_and_times(plan):
    s = report.summary(plan)
    assert s["shares"] == {"probe_window": 0.75, "dense": 0.25}
    assert (s["heads"], s["sites"], s["sparse_sites"]) == (8, 2, 2)
    assert s["attention_speedup"] == pytest.approx(2.5)
    assert s["density"] == pytest.approx(0.4625)
    assert s["measured_error"] == 0.015


def test_another_phase_has_none_of_its_figures(plan):
    s = report.summary(plan, "decode")
    assert s["shares"] == {"dense": 1.0}
    assert s["attention_speedup"] is None
    assert s["measured_error"] is None
    assert "faster" not in " ".join(v for _, v in report.headline(plan, "decode"))


def test_tables_tell_policies_apart(plan):
    text = text_of(plan)
    assert re.search(r"model\.layers\.0\.self_attn\s+│ ·AAB", text)
    assert "blocks=2" in text
    assert "2.50 × faster" in text
    assert "1.50 × faster (measured at 1024 tokens)" in text


def test_a_plan_without_measurements_is_shown_as_well(plan, tmp_path):
    empty = bare(plan)
    assert "·AAB" in text_of(empty)
    assert len(report.figure(empty).axes) == 1
    page = report.write_html(empty, tmp_path / "r.html").read_text("utf-8")
    assert "Quality rounds" not in page


def test_longer_prompts_may_have_other_rules(plan):
    site = SITES[0]
    rules = (
        Rule(phase="prefill", min_tokens=2048, policies=(1, 1, 1, 1)),
        *plan.sites[site].rules,
    )
    tiered = plan.model_copy(update={"sites": plan.sites | {site: LayerPlan(rules=rules)}})
    assert pictures.tiers(tiered) == [512, 2048]
    assert pictures.head_rows(tiered)[site] == [1, 1, 1, 1]
    assert pictures.head_rows(tiered, tokens=600)[site] == [0, 1, 1, 2]
    assert len(report.figure(tiered, tokens=512).axes) == 1
    assert pictures.head_rows(tiered, tokens=100)[site] == [-1] * 4


def test_layers_stand_in_their_order(plan):
    layer = plan.sites[SITES[0]]
    names = [f"model.layers.{n}.self_attn" for n in (10, 9, 2)]
    many = plan.model_copy(update={"sites": dict.fromkeys(names, layer)})
    assert list(pictures.head_rows(many)) == names[::-1]


def test_picture_has_every_map(plan, tmp_path):
    drawing = report.figure(plan)
    titles = {a.get_title(loc="left") for a in drawing.axes}
    assert {"Method of each head", "Density", "Error of each head", "Quality rounds"} <= titles
    pictures.save_figure(plan, tmp_path / "deep" / "p.png")
    assert (tmp_path / "deep" / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="cannot be written"):
        pictures.save_figure(plan, tmp_path / "p.nonsense")


def test_densities_are_drawn_over_steps_and_layers(plan):
    """The first half of the steps dense, then one layer thinner than the other."""
    shares = ((0.0, 0.5), (0.5, 1.0))
    thin = {SITES[0]: (0.2, 0.4, 0.6, 0.8), SITES[1]: (0.1,) * 4}
    sites = {}
    for path, density in thin.items():
        seen = plan.sites[path].evidence["prefill"]
        late = seen.model_copy(update={"density": density})
        evidence = {evidence_key("denoise", shares[1]): late, "denoise": late}
        rule = Rule(phase="denoise", steps=shares[1], policies=(1, 1, 1, 1))
        sites[path] = LayerPlan(rules=(rule,), evidence=evidence)
    fingerprint = plan.fingerprint.model_copy(update={"library": "diffusers"})
    video = plan.model_copy(
        update={
            "fingerprint": fingerprint, "sites": sites, "calibration": {"buckets": list(shares)},
        }
    )  # fmt: skip
    axes = report.figure(video).axes[0]
    assert axes.get_title(loc="left") == "Density over steps"
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == [[1.0, 0.5], [1.0, pytest.approx(0.1)]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0%", "50%", "100%"]


def test_page_is_self_contained_and_escaped(plan, tmp_path):
    odd = plan.model_copy(
        update={"fingerprint": plan.fingerprint.model_copy(update={"base_id": "<script>alert(1)"})}
    )
    page = report.write_html(odd, tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 1
    assert not re.search(r"<(?:link|img|script|iframe)\b", page)
    loads = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(x.startswith(("#", "data:")) for x in loads), loads
    assert "measured 1.50%" in page and "0.031" in page
