"""Speed is a ratio of medians taken in one process, against two dense paths."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from tiny_cases import byte_tokenizer

from accelkit.calibration import results
from accelkit.calibration.bench import prefill as speed
from accelkit.calibration.bench.prefill import Measurement, Timing, bench
from accelkit.calibration.compare.answers import compare, demo_length, demo_prompt, text_prompt
from accelkit.errors import GateFailedError, InvalidInputError, NothingPatchedError


def measured(**ms: tuple[float, ...]) -> Measurement:
    sparse = Timing(ms.pop("sparse"))
    paths = {name: Timing(times) for name, times in ms.items()} | {"broken": Timing(error="no")}
    return Measurement(512, 1, "random tokens", paths, sparse, 0.5, 2, 2, {})


def test_ratios_are_against_the_own_and_the_best_path():
    m = measured(own=(8.0, 9.0, 100.0), fast=(6.0,), sparse=(3.0,))
    assert m.best_dense == "fast"
    assert (m.ratio("own"), m.ratio("fast"), m.ratio("broken")) == (3.0, 2.0, None)
    row = m.as_dict()
    assert (row["speedup_vs_own"], row["speedup_vs_best_dense"]) == (3.0, 2.0)
    assert row["median_ms"] == {"own": 9.0, "fast": 6.0, "broken": None, "sparse": 3.0}
    speed.gate([m], 1.9)
    with pytest.raises(GateFailedError, match=r"'fast', wanted 2\.1"):
        speed.gate([m], 2.1)


def test_measures_dense_on_the_unpatched_model(model, tokenizer, plan):
    said = []
    (m,) = bench(model, plan, tokenizer, lengths=(600,), repeat=3, progress=said.append)
    assert len(m.paths["own"].ms) == len(m.sparse.ms) == 3
    assert m.prompt == "text task, needle task, multi_key task"
    assert 0 < m.density < 1
    # The first run counts densities; dense runs never reach the handle.
    assert m.sparse_calls == m.calls == 2
    assert said == ["600 tokens: own", "600 tokens: sparse"] * 3
    console = Console(width=120)
    with console.capture() as capture:
        console.print(speed.table([m]))
    assert "× best dense" in capture.get()


def test_an_eager_model_is_also_held_against_sdpa(model, plan):
    model.set_attn_implementation("eager")
    try:
        (m,) = bench(model, plan, lengths=(600,), repeat=1, warmup=0)
        assert set(m.paths) == {"own", "sdpa"}
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")
    assert m.prompt == "random tokens"


def test_a_path_that_cannot_run_is_told(model, plan, monkeypatch):
    monkeypatch.setattr(
        speed, "dense_paths", lambda _: {"own": "sdpa", "sdpa cudnn": "no GPU here"}
    )
    (m,) = bench(model, plan, lengths=(600,), repeat=1, warmup=0)
    assert "Error" in m.paths["sdpa cudnn"].error
    assert m.best_dense == "own"


def test_too_short_or_wrong(model, plan):
    with pytest.raises(NothingPatchedError, match="begins at 512"):
        bench(model, plan, lengths=(300,), repeat=1, warmup=0)
    with pytest.raises(InvalidInputError, match="--repeat"):
        bench(model, plan, lengths=(600,), repeat=0)


def test_preview_runs_nothing(model, plan, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    rows = speed.preview(model, plan, (100, 1000))
    assert [r["heads"] for r in rows] == [{"dense": 8}, {"dense": 2, "probe_window": 6}]


def test_results_carry_their_machine(model, tmp_path):
    row = results.about(model, "m", "p")
    assert row["dtype"] == "float32"
    assert row["components"]["text"]["q_heads"] == 4
    assert torch.__version__.startswith(row["environment"]["torch"])  # maybe with a build behind it
    kept = tmp_path / "a" / "b.jsonl"
    results.append_jsonl(kept, [row])
    results.append_jsonl(kept, [row])
    assert [json.loads(x) for x in kept.read_text().splitlines()] == [row, row]
    with pytest.raises(InvalidInputError, match="cannot be written"):
        results.append_jsonl(tmp_path, [row])


# -- one prompt on both sides ----------------------------------------------------------------------


def test_demo_prompt_ends_before_an_answer(tokenizer):
    ids, expected = demo_prompt(tokenizer, 700)
    assert len(ids) >= 700
    text = tokenizer.decode(ids, skip_special_tokens=True)
    key = text.rsplit("\n", 1)[1]
    assert f"{key}{expected}\n" in text
    with pytest.raises(InvalidInputError, match="--length"):
        demo_prompt(tokenizer, 10)


def test_prompts_of_chat_models_are_chats(tokenizer):
    assert text_prompt(tokenizer, "hi") == [256, *b"hi"]
    chat = byte_tokenizer()
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert bytes(text_prompt(chat, "hi")) == b"<user>hi"


def test_compare_counts_equal_tokens(model, tokenizer, plan):
    ids, expected = demo_prompt(tokenizer, 600)
    result = compare(model, tokenizer, plan, ids, expected=expected, max_new_tokens=5, repeat=2)
    same = sum(a == b for a, b in zip(result.dense.tokens, result.sparse.tokens, strict=True))
    assert result.equal_tokens == same / 5
    assert result.speedup == result.dense.first_token_ms / result.sparse.first_token_ms
    assert result.sparse.tokens_per_second > 0
    assert result.note is None
    assert result.counts["sparse_calls"] > 0


def test_compare_says_when_the_switch_is_off(model, tokenizer, plan, monkeypatch):
    monkeypatch.setenv("ACCELKIT_DISABLE", "1")
    ids, _ = demo_prompt(tokenizer, 600)
    result = compare(model, tokenizer, plan, ids, max_new_tokens=2, repeat=1, dense=False)
    assert "ACCELKIT_DISABLE" in result.note
    assert result.density is None
    assert result.dense is None


def test_demo_stays_within_the_plan(plan):
    assert demo_length(plan) == 4096 - 64
    short = plan.limits.model_copy(update={"max_length": 520})
    bare = plan.model_copy(update={"limits": short, "sites": {}})
    assert demo_length(bare) == 512
