"""Plan files: round trip, exact errors, nothing lost."""

from __future__ import annotations

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelkit.errors import PlanCorruptError, PlanError, PlanVersionError
from accelkit.patches import plan_file
from accelkit.patches.call import Clock
from accelkit.patches.method import TokenMethod, load
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import (
    Component,
    Fingerprint,
    LayerPlan,
    Limits,
    Plan,
    Policy,
    Reuse,
    Rule,
)
from accelkit.patches.plan_check import compare
from accelkit.patches.plan_file import FILE, SCHEMA_VERSION, TABLES_FILE
from tests.patches.conftest import tiny

PREFILL = Clock("prefill")


def make(rows=(0, 1, 1, 0), **changes) -> Plan:
    fingerprint = Fingerprint(
        class_name="LlamaForCausalLM",
        model_type="llama",
        config_hash="sha256:0",
        components={"text": Component(layers=1, q_heads=4, kv_heads=2, head_dim=16)},
    )
    window = {"kind": "window", "sink_tokens": 4, "window_tokens": 256}
    site = LayerPlan(rules=(Rule(phase="prefill", policies=rows),))
    fields = {
        "fingerprint": fingerprint,
        "policies": (Policy(), Policy.model_validate({"methods": [window]})),
        "sites": {"model.layers.0.self_attn": site},
    }
    return Plan(**{**fields, **changes})


def damaged(edit) -> str:
    data = json.loads(make().to_json())
    edit(data)
    return json.dumps(data)


@given(st.lists(st.integers(0, 1), min_size=4, max_size=4), st.integers(0, 10**6))
def test_round_trip(rows, length):
    plan = make(tuple(rows), limits=Limits(min_length=length))
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_a_plan_names_itself_in_short():
    assert str(make()) == repr(make()) == "<Plan for LlamaForCausalLM: dense, window at 1 sites>"


def test_groups_by_policy():
    plan = make(limits=Limits(min_length=100))
    groups = plan.groups("model.layers.0.self_attn", 100, PREFILL)
    assert [(g.heads, g.policy.label()) for g in groups] == [((0, 3), "dense"), ((1, 2), "window")]
    assert plan.groups("model.layers.0.self_attn", 99, PREFILL) == ()
    assert plan.groups("model.layers.0.self_attn", 100, Clock("decode")) == ()
    assert plan.groups("elsewhere", 100, PREFILL) == ()
    assert make((0, 0, 0, 0)).groups("model.layers.0.self_attn", 100, PREFILL) == ()


def test_first_matching_rule_wins():
    rules = (
        Rule(phase="prefill", min_tokens=1000, policies=(1,) * 4),
        Rule(phase="prefill", policies=(0, 1, 1, 1)),
    )
    plan = make(sites={"a": LayerPlan(rules=rules)})
    assert len(plan.groups("a", 1000, PREFILL)) == 1
    assert len(plan.groups("a", 999, PREFILL)) == 2


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda d: d.update(schema_version=SCHEMA_VERSION + 1), PlanVersionError, "reads up to"),
        (lambda d: d.update(schema_version=0), PlanVersionError, "calibrate again"),
        (lambda d: d.pop("schema_version"), PlanCorruptError, "not a plan"),
        (
            lambda d: d["policies"][1]["methods"][0].update(kind="nope"),
            PlanError,
            r"policies\.1\.methods\.0.*unknown method 'nope'.*window",
        ),
        (
            lambda d: d["policies"][1]["methods"][0].update(windw=3),
            PlanError,
            r"policies\.1\.methods\.0: .*unknown field 'windw'; known are: sink_tokens, window_tok",
        ),
        (
            lambda d: d["policies"][1]["methods"].append(d["policies"][1]["methods"][0]),
            PlanError,
            "both answer 'index'",
        ),
        (
            lambda d: d["sites"]["model.layers.0.self_attn"]["rules"][0].update(
                policies=[0, 7, 0, 0]
            ),
            PlanError,
            "head 1: policy 7 does not exist",
        ),
        (lambda d: d.update(extra=1), PlanError, "unknown field 'extra'; known are: .*policies"),
        (
            lambda d: d["limits"].update(min_lenght=1),
            PlanError,
            r"limits: .*unknown field 'min_lenght'; known are: min_length, max_length",
        ),
        (
            lambda d: d["sites"]["model.layers.0.self_attn"]["rules"][0].update(phase="prefil"),
            PlanError,
            r"self_attn\.rules\.0\.phase: .*'prefill', 'decode' or 'denoise'",
        ),
        (
            lambda d: d["sites"]["model.layers.0.self_attn"]["rules"][0].update(steps=[0.5, 0.2]),
            PlanError,
            r"rules\.0\.steps: expected shares of the steps that rise",
        ),
    ],
)
def test_damaged_plans_say_where(edit, error, message):
    with pytest.raises(error, match=message):
        Plan.from_json(damaged(edit))


def test_a_field_that_a_method_does_not_have():
    with pytest.raises(
        ValueError, match="unknown field 'window_token'; known are: sink_tokens, win"
    ):
        load("window")(window_token=3)


def test_older_schemas_are_migrated(monkeypatch):
    """Step by step, from the version that the file has."""
    monkeypatch.setattr(plan_file, "SCHEMA_VERSION", SCHEMA_VERSION + 2)
    renamed = lambda data: data | {"limits": {"min_length": data["limits"]["least"]}}  # noqa: E731
    steps = {SCHEMA_VERSION: dict, SCHEMA_VERSION + 1: renamed}
    monkeypatch.setattr(plan_file, "MIGRATIONS", steps)
    plan = Plan.from_json(damaged(lambda d: d.update(limits={"least": 7})))
    assert plan.limits.min_length == 7
    assert plan.schema_version == SCHEMA_VERSION + 2


@pytest.mark.parametrize("version", [1, 2])
def test_plans_of_older_releases_open(version):
    """Schema 1 had no trimmed layer, both a hash of the weights that nothing filled in."""

    def older(data):
        data["schema_version"] = version
        data["fingerprint"]["weights_hash"] = None
        if version == 1:
            del data["trim_last_layer"]

    assert Plan.from_json(damaged(older)) == make()


def test_an_older_plan_without_a_fingerprint_says_so():
    for value in (None, 3):
        edit = lambda d, value=value: d.update(schema_version=2, fingerprint=value)  # noqa: E731
        with pytest.raises(PlanError, match="fingerprint"):
            Plan.from_json(damaged(edit))


def test_not_json():
    with pytest.raises(PlanCorruptError, match="not valid JSON"):
        Plan.from_json('{"schema_version": 1,')


def test_nothing_there(tmp_path):
    with pytest.raises(PlanError, match=FILE):
        Plan.from_pretrained(tmp_path)
    with pytest.raises(PlanError, match="hub id"):
        Plan.from_pretrained(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="no plan at my plans/no such"):
        Plan.from_pretrained("my plans/no such")  # no id of the hub could be called that


def test_tables_travel_with_their_hash(tmp_path):
    tables = {"model.layers.0.self_attn/1/coverage": torch.tensor([0.5, 0.75, 0.9, 1.0])}
    make().with_tables(tables).save_pretrained(tmp_path)
    again = Plan.from_pretrained(tmp_path)
    assert torch.equal(again.tables["model.layers.0.self_attn/1/coverage"], *tables.values())
    (tmp_path / TABLES_FILE).write_bytes(b"damaged")
    with pytest.raises(PlanCorruptError, match="SHA-256"):
        Plan.from_pretrained(tmp_path)
    (tmp_path / TABLES_FILE).unlink()
    with pytest.raises(PlanCorruptError, match="missing"):
        Plan.from_pretrained(tmp_path)


def test_up_to_the_hub_and_back(tmp_path, monkeypatch):
    """A hub that is a folder: the plan with its side tensors, by repository and revision."""
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            assert token in ("secret", None)

        def create_repo(self, repo_id, private, exist_ok):
            (hub / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message, create_pr):
            shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
            return "commit"

    def download(repo, file, subfolder, revision, **_):
        assert revision == "v2"
        return str(hub / repo / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tables = {"model.layers.0.self_attn/1/coverage": torch.tensor([0.5, 0.75, 0.9, 1.0])}
    plan = make().with_tables(tables)
    assert plan.push_to_hub("someone/plan", token="secret") == "commit"
    plan.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="someone/copy")
    assert Plan.from_pretrained("someone/copy", revision="v2") == plan
    again = Plan.from_pretrained("someone/plan", revision="v2")
    assert again.sites == plan.sites
    assert torch.equal(*again.tables.values(), *tables.values())


def test_full_disk_keeps_the_old_plan(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path)
    old = (tmp_path / FILE).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match="older plan there is untouched"):
        make((1, 1, 1, 1)).save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(PlanError, match="no folder can be made there"):
        make().save_pretrained(tmp_path / "taken")


def test_compare_lists_every_problem():
    plan = make(
        policies=(Policy(), Policy(reuse=Reuse(site="model.layers.5.self_attn"))),
    )
    other = plan.fingerprint.model_copy(
        update={"components": {"text": Component(layers=1, q_heads=8, kv_heads=2, head_dim=32)}}
    )
    problems = [str(p) for p in compare(plan, other, {"model.layers.0.self_attn": 8})]
    assert len(problems) == 4
    assert any("q_heads: the plan has 4, the model 8" in p for p in problems)
    assert any("head_dim" in p for p in problems)
    assert any("4 heads in the plan, 8 in the model" in p for p in problems)
    assert any("does not run before it" in p for p in problems)


def test_compare_tells_of_another_revision():
    """Only where both sides came from the hub, under one name; it does not keep anyone off."""

    def fingerprint(name, revision):
        update = {"base_id": name, "base_revision": revision}
        return make().fingerprint.model_copy(update=update)

    plan = make(fingerprint=fingerprint("someone/model", "a" * 40))
    sites = {"model.layers.0.self_attn": 4}
    (found,) = compare(plan, fingerprint("someone/model", "b" * 40), sites)
    assert not found.fatal
    assert str(found) == (
        "someone/model: the plan was made with revision aaaaaaaaaaaa, this is bbbbbbbbbbbb; "
        "check with `accelkit eval --against dense`"
    )
    for other in ("a" * 40, None):
        assert compare(plan, fingerprint("someone/model", other), sites) == []
    assert compare(plan, fingerprint("copies/model", "b" * 40), sites) == []


def test_the_revision_is_that_of_the_download():
    model = tiny("llama")
    plan = plan_of(model, load("window")(window_tokens=256))
    assert plan.fingerprint.base_revision is None and plan.check(model) == []
    model.config._commit_hash = "b" * 40  # as a download from the hub leaves it
    plan = plan_of(model, load("window")(window_tokens=256))
    model.config._commit_hash = "c" * 40
    (problem,) = plan.check(model)
    assert "revision bbbbbbbbbbbb, this is cccccccccccc" in problem.what


def test_rules_that_never_apply_are_told():
    model = tiny("llama")
    plan = plan_of(model, load("window")(window_tokens=256))
    path, layer = next(iter(plan.sites.items()))
    decode = layer.rules[0].model_copy(update={"phase": "decode"})
    both = layer.model_copy(update={"rules": (*layer.rules, decode)})
    (problem,) = plan.model_copy(update={"sites": {**plan.sites, path: both}}).check(model)
    assert not problem.fatal
    assert "decode runs dense: only prefill can be patched here" in problem.what


def test_compare_looks_at_what_nothing_runs_and_at_maps_of_heads():
    """Where `patch` would go on without a word, or fail in the first forward."""
    first, second = "model.layers.0.self_attn", "model.layers.1.self_attn"

    class Thinning(TokenMethod):
        def keep(self, stream):
            return None

    plan = make(policies=(Policy(), Policy(reuse=Reuse(site=first, heads=(0, 1)))))
    rules = plan.sites[first].rules
    layers = {first: LayerPlan(tokens=Thinning()), second: LayerPlan(rules=rules)}
    plan = plan.model_copy(update={"sites": layers})
    found = [str(p) for p in compare(plan, plan.fingerprint, {first: 4, second: 4})]
    assert len(found) == 2
    assert f"{first}: nothing asks" in found[0]
    assert "to keep yet; take 'tokens' out of this site" in found[0]
    assert f"{second}: reuses {first!r} by a map of 2 heads, the site has 4" in found[1]


def test_a_site_cannot_read_its_own_lists_in_the_same_forward():
    first = "model.layers.0.self_attn"
    plan = make(policies=(Policy(), Policy(reuse=Reuse(site=first))))
    (problem,) = compare(plan, plan.fingerprint, {first: 4})
    assert f"reuses {first!r}, which does not run before it" in problem.what


def test_a_step_cache_in_a_plan_of_a_language_model_is_told():
    plan = make(sites={"text": LayerPlan(block=load("mag_cache")())})
    (problem,) = compare(plan, plan.fingerprint, {"model.layers.0.self_attn": 4}, ("prefill",))
    assert problem.fatal and "mag_cache acts in denoise, not here" in problem.what


def test_reading_a_plan_needs_no_torch(tmp_path):
    import subprocess
    import sys

    make().save_pretrained(tmp_path)
    code = (
        "import sys; from accelkit.patches.plan import Plan; "
        f"plan = Plan.from_pretrained({str(tmp_path)!r}); "
        "assert plan.policies[1].label() == 'window'; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
