"""Speed of a patched pipeline against dense ones and step caches (`accelkit bench`)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelkit.calibration.bench.served import heads_by_policy, serves
from accelkit.calibration.candidates import stored
from accelkit.calibration.denoise import look as denoise_look
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings
from accelkit.calibration.fit import fit
from accelkit.errors import GateFailedError, InvalidInputError
from accelkit.patches.adapters import facts
from accelkit.patches.call import Clock
from accelkit.patches.method import BlockMethod, load
from accelkit.patches.patch import patch
from accelkit.patches.plan import LayerPlan, Plan, Policy


def bench(
    pipe: Any,
    plan: Plan,
    settings: Settings,
    shot: Shot,
    *,
    repeat: int = 1,
    warmup: int = 1,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Seconds of a video and of a step for every path: the pipeline's own, cuDNN's attention, step
    caches alone, and the plan; with its ratio to each. Nothing is decoded. Raises
    `InvalidInputError` for fewer than one `repeat`.
    """
    if repeat < 1:
        raise InvalidInputError("--repeat must be at least 1")
    rows: list[dict[str, Any]] = []
    forwards = [0]
    for name, opened in _paths(pipe, plan).items():
        if progress:
            progress(name)
        with opened(), _counted(pipe, forwards if name == "own" else [0]):
            for _ in range(warmup):
                video.run(pipe, settings, shot)
            takes = [video.run(pipe, settings, shot) for _ in range(repeat)]
        seconds = statistics.median(t.ends[-1] for t in takes)
        row = {"path": name, "seconds": seconds, "seconds_a_step": seconds / len(takes[0].ends)}
        rows.append({**row, "runs": len(takes)})
    found = attention(pipe, settings, shot)
    spent = forwards[0] / (warmup + repeat) * found["attention_ms"] / 1e3
    found["attention_share"] = min(1.0, spent / rows[0]["seconds"])
    patched = rows[-1]["seconds"]
    return [{**r, "plan_is_faster_by": r["seconds"] / patched, **found} for r in rows]


def preview(pipe: Any, plan: Plan, settings: Settings) -> list[dict[str, Any]]:
    """What would run at each step, without running it: heads by policy at the calibrated size, and
    the backend with its reason. Steps with equal heads share a row.
    """
    total = settings.filled(pipe).num_inference_steps or plan.limits.steps or 1
    tokens = plan.limits.max_length or plan.limits.min_length
    name, component = next(iter(plan.fingerprint.components.items()))
    device = torch.device(pipe._execution_device)
    served = serves(component, getattr(pipe, name).dtype, device, causal=False)
    rows: list[dict[str, Any]] = []
    for step in range(total):
        heads = heads_by_policy(pipe, plan, tokens, Clock("denoise", step, total))
        if rows and rows[-1]["heads"] == heads:
            rows[-1]["steps"] = f"{rows[-1]['steps'].partition(' ')[0]} … {step + 1}"
        else:
            rows.append({"steps": f"{step + 1}", "tokens": tokens, "heads": heads, **served})
    return rows


def gate(rows: Sequence[dict[str, Any]], least: float) -> None:
    """Raise `GateFailedError` if the plan is not `least` times as fast as the best dense path."""
    dense = min((r for r in rows if r["path"] in ("own", "sdpa cudnn")), key=lambda r: r["seconds"])
    if dense["plan_is_faster_by"] < least:
        raise GateFailedError(
            f"{dense['plan_is_faster_by']:.2f} times as fast as {dense['path']!r}, wanted "
            f"{least:g}; take a larger size or calibrate with a larger budget"
        )


def _paths(pipe: Any, plan: Plan) -> dict[str, Callable[[], Any]]:
    paths: dict[str, Callable[[], Any]] = {"own": nullcontext}
    if torch.device(pipe._execution_device).type == "cuda":
        paths["sdpa cudnn"] = lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION])
    mine = [s.block for s in plan.sites.values() if s.block is not None]
    root = getattr(pipe, next(iter(plan.fingerprint.components)))
    if mine or hasattr(root, "enable_cache"):
        cache = mine[0] if mine else load("first_block_cache")()
        paths[f"{cache.kind} alone"] = lambda: patch(pipe, cache_alone(pipe, cache))  # type: ignore[arg-type]
    paths["plan"] = lambda: patch(pipe, plan)
    return paths


def cache_alone(pipe: Any, cache: BlockMethod) -> Plan:
    """A plan that changes nothing but the steps at which blocks run."""
    fingerprint, _ = facts(pipe)
    layers = dict.fromkeys(fingerprint.components, LayerPlan(block=cache))
    about = {"step_cache": stored(cache)}
    return Plan(fingerprint=fingerprint, policies=(Policy(),), sites=layers, calibration=about)


def attention(pipe: Any, settings: Settings, shot: Shot) -> dict[str, Any]:
    """Tokens of a call, and milliseconds that the best dense path takes for all attention of one
    forward of the denoiser, on random data.
    """
    seen = denoise_look.glance(pipe, settings, shot)
    fingerprint, _ = facts(pipe)
    size = next(iter(fingerprint.components.values()))
    root = getattr(pipe, next(iter(fingerprint.components)))
    device, tokens = torch.device(pipe._execution_device), max(seen["tokens"].values())
    shape = fit.Shape(size.q_heads, size.kv_heads, size.head_dim, batch=seen["batch"], causal=False)
    call = fit.random_call(shape, root.dtype, device, tokens)
    each = fit.dense_ms(call, lambda run: fit.clock(run, 3, device))
    return {"tokens": tokens, "attention_ms": each * len(seen["tokens"])}


@contextmanager
def _counted(pipe: Any, forwards: list[int]) -> Iterator[None]:
    """Add the denoisers' forwards to `forwards`."""

    def add(*_: Any) -> None:
        forwards[0] += 1

    hooks = [getattr(pipe, n).register_forward_hook(add) for n in facts(pipe)[0].components]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def bound(pipe: Any, settings: Settings, shot: Shot) -> list[dict[str, Any]]:
    """Attention's share of a step at this size, and how much faster it would be if attention cost
    nothing. Runs two steps; writes nothing.
    """
    forwards, two = [0], replace(settings, num_inference_steps=2)
    with _counted(pipe, forwards):
        video.run(pipe, two, shot)
        take = video.run(pipe, two, shot)
    found = attention(pipe, settings, shot)
    step = 1e3 * (take.ends[1] - take.ends[0])
    share = min(1.0, forwards[0] / 4 * found["attention_ms"] / step)
    rest = {"attention_share": share, "most_speedup": 1 / max(1 - share, 1e-3)}
    return [{**found, "step_ms": step, **rest}]
