"""Long-context tasks with known answers, used to calibrate and to score sparse attention.

Six kinds of prompt in the manner of the RULER benchmark, and plain text:

=================  ==============================================================================
``needle``         a few ``key=value`` lines hidden in source text; every key is asked
``multi_key``      many such lines; some of the keys are asked, the others distract
``multi_value``    a few keys with four numbered values each, hidden in four different places
``key_value``      one dense list of ``key=value`` lines; some of the keys are asked
``variables``      chains ``a=4821``, ``b=a``, ``c=b`` hidden in source text; the answer to ``c``
                   is the whole way back to the number, ``=b=a=4821``
``common_words``   a dense list of ``topic=word`` votes; the answer to a topic is the word that
                   was voted for most often (half of its votes, the runner-up has a tenth)
``text``           source text only, no questions
=================  ==============================================================================

A prompt ends with many questions, each followed by its answer, so one teacher-forced pass of a
model scores them all: an answer counts as right when every one of its tokens is the model's most
likely next token (`count_right`). No answer is stated in the question part before it is asked.

A prompt is first built as text `Segment` pieces (`build`), then turned into token ids of an exact
length by `encode`, which works with any Hugging Face tokenizer and trims only filler text. `make`
does both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from accelkit.calibration.evaluation.corpus import source_corpus as source_corpus
from accelkit.errors import InvalidInputError

TASKS = ("needle", "multi_key", "multi_value", "key_value", "variables", "common_words", "text")
"""Names of all the kinds of prompt; the last has no questions."""

MIN_LENGTH = 256
"""Shortest prompt that `make` builds, in tokens."""

QUESTION = 8
"""Tokens of a question, about."""

_HEADERS = {
    "needle": "# Remember the lines key=value.\n",
    "multi_key": "# Remember the lines key=value.\n",
    "multi_value": "# Remember the lines key=value.\n",
    "key_value": "# Remember the lines key=value.\n",
    "variables": "# Follow each variable to its number.\n",
    "common_words": "# Which word has most votes?\n",
    "text": "",
}
_QUESTIONS = "---\n"  # the line between the context and the questions
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
_LINE = 10  # characters of a line "abcd=1234\n"
_DENSE_FILLER = 0.06  # share of a dense list's characters left to filler, which `encode` may trim
_RIVALS = 5  # words that share the votes the winner does not get


class Segment(NamedTuple):
    """A piece of a prompt: its text and its kind, ``given``, ``filler`` or ``answer``."""

    text: str
    kind: str


@dataclass(frozen=True, eq=False)
class Sample:
    """A tokenised prompt.

    ids: int32 array of shape (length,), the prompt with its answers in place.
    answers: (start, end) positions in `ids`; tokens ``ids[start:end]`` are one answer.
    """

    task: str
    ids: np.ndarray
    answers: tuple[tuple[int, int], ...]


class ByteTokenizer:
    """One token per UTF-8 byte (id = byte value) after a beginning-of-text token, id 256."""

    bos_token_id = 256

    def encode(self, text: str, add_special_tokens: bool = True) -> np.ndarray:
        """Token ids of `text`, int32 of shape (tokens,)."""
        ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        return np.concatenate(([self.bos_token_id], ids)) if add_special_tokens else ids


def positions(model: Any) -> int:
    """The most tokens that a model has positions for."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found or 1 << 30


def need_positions(model: Any, tokens: int) -> None:
    """Refuse prompts that are longer than the model's positions reach.

    Raises:
        InvalidInputError: too long.
    """
    if tokens > (most := positions(model)):
        raise InvalidInputError(
            f"length {tokens}: the model has positions for {most} tokens; take shorter prompts"
        )


def make(
    task: str, length: int, seed: int, filler: str | None = None, tokenizer: Any = None
) -> Sample:
    """A prompt of exactly `length` tokens; the same arguments give the same prompt.

    filler: text from which random windows are taken; by default `source_corpus()`.
    tokenizer: a Hugging Face tokenizer, or anything with its ``encode(text, add_special_tokens)``
        and ``bos_token_id``; by default `ByteTokenizer`.

    Raises `ValueError` for an unknown task, a length below `MIN_LENGTH`, or a tokenizer that no
    text fits.
    """
    if length < MIN_LENGTH:
        raise ValueError(f"length must be at least {MIN_LENGTH} tokens, not {length}")
    filler = source_corpus() if filler is None else filler
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    size = length  # in characters; grows below if the tokenizer's tokens are longer
    for attempt in range(32):
        share = _DENSE_FILLER * (1 + attempt // 4)  # a list of few long lines needs more to trim
        segments = build(task, size, seed, filler, share)
        pieces, total = _tokenise(segments, tokenizer)
        spare = _spare(pieces, segments)
        if length <= total <= length + spare:
            return _join(pieces, segments, tokenizer, length, task)
        wanted = length + min(spare, share * length) / 2
        size = max(MIN_LENGTH, int(size * wanted / total))
    raise ValueError(f"no {task} prompt of {length} tokens found for this tokenizer")


def build(
    task: str, size: int, seed: int, filler: str, share: float = _DENSE_FILLER
) -> list[Segment]:
    """The text of a prompt, `size` characters in all, as segments.

    share: how much of a dense list's characters is left to filler.

    Raises `ValueError` for an unknown task or a size that its questions alone exceed.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(TASKS)}")
    rng = np.random.default_rng((TASKS.index(task), seed))
    window = _window(rng, filler, size)
    if task == "text":
        return [Segment(window, "filler")]
    names = _Names(rng, window)
    if task in ("key_value", "common_words"):
        room = int(size * (1 - share)) - len(_HEADERS[task]) - len(_QUESTIONS)
        lines, questions = _DENSE[task](rng, names, room // _LINE)
    else:
        lines, questions = _SPARSE[task](rng, names, size)
    asked = _question_segments(rng, questions)
    fixed = len(_HEADERS[task]) + sum(map(len, lines)) + sum(len(s.text) for s in asked)
    if fixed >= size:
        raise ValueError(f"{size} characters are too few for a {task} prompt")
    window = window[: size - fixed - 1] + "\n"
    header = Segment(_HEADERS[task], "given")
    if task in _DENSE:
        return [header, Segment(window, "filler"), Segment("".join(lines), "given"), *asked]
    return [header, *_plant(rng, lines, window), *asked]


def right_answers(sample: Sample, predicted: np.ndarray) -> list[bool]:
    """Which answers are right.

    predicted: shape (length,), at position i the most likely token after ``sample.ids[: i + 1]``.
    """
    right = np.asarray(predicted)[:-1] == sample.ids[1:]
    return [bool(right[start - 1 : end - 1].all()) for start, end in sample.answers]


def count_right(sample: Sample, predicted: np.ndarray) -> int:
    """How many answers are right; `predicted` as for `right_answers`."""
    return sum(right_answers(sample, predicted))


# -- names, filler and questions ---------------------------------------------------------------


def scored_rows(sample: Sample, most: int = 2048) -> np.ndarray:
    """Positions whose next token counts: those before the answers' tokens, or the end of a text."""
    if sample.answers:
        return np.concatenate([np.arange(a - 1, b - 1) for a, b in sample.answers])
    n = len(sample.ids)
    return np.arange(max(n // 2, n - 1 - most), n - 1)


def judged_rows(sample: Sample) -> np.ndarray:
    """Positions at which attention is judged: the whole part with the questions, since what is
    looked up there is handed on between its rows, or the end of a text.
    """
    rows = scored_rows(sample)
    return np.arange(max(0, rows[0] - QUESTION), len(sample.ids)) if sample.answers else rows


class _Names:
    """Draws keys, numbers and words. No key is drawn twice or stands before a "=" in the filler.

    Keys are four consonants, numbers four digits, words consonant-vowel-consonant-vowel.
    """

    def __init__(self, rng: np.random.Generator, window: str) -> None:
        self._rng = rng
        self._taken = set(re.findall(rf"[{_CONSONANTS}]{{4}}(?=\d?=)", window))

    def keys(self, count: int) -> list[str]:
        """`count` keys not drawn before."""
        keys: list[str] = []
        while len(keys) < count:
            letters = self._rng.integers(0, len(_CONSONANTS), (count - len(keys), 4))
            for row in letters.tolist():
                key = "".join([_CONSONANTS[i] for i in row])
                if key not in self._taken:
                    self._taken.add(key)
                    keys.append(key)
        return keys

    def numbers(self, count: int) -> list[str]:
        """`count` numbers, 0000 to 9999, repeats allowed."""
        return [f"{i:04d}" for i in self._rng.integers(0, 10_000, count).tolist()]

    def words(self, count: int) -> list[str]:
        """`count` words with different first letters."""
        first = self._rng.choice(len(_CONSONANTS), count, replace=False).tolist()
        rest = self._rng.integers(0, (5, len(_CONSONANTS), 5), (count, 3)).tolist()
        return [
            _CONSONANTS[c] + _VOWELS[v] + _CONSONANTS[d] + _VOWELS[w]
            for c, (v, d, w) in zip(first, rest, strict=True)
        ]


def _window(rng: np.random.Generator, filler: str, size: int) -> str:
    """`size` characters of the filler from a random place, repeated if it is too short."""
    if not filler:
        raise ValueError("the filler text is empty")
    if len(filler) < size:
        filler *= -(-size // len(filler))
    start = int(rng.integers(0, len(filler) - size + 1))
    return filler[start : start + size]


def _plant(rng: np.random.Generator, lines: Sequence[str], window: str) -> list[Segment]:
    """Put lines at random line ends of the window, in the given order."""
    segments, last = [], 0
    for line, place in zip(lines, sorted(rng.integers(0, len(window), len(lines))), strict=True):
        end = max(last, window.find("\n", int(place)) + 1)
        if end > last:
            segments.append(Segment(window[last:end], "filler"))
        segments.append(Segment(line, "given"))
        last = end
    if last < len(window):
        segments.append(Segment(window[last:], "filler"))
    return segments


def _question_segments(
    rng: np.random.Generator, questions: Sequence[tuple[str, str]]
) -> list[Segment]:
    """(question, answer) pairs in random order, one a line, after the line of dashes."""
    segments, before = [], _QUESTIONS
    for i in rng.permutation(len(questions)).tolist():
        question, answer = questions[i]
        segments += [Segment(before + question, "given"), Segment(answer, "answer")]
        before = "\n"
    return segments


# -- the tasks: each returns the lines of the context and the (question, answer) pairs ----------

_Facts = tuple[list[str], list[tuple[str, str]]]


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def _pairs(names: _Names, count: int, asked: int) -> _Facts:
    facts = [(k, "=" + v) for k, v in zip(names.keys(count), names.numbers(count), strict=True)]
    return [f"{key}{value}\n" for key, value in facts], facts[:asked]


def _needle(rng: np.random.Generator, names: _Names, size: int) -> _Facts:
    count = _between(size // 160, 1, 16)
    return _shuffled(rng, _pairs(names, count, count))


def _multi_key(rng: np.random.Generator, names: _Names, size: int) -> _Facts:
    count = _between(size // 64, 4, 256)
    return _shuffled(rng, _pairs(names, count, _between(count // 4, 2, 32)))


def _multi_value(rng: np.random.Generator, names: _Names, size: int) -> _Facts:
    keys = names.keys(_between(size // 512, 1, 8))
    facts = [
        (key + number, "=" + value)
        for key in keys
        for number, value in zip("1234", names.numbers(4), strict=True)
    ]
    return _shuffled(rng, ([f"{key}{value}\n" for key, value in facts], facts))


def _key_value(rng: np.random.Generator, names: _Names, lines: int) -> _Facts:
    asked = _between(lines // 4, 2, 64)
    return _shuffled(rng, _pairs(names, lines - asked, asked))


def _variables(rng: np.random.Generator, names: _Names, size: int) -> _Facts:
    chains, questions = [], []
    for hops in rng.integers(1, 4, _between(size // 256, 1, 24)).tolist():
        keys = names.keys(hops + 1)
        values = names.numbers(1) + keys[:-1]
        chains.append([f"{key}={value}\n" for key, value in zip(keys, values, strict=True)])
        questions.append((keys[-1], "=" + "=".join(reversed(values))))
    # Interleave the chains, each in its own order.
    turns = rng.permutation(np.repeat(np.arange(len(chains)), [len(c) for c in chains]))
    return [chains[turn].pop(0) for turn in turns.tolist()], questions


def _common_words(rng: np.random.Generator, names: _Names, lines: int) -> _Facts:
    topics = names.keys(_between(lines // 10, 1, 32))
    votes = (lines - len(topics)) // len(topics)
    cast, questions = [], []
    for topic in topics:
        winner, *rivals = names.words(1 + _RIVALS)
        ballot = [winner] * (votes // 2) + (rivals * votes)[: votes - votes // 2]
        cast += [f"{topic}={word}\n" for word in ballot]
        questions.append((topic, "=" + winner))
    return _shuffled(rng, (cast, questions))


def _shuffled(rng: np.random.Generator, facts: _Facts) -> _Facts:
    lines, questions = facts
    return [lines[i] for i in rng.permutation(len(lines)).tolist()], questions


_SPARSE = {
    "needle": _needle,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "variables": _variables,
}  # given the size in characters
_DENSE = {"key_value": _key_value, "common_words": _common_words}  # given the number of lines


# -- tokens -------------------------------------------------------------------------------------


def _tokenise(segments: Sequence[Segment], tokenizer: Any) -> tuple[list[np.ndarray], int]:
    """Each segment's token ids, and the tokens of the whole prompt."""
    texts = [s.text for s in segments]
    if callable(tokenizer):  # all at once: on several cores, where the tokenizer can
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    else:
        ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts]
    pieces = [np.asarray(i) for i in ids]
    return pieces, sum(map(len, pieces)) + len(_prefix(tokenizer))


def _spare(pieces: Sequence[np.ndarray], segments: Sequence[Segment]) -> int:
    """How many of the tokens are filler."""
    return sum(len(p) for p, s in zip(pieces, segments, strict=True) if s.kind == "filler")


def _prefix(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, if this tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in list(tokenizer.encode("")) else []


def _join(
    pieces: Sequence[np.ndarray],
    segments: Sequence[Segment],
    tokenizer: Any,
    length: int,
    task: str,
) -> Sample:
    """Concatenate tokenised segments, trimming filler to `length` tokens."""
    prefix = _prefix(tokenizer)
    surplus = len(prefix) + sum(map(len, pieces)) - length
    spare = _spare(pieces, segments)
    if not 0 <= surplus <= spare:
        raise ValueError(f"{length + surplus} tokens, {spare} of them filler, don't fit {length}")
    parts, answers = [np.asarray(prefix, np.int32)], []
    position, seen, cut = len(prefix), 0, 0
    for piece, segment in zip(pieces, segments, strict=True):
        if segment.kind == "filler":
            seen += len(piece)
            share = surplus * seen // spare if spare else 0
            piece = piece[share - cut :]
            cut = share
        elif segment.kind == "answer":
            answers.append((position, position + len(piece)))
        parts.append(piece)
        position += len(piece)
    return Sample(task, np.concatenate(parts).astype(np.int32), tuple(answers))
