"""Layers that read the lists of an earlier one."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import accelkit
from accelkit.patches.method import load
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import Policy, Reuse, Rule
from tests.patches.conftest import tiny

WINDOW = load("window")
NARROW = WINDOW(sink_tokens=16, window_tokens=48, block=16)
WIDE = WINDOW(sink_tokens=10_000, window_tokens=48, block=16)  # every block, on the sparse path


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_reuse_reads_the_anchors_lists(llama, ids):
    """Layer 1 reads layer 0's lists through a head map: a static pattern does not notice."""
    base = plan_of(llama, NARROW)
    first, second = base.sites
    policies = (*base.policies, Policy(reuse=Reuse(site=first, heads=(3, 2, 1, 0))))
    again = base.sites[second].model_copy(
        update={"rules": (Rule(phase="prefill", policies=(1, 1, 1, 1)),)}
    )
    plan = base.model_copy(update={"policies": policies, "sites": {**base.sites, second: again}})
    with accelkit.patch(llama, base):
        direct = llama(ids).logits
    with accelkit.patch(llama, plan) as handle:
        reused = llama(ids).logits
        assert handle.report().sparse_calls == 2
    assert torch.equal(direct, reused)


@pytest.mark.parametrize("way", ["whole", "in parts", "padded"])
def test_an_anchor_may_lie_far_back(ids, way):
    """Layer 4 reads layer 0's lists; one between runs lists of its own, others run dense."""
    model = tiny("llama", num_hidden_layers=5)
    base = plan_of(model, NARROW)
    first, _, between, _, last = base.sites
    far = Policy(reuse=Reuse(site=first, heads=(3, 2, 1, 0)))
    policies = (Policy(), Policy(methods=(NARROW,)), Policy(methods=(WIDE,)), far)

    def logits(rows: dict[str, int]) -> torch.Tensor:
        sites = {
            path: site.model_copy(
                update={"rules": (Rule(phase="prefill", policies=(rows[path],) * 4),)}
            )
            for path, site in base.sites.items()
            if path in rows
        }
        plan = base.model_copy(update={"policies": policies, "sites": sites})
        assert not [p for p in plan.check(model) if p.fatal]
        with accelkit.patch(model, plan) as handle:
            if way == "in parts":
                cache = DynamicCache(config=model.config)
                model(ids[:, :128], past_key_values=cache)
                found = model(ids[:, 128:], past_key_values=cache).logits
            else:
                mask = torch.ones_like(ids)
                mask[1, : 57 if way == "padded" else 0] = 0
                found = model(ids, attention_mask=mask).logits
            assert handle.report().sparse_calls == (6 if way == "in parts" else 3)
        return found

    reused = logits({first: 1, between: 2, last: 3})
    assert torch.equal(reused, logits({first: 1, between: 2, last: 1}))
    assert not torch.equal(reused, logits({first: 1, between: 2, last: 2}))


def test_reused_lists_end_with_their_forward(ids):
    """Also where the first layer slides and never reaches the plan."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = tiny("gemma3_text", num_hidden_layers=3, layer_types=kinds)
    base = plan_of(model, NARROW)
    first, second = base.sites
    rule = Rule(phase="prefill", policies=(1, 1, 1, 1))
    again = base.sites[second].model_copy(update={"rules": (rule,)})
    policies = (*base.policies, Policy(reuse=Reuse(site=first)))
    plan = base.model_copy(update={"policies": policies, "sites": {**base.sites, second: again}})
    with accelkit.patch(model, base):
        direct = model(ids[:, :200]).logits
    with accelkit.patch(model, plan):
        model(ids)
        assert torch.equal(model(ids[:, :200]).logits, direct)
