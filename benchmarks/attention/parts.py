"""What is measured beside the dense time of a shape: skipping, gather, estimators, whole calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels import dispatch, scores, select
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex, ceil_div, plain_inputs
from attention.peers import dense_paths
from attention.shapes import (
    BLOCK,
    D64,
    FULL,
    LLM,
    LONG,
    NARROW,
    Shape,
    random_call,
    stripes,
    visible_blocks,
)
from attention.sparse import able, check, right
from attention.timing import milliseconds

OURS = ("triton", "gluon")


def part(what: str, ms: dict[str, float], dense: float, target: str) -> dict[str, Any]:
    """A measurement that stands beside the dense time of the whole shape."""
    best = min(ms.values())
    print(f"{what}: " + "  ".join(f"{n} {t:.3f}" for n, t in ms.items()) + f" | dense {dense:.2f}")
    return {
        "what": what,
        "ms": ms,
        "dense_ms": dense,
        "share_of_dense": best / dense,
        "times_dense": dense / best,
        "target": target,
    }


def skipping(budget_ms: float) -> Iterator[dict[str, Any]]:
    """Three quarters of the key blocks lie far below the row maximum; lists are dense."""
    yield from (_skipping(shape, budget_ms) for shape in (FULL, D64))


def _skipping(shape: Shape, budget_ms: float) -> dict[str, Any]:
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    weak = torch.arange(shape.tokens, device="cuda") // 128 % 4 != 0
    q[..., 0] = 4.0
    k[..., 0] = torch.where(weak, -5.0 * shape.head_size**0.5, 0.0).to(k.dtype)
    index = BlockIndex.dense(shape.heads, ceil_div(shape.tokens, 128), BLOCK, q.device)
    exact = attend(q, k, v, index, causal=False, backend="triton").out.float()
    work: dict[str, Callable[[], object]] = {"cudnn": dense_paths(shape, q, k, v)["cudnn"]}
    for name in able(q, k, v, index, causal=False, skip=1e-3):
        run = partial(attend, q, k, v, index, causal=False, skip=1e-3, backend=name)
        error = float((run().out.float() - exact).norm() / exact.norm())
        if not error < 1e-2:
            raise ValueError(f"skipping by {name} is wrong: relative error {error}")
        work[name] = run
    ms = milliseconds(work, budget_ms)
    what = f"softmax-skip, 75 % of the tiles skippable, {shape.name}"
    return part(what, ms, ms.pop("cudnn"), "1.5 ×")


def gathering(budget_ms: float) -> Iterator[dict[str, Any]]:
    """1,024 single keys for every 2,048 queries."""
    for shape in (LLM, LONG, NARROW):
        yield _gathered(shape, budget_ms)


def _gathered(shape: Shape, budget_ms: float) -> dict[str, Any]:
    call, index, pairs = stripes(shape, 1024)
    choice = dispatch.explain(*call, index)
    errors = check(*call, index, True, able(*call, index))
    work: dict[str, Callable[[], object]] = {"cudnn": dense_paths(shape, *call)["cudnn"]}
    for name in right(errors):  # each call orders its rows anew, as the first layer does
        work[name] = lambda name=name: attend(*call, replace(index), backend=name)
    ms = milliseconds(work, budget_ms)
    dense = ms.pop("cudnn")
    rates = {name: pairs / t / (shape.pairs / dense) for name, t in ms.items()}
    print("    rate " + "  ".join(f"{n} {r:.3f}" for n, r in rates.items()), flush=True)
    what = f"gather, 1,024 stripes for 2,048 queries, {shape.name}"
    return part(what, ms, dense, "rate 0.6") | {
        "backend": choice.backend, "why": choice.reason, "rate": rates[choice.backend],
        "rates": rates, "unit": list(index.size), "head_size": shape.head_size, "causal": True,
        "tokens": shape.tokens, "errors": errors,
    }  # fmt: skip


class Estimates:
    """Estimators of blocks at 128K with their selection and lists."""

    def __init__(self) -> None:
        self.q, self.k, self.v = random_call(LONG, "cuda", torch.bfloat16)
        self.call = plain_inputs(self.q, self.k, self.v, causal=True)

    def dense(self, budget_ms: float) -> float:
        """Milliseconds of dense cuDNN."""
        run = dense_paths(LONG, self.q, self.k, self.v)["cudnn"]
        return milliseconds({"cudnn": run}, budget_ms)["cudnn"]

    def listed(self, mask: Tensor) -> BlockIndex:
        return select.compact(select.force(mask, self.call, BLOCK), BLOCK)

    def pooled(self) -> BlockIndex:
        p = select.probabilities(scores.pooled(self.call, BLOCK))
        return self.listed(select.top_p(p, 0.9))

    def probe(self) -> BlockIndex:
        found = scores.probe(self.call, 64)
        lines = [select.top_p(x, 0.9) for x in (found.blocks(128), found.offset_blocks(128))]
        return self.listed(select.lines(self.call, *lines, BLOCK))

    def strided(self, qk: str = "native") -> BlockIndex:
        return self.listed(select.top_p(scores.strided(self.call, 8, BLOCK, qk), 0.9))

    def above(self, alpha: float) -> Tensor:
        """Blocks whose estimate is at least this share of their row's greatest."""
        return select.ratio_of_max(scores.rows_by_block_mean(self.call, BLOCK), alpha)

    def alpha_of(self, density: float) -> float:
        """The share for which so many of the visible blocks stay."""
        low, high = 0.0, 1.0
        every = visible_blocks(LONG, BLOCK, "cuda").sum() * LONG.heads
        for _ in range(12):
            alpha = (low + high) / 2
            stay = select.force(self.above(alpha), self.call, BLOCK).sum() / every
            low, high = (alpha, high) if float(stay) > density else (low, alpha)
        return high


def estimating(budget_ms: float) -> Iterator[dict[str, Any]]:
    """Estimate, selection and lists at 128K."""
    e = Estimates()
    dense = e.dense(budget_ms)
    runs: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
        "pooled": ("2 %", e.pooled, lambda: scores.pooled(e.call, BLOCK)),
        "probe of 64 rows": ("2 %", e.probe, lambda: scores.probe(e.call, 64)),
        "strided 8": ("6 %", e.strided, lambda: scores.strided(e.call, 8, BLOCK)),
        "strided 8, int8 cells": (
            "6 %",
            lambda: e.strided("int8"),
            lambda: scores.strided(e.call, 8, BLOCK, "int8"),
        ),
        "rows × block mean": (
            "–",
            lambda: e.listed(e.above(0.5)),
            lambda: scores.rows_by_block_mean(e.call, BLOCK),
        ),
    }
    for name, (target, run, score) in runs.items():
        ms = milliseconds({"estimate, selection, list": run}, budget_ms)
        alone = milliseconds({"estimate": score}, budget_ms)["estimate"]
        yield part(f"{name}, 128K", ms, dense, target) | {"estimate_ms": alone}


def whole_call(budget_ms: float) -> Iterator[dict[str, Any]]:
    """Estimate, lists and kernel at 128K when a tenth of the blocks stays, a new index each time:
    by what dispatch chooses, and by each kernel.
    """
    e = Estimates()
    alpha = e.alpha_of(0.1)
    index = e.listed(e.above(alpha))
    choice = dispatch.explain(e.q, e.k, e.v, index)
    errors = check(e.q, e.k, e.v, index, True, able(e.q, e.k, e.v, index))

    def run(backend: str | None) -> Callable[[], object]:
        return lambda: attend(e.q, e.k, e.v, e.listed(e.above(alpha)), backend=backend)

    work: dict[str, Callable[[], object]] = {
        "dense": dense_paths(LONG, e.q, e.k, e.v)["cudnn"],
        "dispatch": run(None),
        **{name: run(name) for name in right(errors)},
    }
    ms = milliseconds(work, budget_ms)
    dense = ms.pop("dense")
    for name, t in ms.items():
        what = f"whole call at density 0.1, 128K, {name}"
        why = {"backend": choice.backend, "why": choice.reason} if name == "dispatch" else {}
        yield (
            part(what, {name: t}, dense, "6 ×" if name in OURS else "7 ×")
            | why
            | {"errors": errors}
        )
