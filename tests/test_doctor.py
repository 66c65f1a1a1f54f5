"""The machine's page: every part is there, and a broken probe is told, not raised."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from tiny_cases import probe_methods

from accelkit import doctor
from accelkit.kernels import dispatch
from accelkit.patches import methods


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_page_is_plain_data(found):
    assert json.loads(json.dumps(found)).keys() == found.keys()
    assert found["versions"]["accelkit"]
    assert found["versions"]["torch"]
    assert {"ACCELKIT_KERNEL", "ACCELKIT_DISABLE"} <= found["environment"].keys()


def test_every_kernel_has_a_reason(found):
    assert found["kernels"]
    assert all(
        k["backend"] in (*dispatch.BACKENDS, "none") and k["reason"] for k in found["kernels"]
    )


def test_page_is_drawn(found):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(doctor.render(found))
    text = capture.get()
    if not found["optional"]["flash-attn-4"]["version"]:
        assert "accelkit[fa4]" in " ".join(text.split())
    for title in ("Versions", "Which kernel would serve", "Probes", "Environment"):
        assert title in text


def test_broken_kernels_are_told(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such driver")

    monkeypatch.setattr(dispatch, "explain", broken)
    kernels = doctor.examine()["kernels"]
    assert all(k["backend"] == "none" and "no such driver" in k["reason"] for k in kernels)


def test_kill_switch_is_noticed(monkeypatch):
    monkeypatch.setenv("ACCELKIT_DISABLE", "1")
    assert any("ACCELKIT_DISABLE" in p for p in doctor.examine()["problems"])


def test_methods_are_explained():
    with probe_methods():
        one = doctor.explain("probe_window")
    assert one["class_name"] == "ProbeWindow"
    assert one["answers"] == ["index"]
    assert one["fields"] == [
        {
            "field": "blocks",
            "default": 1,
            "values": "integer ≥ 1",
            "meaning": "blocks of 64 tokens up to the diagonal",
        }
    ]


def test_values_of_fields_are_readable():
    found = {
        f["field"]: f["values"]
        for name in ("sparge_attn", "psa", "ada_spa", "sage_attention", "gna", "paro_attention")
        for f in doctor.explain(name)["fields"]
    }
    assert found["similarity"] == "number ≥ -1, ≤ 1 or name of a side tensor"
    assert found["ends"] == "4 × number ≥ 0, ≤ 1"
    assert found["search_at"] == "any number of number ≥ 0, ≤ 1"
    assert found["qk"] == "'native' or 'int8' or 'fp8'"
    assert found["stride"] == "3 × integer ≥ 1 or none"
    assert found["int8"] == "true or false"


def test_a_broken_method_does_not_hide_the_others(tmp_path, monkeypatch):
    (tmp_path / "broken_method.py").write_text("import no_such_package\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    with probe_methods():
        rows = {m["name"]: m["idea"] for m in doctor.listing()}
    assert "no_such_package" in rows["broken_method"]
    assert "window of blocks" in rows["probe_window"]
