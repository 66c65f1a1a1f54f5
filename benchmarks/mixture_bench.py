"""A model with its held-out prompts, for `mixture.py`: what a plan loses there, how long it takes.

Prompts are the built-in tasks on text that calibration never draws from: one of each task and
several texts, and with `answers` as many more of each task as ask for that many answers.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from accelkit.calibration import memory
from accelkit.calibration.capture import forward
from accelkit.calibration.evaluation import quality
from accelkit.calibration.evaluation.corpus import source_corpus
from accelkit.calibration.evaluation.tasks import Sample, make
from accelkit.calibration.timing import times_ms
from accelkit.patches.method import Method, load
from accelkit.patches.patch import disabled, patch, plan_of
from accelkit.patches.plan import Limits, Plan

SETTINGS = 8
HELD_OUT_SEED = 9_000
"""Far from the seeds that calibration draws and checks with."""
OPTIONS = {"qk": ("fp8", "int8"), "pv": ("fp8", "native"), "smooth_k": (False, True)}
"""Settings of methods that answer with the arithmetic only."""
SEVERAL = {"text": 3}
"""Prompts of tasks that differ much from prompt to prompt; the others have one."""
FIRST = ("text", "key_value", "variables")
"""Tasks that sparse attention fails first."""
DENSE = "dense"


def settings_of(name: str) -> list[Method]:
    """At least eight global settings of a method, from sparsest to densest: its dial's values and
    points between them.
    """
    cls = load(name)
    if cls.dial is None:
        return [cls(**dict(zip(OPTIONS, v, strict=True))) for v in product(*OPTIONS.values())]
    values = sorted(cls.dial.values)
    whole = all(isinstance(v, int) for v in values)
    while len(values) < SETTINGS:
        between = [(b / a, math.sqrt(a * b)) for a, b in pairwise(values)]
        between = [(gap, round(v) if whole else v) for gap, v in between]
        values = sorted([*values, max(m for m in between if m[1] not in values)[1]])
    if cls.dial.values[0] > cls.dial.values[-1]:
        values.reverse()
    return [cls(**{cls.dial.field: v}) for v in values]


def label(method: Method) -> str:
    """What a setting is called: the method and its dial's value."""
    dial = type(method).dial
    values = {k: getattr(method, k) for k in ((dial.field,) if dial else OPTIONS)}
    shown = ", ".join(f"{k}={v:.4g}" if dial else f"{k}={v}" for k, v in values.items())
    return f"{method.kind}({shown})"


def prompts(tasks: Sequence[str], tokens: int, answers: int, tokenizer: Any) -> list[Sample]:
    """Held-out prompts, one of each task before the second of any, those that fail first first."""
    unseen = source_corpus(held_out=True)
    order = sorted(tasks, key=lambda t: FIRST.index(t) if t in FIRST else len(FIRST))

    def drawn(task: str) -> Iterator[tuple[int, Sample]]:
        place, asked, seed = order.index(task), 0, HELD_OUT_SEED + 1_000 * order.index(task)
        for n in range(10_000):
            sample = make(task, tokens, seed + n, unseen, tokenizer)
            several = SEVERAL.get(task, 1)
            yield (max(0, n + 1 - several) * len(order) + place, sample)
            asked += len(sample.answers)
            if n + 1 >= several and (asked >= answers or not sample.answers):
                return

    found = [pair for task in order for pair in drawn(task)]
    return [sample for _, sample in sorted(found, key=lambda pair: pair[0])]


class Bench:
    """The model, its prompts, and the dense side of everything, which is run when first needed."""

    def __init__(
        self, model: str, tasks: Sequence[str], tokens: int, batch: int, answers: int,
        device: str, dtype: str | None, most: float,
    ) -> None:  # fmt: skip
        self.most, self.batch = most, batch
        wanted = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
        if device == "cpu":
            memory.keep()  # as the commands do: fresh pages would be timed with every side
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=wanted)
        self.model = loaded.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.samples = prompts(tasks, tokens, answers, self.tokenizer)
        self.limits = Limits(min_length=tokens // 2)
        first = [self.samples[i % len(self.samples)].ids for i in range(batch)]
        self.ids = np.stack(first).astype(np.int64)
        self.gpu = self.model.device.type == "cuda"
        self.references: dict[int, quality.Reference] = {}
        self.clock_ms()
        self.dense_ms = [self.clock_ms()]

    def single(self, method: Method) -> Plan:
        """A method's setting in every head, with the least minimum length of a calibrated plan."""
        plan = plan_of(self.model, method)
        return plan.model_copy(update={"limits": self.limits}).with_tables(plan.tables)

    def clock_ms(self) -> float:
        """Milliseconds of one prefill of the batch."""
        return times_ms(lambda: forward(self.model, self.ids), 1, 0, self.model.device)[0]

    def rows(self, some: Sequence[int]) -> list[dict[str, Any]]:
        """What the patched model loses on prompts that share a forward."""
        new = [n for n in some if n not in self.references]
        if new:
            with disabled(self.model):
                found = quality.references(self.model, [self.samples[n] for n in new])
            self.references |= dict(zip(new, found, strict=True))
        return quality.compared(self.model, [self.references[n] for n in some])

    def over(self, rows: Sequence[dict[str, Any]], most: float) -> bool:
        """Whether the last row's task is above an error already, whatever its other prompts say."""
        task = rows[-1]["task"]
        count = sum(s.task == task for s in self.samples)
        return sum(r["error"] for r in rows if r["task"] == task) > most * count

    def slow(self, ms: float) -> bool:
        """Whether this reading tells that a setting is no rival; asks the clock again in doubt."""
        if ms > self.most * min(self.dense_ms):
            with disabled(self.model):
                self.dense_ms.append(self.clock_ms())
            return ms > self.most * self.dense_ms[-1]
        return False

    def measure(self, plan: Plan, most_error: float | None = None) -> dict[str, Any]:
        """A first reading of the clock, and what the plan loses. With `most_error`, `stopped` says
        why a setting was not followed to the last prompt.
        """
        rows: list[dict[str, Any]] = []
        ms, stopped, density = 0.0, None, None
        with patch(self.model, plan) as handle:
            if self.gpu:
                self.clock_ms()  # compiles
                ms = self.clock_ms()
            while len(rows) < len(self.samples) and not stopped:
                # The first prompt says the most of what is hopeless.
                end = min(len(rows) + self.batch, len(self.samples)) if rows else 1
                for row in self.rows(range(len(rows), end)):
                    rows.append(row)
                    ms = ms or row["ms"]  # a single prompt tells as much
                    if most_error is not None and self.over(rows, most_error):
                        stopped = f"error of {row['task']} above {most_error:g}"
                    elif most_error is not None and len(rows) == 1 and self.slow(ms):
                        stopped = "slower than dense attention"
                    if stopped:
                        break
            if handle.report().sparse_calls == 0:
                stopped = "every call ran dense"
            if stopped is None:
                with handle.measuring():
                    forward(self.model, self.ids[:1])
                density = handle.report().density
        return {
            "ms": ms, "dense_ms": self.dense_ms[-1], "density": density, "stopped": stopped,
            **summary(rows),
        }  # fmt: skip

    def turn(self, plans: Mapping[str, Plan], backwards: bool) -> dict[str, float]:
        """Milliseconds of a dense prefill and of one with each plan; turns that go forwards and
        backwards let a drifting clock meet all sides alike.
        """
        sides: list[tuple[str, Plan | None]] = [(DENSE, None), *plans.items()]
        found: dict[str, float] = {}
        for name, plan in reversed(sides) if backwards else sides:
            with nullcontext() if plan is None else patch(self.model, plan):
                if self.gpu:
                    self.clock_ms()  # lists that follow from geometry are made once
                found[name] = self.clock_ms()
        return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prompts as a row of the table holds them: the worst task's mean error, the worst prompt's,
    fewest answers of a task that has any, and the points that the worst task lost.
    """
    tasks = quality.by_task(rows)
    for found in tasks.values():
        del found["bound"]
    asked = [t for t in tasks.values() if t["asked"]]
    return {
        "prompts": len(rows),
        "worst_error": max((t["error"] for t in tasks.values()), default=None),
        "worst_prompt": max((t["worst"] for t in tasks.values()), default=None),
        "answers": min((t["asked"] for t in asked), default=0),
        "points_lost": max((100 * t["lost"] / t["asked"] for t in asked), default=None),
        "tasks": tasks,
    }


def told(what: str, row: Mapping[str, Any]) -> None:
    """A line for whoever waits."""
    error = "–" if row["worst_error"] is None else f"{row['worst_error']:.4f}"
    times = f"{time.monotonic():.0f} {what}: {row['ms']:.1f} of {row['dense_ms']:.1f} ms"
    print(f"{times}, error {error}, {row['stopped'] or 'whole'}", file=sys.stderr, flush=True)
