"""The end-to-end check: does the patched model do what the dense one does?

Budget error is the relative L1 error of the last hidden states at scored positions, by task; beside
it the KL divergence of the next-token distribution there, the perplexity of the tokens that follow,
and the share of right answers.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.calibration.capture import See, forward
from accelkit.calibration.evaluation.tasks import Sample, right_answers, scored_rows
from accelkit.kernels.index import Partial
from accelkit.patches.adapters import adapter_for
from accelkit.patches.adapters.last_layer import MOST as TRIM_BELOW
from accelkit.patches.call import AttentionCall
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

NOISE = 0.05
"""Relative L1 size of the noise by which weights are measured."""
LOUD = 0.3
"""The same in half precision, where rounding drowns what a few per cent do to one head."""
ROUNDING = 2.0**-8
"""Relative size of the noise that tells how far rounding alone carries in half precision."""
FAINT = 1e-3
"""Share of a head's output below which what a method leaves out is rounding."""
FAINT_CELL = (64, 16)
"""Queries and keys that are dropped together where weights are measured."""
DROPPED = 0.3
"""Share of attention that is dropped there; what it changes is brought to the size of the noise."""
BROKEN = 1e3
"""Error of what is not finite."""
MOST_DROP = 0.01
"""Share of right answers that a plan may lose on any task."""
ONE_IN_TWENTY = 1.645
"""Standard deviations that a normal number exceeds its mean by in one case of twenty."""
_ROWS = 256  # rows of logits in fp32 at a time


@dataclass
class Reference:
    """The dense side of one prompt: last hidden states at scored rows and right answers."""

    sample: Sample
    rows: np.ndarray
    hidden: Tensor
    answered: list[bool]
    ms: float

    @property
    def right(self) -> int:
        return sum(self.answered)


def reference(model: Any, sample: Sample, still: Plan | None = None) -> Reference:
    """Run one prompt dense; with `still`, a plan that leaves attention dense and trims the last
    layer, only as far as scored rows need it.
    """
    return references(model, [sample], still)[0]


def references(model: Any, samples: Sequence[Sample], still: Plan | None = None) -> list[Reference]:
    """The same for several prompts of one length, in one forward."""
    if still is None or not still.trim_last_layer:
        rows = [scored_rows(s) for s in samples]
        hidden, ms = _hidden(model, samples, rows, False)
    else:
        rows = [scored_rows(s, _most(s, still.dense_rows)) for s in samples]
        with patch(model, still):
            hidden, ms = _hidden(model, samples, rows, True)
    return [
        Reference(s, r, h, _answered(model, s, r, h), ms)
        for s, r, h in zip(samples, rows, hidden, strict=True)
    ]


def check(model: Any, plan: Plan, dense: Reference) -> dict[str, Any]:
    """Run one prompt with `plan` and compare: error, KL, right answers, milliseconds."""
    return checks(model, plan, [dense])[0]


def checks(model: Any, plan: Plan, dense: Sequence[Reference]) -> list[dict[str, Any]]:
    """The same for several prompts of one length, in one forward."""
    with patch(model, plan):
        return compared(model, dense, plan.trim_last_layer)


def compared(model: Any, dense: Sequence[Reference], trimmed: bool = False) -> list[dict[str, Any]]:
    """The same with a model that is patched already."""
    samples = [d.sample for d in dense]
    hidden, ms = _hidden(model, samples, [d.rows for d in dense], trimmed)
    return [_row(model, d, h, ms) for d, h in zip(dense, hidden, strict=True)]


def _row(model: Any, dense: Reference, hidden: Tensor, ms: float) -> dict[str, Any]:
    given = _answered(model, dense.sample, dense.rows, hidden)
    return {
        "task": dense.sample.task,
        "tokens": len(dense.sample.ids),
        "error": relative(hidden, dense.hidden),
        **_predictions(model, dense, hidden),
        "right": sum(given),
        "dense_right": dense.right,
        "asked": len(given),
        "lost_answers": _lost(dense, given),
        "ms": ms,
        "dense_ms": dense.ms,
    }


def answers(
    model: Any, plan: Plan, still: Plan | None, make: Callable[[], Sample]
) -> dict[str, Any]:
    """Count the answers of one prompt that `plan` loses. The dense side runs only where some are
    wrong: nothing is lost where all are right, and error and `dense_right` are None then.
    """
    sample = make()
    given, ms = answered(model, plan, sample)
    found = {
        "task": sample.task,
        "tokens": len(sample.ids),
        "error": None,
        "kl": None,
        "right": sum(given),
        "dense_right": None,
        "asked": len(given),
        "lost_answers": [],
        "ms": ms,
    }
    if not all(given):
        dense = reference(model, sample, still)
        found |= {"dense_right": dense.right, "lost_answers": _lost(dense, given)}
    return found


def answered(model: Any, plan: Plan, sample: Sample) -> tuple[list[bool], float]:
    """Which answers of a prompt `plan` gives right, and the milliseconds of the run."""
    rows = scored_rows(sample)
    with patch(model, plan):
        (hidden,), ms = _hidden(model, [sample], [rows], plan.trim_last_layer)
    return _answered(model, sample, rows, hidden), ms


def _lost(dense: Reference, given: Sequence[bool]) -> list[int]:
    """Places of the answers that only dense attention gives."""
    both = zip(dense.answered, given, strict=True)
    return [n for n, (before, now) in enumerate(both) if before and not now]


def lost(rows: Sequence[dict[str, Any]]) -> int:
    """Answers that dense attention gets right and the plan does not."""
    return sum(r["dense_right"] - r["right"] for r in rows if r["dense_right"] is not None)


def by_task(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The checks of each task and length, keyed "task@tokens": mean and worst error of its prompts,
    and `bound`, what further prompts will hardly exceed (see `margin`).
    """
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(map(task_of, rows)):
        mine = [r for r in rows if task_of(r) == key]
        asked = sum(r["asked"] for r in mine)
        both = [r for r in mine if r["error"] is not None]
        error = float(np.mean([r["error"] for r in both]))
        worst = max(r["error"] for r in both)
        twice = sum(r["asked"] for r in mine if r["dense_right"] is not None)
        found[key] = {
            "prompts": len(mine),
            "error": error,
            "worst": worst,
            "bound": max(worst, error * _margin_of(key, rows)),
            "kl": float(np.mean([r["kl"] for r in both])),
            "perplexity": _perplexity(both, "nats"),
            "dense_perplexity": _perplexity(both, "dense_nats"),
            "asked": asked,
            "lost": lost(mine),
            "accuracy": sum(r["right"] for r in mine) / asked if asked else None,
            "dense_accuracy": sum(r["dense_right"] or 0 for r in mine) / twice if twice else None,
        }
    return found


def _perplexity(rows: Sequence[dict[str, Any]], side: str) -> float | None:
    """Of one side of some checks; None where a journal was written before it was looked at."""
    nats = [r.get(side) for r in rows]
    return None if None in nats else math.exp(float(np.mean(nats)))  # type: ignore[arg-type]


def _margin_of(task: str, rows: Sequence[dict[str, Any]]) -> float:
    """The margin of one task: from its own prompts where there are several, else from those of its
    kind, with answers or without, else from all.
    """
    mine = [r for r in rows if task_of(r) == task]
    alike = [r for r in rows if bool(r["asked"]) == bool(mine[0]["asked"])]
    for some in (mine, alike):
        counts = Counter(task_of(r) for r in some if r["error"] is not None)
        if max(counts.values(), default=0) > 1:
            return margin(some)
    return margin(rows)


def margin(rows: Sequence[dict[str, Any]]) -> float:
    """By which factor a prompt's error exceeds the mean of its task in one case of twenty, from the
    spread of the logarithms within the tasks that have several prompts; 1 where none has. Tasks
    spread differently: each that has several prompts is asked alone, and text and answers apart.
    """
    squares, freedom = 0.0, 0
    for key in dict.fromkeys(map(task_of, rows)):
        errors = [r["error"] for r in rows if task_of(r) == key and r["error"] is not None]
        logs = np.log(np.maximum(errors, 1e-12))
        squares += float(((logs - logs.mean()) ** 2).sum())
        freedom += len(logs) - 1
    return math.exp(ONE_IN_TWENTY * (squares / freedom) ** 0.5) if freedom else 1.0


def task_of(row: dict[str, Any]) -> str:
    """What a check is judged by: "task@tokens"."""
    return f"{row['task']}@{row['tokens']}"


def holds(tasks: dict[str, dict[str, Any]], budget: float) -> bool:
    """Whether every task stays within the budget, on further prompts too, and has kept its right
    answers.
    """
    return all(t["bound"] <= budget and t["lost"] <= MOST_DROP * t["asked"] for t in tasks.values())


def relative(found: Tensor, true: Tensor) -> float:
    """`Σ|found − true| / Σ|true|`; `BROKEN` where that is not finite, for no comparison with a NaN
    would ever say that a plan failed.
    """
    gap = (found - true).abs().sum() / true.abs().sum().clamp(min=1e-30)
    return float(gap.nan_to_num(BROKEN, BROKEN))


def geometric_mean(errors: Sequence[float]) -> float:
    """Of errors, of which none counts as nothing."""
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-12)))))


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- weights --------------------------------------------------------------------------------------


LeftOut = Callable[[AttentionCall, Partial], Tensor | None]
"""What a method leaves out of the first entry of a dense call, fp32 `[H, N, D]`; None if it would
run dense.
"""
Show = Callable[[int, See], Tensor]
"""`show(copies, see)`: one forward over that many equal entries of a batch, with `see` at some
sites; returns what to compare, `[copies, …]`.
"""


def site_weights(
    show: Show,
    groups: Mapping[str, Sequence[Sequence[int]]],
    left_out: Callable[[str], LeftOut | None] = lambda place: None,
    exact: bool = False,
) -> dict[str, list[float]]:
    """Change of the budget error ÷ the noise when the heads of each group of a place get some on
    their output: 5 % in fp32, more in half precision. What a method leaves out of a head,
    `left_out(place)`, takes the place of noise, brought to the same size.

    All places and groups share one forward. Its first entry has no noise; then come, for each
    place, an entry for every group and, unless the model is `exact` (fp32), one with the noise of
    rounding. What rounding alone does in half precision is subtracted in squares. Heads of a group
    share its weight in squares as well.
    """
    size, entries = NOISE, 1
    first: dict[str, int] = {}
    for place, some in groups.items():
        first[place] = entries
        entries += entries_of(some, exact)

    def disturb(call: AttentionCall, dense: Partial) -> None:
        nonlocal size
        place = call.site.path if len(groups) > 1 else next(iter(groups))
        size = NOISE if dense.out.dtype == torch.float32 else LOUD
        noise = noise_like(dense.out[0])
        leave = left_out(place)
        gap = None if leave is None else leave(call, dense)
        if gap is not None:
            true = dense.out[0].float().abs().sum((1, 2))
            share = gap.abs().sum((1, 2)) / true.clamp(min=1e-30)
            real = (share > FAINT)[:, None, None]
            noise = torch.where(real, gap / share.clamp(min=FAINT)[:, None, None], noise)
        for entry, heads in enumerate(groups[place], first[place]):
            dense.out[entry, list(heads)] += (size * noise[list(heads)]).to(dense.out.dtype)
        if not exact:
            rounded = first[place] + len(groups[place])
            dense.out[rounded] += (ROUNDING * noise).to(dense.out.dtype)

    found = show(entries, disturb)
    half = found.dtype != torch.float32
    found = found.float()
    out: dict[str, list[float]] = {}
    for place, some in groups.items():
        at = first[place]
        floor = relative(found[at + len(some)], found[0]) if half else 0.0
        change = [relative(found[at + g], found[0]) for g in range(len(some))]
        out[place] = [
            max(c**2 - floor**2, 0.0) ** 0.5 / size / len(heads) ** 0.5
            for c, heads in zip(change, some, strict=True)
        ]
    return out


def entries_of(groups: Sequence[Any], exact: bool) -> int:
    """How many entries the groups of a place take: one more for rounding, unless it is `exact`."""
    return len(groups) + (not exact)


def faintest(call: AttentionCall, dense: Partial) -> Tensor:
    """What is left out where every few queries drop the keys they look at least, `DROPPED` of their
    attention in all: what selecting keys does, whatever the method.

    Its rows point where attention's errors point, and those of neighbouring tokens resemble each
    other; later layers average noise away, but not these.
    """
    q, k, v = (x[0].float() for x in (call.q, call.k, call.v))
    k, v = k[call.kv_of_head], v[call.kv_of_head]
    heads, n = q.shape[:2]
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    p = (q @ k.mT * call.scale).masked_fill(hidden, -torch.inf).softmax(-1)
    rows, keys = FAINT_CELL
    tall, wide = -(-n // rows), -(-n // keys)
    cells = pad(p, (0, wide * keys - n, 0, tall * rows - n)).reshape(heads, tall, rows, wide, keys)
    mass, at = (cells.sum((2, 4)) / rows).sort(-1)
    gone = torch.zeros_like(at, dtype=torch.bool).scatter(-1, at, mass.cumsum(-1) <= DROPPED)
    p = p * ~gone.repeat_interleave(rows, 1).repeat_interleave(keys, 2)[:, :n, :n]
    return p / p.sum(-1, keepdim=True).clamp(min=1e-9) @ v - dense.out[0].float()


def noise_like(values: Tensor, seed: int = 0) -> Tensor:
    """Noise fp32 whose rows (of the last dimension) have the L1 size of those of `values`."""
    generator = torch.Generator(device=values.device).manual_seed(seed)
    noise = torch.randn(values.shape, generator=generator, device=values.device)
    noise *= values.float().abs().sum(-1, keepdim=True) / noise.abs().sum(-1, keepdim=True)
    return noise


# -- one prompt -----------------------------------------------------------------------------------


@torch.inference_mode()
def _hidden(
    model: Any, samples: Sequence[Sample], rows: Sequence[np.ndarray], trims: bool
) -> tuple[list[Tensor], float]:
    """Last hidden states of each prompt at its `rows`, fp32 `[rows, C]`, and the milliseconds of
    the forward for each; where the last layer is trimmed, rows before them are left out there.
    """
    _, bare = adapter_for(model)
    ids = np.stack([s.ids for s in samples])
    synchronise(bare.device)
    begin = time.perf_counter()
    states = forward(model, ids, min(int(r.min()) for r in rows) if trims else 0)
    synchronise(bare.device)
    ms = 1e3 * (time.perf_counter() - begin) / len(samples)
    at = [torch.from_numpy(r).to(states.device) for r in rows]
    return [states[n, r].float() for n, r in enumerate(at)], ms


def _most(sample: Sample, dense_rows: int) -> int:
    """Scored rows of a text, so few that a trimmed layer leaves the others out, and that no more
    are dense than for a single row.
    """
    most = max(1, len(sample.ids) // TRIM_BELOW - 2)
    return min(most, max(1, dense_rows - 1)) if dense_rows else most


@torch.inference_mode()
def _logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of a few hidden states, fp32."""
    _, bare = adapter_for(model)
    head = bare.get_output_embeddings()
    weight = next(head.parameters())
    return head(hidden.to(weight.dtype).to(weight.device)).float()


def _answered(model: Any, sample: Sample, rows: np.ndarray, hidden: Tensor) -> list[bool]:
    """Which answers of a prompt are right."""
    if not sample.answers:
        return []
    best = [_logits(model, part).argmax(-1) for part in hidden.split(_ROWS)]
    predicted = np.full(len(sample.ids), -1)
    predicted[rows] = torch.cat(best).cpu().numpy()
    return right_answers(sample, predicted)


def _predictions(model: Any, dense: Reference, hidden: Tensor) -> dict[str, float]:
    """Mean KL(dense ‖ sparse) of the next-token distributions, and what the tokens that do follow
    cost on both sides; in nats a token.
    """
    total, ids, places = hidden.new_zeros(3), dense.sample.ids, dense.rows + 1
    there = places < len(ids)  # nothing follows a last token
    known = torch.from_numpy(there).to(hidden.device)
    follows = ids[np.minimum(places, len(ids) - 1)].astype(np.int64)
    follows = torch.from_numpy(follows).to(hidden.device)
    sides = (t.split(_ROWS) for t in (dense.hidden, hidden, follows, known))
    for before, now, token, counts in zip(*sides, strict=True):
        p, q = (_logits(model, x).log_softmax(-1) for x in (before, now))
        total[0] += (p.exp() * (p - q)).sum()
        for n, side in enumerate((q, p), 1):
            total[n] -= (side.gather(-1, token[:, None])[:, 0] * counts).sum()
    kl, nats, dense_nats = total.tolist()
    rows, those = len(hidden), max(int(there.sum()), 1)
    return {"kl": kl / rows, "nats": nats / those, "dense_nats": dense_nats / those}
