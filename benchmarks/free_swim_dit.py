"""FreeSwim's dual path at full size: against both of its passes by hand, and what it costs.

Wan2.1-1.3B's configuration with random weights at 480 × 832 and 81 frames (32,760 tokens), windows
of a third of the picture. A forward of the dual path is compared with a full pass and a windowed
one whose cross-attention is put in by hooks, once with the kernels that dispatch chooses and once
with torch's reference of the block kernels. Then whole denoisings are timed: dense, window alone,
and the dual path with a full pass at one of two steps, whose time should be that of the windowed
denoising and of half a dense one; all compiled by repeated blocks.

    python benchmarks/free_swim_dit.py --out benchmarks/results/free-swim-h100.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from denoise_dit import built, compiled
from torch import Tensor

import accelkit
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings
from accelkit.calibration.evaluation.quality import relative
from accelkit.calibration.results import environment
from accelkit.patches.methods.free_swim import FreeSwim
from accelkit.patches.methods.free_swim_twin import FreeSwimTwin

WINDOW = FreeSwim(base=(11, 20))
FULL = WINDOW.model_copy(update={"windowed": False})


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Attention kernels of this name for every patched call; None: as dispatch chooses."""
    if name is not None:
        os.environ["ACCELKIT_KERNEL"] = name
    try:
        yield
    finally:
        os.environ.pop("ACCELKIT_KERNEL", None)


def forward_of(pipe: Any, size: Settings, shot: Shot) -> dict[str, Any]:
    """What the denoiser is given in the first forward of a denoising."""
    given: list[dict[str, Any]] = []

    def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs)

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    video.run(pipe, size, shot)
    hook.remove()
    return given[0]


def by_hand(pipe: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The windowed prediction alone, and told by a full pass."""
    crossed = [block.attn2.to_out[0] for block in pipe.transformer.blocks]
    told: dict[Any, Tensor] = {}
    with accelkit.patch(pipe, FULL):
        hooks = [
            m.register_forward_pre_hook(lambda m, args: told.update({m: args[0]})) for m in crossed
        ]
        pipe.transformer(**given)
        for hook in hooks:
            hook.remove()
    with accelkit.patch(pipe, WINDOW):
        alone = pipe.transformer(**given)[0]
        hooks = [m.register_forward_pre_hook(lambda m, _: (told[m],)) for m in crossed]
        expected = pipe.transformer(**given)[0]
        for hook in hooks:
            hook.remove()
    return alone, expected


@torch.inference_mode()
def compared(layers: int, frames: int, device: str) -> dict[str, Any]:
    """Relative errors of the dual path: to its passes by hand, to those with the reference kernel,
    and for scale what the full pass changes at all.
    """
    pipe, size, shot = built("wan", (layers,), device)
    for block in pipe.transformer.blocks:  # random weights hardly ask anything of the text
        block.attn2.norm_q.weight.data.mul_(8)
        block.attn2.to_out[0].weight.data.mul_(8)
    given = forward_of(pipe, Settings(size.height, size.width, frames, 2), shot)
    with accelkit.patch(pipe, [WINDOW, FreeSwimTwin()]):
        found = pipe.transformer(**given)[0].float()
    alone, expected = by_hand(pipe, given)
    with backend("reference"):
        slow_alone, slow = by_hand(pipe, given)
    return {
        "layers": layers,
        "tokens": given["hidden_states"].shape[2:].numel() // 4,
        "equal_to_both_passes_by_hand": bool(torch.equal(found, expected.float())),
        "error_to_reference_kernel": relative(found, slow.float()),
        "window_alone_to_reference_kernel": relative(alone.float(), slow_alone.float()),
        "changed_by_the_full_pass": relative(found, alone.float()),
    }


def timed(layers: int, steps: int, device: str, size: Settings | None) -> dict[str, float]:
    """Seconds of whole denoisings, compiled by repeated blocks."""
    pipe, whole, shot = built("wan", (layers,), device)
    whole = size or whole
    plans = {
        "dense": None, "window": [WINDOW], "dual": [WINDOW, FreeSwimTwin(every=2, until_step=steps)]
    }  # fmt: skip
    seconds = {}
    for name, methods in plans.items():
        opened = nullcontext() if methods is None else accelkit.patch(pipe, methods)
        with opened, compiled(pipe, True):
            for number in (4, steps):  # the first one compiles and warms up
                run = Settings(whole.height, whole.width, whole.num_frames, number)
                seconds[name] = video.run(pipe, run, shot).ends[-1]
        print(f"{name}: {seconds[name]:.3f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--compared-layers", type=int, default=4)
    parser.add_argument("--compared-frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=3, help="height width frames, of what is timed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "title": "FreeSwim's dual path at Wan2.1-1.3B shapes, random weights",
        "note": "By `benchmarks/free_swim_dit.py`: bf16, windows of 11 × 20 of 30 × 52 places over "
        "all frames, denoisings compiled by repeated blocks; `expected_s` is the windowed one and "
        "a full pass at half the steps. "
        "Compared: a forward of few layers, whose cross-attention is made to ask more of the text.",
        "environment": environment(torch.device(args.device)),
    }
    row = compared(args.compared_layers, args.compared_frames, args.device)
    found["rows"] = [row]
    print(json.dumps(row, indent=1), flush=True)
    args.out.write_text(json.dumps(found, indent=1))
    size = Settings(*args.size) if args.size else None
    seconds = timed(args.layers, args.steps, args.device, size)
    expected = seconds["window"] + seconds["dense"] / 2
    row |= {
        "timed_layers": args.layers, "steps": args.steps,
        **{f"{k}_s": v for k, v in seconds.items()},
        "expected_s": expected, "over_expected": seconds["dual"] / expected,
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
