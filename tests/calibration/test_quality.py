"""The end-to-end check on tiny models: zero for dense, errors by task, weights by noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_cases import byte_tokenizer, tiny_model

from accelkit.calibration.capture import capture
from accelkit.calibration.evaluation import quality, tasks
from accelkit.kernels.index import Partial
from accelkit.patches import method
from accelkit.patches.patch import patch, plan_of

pytestmark = pytest.mark.usefixtures("probes")


@pytest.fixture(scope="module")
def sample():
    return tasks.make("needle", 512, 3, tokenizer=byte_tokenizer())


def test_a_plan_that_sees_everything_has_no_error(sample) -> None:
    model = tiny_model()
    dense = quality.reference(model, sample)
    everything = plan_of(model, method.load("probe_window")(blocks=8))
    row = quality.check(model, everything, dense)
    assert row["error"] < 1e-5
    assert abs(row["kl"]) < 1e-6
    assert row["nats"] == pytest.approx(row["dense_nats"], abs=1e-5)
    assert row["right"] == row["dense_right"]
    assert row["asked"] == len(sample.answers)


def test_a_narrow_window_has_one(sample) -> None:
    model = tiny_model()
    dense = quality.reference(model, sample)
    narrow = quality.check(model, plan_of(model, method.load("probe_window")(blocks=1)), dense)
    wide = quality.check(model, plan_of(model, method.load("probe_window")(blocks=6)), dense)
    assert narrow["error"] > wide["error"] > 0
    assert not hasattr(model.model.layers[0].self_attn, "accelkit_site")


@pytest.mark.parametrize("task", ["needle", "text"])
def test_perplexity_is_that_of_the_tokens_that_follow(task) -> None:
    sample = tasks.make(task, 512, 3, tokenizer=byte_tokenizer())
    model = tiny_model()
    rows = tasks.scored_rows(sample)
    ids = torch.from_numpy(sample.ids).long()[None]
    targets = ids[0, torch.from_numpy(rows + 1)]

    def nats() -> float:
        with torch.inference_mode():
            logits = model(ids).logits[0, torch.from_numpy(rows)]
        return float(torch.nn.functional.cross_entropy(logits, targets))

    plan = plan_of(model, method.load("probe_window")(blocks=1))
    row = quality.check(model, plan, quality.reference(model, sample))
    assert row["dense_nats"] == pytest.approx(nats(), rel=1e-5)
    with patch(model, plan):
        assert row["nats"] == pytest.approx(nats(), rel=1e-5)
    assert row["nats"] != row["dense_nats"]
    (found,) = quality.by_task([row]).values()
    assert found["perplexity"] == pytest.approx(np.exp(row["nats"]))
    assert found["dense_perplexity"] == pytest.approx(np.exp(row["dense_nats"]))
    old = {k: v for k, v in row.items() if "nats" not in k}
    assert quality.by_task([old])[f"{task}@512"]["perplexity"] is None


def test_a_trimmed_check_reads_the_same(sample) -> None:
    """The last layer is left out for rows that are not scored, on both sides."""
    text = tasks.make("text", 512, 3, tokenizer=byte_tokenizer())
    for one in (text, sample):
        model = tiny_model()
        plan = plan_of(model, method.load("probe_window")(blocks=2))
        _, last = plan.sites
        sites = {**plan.sites, last: plan.sites[last].model_copy(update={"rules": ()})}
        plan = plan.model_copy(update={"sites": sites})
        whole = quality.check(model, plan, quality.reference(model, one))
        plan = plan.model_copy(update={"trim_last_layer": True})
        bare = {p: s.model_copy(update={"rules": ()}) for p, s in plan.sites.items()}
        dense = quality.reference(model, one, plan.model_copy(update={"sites": bare}))
        row = quality.check(model, plan, dense)
        if one is sample:
            assert row["error"] == pytest.approx(whole["error"], rel=1e-4)
        else:  # fewer rows, so that there is something to leave out
            assert len(dense.rows) * 8 < 512 < len(quality.scored_rows(text)) * 8
            states = quality.forward(model, one.ids)[0, torch.from_numpy(dense.rows)]
            assert torch.allclose(dense.hidden, states, atol=1e-5)
            few = quality.reference(
                model, one, plan.model_copy(update={"sites": bare, "dense_rows": 16})
            )
            assert len(few.rows) == 15  # with them, no more rows are dense than for a single one
        assert row["error"] > 0


def test_the_dense_side_of_further_prompts_runs_where_something_is_wrong(sample) -> None:
    model, seen = tiny_model(), []
    plan = plan_of(model, method.load("probe_window")(blocks=8))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(quality, "_answered", lambda *a: seen.append(a) or [True] * len(sample.answers))
        right = quality.answers(model, plan, None, lambda: sample)
        assert (len(seen), right["dense_right"], right["lost_answers"]) == (1, None, [])
        given = [[True, False, True, False], [True, True, True, False]]
        m.setattr(quality, "_answered", lambda *a: given.pop(0))
        wrong = quality.answers(model, plan, None, lambda: sample)
    assert (wrong["right"], wrong["dense_right"], wrong["lost_answers"]) == (2, 3, [1])
    row = {"task": "needle", "tokens": 512, "error": 0.01, "kl": 0.0, "asked": 4}
    rows = [{**row, "right": 4, "dense_right": 4}, {**wrong, "asked": 4}, {**right, "asked": 4}]
    found = quality.by_task(rows)["needle@512"]
    assert (found["prompts"], found["asked"], found["lost"], found["error"]) == (3, 12, 1, 0.01)


def test_worst_task_decides() -> None:
    row = {"tokens": 512, "kl": 0.0, "right": 0, "dense_right": 0, "asked": 0}
    good, bad = {"task": "a", "error": 0.01, **row}, {"task": "b", "error": 0.03, **row}
    assert quality.holds(quality.by_task([good]), 0.02)
    assert not quality.holds(quality.by_task([good, bad]), 0.02)


def test_text_and_answers_spread_apart() -> None:
    """A task with one prompt gets the margin of its own kind, where that is known."""
    row = {"tokens": 512, "kl": 0.0, "right": 9, "dense_right": 9}
    text = [{**row, "task": "text", "asked": 0, "error": e} for e in (0.002, 0.01)]
    needles = [{**row, "task": "needle", "asked": 9, "error": e} for e in (0.01, 0.011)]
    other = {**row, "task": "variables", "asked": 9, "error": 0.015}
    found = quality.by_task([*text, *needles, other])
    few, many = quality.margin(needles), quality.margin(text)
    assert many > 5 * few
    assert found["variables@512"]["bound"] == pytest.approx(0.015 * few)
    assert found["text@512"]["bound"] == pytest.approx(0.006 * many)
    alone = quality.by_task([*text, other])  # nothing else tells
    assert alone["variables@512"]["bound"] == pytest.approx(0.015 * many)


def test_every_prompt_decides_and_their_spread() -> None:
    """Errors e^±x of a task lie √2·x apart from each other: 1.645 of that is the margin."""
    row = {"task": "a", "tokens": 512, "kl": 0.0, "right": 0, "dense_right": 0, "asked": 0}
    even = [{**row, "error": 0.0199}] * 2
    assert quality.holds(quality.by_task(even), 0.02)
    spread = [{**row, "error": 0.01 * math.exp(x)} for x in (0.3, -0.3)]
    assert quality.margin(spread) == pytest.approx(math.exp(1.645 * 0.3 * 2**0.5))
    found = quality.by_task(spread)["a@512"]
    assert found["worst"] == pytest.approx(0.01 * math.exp(0.3))
    assert found["bound"] == pytest.approx(found["error"] * quality.margin(spread))
    # Tasks with a single prompt get the margin of the others.
    other = {**row, "task": "b", "error": 0.015}
    assert not quality.holds(quality.by_task([*spread, other]), 0.02)
    assert quality.holds(quality.by_task([other]), 0.02)
    # Those with several have their own, however far the prompts of another lie apart.
    steady = [{**row, "task": "b", "error": 0.0199}] * 2
    tasks = quality.by_task([*steady, *spread])
    assert tasks["b@512"]["bound"] == pytest.approx(0.0199)
    assert tasks["a@512"]["bound"] == found["bound"]


def test_lost_answers_count() -> None:
    row = {"task": "a", "tokens": 512, "kl": 0.0, "error": 0.0, "asked": 100, "dense_right": 100}
    assert quality.holds(quality.by_task([{**row, "right": 99}]), 0.02)
    assert not quality.holds(quality.by_task([{**row, "right": 98}]), 0.02)


def test_a_budget_is_not_passed_by_a_little() -> None:
    row = {"task": "a", "tokens": 512, "kl": 0.0, "right": 0, "dense_right": 0, "asked": 0}
    assert quality.holds(quality.by_task([{**row, "error": 0.02}]), 0.02)
    assert not quality.holds(quality.by_task([{**row, "error": 0.0201}]), 0.02)


def test_right_answers_are_those_of_the_logits(sample) -> None:
    model = tiny_model()
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.ids.astype(np.int64))[None]).logits[0]
    right = tasks.count_right(sample, logits.argmax(-1).numpy())
    assert quality.reference(model, sample).right == right


def test_weights_follow_what_a_head_does(sample) -> None:
    model = tiny_model()
    site = "model.layers.0.self_attn"
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight.data[:, :16] = 0.0  # nobody listens to head 0
    attention.o_proj.weight.data[:, 16:32] *= 30.0

    def show(copies, see):
        ids = np.repeat(sample.ids[None, :256], copies, 0)
        return capture(model, ids, see, lambda path: path == site)[:, 100:200]

    found = quality.site_weights(show, {site: [[0], [1], [2], [3]]})[site]
    assert found[0] < 1e-4
    assert found[1] > 5 * found[2] > 0
    again = quality.site_weights(show, {site: [[0], [1], [2], [3]]})[site]
    assert again == found
    exact = quality.site_weights(show, {site: [[0], [1], [2], [3]]}, exact=True)[site]
    assert exact == pytest.approx(found, rel=1e-3, abs=1e-6)
    grouped = quality.site_weights(show, {site: [[0, 1], [2, 3]]})[site]
    assert grouped[0] == pytest.approx(found[1] / 2**0.5, rel=0.05)


def test_weights_of_several_sites_share_a_forward(sample) -> None:
    model = tiny_model()
    sites = [f"model.layers.{n}.self_attn" for n in range(2)]
    groups = {sites[0]: [[0], [1, 2], [3]], sites[1]: [[0, 1], [2, 3]]}

    def show_at(some):
        def show(copies, see):
            ids = np.repeat(sample.ids[None, :256], copies, 0)
            return capture(model, ids, see, lambda path: path in some)[:, 100:200]

        return show

    found = quality.site_weights(show_at(sites), groups, lambda _: quality.faintest)
    for site in sites:
        one = quality.site_weights(
            show_at([site]), {site: groups[site]}, lambda _: quality.faintest
        )
        assert found[site] == pytest.approx(one[site], rel=1e-3)


def test_faintest_leaves_out_what_is_looked_at_least() -> None:
    """Values that mark their keys: each row of the change lacks some keys, none that weigh, and the
    others grow by what those had.
    """
    n, seen = 128, []

    def see(call, dense) -> None:
        marks = torch.eye(n)[None, None].expand(1, call.k.shape[1], -1, -1)
        call = replace(call, v=marks)
        k = call.k[:, call.kv_of_head]
        hidden = torch.ones(n, n).triu(1).bool()
        p = (call.q @ k.mT * call.scale).masked_fill(hidden, -torch.inf).softmax(-1)
        gap = quality.faintest(call, Partial(p, dense.lse))
        kept = gap + p[0]
        assert torch.allclose(kept.sum(-1), torch.ones(()), atol=1e-4)
        gone = (p[0] > 1e-6) & (kept.abs() < 1e-7)
        rows, keys = quality.FAINT_CELL
        lost = (p[0] * gone).reshape(-1, n // rows, rows, n).sum(-1).mean(-1)
        assert 0 < lost.max() <= quality.DROPPED + 1e-5
        cells = p[0].reshape(-1, n // rows, rows, n // keys, keys).sum((2, 4))
        out = gone.reshape(-1, n // rows, rows, n // keys, keys).any(4).any(2)
        for head, (mass, left_out) in enumerate(zip(cells, out, strict=True)):
            for tile in range(n // rows):
                here = mass[tile]
                some, rest = here[left_out[tile]], here[~left_out[tile] & (here > 1e-4)]
                assert not len(some) or some.max() <= rest.min(), head
        seen.append(call.site.path)

    capture(tiny_model(), np.arange(n) % 250, see)
    assert len(seen) == 2


def test_rounding_does_not_drown_a_weight() -> None:
    """A model that adds a head's outputs up with factors, in bfloat16: what one weak head does is
    near the rounding of the sum, and is found all the same.
    """
    factors = torch.tensor([1.0, 0.05])
    values = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))

    def show(dtype: torch.dtype) -> quality.Show:
        def run(copies: int, see: Any) -> torch.Tensor:
            out = values.to(dtype).expand(copies, -1, -1, -1).clone()
            see(None, Partial(out, torch.zeros(copies, 2, 64)))
            return (out * factors.to(dtype)[:, None, None]).sum(1) + 0.5

        return run

    groups = {"site": [[0], [1]]}
    true = quality.site_weights(show(torch.float32), groups)
    found = quality.site_weights(show(torch.bfloat16), groups)
    assert found["site"] == pytest.approx(true["site"], rel=0.2)


def test_capture_shows_dense_attention(sample) -> None:
    model, seen = tiny_model(), []

    def see(call, dense) -> None:
        k = call.k[:, call.kv_of_head]
        s = (call.q @ k.mT * call.scale).masked_fill(
            torch.ones(512, 512).triu(1).bool(), -torch.inf
        )
        assert torch.allclose(s.logsumexp(-1), dense.lse, atol=1e-4)
        seen.append(call.site.path)

    states = capture(model, sample.ids, see)
    with torch.no_grad():
        ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
        assert torch.allclose(states, model.model(ids).last_hidden_state, atol=1e-4)
    assert seen == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
