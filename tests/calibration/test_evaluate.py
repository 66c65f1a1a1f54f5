"""Scores, their intervals, and what counts as sparse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rich.console import Console

from accelkit.calibration.evaluation import evaluate as quality
from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.evaluate import Score, Share, evaluate
from accelkit.errors import GateFailedError, InvalidInputError, NothingPatchedError


def test_interval_of_independent_answers_is_wilsons():
    # 8 of 10, one a prompt; the bounds are the textbook's.
    share = Share.of([1] * 8 + [0] * 2, [1] * 10)
    assert (share.right, share.asked, share.value) == (8, 10, 0.8)
    assert (share.low, share.high) == (
        pytest.approx(0.490, abs=0.02),
        pytest.approx(0.943, abs=0.02),
    )


def test_answers_of_one_prompt_count_for_less():
    alone = Share.of([1, 1, 0, 0] * 10, [1] * 40)
    grouped = Share.of([10, 10, 0, 0], [10] * 4)
    assert grouped.value == alone.value == 0.5
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_interval_at_the_ends():
    assert Share.of([5, 5], [5, 5]).high == 1.0
    assert 0 < Share.of([5, 5], [5, 5]).low < 1
    assert Share.of([0], [5]).low == 0.0
    assert Share.of([], []).asked == 0


def test_dense_alone_agrees_with_transformers(model, tokenizer):
    (score,) = evaluate(model, tokenizer, names=("text",), lengths=(512,), samples=1)
    sample = tasks.make(
        "text", 512, quality.FIRST_SEED, tasks.source_corpus(held_out=True), tokenizer
    )
    ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids.masked_fill(torch.arange(512) <= 256, -100)).loss
    assert score.dense_bits == pytest.approx(loss.item() / math.log(2), rel=1e-4)
    assert score.sparse is None
    assert score.tokens == 255


def test_both_sides_see_the_same_prompts(model, tokenizer, plan):
    scores = evaluate(model, tokenizer, plan, names=("needle", "text"), lengths=(600,), samples=2)
    needle, text = scores
    assert needle.dense.asked == needle.sparse.asked > 0
    assert needle.prompts == 2
    assert 0 <= needle.agreement <= 1
    assert text.divergence > 0
    assert text.drop is None
    console = Console(width=140)
    with console.capture() as capture:
        console.print(quality.table(scores))
    assert "needle" in capture.get()
    assert needle.as_dict()["dense"]["accuracy"] == needle.dense.value
    assert text.as_dict()["dense"] is None


def test_a_full_budget_agrees_wholly(model, tokenizer, plan):
    probe = plan.policies[1].methods[0].model_copy(update={"blocks": 99})
    whole = plan.policies[1].model_copy(update={"methods": (probe,)})
    full = plan.model_copy(update={"policies": (plan.policies[0], whole, whole)})
    (score,) = evaluate(model, tokenizer, full, names=("needle",), lengths=(600,), samples=1)
    assert score.agreement == 1.0
    assert score.divergence == pytest.approx(0, abs=1e-6)
    assert score.drop == 0


def test_as_many_answers_as_asked_for(model, tokenizer):
    (score,) = evaluate(
        model, tokenizer, names=("key_value",), lengths=(512,), samples=1, answers=30
    )
    assert score.dense.asked >= 30
    assert score.prompts > 1


def test_the_model_is_unpatched_afterwards(model, tokenizer, plan):
    before = model.config._attn_implementation
    evaluate(model, tokenizer, plan, names=("needle",), lengths=(600,), samples=1, dense=False)
    assert model.config._attn_implementation == before


def test_nothing_sparse_is_an_error(model, tokenizer, plan):
    with pytest.raises(NothingPatchedError, match="begins at 512"):
        evaluate(model, tokenizer, plan, names=("needle",), lengths=(300,), samples=1)


def test_a_length_that_the_plan_leaves_dense_says_so(model, tokenizer, plan):
    """Its sides are equal, which is no result."""
    size = {"names": ("needle",), "lengths": (300, 600), "samples": 1}
    below, above = evaluate(model, tokenizer, plan, **size)
    assert below.sparse_calls == 0 and below.as_dict()["sparse_calls"] == 0
    assert above.sparse_calls > 0
    console = Console(width=140)
    with console.capture() as capture:
        console.print(quality.table([below, above]))
    lines = [line for line in capture.get().splitlines() if "needle" in line]
    assert ["ran dense" in line for line in lines] == [True, False]


def test_wrong_wishes(model, tokenizer):
    with pytest.raises(InvalidInputError, match="riddles"):
        evaluate(model, tokenizer, names=("riddles",))
    with pytest.raises(InvalidInputError, match="at least"):
        evaluate(model, tokenizer, lengths=(10,))
    with pytest.raises(InvalidInputError, match="give a plan"):
        evaluate(model, tokenizer, dense=False)


def test_the_gate_names_the_worst_task():
    def score(task: str, right: int) -> Score:
        sides = Share.of([10], [10]), Share.of([right], [10])
        return Score(task, 512, 1, 50, *sides, 1.0, 1.0, 1.0, 0.0)

    scores = [score("needle", 9), score("variables", 7)]
    assert quality.worst_drop(scores, 30).task == "variables"
    with pytest.raises(GateFailedError, match=r"variables at 512 tokens lost 30\.0 points"):
        quality.worst_drop(scores, 5)
    with pytest.raises(InvalidInputError, match="--max-drop"):
        quality.worst_drop([], 5)
