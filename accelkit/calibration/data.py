"""What calibration runs on: prompts to measure on, and others to check on.

Without data of the user's, a mix of retrieval tasks and source text is made; retrieval is where
sparse attention fails first. Prompts to check on have other seeds and other filler text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.tasks import Sample
from accelkit.errors import InvalidInputError

LENGTHS = {"cpu": (4096, 8192), "cuda": (8192, 32768)}
"""Prompt lengths without a wish of the user's, by kind of device."""
FEWEST, MOST_OF_IT, ENOUGH_TOKENS = "variables", 4, 8192
"""A task of which further prompts are checked on, so many at most, until they have as many tokens
as one prompt that asks enough of it.
"""
CHECK_SEED = 500_000
"""Prompts to check on are numbered from here on, those to measure on below."""


@dataclass(frozen=True)
class Mix:
    """Which built-in tasks a preset uses: at the longest length, at each shorter one, to check."""

    longest: tuple[str, ...]
    shorter: tuple[str, ...]
    check: tuple[str, ...]
    check_shorter: tuple[str, ...]


# Balanced measures on text, on a task that is mostly text and on few questions behind much text.
# Text comes first, since its error is what the budget meets first: the first prompt decides which
# settings the others measure. It varies most from prompt to prompt, and needles fail at one place
# or another: several of both are checked, behind one each of the tasks that fail first. Where the
# last rows stay dense, text keeps far from the budget, and one is enough.
_FIRST = ("text", "common_words", "variables")
_TEXTS, _NEEDLES = ("text",) * 2, ("needle",) * 2
_ALL = ("text", *(t for t in tasks.TASKS if t != "text"))
_REST = tuple(t for t in tasks.TASKS if t not in _FIRST)
_CHECK = (*_FIRST, *_TEXTS, *_NEEDLES, *_REST)
MIXES = {
    "fast": Mix(("text", "variables"), ("variables",), ("text", "text", "variables", "needle"), ()),
    "balanced": Mix(("text", "variables", "needle"), ("multi_value",), _CHECK, ("key_value",)),
    "careful": Mix(_ALL, ("multi_key", "variables", "text"), _CHECK * 2, _CHECK),
}


@dataclass(frozen=True)
class Inputs:
    """Prompts to measure on (the longest first) and to check on; `about` goes into the plan.

    `more(task, tokens, n)` makes the n-th further prompt to check on; None for data of the user's.
    """

    measure: tuple[Sample, ...]
    check: tuple[Sample, ...]
    about: str
    more: Callable[[str, int, int], Sample] | None = None

    @property
    def longest(self) -> int:
        return max(len(s.ids) for s in self.measure)

    @property
    def shortest(self) -> int:
        return min(len(s.ids) for s in self.measure)


def need_known(inputs: Inputs, model: Any) -> None:
    """Refuse token ids that the model has no embedding of.

    Raises:
        InvalidInputError: an id beyond the vocabulary.
    """
    known = model.config.get_text_config().vocab_size
    highest = max(int(s.ids.max()) for s in (*inputs.measure, *inputs.check))
    if highest >= known:
        raise InvalidInputError(
            f"data: token id {highest}, the model knows 0 to {known - 1}; take the tokenizer that "
            "belongs to the model"
        )


def chosen_lengths(lengths: Sequence[int] | None, model: Any) -> list[int]:
    """The prompt lengths that are wished, or those by the model's device; tokens, ascending.

    Raises:
        InvalidInputError: too short, or longer than the model has positions for.
    """
    if lengths is None:
        kind = "cuda" if model.device.type == "cuda" else "cpu"
        return sorted({min(n, tasks.positions(model)) for n in LENGTHS[kind]})
    try:
        found = sorted({index(n) for n in lengths})
    except TypeError as error:
        raise InvalidInputError(
            f"lengths is {lengths!r}; expected numbers of tokens, such as [8192, 32768]"
        ) from error
    if not found or found[0] < tasks.MIN_LENGTH:
        raise InvalidInputError(
            f"lengths {list(lengths)}: expected numbers of tokens from {tasks.MIN_LENGTH} on"
        )
    tasks.need_positions(model, found[-1])
    return found


def gather(
    data: Any,
    tokenizer: Any,
    lengths: Sequence[int],
    preset: str,
    seed: int,
    every_row: bool = True,
) -> Inputs:
    """Prompts of at most the given lengths, in tokens.

    Args:
        data: None for the built-in mix; a path to a text or JSON-lines file; one text; a list of
            texts, of chats (lists of messages) or of token ids (1-d, `[1, N]`, or a dict with
            `input_ids`); or a function without arguments that returns one of these.
        tokenizer: a Hugging Face tokenizer; not needed for token ids.
        every_row: whether the plan is for logits of every row, not of the last ones alone.

    Raises:
        InvalidInputError: no tokenizer, an empty file, prompts too few or too short.
    """
    if hasattr(data, "tokenize"):
        raise InvalidInputError(f"data is a {type(data).__name__}; pass it as tokenizer=…")
    if isinstance(tokenizer, str | Path):
        raise InvalidInputError(
            f"tokenizer is {str(tokenizer)!r}; expected the tokenizer itself, from "
            "AutoTokenizer.from_pretrained(…)"
        )
    if callable(data):
        data = data()
    if data is None:
        return _built_in(tokenizer, lengths, preset, seed, every_row)
    if isinstance(data, str | Path):
        data = _read(data)
    if isinstance(data, Mapping) or hasattr(data, "shape"):
        data = [data]
    if not isinstance(data, Sequence):
        raise InvalidInputError(
            f"data is {type(data).__name__}; expected a path, texts, chats, token ids or a function"
        )
    if not data:
        raise InvalidInputError("data is empty; give at least two prompts or one long text")
    longest = max(lengths)
    prompts: list[np.ndarray] = []
    texts = [d for d in data if isinstance(d, str)]
    for item in data:
        if not isinstance(item, str):
            prompts.append(_token_ids(item, tokenizer))
    if texts:
        prompts += _windows(texts, _need(tokenizer), longest)
    kind = "text" if texts else "prompt"
    short = min(len(p) for p in prompts)
    if short < tasks.MIN_LENGTH:
        raise InvalidInputError(
            f"a prompt has {short} tokens; calibration needs at least {tasks.MIN_LENGTH} in each"
        )
    if len(prompts) < 2:
        raise InvalidInputError(
            f"one prompt of {short} tokens; calibration needs two, one to measure on and one to "
            f"check on, or a text of at least {2 * longest} tokens"
        )
    most = len(MIXES[preset].check)
    measure, check = prompts[0::2][:most], prompts[1::2][:most]
    samples = [Sample(kind, p[:longest], ()) for p in measure]
    # A shorter length is measured on the beginning of the first prompt.
    samples += [Sample(kind, samples[0].ids[:n], ()) for n in lengths if n < len(samples[0].ids)]
    return Inputs(
        tuple(sorted(samples, key=lambda s: -len(s.ids))),
        tuple(Sample(kind, p[:longest], ()) for p in check),
        f"{len(data)} of the user's",
    )


def screening(inputs: Inputs, tokenizer: Any, tokens: int, seed: int) -> Sample:
    """A short prompt on which hopeless methods are found out cheaply."""
    first = inputs.measure[0]
    if any(s.answers for s in inputs.measure) and tokenizer is not None:
        return made("multi_key", tokens, seed + 99, False, tokenizer)
    return Sample(first.task, first.ids[-tokens:], ())


def _built_in(
    tokenizer: Any, lengths: Sequence[int], preset: str, seed: int, every_row: bool
) -> Inputs:
    _need(tokenizer)
    mix, longest = MIXES[preset], max(lengths)
    shorter = sorted((n for n in lengths if n < longest), reverse=True)
    first = seed * 1000
    measure = [(t, longest) for t in mix.longest] + [(t, n) for n in shorter for t in mix.shorter]
    # The task that fails first has few questions where prompts are short.
    more = (FEWEST,) * (min(MOST_OF_IT, ENOUGH_TOKENS // longest) - 1)
    check = [(t, longest) for t in (*mix.check, *more)]
    check += [(t, n) for n in shorter for t in mix.check_shorter]
    numbered = list(enumerate(check))
    if not every_row:
        numbered = [(i, c) for i, c in numbered if c[0] != "text" or c not in check[:i]]
    return Inputs(
        tuple(made(t, n, first + i, False, tokenizer) for i, (t, n) in enumerate(measure)),
        tuple(made(t, n, CHECK_SEED + first + i, True, tokenizer) for i, (t, n) in numbered),
        "built-in tasks: " + ", ".join(dict.fromkeys(mix.longest + mix.shorter)),
        lambda task, tokens, n: made(task, tokens, CHECK_SEED + first + 100 + n, True, tokenizer),
    )


def made(task: str, tokens: int, seed: int, held_out: bool, tokenizer: Any) -> Sample:
    try:
        return tasks.make(task, tokens, seed, tasks.source_corpus(held_out=held_out), tokenizer)
    except ValueError as error:
        raise InvalidInputError(
            f"{task} at {tokens} tokens: {error}; give data of your own"
        ) from error


def _need(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise InvalidInputError(
            "no tokenizer: pass tokenizer=…, or data as token ids; texts and tasks need one"
        )
    return tokenizer


def _read(path: str | Path) -> list[Any]:
    """Texts or chats of a file; a string that is no path is a text itself."""
    text = str(path)
    if isinstance(path, str) and ("\n" in text or len(text) > 1024):
        return [text]
    file = Path(path)
    try:
        content = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"data: {file} cannot be read ({error}); expected a UTF-8 text or JSON-lines file"
        ) from error
    if not content.strip():
        raise InvalidInputError(f"data: {file} is empty")
    if file.suffix != ".jsonl":
        return [content]
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(row if isinstance(row, str | list) else row.get("messages") or row["text"])
        except (ValueError, KeyError, AttributeError) as error:
            raise InvalidInputError(
                f"data: {file}, line {number}: expected a text, or an object with 'text' or "
                f"'messages' ({error!r})"
            ) from error
    return found


def _token_ids(item: Any, tokenizer: Any) -> np.ndarray:
    """Ids of a ready prompt or of a chat."""
    if isinstance(item, list) and item and isinstance(item[0], Mapping):
        if not getattr(_need(tokenizer), "chat_template", None):
            raise InvalidInputError(
                "data holds chats, and the tokenizer has no chat template; give texts"
            )
        item = tokenizer.apply_chat_template(item, return_dict=True)
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise InvalidInputError(f"data: a dict with {sorted(item)}; expected 'input_ids'")
        item = item["input_ids"]
    ids = np.asarray(item.tolist() if hasattr(item, "tolist") else item)
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidInputError(
            f"data: token ids of shape {ids.shape}, {ids.dtype}; expected integers [N] or [1, N]"
        )
    return ids.astype(np.int32)


def _windows(texts: Sequence[str], tokenizer: Any, tokens: int) -> list[np.ndarray]:
    """Each long text cut into prompts of `tokens`; short texts stay whole, or are joined if a
    single prompt comes out otherwise.
    """
    encoded = [np.asarray(tokenizer.encode(t), np.int32) for t in texts]
    if sum(len(e) for e in encoded) < tasks.MIN_LENGTH:
        raise InvalidInputError(
            f"the texts have {sum(len(e) for e in encoded)} tokens in all; calibration needs "
            f"prompts of at least {tasks.MIN_LENGTH}"
        )
    if any(len(e) < min(tokens, 2 * tasks.MIN_LENGTH) for e in encoded):
        encoded = [np.concatenate(encoded)]
    pieces = [e[i : i + tokens] for e in encoded for i in range(0, len(e), tokens)]
    whole = [p for p in pieces if len(p) == tokens]
    if len(whole) >= 2:
        return whole
    # Too little for two prompts of this length: halves of what there is.
    if len(pieces) < 2:
        pieces = list(np.array_split(pieces[0], 2))
    return [p for p in pieces if len(p) >= tasks.MIN_LENGTH] or pieces
