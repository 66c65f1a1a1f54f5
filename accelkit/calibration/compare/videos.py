"""One prompt through a dense and a patched pipeline (`accelkit patch`): what it looks
like, how fast it is and how close it comes.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.fidelity import fidelity
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings, Take
from accelkit.calibration.show import frames
from accelkit.errors import InvalidInputError, NothingPatchedError, PlanTransferWarning
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


WARM = 4
"""Steps of a run before each side's own: kernels are compiled and chosen then."""


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
    `output`. A short run of each side before warms up. The pipeline is unpatched afterwards.

    Raises:
        NothingPatchedError: no call ran sparse and no step was cached.
        InvalidInputError: nothing can be written there.
    """
    if repeat < 1:
        raise InvalidInputError("--repeat must be at least 1")
    if output is not None:
        if getattr(pipe, "vae", None) is None:
            raise InvalidInputError(
                f"{type(pipe).__name__} has no decoder, so there is nothing to write"
            )
        frames.can_write(output, settings.filled(pipe).num_frames or 1)
    cached = any(layer.block for layer in plan.sites.values())
    if not cached and not any(layer.rules for layer in plan.sites.values()):
        raise NothingPatchedError(
            f"{plan.measured.get('note', 'the plan is dense everywhere')}; there is nothing to "
            "compare, calibrate with a larger budget or at a larger size"
        )

    def takes() -> list[Take]:
        return [video.run(pipe, settings, shot, decode=True) for _ in range(repeat)]

    if dense:
        _warm(pipe, settings, shot)
    own = takes() if dense else []
    with patch(pipe, plan):
        _warm(pipe, settings, shot)
    with patch(pipe, plan) as handle:  # another one, which counts and warns anew
        ours = takes()
        report = handle.report()
    if not report.sparse_calls and not cached and handle.enabled:
        raise NothingPatchedError(
            f"none of {report.calls} attention calls ran sparse ({dict(report.dense)}); the plan "
            f"begins at {plan.limits.min_length} tokens"
        )
    files = {} if output is None else _written(ours[0], own[0] if own else None, output, fps)
    return Comparison(
        shot.name, shot.seed, _side(ours, files.get("patched")),
        _side(own, files.get("dense")) if own else None,
        fidelity(ours[0], own[0]) if own else {}, files.get("sheet"),
        report.calls, report.sparse_calls,
    )  # fmt: skip


def _warm(pipe: Any, settings: Settings, shot: Shot) -> None:
    """A few steps, of which a plan has nothing to tell."""
    steps = settings.filled(pipe).num_inference_steps or WARM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanTransferWarning)
        video.run(pipe, replace(settings, num_inference_steps=min(WARM, steps)), shot)


def _written(patched: Take, dense: Take | None, output: Path, fps: float) -> dict[str, str]:
    """Write `output` and beside it, where there is a dense side, its frames and the contact sheet;
    the files by what they show.
    """
    files = {"patched": str(frames.write(_frames(patched), output, fps))}
    if dense is not None:
        beside = output.with_stem(output.stem + "-dense")
        files["dense"] = str(frames.write(_frames(dense), beside, fps))
        sheet = output.with_name(output.stem + "-sheet.png")
        files["sheet"] = str(frames.contact_sheet(_frames(dense), _frames(patched), sheet))
    return files


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
    grid.add_row("in all, seconds", *(f"{s.seconds:.2f}" for _, s in sides))
    grid.add_row("denoising alone, seconds", *(f"{s.denoise_seconds:.2f}" for _, s in sides))
    blank = [""] * (len(sides) - 1)
    calls = f"{result.sparse_calls} of {result.calls}"
    rows = (
        ("faster", result.speedup, "{:.2f} ×"),
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
