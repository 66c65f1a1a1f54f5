"""Scores a model on tasks with known answers, sparse against dense (`accelkit eval`).

Every prompt ends with questions and their answers, so one teacher-forced pass scores them all. Both
sides see the same prompts, which differ from those of calibration. Intervals are Wilson's at 95 %,
with the number of answers divided by the design effect: answers of one prompt resemble each other,
so they count for less than independent ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.tasks import scored_rows
from accelkit.errors import GateFailedError, InvalidInputError, NothingPatchedError
from accelkit.patches.patch import PatchHandle, disabled, patch
from accelkit.patches.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

FIRST_SEED = 1_000_000
"""Prompts of evaluation are numbered from here on; calibration stays below."""
_ROWS = 512  # rows of logits in fp32 at a time
_Z = 1.959964


@dataclass(frozen=True)
class Share:
    """`right` of `asked`, as a share with its 95 % interval."""

    right: int
    asked: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @staticmethod
    def of(right: Sequence[int], asked: Sequence[int]) -> Share:
        """From counts by prompt."""
        total, n = sum(right), sum(asked)
        if not n:
            return Share(0, 0, math.nan, math.nan)
        p = total / n
        deviation = np.asarray(right, float) - p * np.asarray(asked, float)
        clusters = len(right)
        binomial = p * (1 - p) * n
        effect = 1.0
        if clusters > 1 and binomial > 0:
            effect = max(1.0, float((deviation**2).sum()) * clusters / (clusters - 1) / binomial)
        m = n / effect
        middle, half = p + _Z**2 / (2 * m), _Z * math.sqrt(p * (1 - p) / m + _Z**2 / (4 * m * m))
        scale = 1 + _Z**2 / m
        low = (middle - half) / scale if total else 0.0
        return Share(total, n, low, (middle + half) / scale if total < n else 1.0)


@dataclass(frozen=True)
class Score:
    """One task at one length. Bits are per scored token, agreement is the share of scored tokens
    with the dense argmax, divergence the mean KL(dense ‖ sparse) in nats there. Without a plan only
    the dense side is filled. `sparse_calls` are attention calls that ran sparse, or in a trimmed
    layer: where there are none, the plan left this length dense and the sides say nothing."""

    task: str
    length: int
    prompts: int
    tokens: int
    dense: Share | None
    sparse: Share | None
    dense_bits: float | None
    sparse_bits: float | None
    agreement: float | None
    divergence: float | None
    sparse_calls: int | None = None

    @property
    def drop(self) -> float | None:
        """Points lost against dense, out of 100; None for plain text or a single side."""
        if not self.dense or not self.sparse or not self.dense.asked:
            return None
        return 100 * (self.dense.right - self.sparse.right) / self.dense.asked

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        row = asdict(self) | {"drop_points": self.drop}
        for side, share in (("dense", self.dense), ("sparse", self.sparse)):
            row[side] = asdict(share) | {"accuracy": share.value} if share and share.asked else None
            bits = row[f"{side}_bits"]
            row[f"{side}_perplexity"] = None if bits is None else 2.0**bits
        return row


@dataclass
class _Sums:
    right: list[int] = field(default_factory=list)
    bits: float = 0.0


def evaluate(
    model: Any,
    tokenizer: Any,
    plan: Plan | None = None,
    *,
    names: Sequence[str] = tasks.TASKS,
    lengths: Sequence[int] = (8192,),
    samples: int = 4,
    answers: int = 0,
    dense: bool = True,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Score]:
    """Score `model` on tasks at lengths in tokens, patched with `plan` and dense.

    `samples` prompts a task and length are drawn, and more until `answers` of them were asked.
    `dense=False` leaves the dense side out. The model is unpatched afterwards.

    Raises:
        InvalidInputError: an unknown task or a length too short.
        NothingPatchedError: a plan was given and no call ran sparse.

    Example:
        >>> scores = evaluate(model, tokenizer, plan, names=("needle",), lengths=(8192,),
            answers=500)
    """
    unknown = [n for n in names if n not in tasks.TASKS]
    if unknown or not names:
        raise InvalidInputError(
            f"--tasks: {', '.join(unknown) or 'none'} unknown; "
            f"expected some of {', '.join(tasks.TASKS)}, or all"
        )
    if min(lengths) < tasks.MIN_LENGTH:
        raise InvalidInputError(f"--lengths: the tasks need at least {tasks.MIN_LENGTH} tokens")
    if plan is None and not dense:
        raise InvalidInputError("nothing to score: give a plan, or leave the dense side in")
    tasks.need_positions(model, max(lengths))
    filler = tasks.source_corpus(held_out=True)
    scores = []
    with patch(model, plan) if plan is not None else nullcontext() as handle:
        for name in names:
            for length in lengths:
                if progress:
                    progress(f"{name} at {length} tokens")
                first = FIRST_SEED + seed * 100_000
                drawn = _draw(name, length, first, samples, answers, filler, tokenizer)
                scores.append(_score(model, handle, name, length, drawn, dense))
        if handle is not None:
            need_sparse(handle, max(lengths))
    return scores


def need_sparse(handle: PatchHandle, longest: int) -> None:
    """Raise `NothingPatchedError`, with the reason, if no call ran sparse."""
    report = handle.report()
    if _ran(handle) or not handle.enabled:
        return
    minimum = handle.plan.limits.min_length
    if longest < minimum:
        raise NothingPatchedError(
            f"nothing ran sparse: {longest} tokens, the plan begins at {minimum}; "
            "take longer prompts"
        )
    if all(p.dense for p in handle.plan.policies):
        raise NothingPatchedError(
            "nothing ran sparse: the plan is dense everywhere, no method was faster within its "
            "budget; calibrate with a larger budget or longer lengths"
        )
    reasons = (
        ", ".join(f"{reason} ({n})" for reason, n in report.dense.items())
        or "no attention call was seen"
    )
    raise NothingPatchedError(
        f"nothing ran sparse at {longest} tokens: {reasons}; `accelkit doctor` says what runs here"
    )


def _ran(handle: PatchHandle) -> int:
    """Calls so far of which the plan changed anything."""
    report = handle.report()
    return report.sparse_calls + report.trimmed_calls


def worst_drop(scores: Sequence[Score], most: float) -> Score:
    """The score with the largest drop; the gate of `--max-drop`, in points out of 100.

    Raises:
        GateFailedError: it exceeds `most`. InvalidInputError: no task with answers was scored on
            both sides.
    """
    paired = [s for s in scores if s.drop is not None]
    if not paired:
        raise InvalidInputError("--max-drop needs a plan, the dense side and a task with answers")
    worst = max(paired, key=lambda s: s.drop or 0.0)
    if worst.drop is not None and worst.drop > most:
        raise GateFailedError(
            f"{worst.task} at {worst.length} tokens lost {worst.drop:.1f} points "
            f"(allowed {most:g}); calibrate with a smaller budget"
        )
    return worst


LEGEND = (
    "lost: points out of 100; agreement: tokens on which both sides decide alike; KL: of the "
    "patched model's next-token probabilities from dense ones, in nats; bits: for a token of text"
)


def table(scores: Sequence[Score]) -> Table:
    """What a person reads."""
    from rich.table import Table

    both = any(s.sparse for s in scores) and any(s.dense for s in scores)
    grid = Table(
        title="Right answers in percent (95 % interval)",
        title_justify="left",
        caption=LEGEND if both else None,
        caption_justify="left",
    )
    grid.add_column("task", no_wrap=True)
    for head in ("length", "answers"):
        grid.add_column(head, justify="right")
    for side in ("dense", "sparse"):
        if any(getattr(s, side) for s in scores):
            grid.add_column(f"{side} %", justify="right", no_wrap=True)
    for head in ("lost", "agreement", "KL") if both else ():
        grid.add_column(head, justify="right")
    for side in ("dense", "sparse"):
        if any(getattr(s, side) for s in scores):
            grid.add_column(f"bits, {side}", justify="right")
    for s in scores:
        sides = [x for x in (s.dense, s.sparse) if x]
        row = [s.task, str(s.length), str(sides[0].asked or "–")]
        row += [_interval(x) for x in sides]
        if s.sparse_calls == 0:
            row[-1] = "ran dense"
        if both:
            row.append("–" if s.drop is None else f"{s.drop:+.1f}")
            row.append("–" if s.agreement is None else f"{s.agreement:.2%}")
            row.append("–" if s.divergence is None else f"{max(s.divergence, 0.0):.1e}")
        row += [f"{b:.4f}" for b in (s.dense_bits, s.sparse_bits) if b is not None]
        grid.add_row(*row)
    return grid


def _interval(share: Share) -> str:
    if not share.asked:
        return "–"
    return f"{100 * share.value:.1f} ({100 * share.low:.0f}–{100 * share.high:.0f})"


def _draw(
    name: str, length: int, seed: int, samples: int, answers: int, filler: str, tokenizer: Any
) -> Iterator[tasks.Sample]:
    asked = drawn = 0
    while drawn < samples or (asked < answers and name != "text"):
        try:
            sample = tasks.make(name, length, seed + drawn, filler, tokenizer)
        except ValueError as error:
            raise InvalidInputError(f"{name} at {length} tokens: {error}") from error
        drawn, asked = drawn + 1, asked + len(sample.answers)
        yield sample


def _score(
    model: Any,
    handle: PatchHandle | None,
    name: str,
    length: int,
    samples: Iterator[tasks.Sample],
    dense: bool,
) -> Score:
    sides = (["dense"] if dense else []) + (["sparse"] if handle is not None else [])
    sums = {side: _Sums() for side in sides}
    asked: list[int] = []
    tokens, same, divergence = 0, 0, 0.0
    before = _ran(handle) if handle is not None else 0
    for sample in samples:
        rows = scored_rows(sample)
        targets = torch.from_numpy(sample.ids[rows + 1].astype(np.int64))
        asked.append(len(sample.answers))
        tokens += len(rows)
        logits = {}
        for side in sides:
            with disabled(model) if side == "dense" and handle is not None else nullcontext():
                logits[side] = logits_at(model, sample.ids, rows)
            sums[side].bits += _bits(logits[side], targets)
            best = logits[side].argmax(-1).cpu().numpy()
            predicted = np.full(len(sample.ids), -1)
            predicted[rows] = best
            sums[side].right.append(tasks.count_right(sample, predicted))
        if len(sides) == 2:
            a, b = logits["dense"], logits["sparse"]
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            divergence += _divergence(a, b)
    share = {side: Share.of(s.right, asked) for side, s in sums.items()}
    bits = {side: s.bits / tokens for side, s in sums.items()}
    both = len(sides) == 2
    return Score(
        name, length, len(asked), tokens, share.get("dense"), share.get("sparse"),
        bits.get("dense"), bits.get("sparse"),
        same / tokens if both else None, divergence / tokens if both else None,
        _ran(handle) - before if handle is not None else None,
    )  # fmt: skip


@torch.inference_mode()
def logits_at(model: Any, ids: np.ndarray, rows: np.ndarray) -> Tensor:
    """Logits `[rows, vocabulary]` of one prompt at some positions, in one pass without a cache."""
    prompt = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    keep = torch.from_numpy(rows.astype(np.int64)).to(model.device)
    return model(input_ids=prompt, use_cache=False, logits_to_keep=keep).logits[0]


def _bits(logits: Tensor, targets: Tensor) -> float:
    """Sum of −log2 p of the targets."""
    total = 0.0
    for part, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        wanted = wanted.to(part.device)
        total += float(torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum"))
    return total / math.log(2)


def _divergence(dense: Tensor, sparse: Tensor) -> float:
    """Sum of KL(dense ‖ sparse) over rows, in nats."""
    total = 0.0
    for a, b in zip(dense.split(_ROWS), sparse.split(_ROWS), strict=True):
        p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total
