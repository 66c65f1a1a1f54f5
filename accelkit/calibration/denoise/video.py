"""What a pipeline is run on, how it is run, and how two results of equal seed are compared."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from accelkit.calibration.denoise.perceptual import lpips_of
from accelkit.calibration.evaluation.quality import relative, synchronise
from accelkit.errors import AccelkitError, InvalidInputError

FILES = (".txt", ".jsonl")
"""What names of files of prompts end with."""
BUILT_IN = (
    "a red fox running through fresh snow, low winter sun",
    "waves breaking on black rocks at dusk, slow motion",
    "a chef slicing vegetables in a bright kitchen, close-up",
    "an astronaut walking across a field of yellow flowers",
    "night traffic on a wet city street, neon signs, aerial view",
    "a paper boat drifting down a narrow stream",
)
CHECK_SEED = 500_000
"""Seeds of results to check on begin here, those to measure on are below."""


@dataclass(frozen=True)
class Shot:
    """One result to make: the pipeline's call arguments that are its own, and its seed."""

    name: str
    arguments: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Shots:
    """Shots to measure on and, with other seeds and where possible other prompts, to check on."""

    measure: tuple[Shot, ...]
    check: tuple[Shot, ...]
    about: str


def gather(data: Any, seed: int, measure: int, check: int) -> Shots:
    """At most `measure` and `check` shots.

    Args:
        data: None for built-in prompts; a file with a prompt in each line, or JSON lines of call
            arguments; one prompt; or a list of prompts and of dicts of call arguments, whose
            `seed` is taken if there is one.

    Raises:
        InvalidInputError: no prompt, or something that is none.
    """
    items = list(BUILT_IN) if data is None else _items(data)
    if not items:
        raise InvalidInputError("no prompts: expected at least one; None takes built-in ones")
    given = [dict(i) if isinstance(i, Mapping) else {"prompt": i} for i in items]
    for n, one in enumerate(given):
        if not one or not isinstance(one.get("prompt", ""), str):
            raise InvalidInputError(
                f"prompt {n + 1} is {items[n]!r:.80}; expected text, or a dict of call arguments "
                "with a text as 'prompt'"
            )
    first, second = (given[0::2], given[1::2]) if len(given) > 1 else (given, given)

    def shots(some: Sequence[dict[str, Any]], most: int, begin: int) -> tuple[Shot, ...]:
        out = []
        for n, one in enumerate(some[:most]):
            rest = {k: v for k, v in one.items() if k != "seed"}
            name = str(rest.get("prompt", f"prompt {n + 1}"))
            out.append(Shot(name[:80], rest, int(one.get("seed", begin + seed * 1000 + n))))
        return tuple(out)

    about = "built-in prompts" if data is None else f"{len(given)} of the user's"
    return Shots(shots(first, measure, 0), shots(second, check, CHECK_SEED), about)


def _items(data: Any) -> list[Any]:
    path = Path(data) if isinstance(data, Path) else None
    if isinstance(data, str) and "\n" not in data and len(data) < 1024:
        # A name that is no file is told rather than drawn.
        path = Path(data) if data.endswith(FILES) or Path(data).is_file() else None
    if path is None:
        if isinstance(data, str | Mapping):
            return [data] if data else []
        if not isinstance(data, Sequence):
            raise InvalidInputError(
                f"data is {type(data).__name__}; expected a file, a prompt or a list of prompts"
            )
        return list(data)
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        lines = [line for line in lines if line]
        found = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error}); expected a prompt in each line, or JSON lines"
        ) from error
    if not found:
        raise InvalidInputError(f"{path} is empty; expected a prompt in each line")
    return found


def together(shots: Sequence[Shot]) -> Shot | None:
    """One shot that makes all of them at once, from noise of its own; None where their arguments
    cannot be joined.
    """
    keys = shots[0].arguments.keys()
    if any(s.arguments.keys() != keys for s in shots):
        return None
    joined: dict[str, Any] = {}
    for key in keys:
        values = [s.arguments[key] for s in shots]
        if all(isinstance(v, str) for v in values):
            joined[key] = values
        elif all(isinstance(v, Tensor) and v.ndim and len(v) == 1 for v in values):
            if len({v.shape for v in values}) > 1:
                return None
            joined[key] = torch.cat(values)
        elif all(isinstance(v, int | float | None) and v == values[0] for v in values):
            joined[key] = values[0]
        else:
            return None
    return Shot(shots[0].name, joined, shots[0].seed)


# -- running a pipeline ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Size, length and steps that all runs of a pipeline share; None leaves its own default."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None

    def arguments(self, pipe: Any) -> dict[str, Any]:
        """Call arguments; what the pipeline has no parameter for is an error."""
        wanted = {k: v for k, v in vars(self).items() if v is not None}
        known = inspect.signature(type(pipe).__call__).parameters
        strange = [k for k in wanted if k not in known]
        if strange:
            raise InvalidInputError(
                f"{type(pipe).__name__} has no {' and no '.join(strange)}; leave it out"
            )
        return wanted

    def filled(self, pipe: Any) -> Settings:
        """With the pipeline's own defaults where it has numbers for them."""
        known = inspect.signature(type(pipe).__call__).parameters
        found = {
            k: getattr(known.get(k), "default", None) for k, v in vars(self).items() if v is None
        }
        return replace(self, **{k: v for k, v in found.items() if isinstance(v, int)})

    def smaller(self) -> list[Settings]:
        """Smaller frames and fewer of them, the smallest first, this size last."""
        found = []
        for side, time_ in ((4, 4), (4, 2), (2, 4), (2, 2), (2, 1)):
            if self.height is None or self.width is None:
                break
            if self.height % (16 * side) or self.width % (16 * side):
                continue
            frames = self.num_frames
            if frames is not None and frames > 8:
                frames = max(9, (frames - 1) // (8 * time_) * 8 + 1)
            one = replace(
                self, height=self.height // side, width=self.width // side, num_frames=frames
            )
            found.append(one)
        return [*found, self]


@dataclass
class Take:
    """What one run gave: final latents, frames fp32 `[F, H, W, 3]` in 0 … 1 (None without a
    decoder), seconds in all, and seconds until each step had ended.
    """

    latents: Tensor
    frames: np.ndarray | None
    seconds: float
    ends: list[float] = field(default_factory=list)
    whole: bool = True


class Enough(Exception):
    """Ends a run early; what there is so far is its result."""


@torch.inference_mode()
def run(
    pipe: Any,
    settings: Settings,
    shot: Shot,
    *,
    decode: bool = False,
    each: Callable[[int, Tensor], None] | None = None,
    **extra: Any,
) -> Take:
    """One run of a pipeline. `each(step, latents)` is called after every step; it may raise
    `Enough`.
    """
    decode = decode and getattr(pipe, "vae", None) is not None
    latents: list[Tensor] = []
    clock = _Clock(torch.device(pipe._execution_device))

    def see(value: Tensor, again: bool) -> None:
        latents[:] = [value]
        if again:
            return
        clock.mark()
        if each is not None:
            each(len(clock.marks) - 2, value)

    whole, frames = True, None
    with listening(pipe, see), _quiet(pipe):
        clock.mark()
        try:
            out = _called(pipe, settings, shot, output_type="np" if decode else "latent", **extra)
            if decode:
                frames = _frames(out)
        except Enough:
            whole = False
            pipe.maybe_free_model_hooks()
        clock.mark()
    *ends, seconds = clock.seconds()
    return Take(latents[0].float().clone(), frames, seconds, ends, whole)


class _Clock:
    """Marks in the device's own time, so that nobody has to wait for it on the way."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        synchronise(device)

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record(torch.cuda.current_stream(self.device))
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From the first mark to each of the others."""
        synchronise(self.device)
        first, *rest = self.marks
        if self.device.type == "cuda":
            return [first.elapsed_time(m) / 1e3 for m in rest]
        return [m - first for m in rest]


def _called(pipe: Any, settings: Settings, shot: Shot, **extra: Any) -> Any:
    """The pipeline's own call; arguments that it refuses are bad input, told in its words."""
    known = inspect.signature(type(pipe).__call__).parameters
    strange = [k for k in shot.arguments if k not in known]
    if strange:
        raise InvalidInputError(
            f"prompt {shot.name!r}: {type(pipe).__name__} has no argument {', '.join(strange)}; "
            f"it has {', '.join(k for k in known if k != 'self')}"
        )
    arguments = {**settings.arguments(pipe), **shot.arguments, **extra}
    try:
        return pipe(**arguments, generator=torch.Generator().manual_seed(shot.seed))
    except AccelkitError:
        raise
    except ValueError as error:
        raise InvalidInputError(
            f"{type(pipe).__name__} refuses what it was called with: {error}"
        ) from error


def begin(pipe: Any, settings: Settings, shot: Shot) -> None:
    """Run a pipeline until something raises `Enough`, and tidy up behind it."""
    try:
        with torch.inference_mode(), _quiet(pipe):
            _called(pipe, settings, shot, output_type="latent")
    except Enough:
        pipe.maybe_free_model_hooks()


@contextmanager
def listening(
    pipe: Any,
    see: Callable[[Tensor, bool], None],
    before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
) -> Iterator[None]:
    """While open, `see` gets the latents that each of the scheduler's steps gives, and whether it
    was another look at the same timestep; `before` gets the arguments, ahead of the step.
    """
    scheduler, own = pipe.scheduler, "step" in vars(pipe.scheduler)
    step = scheduler.step

    last: list[Any] = [None]

    @wraps(step)
    def listened(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(args, kwargs)
        found = step(*args, **kwargs)
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        again = timestep is not None and timestep is last[0]
        last[0] = timestep
        see(found[0] if isinstance(found, tuple) else found.prev_sample, again)
        return found

    scheduler.step = listened
    try:
        yield
    finally:
        if own:
            scheduler.step = step
        else:
            del scheduler.step


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar would write over ours."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _frames(out: Any) -> np.ndarray:
    """Frames fp32 `[F, H, W, 3]` of a pipeline's output, whose arrays have a batch in front."""
    found = getattr(out, "frames", None)
    found = np.asarray(getattr(out, "images", None) if found is None else found, np.float32)
    return found[0] if found.ndim == 5 else found


# -- comparing two results ------------------------------------------------------------------------


def fidelity(found: Take, true: Take) -> dict[str, float | None]:
    """How close a run comes to one of equal seed: relative L1 error and PSNR of the latents (peak:
    their range), and PSNR, SSIM and LPIPS (see `perceptual`) of the frames where both have some.
    """
    there = true.latents.to(found.latents.device)
    square = float((found.latents - there).square().mean())
    spread = float(true.latents.max() - true.latents.min()) or 1.0
    rows: dict[str, float | None] = {
        "error": relative(found.latents, there),
        "latent_psnr": decibels(square, spread),
        "psnr": None,
        "ssim": None,
        "lpips": None,
    }
    if found.frames is not None and true.frames is not None:
        rows["psnr"] = decibels(float(np.square(found.frames - true.frames).mean()), 1.0)
        rows["ssim"] = ssim(found.frames, true.frames, found.latents.device)
        rows["lpips"] = lpips_of(found.frames, true.frames)
    return rows


def decibels(square: float, peak: float) -> float:
    """PSNR of a mean square error; 100 dB stands for equal, −100 dB for what is not finite."""
    if not math.isfinite(square):
        return -100.0
    return min(100.0, 10 * math.log10(peak**2 / max(square, 1e-30)))


def ssim(a: np.ndarray, b: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Structural similarity of frames `[F, H, W, C]` in 0 … 1, computed on `device`: Gaussian
    window of 11 pixels and σ 1.5, mean over frames, pixels and channels (Wang et al. 2004).
    """
    x, y = (
        torch.from_numpy(f).to(device).permute(0, 3, 1, 2).flatten(0, 1)[:, None].double()
        for f in (a, b)
    )
    if min(x.shape[2:]) < 11:
        raise InvalidInputError(f"SSIM needs frames of 11 pixels a side; these are {a.shape[1:3]}")
    at = torch.arange(11, dtype=torch.float64, device=device) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    line = (line / line.sum())[None, None, None]

    def mean(image: Tensor) -> Tensor:
        # The window is a product of two lines.
        return functional.conv2d(functional.conv2d(image, line), line.mT)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * vxy + c2)
    return float((top / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
