"""The long-context tasks: exact lengths, true answers, any tokenizer; and the shipped model."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.corpus import source_corpus

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama"
QUESTIONS = tasks.TASKS[:-1]
FILLER = "".join(
    f"def f{i}(first, second={i}):\n    total = first * second\n    return total + {i * i}\n\n"
    for i in range(3000)
)


def text_of(sample: tasks.Sample, start: int = 1, end: int | None = None) -> str:
    """The text of a sample of the byte tokenizer, without its beginning-of-text token."""
    return bytes(sample.ids[start:end].astype(np.uint8)).decode()


def solve(task: str, context: str, question: str) -> str:
    """Answer a question from the context alone, by reading it."""
    if task == "common_words":
        votes = Counter(re.findall(rf"^{question}=(\w+)$", context, re.M))
        (first, most), (_, next_most) = votes.most_common(2)
        assert most >= 2 * next_most
        return "=" + first
    answer = ""
    while True:
        (value,) = re.findall(rf"^{question}=(\w+)$", context, re.M)
        answer += "=" + value
        if value.isdigit():
            return answer
        question = value


class WordTokenizer:
    """Tokens of several characters and no beginning-of-text token."""

    bos_token_id = None

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for word in re.findall(r"\s*\w{1,3}|\s+|\W", text):
            if word not in self._ids:
                self._ids[word] = len(self.texts)
                self.texts.append(word)
        return [self._ids[word] for word in re.findall(r"\s*\w{1,3}|\s+|\W", text)]


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [256, 513, 4096, 32768])
def test_length_is_exact(task: str, length: int) -> None:
    sample = tasks.make(task, length, seed=3, filler=FILLER)
    assert sample.ids.shape == (length,)
    assert sample.ids.dtype == np.int32
    assert sample.ids[0] == tasks.ByteTokenizer.bos_token_id
    assert bool(sample.answers) == (task != "text")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_same_seed_same_prompt(task: str) -> None:
    first, again, other = (tasks.make(task, 2048, seed, FILLER) for seed in (7, 7, 8))
    assert (first.ids == again.ids).all()
    assert first.answers == again.answers
    assert (first.ids != other.ids).any()


@pytest.mark.parametrize("task", QUESTIONS)
@pytest.mark.parametrize("length", [256, 2048, 16384])
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_follow_from_the_context(task: str, length: int, seed: int) -> None:
    sample = tasks.make(task, length, seed, FILLER)
    context, _, asked = text_of(sample).partition("\n---\n")
    assert len(asked.splitlines()) == len(sample.answers)
    for line, (start, end) in zip(asked.splitlines(), sample.answers, strict=True):
        question, answer = line.split("=")[0], text_of(sample, start, end)
        assert line == question + answer
        assert answer == solve(task, context, question)


@pytest.mark.parametrize("task", QUESTIONS)
def test_questions_are_asked_once_and_many(task: str) -> None:
    sample = tasks.make(task, 8192, 5, FILLER)
    asked = text_of(sample).partition("\n---\n")[2]
    questions = [line.split("=")[0] for line in asked.splitlines()]
    assert len(set(questions)) == len(questions) >= 16


@pytest.mark.parametrize("task", tasks.TASKS)
def test_any_tokenizer(task: str) -> None:
    tokenizer = WordTokenizer()
    sample = tasks.make(task, 1500, 2, FILLER, tokenizer)
    assert sample.ids.shape == (1500,)
    context, _, asked = "".join(tokenizer.texts[i] for i in sample.ids).partition("\n---\n")
    for line, (start, end) in zip(asked.splitlines(), sample.answers, strict=True):
        answer = "".join(tokenizer.texts[i] for i in sample.ids[start:end])
        assert answer == solve(task, context, line.split("=")[0])


def test_short_prompts_fit_a_trained_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, show_progress=False)
    trained.train_from_iterator([source_corpus(held_out=True)], trainer)

    class Trained:
        bos_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return trained.encode(text).ids

    for task in tasks.TASKS:
        for length, seed in ((256, 0), (301, 1), (777, 2), (2000, 3)):
            sample = tasks.make(task, length, seed, tokenizer=Trained())
            assert sample.ids.shape == (length,)
            for start, end in sample.answers:
                assert trained.decode(sample.ids[start:end].tolist()).startswith("=")


def test_only_filler_is_trimmed() -> None:
    segments = [
        tasks.Segment("head ", "given"),
        tasks.Segment("0123456789", "filler"),
        tasks.Segment("=42", "answer"),
        tasks.Segment("abcde", "filler"),
    ]
    tokenizer = tasks.ByteTokenizer()
    pieces, total = tasks._tokenise(segments, tokenizer)

    def joined(length: int) -> tasks.Sample:
        return tasks._join(pieces, segments, tokenizer, length, "")

    assert text_of(joined(total)) == "head 0123456789=42abcde"
    short = joined(18)
    assert text_of(short) == "head 456789=42cde"
    assert [text_of(short, *span) for span in short.answers] == ["=42"]
    for length in (8, 25):
        with pytest.raises(ValueError, match="filler"):
            joined(length)


def test_count_right() -> None:
    sample = tasks.make("key_value", 1024, 0, FILLER)
    predicted = np.roll(sample.ids, -1)
    assert tasks.count_right(sample, predicted) == len(sample.answers)
    predicted[sample.answers[0][0] - 1] += 1
    predicted[sample.answers[1][1] - 2] += 1
    predicted[sample.answers[2][1] - 1] += 1  # the token after the answer
    assert tasks.count_right(sample, predicted) == len(sample.answers) - 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="unknown task"):
        tasks.make("chess", 1024, 0, FILLER)
    with pytest.raises(ValueError, match="at least"):
        tasks.make("needle", 10, 0, FILLER)
    with pytest.raises(ValueError, match="empty"):
        tasks.make("text", 1024, 0, "")


def test_short_filler_is_repeated() -> None:
    assert text_of(tasks.make("text", 4096, 0, "one line\n")).count("one line") > 400


def test_source_corpus_is_split() -> None:
    everything = source_corpus()
    held_out, others = source_corpus(held_out=True), source_corpus(held_out=False)
    assert everything.isascii()
    assert 0 < len(held_out) < len(others) / 4
    assert len(held_out) + len(others) == len(everything) or len(everything) == 16_000_000
    assert source_corpus() is everything


def test_shipped_tokenizer_is_the_byte_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    text = "def f(x):\n\treturn 'é∞ 😀'  # a , b .\x00\r\n"
    ids = tokenizer.encode(text)
    assert ids == tasks.ByteTokenizer().encode(text).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for task in tasks.TASKS:
        ours = tasks.make(task, 700, 3, FILLER)
        theirs = tasks.make(task, 700, 3, FILLER, tokenizer)
        assert (ours.ids == theirs.ids).all()
        assert ours.answers == theirs.answers


@pytest.mark.parametrize("task", QUESTIONS)
def test_shipped_model_answers(task: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    corpus = source_corpus(held_out=True)
    right = asked = 0
    for seed in range(4):
        sample = tasks.make(task, 2048, seed, corpus)
        with torch.inference_mode():
            logits = model(torch.from_numpy(sample.ids).long()[None]).logits[0]
        right += tasks.count_right(sample, logits.argmax(-1).numpy())
        asked += len(sample.answers)
    # What the model's card promises of it, or quality that is lost could not be seen.
    assert asked >= 32
    assert right >= (0.98 if task in ("needle", "key_value") else 0.95) * asked
