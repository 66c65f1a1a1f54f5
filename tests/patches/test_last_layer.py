"""The last layer for the kept rows only: the same answers and cache, less work, no trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

import accelkit
from accelkit.patches.adapters import last_layer
from accelkit.patches.adapters import transformers as adapter
from accelkit.patches.method import load
from accelkit.patches.patch import TRIMMED, plan_of
from accelkit.patches.plan import Limits, Plan, Rule
from tests.patches.conftest import FAMILIES, attributes, tiny

WINDOW = load("window")
WIDE = WINDOW(sink_tokens=10_000, window_tokens=48, block=16)  # every block, on the sparse path
NARROW = WINDOW(sink_tokens=16, window_tokens=48, block=16)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LAST = "model.layers.1.self_attn"
pytestmark = pytest.mark.filterwarnings("ignore::accelkit.errors.DenseFallbackWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def trimming(model, **changes) -> Plan:
    """Dense everywhere, and the last layer trimmed."""
    plan = plan_of(model, WIDE)
    bare = {path: s.model_copy(update={"rules": ()}) for path, s in plan.sites.items()}
    return plan.model_copy(update={"sites": bare, "trim_last_layer": True, **changes})


class Rows:
    """How many rows a module of the last layer worked on in each call."""

    def __init__(self, module) -> None:
        self.seen: list[int] = []
        self.hook = module.register_forward_hook(self)

    def __call__(self, module, args, out) -> None:
        self.seen.append(args[0].shape[1])


def content(cache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mistral"])
def test_every_family_keeps_its_rows_and_its_cache(family, ids):
    model = tiny(family)
    before = attributes(model)
    mask = torch.ones_like(ids)
    mask[1, :57] = 0
    dense = model(ids, attention_mask=mask, logits_to_keep=5)
    with accelkit.patch(model, trimming(model)) as handle:
        found = model(ids, attention_mask=mask, logits_to_keep=5)
        rows = Rows(model.model.layers[1].mlp)
        model(ids, attention_mask=mask, logits_to_keep=5)
        rows.hook.remove()
        assert rows.seen == [5]
        trimmed = handle.report().sites.get(LAST)
        if family != "gpt_oss":  # its sinks are left to what ran before, on all rows
            assert trimmed.dense == {TRIMMED: 2}
    torch.testing.assert_close(found.logits, dense.logits, **CLOSE)
    for a, b in zip(content(found.past_key_values), content(dense.past_key_values), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=5).logits, dense.logits)
    assert attributes(model) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", [0, 57])
def test_generate_gives_the_same(llama, ids, implementation, cache, padding):
    llama.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    settings |= {"cache_implementation": cache} if cache else {}
    dense = llama.generate(ids, **settings)
    with accelkit.patch(llama, trimming(llama)) as handle:
        found = llama.generate(ids, **settings)
        assert handle.report().sites[LAST].dense == {TRIMMED: 1, "decode": 5}
    assert torch.equal(found.sequences, dense.sequences)
    for a, b in zip(found.logits, dense.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_second_turn_and_chunks(llama, ids):
    def turns(cache):
        some = [ids[:, :100], ids[:, 100:220], ids[:, 220:]]
        return [llama(part, past_key_values=cache, logits_to_keep=2).logits for part in some]

    caches = [lambda: DynamicCache(config=llama.config)]
    caches.append(lambda: StaticCache(config=llama.config, max_cache_len=320))
    for make in caches:
        dense = turns(make())
        with accelkit.patch(llama, trimming(llama)) as handle:
            found = turns(make())
            assert handle.report().sites[LAST].dense == {TRIMMED: 3}
        for a, b in zip(found, dense, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 57])
def test_many_kept_rows_are_masked_a_few_at_a_time(
    llama, ids, monkeypatch, implementation, padding
):
    """No mask of all kept rows is made; the second turn sees the keys of the first."""
    monkeypatch.setattr(adapter, "MOST_MASKED", 7 * ids.numel())
    masks = []
    full = adapter._full_mask
    monkeypatch.setattr(adapter, "_full_mask", lambda *a: masks.append(full(*a)) or masks[-1])
    llama.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0

    def turns():
        cache = DynamicCache(config=llama.config)
        first, second = ids[:, :180], ids[:, 180:]
        options = {"past_key_values": cache, "logits_to_keep": 13}
        return [
            llama(first, attention_mask=mask[:, :180], **options).logits,
            llama(second, attention_mask=mask, **options).logits,
        ]

    dense = turns()
    masks.clear()
    with accelkit.patch(llama, trimming(llama)) as handle:
        found = turns()
        assert handle.report().sites[LAST].dense == {TRIMMED: 2}
    for a, b in zip(found, dense, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    mine = [m for m in masks if isinstance(m, torch.Tensor) and m.shape[2] < 13]
    assert [m.shape[2] for m in mine] == [11, 2, 7, 6]
    assert [m.shape[3] for m in mine] == [178, 180, 294, 300]


def test_rows_are_kept_from_the_first_index_on(llama, ids):
    keep = torch.tensor([290, 280, 299])
    dense = llama(ids, logits_to_keep=keep, use_cache=False).logits
    with accelkit.patch(llama, trimming(llama)) as handle:
        rows = Rows(llama.model.layers[1].self_attn.o_proj)
        found = llama(ids, logits_to_keep=keep, use_cache=False).logits
        report = handle.report().sites[LAST]
        assert rows.seen == [20]
        assert report.dense == {TRIMMED: 1}
        assert report.left_out == pytest.approx(280 * 281 / (300 * 301))
        # Too many rows: the layer runs whole.
        early = torch.tensor([200, 299])
        whole = llama(ids, logits_to_keep=early, use_cache=False).logits
        assert rows.seen == [20, 300]
    rows.hook.remove()
    torch.testing.assert_close(found, dense, **CLOSE)
    assert torch.equal(whole, llama(ids, logits_to_keep=early, use_cache=False).logits)


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"logits_to_keep": 0},
        {"logits_to_keep": torch.tensor([-1])},
        {"logits_to_keep": 1, "output_hidden_states": True},
        {"logits_to_keep": 1, "output_attentions": True},
        {"logits_to_keep": 1, "labels": True},
    ],
)
def test_who_sees_other_rows_gets_them(llama, ids, wish):
    llama.set_attn_implementation("eager")
    if wish.get("labels"):
        wish = {"logits_to_keep": 300, "labels": ids}
    dense = llama(ids, **wish)
    with accelkit.patch(llama, trimming(llama)) as handle:
        found = llama(ids, **wish)
        assert TRIMMED not in handle.report().dense
    assert torch.equal(found.logits, dense.logits)
    for a, b in zip(found.hidden_states or (), dense.hidden_states or (), strict=True):
        assert torch.equal(a, b)


def test_the_base_model_alone_is_whole(llama, ids):
    """Also behind a forward that was broken off, and one that asked for a row."""
    dense = llama.model(ids).last_hidden_state
    broken = llama.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with accelkit.patch(llama, trimming(llama)):
        with pytest.raises(ZeroDivisionError):
            llama(ids, logits_to_keep=1)
        broken.remove()
        assert torch.equal(llama.model(ids).last_hidden_state, dense)
        llama(ids, logits_to_keep=1)
        assert torch.equal(llama.model(ids).last_hidden_state, dense)


def test_below_the_minimum_length_and_disabled_nothing_changes(llama, ids):
    dense = llama(ids, logits_to_keep=1).logits
    short = trimming(llama, limits=Limits(min_length=301))
    with accelkit.patch(llama, short):
        assert torch.equal(llama(ids, logits_to_keep=1).logits, dense)
    with accelkit.patch(llama, trimming(llama)) as handle:
        with accelkit.disabled(llama):
            assert torch.equal(llama(ids, logits_to_keep=1).logits, dense)
        assert TRIMMED not in handle.report().dense


def test_beside_rules(llama, ids):
    """The other layers run sparse; the last one's rules count where all rows are asked for."""
    plan = plan_of(llama, NARROW).model_copy(update={"trim_last_layer": True})
    first = plan.sites[LAST.replace("1", "0")]
    only = plan.model_copy(
        update={
            "sites": {**plan.sites, LAST: plan.sites[LAST].model_copy(update={"rules": ()})},
            "trim_last_layer": False,
        }
    )
    assert first.rules == (Rule(phase="prefill", policies=(0,) * 4),)
    with accelkit.patch(llama, only):
        wanted = llama(ids, logits_to_keep=1).logits
    with accelkit.patch(llama, plan) as handle, handle.measuring():
        torch.testing.assert_close(llama(ids, logits_to_keep=1).logits, wanted, **CLOSE)
        report = handle.report()
        assert (report.sparse_calls, report.dense) == (1, {TRIMMED: 1})
        sparse = report.sites[LAST.replace("1", "0")].density
        left = 299 * 300 / (300 * 301)
        assert report.density == pytest.approx((sparse + 1 - left) / 2)
        llama(ids)
        assert handle.report().sparse_calls == 3


def test_copies_run_whole(llama, ids):
    dense = llama(ids, logits_to_keep=1).logits
    with accelkit.patch(llama, trimming(llama)):
        copies = copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))
    for other in copies:
        assert torch.equal(other(ids, logits_to_keep=1).logits, dense)


def test_compiled_code_is_whole(llama, ids):
    dense = llama(ids, use_cache=True, logits_to_keep=1).logits
    with accelkit.patch(llama, trimming(llama)) as handle:
        compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
        found = compiled(ids, use_cache=True, logits_to_keep=1).logits
        assert TRIMMED not in handle.report().dense
    torch.testing.assert_close(found, dense, **CLOSE)
    torch._dynamo.reset()


def test_device_map(tmp_path, ids):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
    ids = ids.to(model.device)
    dense = model(ids, logits_to_keep=1).logits
    with accelkit.patch(model, trimming(model)) as handle:
        torch.testing.assert_close(model(ids, logits_to_keep=1).logits, dense, **CLOSE)
        assert handle.report().dense[TRIMMED] == 1
    assert torch.equal(model(ids, logits_to_keep=1).logits, dense)


def test_models_without_such_a_head_are_left_alone(llama):
    assert last_layer.trimmed_layer(llama, LAST) is not None
    assert last_layer.trimmed_layer(llama, "model.layers.0.self_attn") is None
    assert last_layer.trimmed_layer(llama.model, "layers.1.self_attn") is None
