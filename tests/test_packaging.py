"""What is shipped: the wheel's files and metadata, pinned versions, schema and documentation."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import accelkit
from accelkit.patches.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(p for p in (ROOT / "docs").glob("*.md") if p.name not in {"cli.md", "benchmarks.md"}),
]
A_PLAN = {
    "schema_version": 1,
    "fingerprint": {
        "class_name": "LlamaForCausalLM",
        "model_type": "llama",
        "config_hash": "sha256:0",
        "components": {"text": {"layers": 1, "q_heads": 2, "kv_heads": 1, "head_dim": 64}},
    },
    "policies": [{}, {"methods": [{"kind": "window", "window_tokens": 512}]}],
    "sites": {"model.layers.0.self_attn": {"rules": [{"phase": "prefill", "policies": [0, 1]}]}},
    "budget": {"max_rel_error": 0.02},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_has_every_file_and_nothing_else(wheel):
    inside = {n for n in wheel.namelist() if n.startswith("accelkit/")}
    here = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "accelkit").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert inside == here
    assert {"accelkit/py.typed", "accelkit/plan.schema.json"} <= inside
    others = {n.partition("/")[0] for n in wheel.namelist()} - {"accelkit"}
    assert others == {f"accelkit-{accelkit.__version__}.dist-info"}


def test_wheel_metadata(wheel):
    info = f"accelkit-{accelkit.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "accelkit = accelkit.cli:" in wheel.read(f"{info}/entry_points.txt").decode()


def test_entry_point_exists():
    module, _, attribute = PROJECT["scripts"]["accelkit"].partition(":")
    assert callable(getattr(import_module(module), attribute))


def test_public_names_exist():
    for name in accelkit.__all__:
        assert getattr(accelkit, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        accelkit.nothing_of_this_name  # noqa: B018


def test_public_names_are_explained():
    """Each on a page of the site."""
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    for name, (module, attribute) in accelkit._WHERE.items():
        assert f"::: {module}.{attribute}\n" in text, f"accelkit.{name} stands on no page"


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    found = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in found}


def test_constraints_satisfy_the_metadata():
    pinned = pins()
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in map(Requirement, (line for part in lists for line in part)):
        name = canonicalize_name(requirement.name)
        if name == "accelkit":
            continue
        assert name in pinned, f"{name} is asked for in pyproject.toml and not pinned"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}: pinned {pinned[name]}"
        assert "<" not in str(requirement.specifier), f"{requirement}: lower bounds only"


def test_schema_is_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_schema_accepts_plans_and_refuses_others():
    schema = json.loads((ROOT / "accelkit" / "plan.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(A_PLAN, schema)
    plan = Plan.from_json(json.dumps(A_PLAN))
    jsonschema.validate(json.loads(plan.to_json()), schema)
    for path, value in (
        (("policies", 1, "methods", 0, "kind"), 3),
        (("budget", "max_rel_error"), 2.0),
        (("sites", "model.layers.0.self_attn", "rules", 0, "phase"), "later"),
        (("polices",), []),
    ):
        broken = json.loads(json.dumps(A_PLAN))
        part = broken
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_hold_together(page):
    """Links lead somewhere, files and results that are named are there, Python snippets parse,
    generated parts are filled."""
    text = page.read_text("utf-8")
    rooms = "accelkit|kernels|patches|calibration|commands|benchmarks|docs|examples|tests"
    for name in re.findall(rf"[`( ]((?:{rooms})/[\w/.-]*\w/?)(?![\w/<*])", text):
        there = [home for home in (ROOT, ROOT / "accelkit") if (home / name).exists()]
        assert there, f"{page.name} names {name}"
    for name in re.findall(r"[\w-]+-(?:h100|h200|cpu)\.json", text):
        assert (ROOT / "benchmarks" / "results" / name).exists(), f"{page.name} names {name}"
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        made = page.parent.name == "docs" and target.startswith(("methods/", "cli.md"))
        assert made or (page.parent / target).exists(), f"{page.name} links to {target}"
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M):
        ast.parse(snippet)
    for name, body in re.findall(r"<!-- generated:(\w+) -->\n(.*?)<!-- /generated -->", text, re.S):
        assert body.strip(), f"{name} is empty; run `make generate`"
