"""What a call pays before its kernel runs, on the GPU and on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from accelkit.calibration.timing import host_ms
from accelkit.kernels import dispatch
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex
from attention.parts import part
from attention.peers import dense_paths
from attention.shapes import BLOCK, D64, FULL, LLM, Shape, random_call, random_mask
from attention.timing import milliseconds

CALLS, ROUNDS = 20, 10


def preparing(budget_ms: float) -> Iterator[dict[str, Any]]:
    """Calls over lists that nothing ran before, as each layer of a dynamic method has them, beside
    calls over lists that were run, whose preparation is kept.
    """
    for shape, density in ((FULL, 0.05), (LLM, 0.05), (LLM, 0.1), (D64, 0.05)):
        yield _prepared(shape, density, budget_ms)


def _prepared(shape: Shape, density: float, budget_ms: float) -> dict[str, Any]:
    call = random_call(shape, "cuda", torch.bfloat16)
    index = BlockIndex.from_mask(random_mask(shape, BLOCK, density, "cuda"), BLOCK)
    backend = dispatch.explain(*call, index, causal=shape.causal).backend
    kept = partial(attend, *call, index, causal=shape.causal)

    def fresh() -> object:
        return attend(*call, replace(index), causal=shape.causal)

    work: dict[str, Callable[[], object]] = {"fresh": fresh, "kept": kept}
    ms = milliseconds(work | {"cudnn": dense_paths(shape, *call)["cudnn"]}, budget_ms)
    host = {name: host_us(run) for name, run in work.items()}
    spent = launched_us(fresh)
    del spent[max(spent, key=spent.__getitem__)]  # the attention kernel
    print(f"    host, µs {host}  on the GPU, µs {spent}", flush=True)
    what = f"call over new lists, density {density}, {shape.name}"
    return part(what, {"call": ms["fresh"]}, ms["cudnn"], "–") | {
        "backend": backend, "kept_ms": ms["kept"], "host_us": host, "preparing_us": spent,
    }  # fmt: skip


def host_us(run: Callable[[], object]) -> float:
    """Microseconds that the host takes to start the work, mean over calls that follow one another,
    the least of some rounds.
    """

    def calls() -> None:
        for _ in range(CALLS):
            run()

    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        found.append(1e3 * host_ms(calls) / CALLS)
    torch.cuda.synchronize()
    return min(found)


def launched_us(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel, copy and fill in a call, by name."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            spent[event.name] = spent.get(event.name, 0.0) + event.device_time_total / CALLS
    return spent
