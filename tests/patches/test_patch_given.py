"""What `patch` is given: plans, their paths, methods, models that it refuses; and a patched model
on disk.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import accelkit
from accelkit.errors import (
    AccelkitError,
    AlreadyPatchedError,
    DenseFallbackWarning,
    InvalidInputError,
    NothingPatchedError,
    PlanError,
    PlanMismatchError,
    PlanTransferWarning,
    UnsupportedModelError,
)
from accelkit.patches.patch import handle_of, plan_of, save_pretrained
from accelkit.patches.plan import Budget, Plan, Rule
from accelkit.patches.plan_file import FILE
from tests.patches.conftest import tiny
from tests.tiny_pipes import NARROW as PICTURES
from tests.tiny_pipes import tiny_pipe

WINDOW = accelkit.method("window")
NARROW = WINDOW(sink_tokens=16, window_tokens=48, block=16)
WIDE = WINDOW(sink_tokens=10_000, window_tokens=48, block=16)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("what", [None, {"policies": ["x" * 500]}, [NARROW, 3]])
def test_what_is_no_method_is_refused(llama, what):
    with pytest.raises(InvalidInputError, match="neither a plan nor a method") as error:
        accelkit.patch(llama, what)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("what", ["window", accelkit.method("window"), [NARROW, "window"]])
def test_a_method_without_its_numbers_is_refused(llama, what):
    with pytest.raises(InvalidInputError, match=r'accelkit\.method\("window"\)\(\)'):
        accelkit.patch(llama, what)


@pytest.mark.parametrize("as_given", [str, lambda folder: folder, lambda f: f / FILE])
def test_a_plan_by_its_path(llama, tmp_path, as_given):
    plan = plan_of(llama, NARROW)
    plan.save_pretrained(tmp_path)
    with accelkit.patch(llama, as_given(tmp_path)) as handle:
        assert handle.plan == plan


def test_a_plan_without_a_model_is_told(llama, tmp_path):
    plan_of(llama, NARROW).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="a plan, but no model of transformers that opens"):
        accelkit.from_pretrained(tmp_path)


def test_a_path_without_a_plan_is_told(llama, tmp_path):
    with pytest.raises(PlanError, match="no plan at"):
        accelkit.patch(llama, tmp_path)


def test_compiled_model_is_refused(llama):
    with pytest.raises(InvalidInputError, match=r"torch\.compile afterwards"):
        accelkit.patch(torch.compile(llama), NARROW)


def test_patching_twice(llama):
    handle = accelkit.patch(llama, NARROW)
    assert accelkit.patch(llama, NARROW) is handle
    with pytest.raises(AlreadyPatchedError, match="remove"):
        accelkit.patch(llama, WIDE)
    accelkit.unpatch(llama)
    assert handle_of(llama) is None
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "wan"])
def test_a_patch_is_undone_from_the_part_or_the_whole(family):
    """Also one that was laid on the part alone; a second patch is refused and changes nothing."""
    whole = tiny_pipe("wan") if family == "wan" else tiny("llama")
    part = whole.transformer if family == "wan" else whole.model
    method = PICTURES if family == "wan" else NARROW
    before = [dict(vars(m)) for m in part.modules()]
    for patched, other in ((whole, part), (part, whole)):
        handle = accelkit.patch(patched, method)
        assert handle_of(other) is handle
        with pytest.raises(AlreadyPatchedError, match="unpatch"):
            accelkit.patch(other, WIDE if family == "llama" else PICTURES.model_copy())
        with accelkit.disabled(other):
            assert not handle.enabled
        assert handle.enabled
        accelkit.unpatch(other)
        assert handle_of(patched) is None
        assert [dict(vars(m)) for m in part.modules()] == before


def test_attention_that_is_set_anew_behind_a_patch_is_told_and_kept(llama):
    ids, reason = torch.arange(100)[None], "the attention implementation was set after patching"
    with accelkit.patch(llama, NARROW) as handle:
        llama.set_attn_implementation("eager")
        with pytest.warns(DenseFallbackWarning, match=reason):
            llama(ids)
        assert handle.report().dense == {reason: 2}
    assert llama.config._attn_implementation == "eager"


def test_a_handle_that_was_removed_is_not_entered(llama):
    handle = accelkit.patch(llama, NARROW)
    assert handle.installed
    with handle:
        pass
    assert not handle.installed
    with pytest.raises(InvalidInputError, match="patch the model again"), handle:
        pass


def test_a_report_says_what_was_until_then(llama):
    ids = torch.arange(100)[None]
    with accelkit.patch(llama, NARROW) as handle:
        llama(ids)
        then = handle.report()
        llama(ids)
        assert (then.calls, handle.report().calls) == (2, 4)


def test_a_step_cache_on_a_bare_denoiser():
    pipe = tiny_pipe("wan")
    root, cache = pipe.transformer, accelkit.method("first_block_cache")()
    with accelkit.patch(root, cache):
        assert root.is_cache_enabled
        with accelkit.disabled(pipe):
            assert not root.is_cache_enabled
        assert root.is_cache_enabled
    assert not root.is_cache_enabled


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Budget(0.02), r"^Budget\(0.02\): fields are given by name; known are: max_rel"),
        (lambda: Budget(max_rel_error="2%"), r"^Budget: max_rel_error: .*number.* \(found '2%'\)"),
        (lambda: Budget(max_rel_error=2), r"less than 1 \(found 2\)"),
        (lambda: WINDOW(windw=3), "^Window: unknown field 'windw'; known are: sink_tokens, win"),
        (lambda: WINDOW(window_tokens=0), r"window_tokens: .* 1 \(found 0\)$"),
        (lambda: accelkit.method("flex_prefill")(coverage=3), r"coverage: .* 1 or .*\(found 3\)$"),
        (lambda: Rule(phase="pre", policies=(0,)), r"phase: .*'prefill'.*\(found 'pre'\)"),
        (lambda: setattr(NARROW, "window_tokens", 3), r"Window\.window_tokens does not change"),
        (lambda: accelkit.method(None), "None is no method's name"),
        (lambda: accelkit.method(WINDOW), "is no method's name"),
        (lambda: Plan.from_pretrained(None), "the plan's place is None; expected a path"),
        (lambda: Plan.from_json(None), "NoneType is no text"),
        (lambda: Plan.from_json('{"schema_version": 99, "producer": 3}'), "a newer accelkit"),
        (lambda: Plan.from_json('{"schema_version": true}'), "not a plan"),
        (lambda: Plan.from_pretrained('{"schema_version": 3}' * 99), "Plan.from_json reads the"),
    ],
)
def test_what_cannot_be_made_says_so_in_a_line(make, words):
    with pytest.raises(AccelkitError, match=words) as error:
        make()
    assert "pydantic" not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_upload_that_is_refused_is_told(llama):
    with pytest.raises(PlanError, match=r"a b/c: the plan was not uploaded .*'owner/name'"):
        plan_of(llama, NARROW).push_to_hub("a b/c")


def test_plans_with_equal_tables_are_equal(llama, tmp_path):
    tables = {"model.layers.0.self_attn/1/coverage": torch.tensor([0.5, 0.75, 0.9, 1.0])}
    plan = plan_of(llama, NARROW).with_tables(tables)
    plan.save_pretrained(tmp_path)
    with accelkit.patch(llama, plan) as handle:
        assert accelkit.patch(llama, tmp_path) is handle
        others = {name: table + 1 for name, table in tables.items()}
        with pytest.raises(AlreadyPatchedError):
            accelkit.patch(llama, plan.with_tables(others))


def test_plan_of_another_model_lists_differences(llama):
    plan = plan_of(tiny("llama", num_attention_heads=8, num_hidden_layers=5), NARROW)
    with pytest.raises(PlanMismatchError) as error:
        accelkit.patch(llama, plan)
    text = str(error.value)
    assert "layers: the plan has 5, the model 2" in text
    assert "q_heads: the plan has 8, the model 4" in text
    assert "model.layers.0.self_attn: 8 heads in the plan, 4 in the model" in text
    assert "and 2 more" in text


@pytest.mark.filterwarnings("ignore::accelkit.errors.PlanTransferWarning")
def test_another_class_of_the_same_sizes_if_it_need_not_be_strict(llama):
    model = tiny("qwen3")
    plan = plan_of(llama, NARROW)
    with pytest.raises(PlanMismatchError, match="for LlamaForCausalLM"):
        accelkit.patch(model, plan)
    with pytest.warns(PlanTransferWarning, match="this is Qwen3ForCausalLM"):
        accelkit.patch(model, plan, strict=False).remove()
    with pytest.raises(PlanMismatchError, match="q_heads"):
        accelkit.patch(tiny("qwen3", num_attention_heads=8), plan, strict=False)


def test_changed_config_only_warns(llama):
    plan = plan_of(tiny("llama", rope_theta=5e5), NARROW)
    with pytest.warns(PlanTransferWarning, match="rope"):
        accelkit.patch(llama, plan).remove()


def test_a_config_is_the_same_before_and_after_saving(llama, tmp_path):
    plan = plan_of(llama, NARROW)
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plan.check(llama) == plan.check(again) == []


@pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), "my-model", tiny("llama").config])
def test_unknown_class_is_refused(what):
    with pytest.raises(UnsupportedModelError, match=type(what).__name__):
        accelkit.patch(what, NARROW)


def test_a_model_without_causal_attention_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    with pytest.raises(NothingPatchedError, match="no attention module found"):
        accelkit.patch(BertModel(BertConfig(intermediate_size=32, **sizes)), NARROW)


def test_patched_model_saves_the_same_bytes(llama, tmp_path, ids):
    llama.save_pretrained(tmp_path / "plain")
    with accelkit.patch(llama, NARROW):
        sparse = llama(ids).logits
        save_pretrained(llama, tmp_path / "patched")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "patched" / name
        ).read_bytes()
    again = accelkit.from_pretrained(tmp_path / "patched")
    assert torch.equal(again(ids).logits, sparse)
    assert Plan.from_pretrained(tmp_path / "patched") == handle_of(again).plan


def test_what_is_said_of_the_hub_holds_for_the_plan_too(monkeypatch):
    def read(name, **kwargs):
        raise PlanError(f"{name} {kwargs}")

    monkeypatch.setattr(Plan, "from_pretrained", read)
    with pytest.raises(PlanError, match=r"someone/model \{'revision': 'v2'\}"):
        accelkit.from_pretrained("someone/model", revision="v2", dtype="auto")
