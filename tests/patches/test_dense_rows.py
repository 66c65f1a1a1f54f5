"""The last rows of a prompt dense, whatever rules say of the rows before them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import accelkit
from accelkit.calibration.capture import capture
from accelkit.errors import DenseFallbackWarning, PlanError
from accelkit.patches.method import load
from accelkit.patches.patch import ANY_ROW, LAST_ROWS, TRIMMED, plan_of
from accelkit.patches.plan import Limits, Plan
from tests.patches.conftest import tiny

NARROW = load("window")(sink_tokens=16, window_tokens=48, block=16)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ROWS = 40
FIRST = "model.layers.0.self_attn"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def generating(model, dense_rows: int = ROWS, **changes) -> Plan:
    """A narrow window everywhere, the last layer trimmed, and dense last rows."""
    update = {"trim_last_layer": True, "dense_rows": dense_rows, **changes}
    return plan_of(model, NARROW).model_copy(update=update)


def first_layer(model, **inputs) -> torch.Tensor:
    """What the first layer's attention gives, `[B, N, C]`, before its output projection."""
    seen = []
    part = model.get_submodule(FIRST).o_proj
    hook = part.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "phi3"])
@pytest.mark.parametrize("keep", [1, 30, ROWS, 90, torch.tensor([289, 250])])
@pytest.mark.parametrize("padding", [0, 57])
def test_rows_before_the_last_ones_run_the_rules(family, keep, padding, ids):
    """Each row is either that of the window everywhere, or that of dense attention."""
    model = tiny(family)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": keep}
    dense = first_layer(model, **inputs)
    with accelkit.patch(model, plan_of(model, NARROW)):
        sparse = first_layer(model, **inputs)
    with accelkit.patch(model, generating(model)):
        found = first_layer(model, **inputs)
    asked = keep if isinstance(keep, int) else 300 - int(keep.min())
    body = 300 - max(ROWS, asked)
    torch.testing.assert_close(found[:, :body], sparse[:, :body], **CLOSE)
    torch.testing.assert_close(found[:, body:], dense[:, body:], **CLOSE)
    assert not torch.allclose(found[:, :body], dense[:, :body], atol=1e-3)
    assert not torch.allclose(found[:, body:], sparse[:, body:], atol=1e-3)


@pytest.mark.parametrize("call", [{}, {"labels": True}, {"output_hidden_states": True}])
def test_calls_that_may_read_every_row_are_dense_and_say_so(llama, ids, call):
    call = {k: ids if k == "labels" else v for k, v in call.items()}
    dense = llama(ids, **call).logits
    with accelkit.patch(llama, generating(llama)) as handle:
        with pytest.warns(DenseFallbackWarning, match="every row may be asked for"):
            assert torch.equal(llama(ids, **call).logits, dense)
        assert torch.equal(llama.model(ids).last_hidden_state, llama.model(ids)[0])
        report = handle.report()
        assert report.sparse_calls == 0
        assert set(report.dense) == {ANY_ROW}
        llama(ids, logits_to_keep=1)
        assert handle.report().sparse_calls == 1


def test_compiled_code_is_dense(llama, ids):
    dense = llama(ids, use_cache=True, logits_to_keep=1).logits
    with accelkit.patch(llama, generating(llama)) as handle:
        compiled = torch.compile(llama, fullgraph=True, backend="aot_eager")
        with pytest.warns(DenseFallbackWarning, match="compiled"):
            found = compiled(ids, use_cache=True, logits_to_keep=1).logits
        assert set(handle.report().dense) == {ANY_ROW}
    torch.testing.assert_close(found, dense, **CLOSE)
    torch._dynamo.reset()


def test_chunks_end_in_dense_rows_and_short_ones_are_dense(llama, ids):
    cache = DynamicCache(config=llama.config)
    with accelkit.patch(llama, generating(llama)) as handle:
        for part in (ids[:, :200], ids[:, 200 : 200 + ROWS], ids[:, 200 + ROWS :]):
            llama(part, past_key_values=cache, logits_to_keep=1)
        seen = handle.report()
    assert seen.sites[FIRST].sparse == 2
    assert seen.sites[FIRST].dense == {LAST_ROWS: 1}
    assert seen.dense[TRIMMED] == 3


def test_a_later_chunk_runs_the_rules_at_its_place(llama, ids):
    def second(plan):
        cache = DynamicCache(config=llama.config)
        llama(ids[:, :100], past_key_values=cache, logits_to_keep=1)
        with accelkit.patch(llama, plan):
            return first_layer(
                llama, input_ids=ids[:, 100:], past_key_values=cache, logits_to_keep=1
            )

    found, sparse = second(generating(llama)), second(plan_of(llama, NARROW))
    still = plan_of(llama, NARROW).model_copy(update={"limits": Limits(min_length=1000)})
    dense = second(still)
    body = 200 - ROWS
    torch.testing.assert_close(found[:, :body], sparse[:, :body], **CLOSE)
    torch.testing.assert_close(found[:, body:], dense[:, body:], **CLOSE)


def test_generate(llama, ids):
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with accelkit.patch(llama, generating(llama)) as handle:
        assert llama.generate(ids, **settings).shape == (2, 304)
        assert handle.report().sites[FIRST].sparse == 1


def test_density_counts_the_dense_rows(llama, ids):
    def density(plan):
        with accelkit.patch(llama, plan) as handle, handle.measuring():
            llama(ids, logits_to_keep=1)
            return handle.report().sites[FIRST].density

    few = density(generating(llama, dense_rows=1))
    body, whole = (n * (n + 1) / 2 for n in (300 - ROWS, 300))
    with accelkit.patch(llama, plan_of(llama, NARROW)) as handle, handle.measuring():
        llama(ids[:, : 300 - ROWS])
        alone = handle.report().sites[FIRST].density
    found = density(generating(llama))
    assert found == pytest.approx(1 - body / whole * (1 - alone), rel=1e-5)
    assert few < found < 1


def test_capture_shows_the_rows_before_the_dense_ones(llama, ids):
    seen = []

    def see(call, dense) -> None:
        seen.append((call.n_q, call.n_k, dense.out.shape[2], dense.lse.shape[2]))
        if call.site.path == FIRST:
            dense.out.add_(1.0)

    changed = capture(llama, ids.numpy(), see, dense_rows=ROWS)
    assert seen == [(260, 260, 260, 260)] * 2
    same = capture(llama, ids.numpy(), lambda call, dense: None)
    assert not torch.allclose(changed[:, :260], same[:, :260], atol=1e-2)


def test_dense_rows_need_to_know_what_is_asked_for(llama):
    text = (
        generating(llama).to_json().replace('"trim_last_layer": true', '"trim_last_layer": false')
    )
    with pytest.raises(PlanError, match="dense_rows is 40 without trim_last_layer"):
        Plan.from_json(text)
