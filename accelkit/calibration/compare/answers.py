"""One prompt through the dense and the patched model: answers, speed and agreement (`accelkit
patch`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.evaluate import FIRST_SEED, logits_at, need_sparse
from accelkit.errors import InvalidInputError
from accelkit.patches.patch import disabled, patch
from accelkit.patches.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

END = 12
"""Tokens of a prompt that are shown of its end."""


@dataclass(frozen=True)
class Generated:
    """What one side generated and how fast. Time to first token is a median, tokens per second
    count the later ones."""

    text: str
    tokens: tuple[int, ...]
    first_token_ms: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison:
    """Both sides of one prompt.

    `equal_tokens` is the share of generated tokens that are equal place by place; `agreement` the
    share of the dense answer's tokens that the patched model also finds likeliest when it is led
    along that answer. `note` says why nothing ran sparse when that is as the plan wants it."""

    prompt_tokens: int
    prompt_end: str
    expected: str | None
    dense: Generated | None
    sparse: Generated
    equal_tokens: float | None
    agreement: float | None
    density: float | None
    counts: dict[str, Any]
    note: str | None

    @property
    def speedup(self) -> float | None:
        """Ratio of the times to the first token."""
        return self.dense.first_token_ms / self.sparse.first_token_ms if self.dense else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"speedup_first_token": self.speedup}


def compare(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    ids: Sequence[int],
    *,
    expected: str | None = None,
    max_new_tokens: int = 64,
    dense: bool = True,
    repeat: int = 3,
) -> Comparison:
    """Generate greedily after `ids` with the plan and, if asked, without it. The model is unpatched
    afterwards.

    Raises:
        NothingPatchedError: the prompt is long enough and nothing ran sparse.
    """
    if min(max_new_tokens, repeat) < 1:
        raise InvalidInputError("--max-new-tokens and --repeat must be at least 1")
    tasks.need_positions(model, len(ids) + max_new_tokens)
    tokens, n = torch.as_tensor(ids, dtype=torch.long, device=model.device)[None], len(ids)
    sparse, plain = Timed(), Timed() if dense else None
    short, agreement = n < plan.limits.min_length, None
    run = lambda most: _generate(model, tokenizer, tokens, most)  # noqa: E731
    with patch(model, plan) as handle:
        with handle.measuring():  # and warming up
            run(1)
        report = handle.report().as_dict()
        if not short:
            need_sparse(handle, n)
    for turn in range(repeat):  # what disturbs a machine meets both sides
        if plain is not None:
            plain.collect(run, max_new_tokens, warm=tokens.is_cuda)
        with patch(model, plan):
            sparse.collect(run, max_new_tokens, warm=tokens.is_cuda)
            if plain is not None and turn == repeat - 1:
                agreement = _led(model, list(ids), plain.tokens)
    after = sparse.answer(tokenizer)
    before = None if plain is None else plain.answer(tokenizer)
    note = None
    if not handle.enabled:
        note = "ACCELKIT_DISABLE is set: the patched model runs dense"
    elif short:
        note = (
            f"the prompt has {n} tokens, the plan begins at {plan.limits.min_length}: it runs dense"
        )
    return Comparison(
        n, tokenizer.decode(list(ids)[-END:]), expected, before, after, _equal(before, after),
        agreement, None if note else report["density"], report, note,
    )  # fmt: skip


def table(result: Comparison) -> Table:
    """What a person reads: both sides next to each other."""
    from rich.table import Table
    from rich.text import Text

    title = f"{result.prompt_tokens} prompt tokens, ending in {result.prompt_end!r}"
    grid = Table(title=Text(title, style="italic"), title_justify="left")
    sides = [(n, a) for n, a in (("dense", result.dense), ("patched", result.sparse)) if a]
    grid.add_column("")
    for name, _ in sides:
        grid.add_column(name, overflow="fold")
    grid.add_row("answer", *(Text(a.text) for _, a in sides))
    if result.expected is not None:
        right = ["yes" if a.text.startswith(result.expected) else "no" for _, a in sides]
        grid.add_row(f"begins with {result.expected!r}", *right)
    grid.add_row("first token", *(f"{a.first_token_ms:.1f} ms" for _, a in sides))
    rates = [a.tokens_per_second for _, a in sides]
    grid.add_row("tokens per second", *("–" if r is None else f"{r:.1f}" for r in rates))
    blank = [""] * (len(sides) - 1)
    rows = (
        ("faster to first token", None if result.note else result.speedup, "{:.2f} ×"),
        ("density", result.density, "{:.1%}"),
        ("equal tokens", result.equal_tokens, "{:.1%}"),
        ("agreement along the dense answer", result.agreement, "{:.1%}"),
    )
    for name, value, form in rows:
        if value is not None:
            grid.add_row(name, *blank, form.format(value))
    return grid


class Timed:
    """A greedy answer and the times of its tokens, collected in turns with another side."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.first_ms: list[float] = []
        self.rate: float | None = None

    def collect(
        self, run: Callable[[int], tuple[list[int], list[float]]], most: int, warm: bool
    ) -> None:
        """One more time to the first token, `warm` after a run for that; the first turn generates
        on.
        """
        if warm:
            run(1)
        tokens, at = run(1 if self.tokens else most)
        self.first_ms.append(1e3 * at[0])
        if not self.tokens:
            self.tokens = tokens
            if len(at) > 1 and at[-1] > at[0]:
                self.rate = (len(at) - 1) / (at[-1] - at[0])

    def answer(self, tokenizer: Any) -> Generated:
        """The result."""
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        return Generated(text, tuple(self.tokens), statistics.median(self.first_ms), self.rate)


class _Stamps:
    """A streamer that notes when each generated token has reached the CPU, in seconds from now."""

    def __init__(self) -> None:
        self.start, self.prompt = time.perf_counter(), True
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.at.append(time.perf_counter() - self.start)
        self.prompt = False

    def end(self) -> None:
        pass


@torch.inference_mode()
def _generate(
    model: Any, tokenizer: Any, prompt: torch.Tensor, most: int
) -> tuple[list[int], list[float]]:
    """Greedy tokens and the seconds after which each was there."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if prompt.device.type == "cuda":
        torch.cuda.synchronize(prompt.device)
    stamps = _Stamps()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=most,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        streamer=stamps,
    )
    return out[0, prompt.shape[1] :].tolist(), stamps.at


def _equal(a: Generated | None, b: Generated) -> float | None:
    if a is None:
        return None
    longest = max(len(a.tokens), len(b.tokens))
    same = sum(x == y for x, y in zip(a.tokens, b.tokens, strict=False))
    return same / longest if longest else 1.0


def _led(model: Any, ids: list[int], answer: Sequence[int]) -> float:
    """Argmax agreement of the patched model with itself run dense, along the dense answer."""
    whole = np.asarray([*ids, *answer])
    rows = np.arange(len(ids) - 1, len(whole) - 1)
    sparse = logits_at(model, whole, rows).argmax(-1)
    with disabled(model):
        dense = logits_at(model, whole, rows).argmax(-1)
    return float((sparse == dense).float().mean())


def prompt(
    tokenizer: Any, plan: Plan, text: str | None, length: int | None, seed: int = 0
) -> tuple[list[int], str | None]:
    """Token ids of `text`, or without one those of a demo of `length` tokens and its answer."""
    if text is not None:
        if not text.strip():
            raise InvalidInputError("the prompt is empty; give some text")
        return text_prompt(tokenizer, text), None
    return demo_prompt(tokenizer, length or demo_length(plan), seed)


def demo_prompt(tokenizer: Any, length: int, seed: int = 0) -> tuple[list[int], str]:
    """A retrieval prompt of at least `length` tokens that ends where an answer is due, and that
    answer. Raises `InvalidInputError` for fewer tokens than the task needs.
    """
    if length < tasks.MIN_LENGTH:
        raise InvalidInputError(f"--length: the demo needs at least {tasks.MIN_LENGTH} tokens")
    for tail in range(1, 33):  # tokens of the last answer, which the prompt leaves out
        sample = tasks.make("needle", length + tail, FIRST_SEED + seed, tokenizer=tokenizer)
        start, end = sample.answers[-1]
        if start >= length:
            break
    return sample.ids[:start].tolist(), tokenizer.decode(sample.ids[start:end].tolist())


def text_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; a chat model gets it as the user's turn. Raises `InvalidInputError` for
    an empty one.
    """
    if getattr(tokenizer, "chat_template", None):
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
        ids = list(found["input_ids"])
    else:
        ids = list(tokenizer.encode(text))
    return ids


def demo_length(plan: Plan) -> int:
    """A length at which the plan has something to show, in tokens: near the longest calibrated."""
    seen = [e.tokens for layer in plan.sites.values() for e in layer.evidence.values()]
    longest = max(plan.limits.max_length or 0, *seen, 0)
    # Room for the answer, which may not pass the longest length either.
    return max(longest - 64, plan.limits.min_length, tasks.MIN_LENGTH)
