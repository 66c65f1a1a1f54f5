"""Kascade by hand: tiles of 4, keys 1, 6 and, less, 3 matter to everyone."""

import hand
import torch
from tiny_cases import tiny_model

import accelkit
from accelkit.patches.methods.kascade import Kascade
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import Policy, Reuse, Rule

SMALL = Kascade(share=0.25, floor_tokens=2, tile=4)
NATS = {1: 9.0, 6: 8.0, 3: 5.0}


def test_lists():
    """A quarter of the 0, 4, 8, 12 keys before the tile, at least 2; and the tile's own."""
    assert hand.lists(SMALL, hand.call_with(16, NATS)) == [
        [0, 1, 2, 3],
        [1, 3, 4, 5, 6, 7],
        [1, 6, 8, 9, 10, 11],
        [1, 3, 6, 12, 13, 14, 15],
    ]


def test_a_group_shares_its_list():
    """Two heads on one KV head want different keys; the pooled list has what they want most."""
    call = hand.call_with(16, {1: 9.0})
    call.q[:, 1, :, 0], call.q[:, 1, :, 1] = 0.0, 1.0
    call.k[:, :, 6, 1] = 9.0 * 4
    assert hand.lists(SMALL, call)[2] == [1, 6, 8, 9, 10, 11]
    assert hand.lists(SMALL, call, head=1) == hand.lists(SMALL, call)


def test_dense_anchor_runs_dense_and_emits():
    first = SMALL.model_copy(update={"dense_output": True})
    call = hand.call_with(16, NATS)
    assert first.index(call) is None
    emitted = first.emit(call, None)
    assert hand.rows(emitted) == hand.lists(SMALL, call)
    assert SMALL.emit(call, None) is None


def test_tail_tile_is_its_own():
    found = hand.lists(SMALL, hand.call_with(14, NATS))
    assert found[3][-2:] == [12, 13]
    assert torch.tensor(found[3]).max() == 13


@torch.inference_mode()
def test_a_dense_first_layer_serves_the_second():
    """Layer 0 runs dense and hands its lists through a head map to layer 1, which computes none.
    With all keys listed that is the dense model.
    """
    model = tiny_model()
    ids = torch.randint(3, 128, (1, 300))
    dense = model(ids).logits
    for share, close in ((1.0, True), (0.1, False)):
        anchor = Kascade(share=share, floor_tokens=16, tile=16, dense_output=True)
        base = plan_of(model, anchor)
        first, second = base.sites
        reuse = Policy(reuse=Reuse(site=first, heads=(2, 3, 0, 1)))
        rule = Rule(phase="prefill", policies=(len(base.policies),) * 4)
        sites = {**base.sites, second: base.sites[second].model_copy(update={"rules": (rule,)})}
        policies = (*base.policies, reuse)
        plan = base.model_copy(update={"policies": policies, "sites": sites})
        with accelkit.patch(model, plan) as handle:
            logits = model(ids).logits
            counts = handle.report().sites
            assert (counts[first].sparse, counts[second].sparse) == (0, 1)
        assert torch.allclose(logits, dense, atol=1e-5) == close
