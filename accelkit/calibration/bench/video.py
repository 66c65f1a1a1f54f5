"""One prompt through a dense and a patched pipeline (`accelkit patch`), and their speed against
other ways of saving time (`accelkit bench`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelkit.calibration.bench.prefill import heads_by_policy, serves
from accelkit.calibration.candidates import stored
from accelkit.calibration.denoise import look as denoise_look
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.video import Settings, Shot, Take
from accelkit.calibration.fit import fit
from accelkit.calibration.show import frames
from accelkit.errors import GateFailedError, InvalidInputError, NothingPatchedError
from accelkit.patches.adapters import facts
from accelkit.patches.call import Clock
from accelkit.patches.method import BlockMethod, load
from accelkit.patches.patch import patch
from accelkit.patches.plan import LayerPlan, Plan, Policy

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Side:
    """A run with the plan or without: seconds in all, and of the denoising alone."""

    seconds: float
    denoise_seconds: float
    file: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Both sides of one prompt. `fidelity` is how close the patched result comes, equal seed."""

    prompt: str
    seed: int
    patched: Side
    dense: Side | None
    fidelity: dict[str, float | None]
    sheet: str | None
    calls: int
    sparse_calls: int

    @property
    def speedup(self) -> float | None:
        """Ratio of the denoising's seconds."""
        return self.dense.denoise_seconds / self.patched.denoise_seconds if self.dense else None

    def files(self) -> dict[str, str]:
        """What was written."""
        sides = {"patched": self.patched, "dense": self.dense}
        found = {k: s.file for k, s in sides.items() if s and s.file}
        return found | ({"sheet": self.sheet} if self.sheet else {})

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"speedup": self.speedup}


def compare(
    pipe: Any,
    plan: Plan,
    settings: Settings,
    shot: Shot,
    *,
    dense: bool = True,
    repeat: int = 1,
    output: Path | None = None,
    fps: float = 16.0,
) -> Comparison:
    """Run a prompt with the plan and, if asked, without it; write both and a contact sheet beside
    `output`. The pipeline is unpatched afterwards.

    Raises:
        NothingPatchedError: no call ran sparse and no step was cached.
        InvalidInputError: nothing can be written there.
    """
    if repeat < 1:
        raise InvalidInputError("--repeat must be at least 1")
    if output is not None and getattr(pipe, "vae", None) is None:
        raise InvalidInputError(
            f"{type(pipe).__name__} has no decoder, so there is nothing to write"
        )

    def takes() -> list[Take]:
        return [video.run(pipe, settings, shot, decode=True) for _ in range(repeat)]

    own = takes() if dense else []
    with patch(pipe, plan) as handle:
        ours = takes()
        report = handle.report()
    cached = any(layer.block for layer in plan.sites.values())
    if not report.sparse_calls and not cached and handle.enabled:
        planned = any(layer.rules for layer in plan.sites.values())
        about = str(plan.measured.get("note", "the plan is dense everywhere"))
        raise NothingPatchedError(
            f"none of {report.calls} attention calls ran sparse ({dict(report.dense)}); "
            + (f"the plan begins at {plan.limits.min_length} tokens" if planned else about)
        )
    files: dict[str, str] = {}
    if output is not None:
        files["patched"] = str(frames.write(_frames(ours[0]), output, fps))
        if own:
            beside = output.with_stem(output.stem + "-dense")
            files["dense"] = str(frames.write(_frames(own[0]), beside, fps))
            sheet = output.with_name(output.stem + "-sheet.png")
            files["sheet"] = str(frames.contact_sheet(_frames(own[0]), _frames(ours[0]), sheet))
    return Comparison(
        shot.name, shot.seed, _side(ours, files.get("patched")),
        _side(own, files.get("dense")) if own else None,
        video.fidelity(ours[0], own[0]) if own else {}, files.get("sheet"),
        report.calls, report.sparse_calls,
    )  # fmt: skip


def _frames(take: Take) -> Any:
    assert take.frames is not None
    return take.frames


def _side(takes: Sequence[Take], file: str | None) -> Side:
    seconds = statistics.median(t.seconds for t in takes)
    return Side(seconds, statistics.median(t.ends[-1] for t in takes), file)


def table(result: Comparison) -> Table:
    """What a person reads: both sides next to each other."""
    from rich.table import Table

    grid = Table(title=result.prompt, title_justify="left")
    sides = [(n, s) for n, s in (("dense", result.dense), ("patched", result.patched)) if s]
    grid.add_column("")
    for name, _ in sides:
        grid.add_column(name, justify="right", overflow="fold")
    grid.add_row("seconds", *(f"{s.seconds:.2f}" for _, s in sides))
    grid.add_row("of them denoising", *(f"{s.denoise_seconds:.2f}" for _, s in sides))
    blank = [""] * (len(sides) - 1)
    calls = f"{result.sparse_calls} of {result.calls}"
    rows = (
        ("times faster", result.speedup, "{:.2f}"),
        ("attention calls that ran sparse", calls, "{}"),
        ("error of the final latents", result.fidelity.get("error"), "{:.2%}"),
        ("PSNR", result.fidelity.get("psnr"), "{:.2f} dB"),
        ("SSIM", result.fidelity.get("ssim"), "{:.4f}"),
        ("LPIPS", result.fidelity.get("lpips"), "{:.4f}"),
    )
    for name, value, form in rows:
        if value is not None:
            grid.add_row(name, *blank, form.format(value))
    return grid


# -- speed ----------------------------------------------------------------------------------------


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
    caches alone, and the plan; with its ratio to each. Nothing is decoded.
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
