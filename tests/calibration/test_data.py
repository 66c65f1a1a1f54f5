"""Prompts to calibrate on: every form of data, and clear errors for what cannot be used."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_cases import byte_tokenizer

from accelkit.calibration import data
from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.errors import InvalidInputError

TEXT = "the quick brown fox jumps over the lazy dog\n" * 100


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def gather(found, tokenizer=None, lengths=(512, 1024), preset="fast", seed=0) -> data.Inputs:
    return data.gather(found, tokenizer, lengths, preset, seed)


def test_built_in(tokenizer) -> None:
    found = gather(None, tokenizer)
    assert {len(s.ids) for s in found.measure} == {512, 1024}
    assert found.longest == 1024
    assert found.shortest == 512
    ids = {s.ids.tobytes() for s in found.measure} | {s.ids.tobytes() for s in found.check}
    assert len(ids) == len(found.measure) + len(found.check)
    again = gather(None, tokenizer)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(found.check, again.check, strict=True))
    other = gather(None, tokenizer, seed=1)
    assert not np.array_equal(found.check[0].ids, other.check[0].ids)
    assert len(found.more("needle", 512, 1).ids) == 512


@pytest.mark.parametrize(("longest", "prompts"), [(512, 4), (2048, 4), (4096, 2), (8192, 1)])
def test_short_prompts_ask_as_much_of_the_task_that_fails_first(tokenizer, longest, prompts):
    found = gather(None, tokenizer, (longest,), "balanced").check
    some = [s for s in found if s.task == "variables"]
    assert len(some) == prompts and len({s.ids.tobytes() for s in some}) == prompts
    assert sum(s.task == "multi_key" for s in found) == 1


def test_one_text_is_checked_where_the_last_rows_stay_dense(tokenizer) -> None:
    """The other prompts are those of a plan for every row."""
    every = gather(None, tokenizer, (512,), "balanced").check
    some = data.gather(None, tokenizer, (512,), "balanced", 0, every_row=False).check
    assert sum(s.task == "text" for s in every) > 1
    assert sum(s.task == "text" for s in some) == 1
    rest = [[s.ids.tobytes() for s in found if s.task != "text"] for found in (every, some)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("kind", ["tensor", "row", "dict", "array", "function"])
def test_token_ids(kind: str) -> None:
    ids = torch.arange(600) % 250
    one = {
        "tensor": ids,
        "row": ids[None],
        "dict": {"input_ids": ids[None]},
        "array": ids.numpy(),
        "function": ids,
    }[kind]
    found = gather((lambda: [one, one, one]) if kind == "function" else [one, one, one])
    assert [len(s.ids) for s in found.measure] == [600, 600, 512]
    assert len(found.check) == 1
    assert found.measure[0].ids.dtype == np.int32


def test_one_long_text_is_cut(tokenizer, tmp_path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    for source in (TEXT, [TEXT], file, str(file)):
        found = gather(source, tokenizer)
        assert found.longest == 1024
        assert found.check


def test_json_lines(tokenizer, tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": TEXT[n:]}) + "\n" for n in range(4)))
    assert gather(file, tokenizer).longest == 1024


def test_chats(tokenizer) -> None:
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": TEXT}]
    with pytest.raises(InvalidInputError, match="chat template"):
        gather([chat, chat], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert gather([chat, chat], tokenizer).longest == 1024


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "empty"),
        (7, "expected a path"),
        ([torch.arange(100)] * 2, "100 tokens"),
        ([torch.arange(600)], "needs two"),
        ([torch.rand(600)] * 2, "expected integers"),
        ([{"ids": [1]}], "input_ids"),
        (["short"], "tokens in all"),
        ("no/such/file.txt", "cannot be read"),
    ],
)
def test_what_cannot_be_used(found, words: str, tokenizer) -> None:
    with pytest.raises(InvalidInputError, match=words):
        gather(found, tokenizer)


def test_bad_files(tokenizer, tmp_path) -> None:
    empty, broken = tmp_path / "a.txt", tmp_path / "b.jsonl"
    empty.write_text(" \n")
    broken.write_text('{"text": "a"}\n{"tex": 1}\n')
    with pytest.raises(InvalidInputError, match="is empty"):
        gather(empty, tokenizer)
    with pytest.raises(InvalidInputError, match="line 2"):
        gather(broken, tokenizer)


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        gather([TEXT])


def test_a_tokenizer_in_the_place_of_data_is_told(tokenizer) -> None:
    with pytest.raises(InvalidInputError, match="tokenizer=…"):
        gather(tokenizer)
    with pytest.raises(InvalidInputError, match="tokenizer is 'my-model'"):
        gather([TEXT], "my-model")


def test_scored_rows() -> None:
    rows = tasks.scored_rows(Sample("needle", np.zeros(20, np.int32), ((5, 7), (10, 12))))
    assert rows.tolist() == [4, 5, 9, 10]
    assert tasks.scored_rows(Sample("text", np.zeros(20, np.int32), ())).tolist() == list(
        range(10, 19)
    )


def test_the_whole_question_part_is_judged() -> None:
    """Rows between the answers too: what is looked up is handed on there."""
    sample = tasks.make("needle", 1024, 3, tokenizer=byte_tokenizer())
    rows, scored = tasks.judged_rows(sample), tasks.scored_rows(sample)
    assert set(scored) < set(rows)
    assert rows.tolist() == list(range(scored[0] - tasks.QUESTION, 1024))
    text = tasks.make("text", 1024, 3, tokenizer=byte_tokenizer())
    assert tasks.judged_rows(text).tolist() == tasks.scored_rows(text).tolist()
