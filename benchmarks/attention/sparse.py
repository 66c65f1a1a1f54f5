"""Block-sparse kernels over random lists, relative to dense cuDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from accelkit.kernels import dispatch
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.prepare import prepare
from attention.peers import dense_paths, flex
from attention.shapes import BLOCK, Shape, mixed, random_call, random_mask, visible_blocks
from attention.timing import milliseconds

ANY, OWN = (
    {0.5: 1.0, 0.25: 0.97, 0.1: 0.92, 0.05: 0.85},
    {0.5: 0.95, 0.25: 0.93, 0.1: 0.88, 0.05: 0.8},
)
FREE = {0.5: 1.05, 0.25: 1.0, 0.1: 0.95, 0.05: 0.9}

LIMIT = 1e-2
"""Relative error above which a kernel is wrong: it is not timed, and the run fails."""


LEFT_OUT: set[str] = set()
"""Backends and peers that are not measured."""


def able(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, **options: Any) -> list[str]:
    """Kernels that can serve a launch."""
    launch = prepare(q, k, v, index, **options)
    kernels = {n: refused for n, refused in dispatch.KERNELS.items() if n not in LEFT_OUT}
    return [name for name, refused in kernels.items() if refused(launch) is None]


def check(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, causal: bool, backends: list[str]
) -> dict[str, float]:
    """Relative error of a few query tiles against fp32 for each backend that runs."""
    tiles, bq = sorted({1, index.rows // 2, index.rows - 1}), index.size[0]
    at = torch.cat([torch.arange(t * bq, min(q.shape[2], (t + 1) * bq)) for t in tiles])
    one = [t[:1] for t in (q, k, v)]
    want = attend(*one, index, causal=causal, rows=tiles, backend="reference").out[:, :, at].float()
    errors = {}
    for backend in backends:
        try:
            got = attend(*one, index, causal=causal, backend=backend).out[:, :, at]
        except Exception as error:  # a peer that cannot run here must not end the others
            print(f"    {backend} cannot run: {type(error).__name__}: {error}"[:200], flush=True)
            continue
        errors[backend] = float((got.float() - want).norm() / want.norm())
        if not errors[backend] < LIMIT:
            print(f"    {backend} is wrong: relative error {errors[backend]}", flush=True)
    return errors


def right(errors: dict[str, float]) -> list[str]:
    """Backends that may be timed."""
    return [name for name, error in errors.items() if error < LIMIT]


@contextmanager
def lists_kept() -> Iterator[None]:
    """Lowered lists of any size stay with their index, so that the kernels alone are timed."""
    from accelkit.kernels._triton import lower

    before, lower._KEEP_BYTES = lower._KEEP_BYTES, 1 << 40
    try:
        yield
    finally:
        lower._KEEP_BYTES = before


def rates(
    shape: Shape,
    cases: tuple[tuple[tuple[int, int], float | str], ...],
    targets: dict[float, float],
    budget_ms: float,
) -> Iterator[dict[str, Any]]:
    """Block-sparse kernels over random lists, relative to dense cuDNN."""
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    paths = {n: run for n, run in dense_paths(shape, q, k, v).items() if n not in LEFT_OUT}
    dense = milliseconds(paths, budget_ms)
    dense_flops = 4 * shape.head_size * shape.pairs
    print(f"{shape.name}: dense " + "  ".join(f"{n} {t:.3f}" for n, t in dense.items()), flush=True)
    for size, density in cases:
        mask = random_mask(shape, size, density if isinstance(density, float) else 0.05, "cuda")
        index = BlockIndex.from_mask(mask, size)
        computed, every = mask, visible_blocks(shape, size, "cuda")
        if density == "mixed":
            index, computed = mixed(index, 4), mask.clone()
            computed[:, ::4] = every
        share = float(computed.sum()) / float(every.sum() * shape.heads)
        names = able(q, k, v, index, causal=shape.causal)
        errors = check(q, k, v, index, shape.causal, names)
        names = right(errors)
        work: dict[str, Callable[[], object]] = {"dense": paths["cudnn"]}
        for name in names:
            work[name] = partial(attend, q, k, v, index, causal=shape.causal, backend=name)
        work["call"] = lambda i=index: attend(q, k, v, replace(i), causal=shape.causal)
        if "flex" not in LEFT_OUT and size == BLOCK and density != "mixed":
            work["flex"] = flex(shape, mask, q, k, v)
        with lists_kept():
            ms = milliseconds(work, budget_ms)
        flops = 4.0 * shape.batch * float(computed.sum()) * size[0] * size[1] * shape.head_size
        rate = {n: (dense_flops if n == "dense" else flops) / t / 1e9 for n, t in ms.items()}
        ratio = {n: rate[n] / rate["dense"] for n in rate}
        cells = "  ".join(f"{n} {t:.3f} ({ratio[n]:.2f})" for n, t in ms.items())
        print(f"  {size} ρ={share:.3f} | {cells}", flush=True)
        yield {
            **asdict(shape),
            "unit": list(size),
            "wanted": density,
            "density": share,
            "errors": errors,
            "dense_ms": dense,
            "ms": ms,
            "tflops": rate,
            "ratio": ratio,
            "times_dense": {n: ms["dense"] / t for n, t in ms.items()},
            "target": targets.get(density) if isinstance(density, float) else None,
            "own_target": OWN.get(density) if isinstance(density, float) else None,
        }
