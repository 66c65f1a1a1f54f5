"""Patching: what runs sparse, what stays dense, and that undoing leaves no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import accelkit
from accelkit.errors import (
    DenseFallbackWarning,
    NothingPatchedError,
    ParallelNotSupportedError,
    PlanTransferWarning,
)
from accelkit.patches.adapters import transformers as adapter
from accelkit.patches.method import load
from accelkit.patches.patch import handle_of, plan_of
from accelkit.patches.plan import Limits, Policy, Rule
from tests.patches.conftest import FAMILIES, attributes, tiny

WINDOW = load("window")
NARROW = WINDOW(sink_tokens=16, window_tokens=48, block=16)
WIDE = WINDOW(sink_tokens=10_000, window_tokens=48, block=16)  # every block, on the sparse path
# Families whose full-attention layers may run sparse, and how many of the two layers that is.
SPARSE_LAYERS = {"mistral": 0, "gemma3_text": 1, "gpt_oss": 0}
pytestmark = pytest.mark.filterwarnings("ignore::accelkit.errors.DenseFallbackWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_patches_runs_and_undoes(family, ids):
    model = tiny(family)
    mask = torch.ones_like(ids)
    mask[1, :57] = 0
    dense, padded = model(ids).logits, model(ids, attention_mask=mask).logits
    before = attributes(model)
    implementation = model.config._attn_implementation
    sparse_layers = SPARSE_LAYERS.get(family, 2)
    if family == "mistral":
        with pytest.raises(NothingPatchedError):
            accelkit.patch(model, NARROW)
    else:
        with accelkit.patch(model, WIDE) as handle:
            torch.testing.assert_close(model(ids).logits, dense, atol=2e-4, rtol=1e-3)
            wide = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(wide[0], padded[0], atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(wide[1, 57:], padded[1, 57:], atol=2e-4, rtol=1e-3)
            assert handle.report().sparse_calls == 2 * sparse_layers
        with accelkit.patch(model, NARROW) as handle, handle.measuring():
            narrow = model(ids).logits
            if sparse_layers:
                assert not torch.allclose(narrow, dense, atol=1e-3)
                assert 0 < handle.report().density < 1
            else:
                assert torch.equal(narrow, dense)
                assert handle.report().dense
    assert torch.equal(model(ids).logits, dense)
    assert torch.equal(model(ids, attention_mask=mask).logits, padded)
    assert model.config._attn_implementation == implementation
    assert attributes(model) == before


def test_gpt_oss_sinks_stay_dense_with_a_reason(ids):
    model = tiny("gpt_oss")
    with accelkit.patch(model, NARROW) as handle, pytest.warns(DenseFallbackWarning, match="s aux"):
        model(ids)
    assert handle.report().dense["s aux"] == 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_fallback_is_bit_identical(llama, ids, implementation):
    llama.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :57] = 0
    settings = {"max_new_tokens": 4, "do_sample": False}
    plain, padded = llama(ids).logits, llama(ids, attention_mask=mask).logits
    answer = llama.generate(ids, attention_mask=mask, **settings)
    plan = plan_of(llama, NARROW).model_copy(update={"limits": Limits(min_length=10_000)})
    with accelkit.patch(llama, plan) as handle:
        assert torch.equal(llama(ids).logits, plain)
        assert torch.equal(llama(ids, attention_mask=mask).logits, padded)
        assert torch.equal(llama.generate(ids, attention_mask=mask, **settings), answer)
        assert handle.report().sparse_calls == 0
        assert handle.report().dense["shorter than the minimum length"] > 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_fallback_over_a_static_cache(llama, ids, implementation):
    """Its room behind the prompt is hidden by a mask, which is made anew for the fallback."""
    llama.set_attn_implementation(implementation)
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    dense = llama.generate(ids, **settings)
    plan = plan_of(llama, NARROW).model_copy(update={"limits": Limits(min_length=10_000)})
    with accelkit.patch(llama, plan):
        found = llama.generate(ids, **settings)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, dense.logits, strict=True))


def varlen(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """As kernels for packed sequences do: positions tell documents apart, and no mask does."""
    n = query.shape[2]
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    if position_ids is not None:
        document = (position_ids[0] == 0).cumsum(0)
        mask &= document[:, None] == document
    out = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("implementation", ["sdpa", "varlen"])
def test_packed_sequences_stay_apart(llama, ids, implementation, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "varlen", varlen)
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "varlen", flash_attention_mask
    )
    llama.set_attn_implementation(implementation)
    packed = {"position_ids": torch.arange(300)[None] % 150, "use_cache": False}
    dense = llama(ids[:1], **packed).logits
    with accelkit.patch(llama, NARROW) as handle:
        assert torch.equal(llama(ids[:1], **packed).logits, dense)
        assert handle.report().dense == {"attention mask other than causal": 2}
        llama(ids[:1], use_cache=False)
        assert handle.report().sparse_calls == 2


@torch.compiler.set_stance("force_eager")
def test_over_flex_attention(llama, ids):
    """Its masks are no tensors. Nothing is compiled: its kernels would take a minute."""
    llama.set_attn_implementation("flex_attention")
    settings = {"max_new_tokens": 2, "do_sample": False}
    dense = llama.generate(ids, **settings)
    with accelkit.patch(llama, WIDE) as handle:
        assert torch.equal(llama.generate(ids, **settings), dense)
        assert handle.report().sparse_calls == 2
        packed = llama(ids[:1], position_ids=torch.arange(300)[None] % 150, use_cache=False).logits
        assert handle.report().dense == {"decode": 2, "attention mask other than causal": 2}
    again = llama(ids[:1], position_ids=torch.arange(300)[None] % 150, use_cache=False).logits
    assert torch.equal(packed, again)


def chunked(model, ids, cut, cache):
    model(ids[:, :cut], past_key_values=cache)
    return model(ids[:, cut:], past_key_values=cache).logits


def test_chunked_prefill_equals_one_shot_rows(llama, ids):
    with accelkit.patch(llama, NARROW) as handle:
        whole = llama(ids).logits
        parts = chunked(llama, ids, 128, DynamicCache(config=llama.config))
        assert handle.report().sparse_calls == 6
    torch.testing.assert_close(parts, whole[:, 128:], atol=2e-4, rtol=1e-3)


def test_static_cache(llama, ids):
    dense = llama.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
    with accelkit.patch(llama, WIDE) as handle:
        same = llama.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert handle.report().sparse_calls > 0
    assert torch.equal(dense, same)
    with accelkit.patch(llama, WIDE):
        cache = StaticCache(config=llama.config, max_cache_len=320)
        first = llama(ids, past_key_values=cache).logits
    torch.testing.assert_close(first, llama(ids).logits, atol=2e-4, rtol=1e-3)


def test_second_turn_over_a_static_cache(llama, ids):
    """Behind the second part lies room that nobody may read: a mask that is not ours."""

    def second():
        cache = StaticCache(config=llama.config, max_cache_len=400)
        llama(ids[:, :200], past_key_values=cache)
        return llama(ids[:, 200:], past_key_values=cache).logits

    dense = second()
    with accelkit.patch(llama, WIDE) as handle:
        torch.testing.assert_close(second(), dense, atol=1e-5, rtol=1e-4)
        assert handle.report().dense == {"attention mask other than causal": 2}


def test_room_behind_the_queries_makes_a_mask_that_is_not_ours():
    lengths = {"q_length": 100, "q_offset": 200}
    found = adapter._mask(lambda **_: "theirs", kv_length=400, **lengths)
    assert found == adapter._Foreign("theirs")
    assert adapter._mask(print, kv_length=300, device="cpu", **lengths).ndim == 1


def test_second_turn_and_prefix_cache(llama, ids):
    cache = DynamicCache(config=llama.config)
    llama(ids[:, :200], past_key_values=cache)
    reference = llama(ids[:, 200:], past_key_values=cache).logits
    with accelkit.patch(llama, WIDE) as handle:
        again = chunked(llama, ids, 200, DynamicCache(config=llama.config))
        assert handle.report().sparse_calls == 4
    torch.testing.assert_close(again, reference, atol=2e-4, rtol=1e-3)


def test_generate_twice_gives_the_same(llama, ids):
    with accelkit.patch(llama, NARROW):
        first = llama.generate(ids, max_new_tokens=4, do_sample=False)
        second = llama.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(first, second)


def test_gradients_run_dense_and_warn(llama, ids):
    with torch.enable_grad(), accelkit.patch(llama, NARROW) as handle:
        with pytest.warns(DenseFallbackWarning, match="gradients"):
            loss = llama(ids).logits.sum()
        loss.backward()
    assert handle.report().sparse_calls == 0
    assert llama.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("asks", ["q_proj", "k_proj", "v_proj"])
def test_whatever_asks_for_gradients_keeps_its_call_dense(llama, ids, asks):
    llama.requires_grad_(False)
    weight = llama.model.layers[1].self_attn.get_submodule(asks).weight.requires_grad_()
    with torch.enable_grad(), accelkit.patch(llama, NARROW) as handle:
        llama(ids).logits.sum().backward()
    assert handle.report().dense == {"gradients are enabled": 1}
    assert weight.grad.abs().sum() > 0


def test_cached_lists_do_not_outlive_their_padding(llama, ids):
    mask = torch.ones_like(ids)
    mask[1, :57] = 0
    with accelkit.patch(llama, NARROW):
        cold = llama(ids, attention_mask=mask).logits
    with accelkit.patch(llama, NARROW):
        llama(ids)
        warm = llama(ids, attention_mask=mask).logits
    assert torch.equal(warm, cold)


def test_heads_of_a_layer_may_differ(llama, ids):
    """Mixed lanes equal the groups run one by one: head 0 narrow, 1 dense, 2 wide, 3 narrow."""
    base = plan_of(llama, NARROW)
    policies = (Policy(), Policy(methods=(NARROW,)), Policy(methods=(WIDE,)))
    rule = Rule(phase="prefill", policies=(1, 0, 2, 1))
    sites = {path: s.model_copy(update={"rules": (rule,)}) for path, s in base.sites.items()}
    mixed = base.model_copy(update={"policies": policies, "sites": sites})

    def outputs(model, plan):
        seen = {}
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda _, args, n=n: seen.setdefault(n, args[0].clone())
            )
            for n, layer in enumerate(model.model.layers)
        ]
        with accelkit.patch(model, plan):
            model(ids)
        for hook in hooks:
            hook.remove()
        return seen[0].view(2, 300, 4, 16)

    got, narrow = outputs(llama, mixed), outputs(llama, plan_of(llama, NARROW))
    wide = outputs(llama, plan_of(llama, WIDE))
    torch.testing.assert_close(got[:, :, [0, 3]], narrow[:, :, [0, 3]])
    torch.testing.assert_close(got[:, :, [1, 2]], wide[:, :, [1, 2]], atol=1e-5, rtol=1e-4)


def test_static_lists_serve_other_heads_of_other_layers(llama, ids):
    """One head a layer runs the window, each time another: the list is made once."""
    base = plan_of(llama, NARROW)
    first, second = base.sites

    def only(head: int, policy: int) -> dict:
        rows = tuple(policy if h == head else 0 for h in range(4))
        return {"rules": (Rule(phase="prefill", policies=rows),)}

    def logits(policies: tuple[Policy, ...], second_policy: int) -> torch.Tensor:
        rules = {first: only(1, 1), second: only(2, second_policy)}
        sites = {path: base.sites[path].model_copy(update=u) for path, u in rules.items()}
        plan = base.model_copy(update={"policies": policies, "sites": sites})
        with accelkit.patch(llama, plan) as handle:
            found = llama(ids).logits
            assert handle.report().sparse_calls == 2
        return found

    narrow = Policy(methods=(NARROW,))
    shared = logits((Policy(), narrow), 1)
    apart = logits((Policy(), narrow, narrow), 2)  # another row of the table: a list of its own
    assert torch.equal(shared, apart)


@pytest.mark.parametrize("before", ["sdpa", "eager", "flash_attention_2"])
def test_names_lead_back_to_the_previous_implementation(before):
    from accelkit.patches.adapters.transformers import _ours, _theirs

    assert "flash" not in _ours(before)
    assert _theirs(_ours(before)) == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_compile_fullgraph(family, ids):
    model = tiny(family)
    with accelkit.patch(model, NARROW) as handle:
        eager = model(ids, use_cache=True).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(ids, use_cache=True).logits, eager, atol=1e-5, rtol=1e-4
        )
        assert handle.report().sparse_calls == 2 * SPARSE_LAYERS.get(family, 2)
    torch._dynamo.reset()


def test_compiled_without_a_cache_is_dense_and_told(llama, ids):
    """There transformers cannot know that sequences are not packed, and masks them as if."""
    dense = llama(ids, use_cache=False).logits
    with accelkit.patch(llama, NARROW) as handle:
        compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
        with pytest.warns(DenseFallbackWarning, match="other than causal"):
            found = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(found, dense, atol=1e-5, rtol=1e-4)
        assert handle.report().dense == {"attention mask other than causal": 2}
    torch._dynamo.reset()


@pytest.mark.parametrize("padded", [False, True])
def test_the_op_keeps_its_contract(llama, ids, padded):
    mask = ids > 20 if padded else None
    with accelkit.patch(llama, NARROW):
        number = llama.model.layers[0].self_attn.accelkit_site
        q, k, v = (torch.randn(2, 300, h, 16).transpose(1, 2) for h in (4, 2, 2))
        op = torch.ops.accelkit.attention.default
        torch.library.opcheck(op, (q, k, v, mask, 0.25, number))
        assert torch.Tag.cudagraph_unsafe in op.tags, "a replayed graph would not look at the plan"


def test_sharded_heads_are_refused(llama, ids):
    """Under tensor parallelism a module sees some of the heads that its config names."""
    with accelkit.patch(llama, NARROW):
        number = llama.model.layers[0].self_attn.accelkit_site
        q, k, v = (torch.randn(1, h, 300, 16) for h in (2, 1, 1))
        with pytest.raises(ParallelNotSupportedError, match="2 query heads here, 4 in the config"):
            torch.ops.accelkit.attention(q, k, v, None, 0.25, number)


def test_a_patched_model_goes_when_nobody_needs_it(ids):
    model = tiny("llama")
    accelkit.patch(model, NARROW)
    model(ids)
    seen = [weakref.ref(model), weakref.ref(model.model.layers[0].self_attn)]
    del model
    gc.collect()
    assert [r() for r in seen] == [None, None]


def test_copies_outlive_the_handle(llama, ids):
    dense = llama(ids).logits
    with accelkit.patch(llama, NARROW) as handle:
        copies = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
        other = copy.deepcopy(llama)
        other.set_attn_implementation("eager")
        other(ids)
        assert [handle_of(c) for c in copies] == [None, None]
        assert handle_of(llama) is handle
    for other in copies:
        assert torch.equal(other(ids).logits, dense)


def test_disabled_block_is_dense(llama, ids):
    dense = llama(ids).logits
    with accelkit.patch(llama, NARROW):
        with accelkit.disabled(llama):
            assert torch.equal(llama(ids).logits, dense)
        assert not torch.equal(llama(ids).logits, dense)


def test_failed_patch_leaves_the_model(llama, ids, monkeypatch):
    before, dense = attributes(llama), llama(ids).logits
    calls = iter(range(1))
    monkeypatch.setattr(adapter, "_implementation", lambda module: next(calls) or print)
    with pytest.raises(StopIteration):
        accelkit.patch(llama, NARROW)
    monkeypatch.undo()
    assert attributes(llama) == before
    assert torch.equal(llama(ids).logits, dense)


def test_warning_free_when_all_is_well(llama, ids):
    with warnings.catch_warnings(), accelkit.patch(llama, NARROW):
        warnings.simplefilter("error", DenseFallbackWarning)
        llama.generate(ids, max_new_tokens=3, do_sample=False)


def test_prompts_longer_than_calibrated_are_told_once(llama, ids):
    plan = plan_of(llama, NARROW).model_copy(update={"limits": Limits(max_length=250)})
    with accelkit.patch(llama, plan) as handle, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in (250, 280, 300):
            llama(ids[:, :n])
        assert handle.report().sparse_calls == 6
    assert [w.category for w in told] == [PlanTransferWarning]
    assert str(told[0].message) == "280 tokens: the plan was calibrated up to 250"


def test_unmerged_lora(llama, ids):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.eval()
    dense = model(ids).logits
    with accelkit.patch(model, WIDE) as handle:
        torch.testing.assert_close(model(ids).logits, dense, atol=2e-4, rtol=1e-3)
        assert handle.report().sparse_calls == 2
        assert "model.layers.0.self_attn" in handle.report().sites
    assert torch.equal(model(ids).logits, dense)


def test_device_map_auto(tmp_path, ids):
    pytest.importorskip("accelerate")

    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
    ids = ids.to(model.device)
    dense = model(ids).logits
    with accelkit.patch(model, WIDE) as handle:
        torch.testing.assert_close(model(ids).logits, dense, atol=2e-4, rtol=1e-3)
        assert handle.report().sparse_calls == 2
    assert torch.equal(model(ids).logits, dense)


def test_quantised_weights(llama, ids):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(llama, torchao.Int8WeightOnlyConfig())
    dense = llama(ids).logits
    with accelkit.patch(llama, WIDE) as handle:
        torch.testing.assert_close(llama(ids).logits, dense, atol=2e-4, rtol=1e-3)
        assert handle.report().sparse_calls == 2
    assert torch.equal(llama(ids).logits, dense)
