"""Calibrate a video pipeline, run it patched, and put both videos side by side.

    python examples/video.py [PIPELINE] [--prompt "…"] [--height 64 --width 64 --frames 25]

PIPELINE is a hub id or a folder; by default the small Wan beside this file."""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import accelkit
from accelkit.calibration.denoise import fidelity, shots, video
from accelkit.calibration.show import frames
from accelkit.console import names, share

HERE = Path(__file__).parent
PROMPTS = [
    "a red circle moving left on a gray background",
    "a blue cross moving up on a white background",
    "a yellow triangle moving down on a black background",
    "a green square moving right",
]
SIZE = {"height": 64, "width": 64, "frames": 25, "steps": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", nargs="?", default=str(HERE / "models" / "tiny-wan"))
    parser.add_argument("--prompt", default="a blue circle moving right on a white background")
    for name, default in (SIZE | {"guidance": 3.0, "preset": "balanced"}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--budget", type=share, default="10%", help="error that may be spent")
    parser.add_argument("--methods", type=names, help="such as psa,mag_cache; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/video"))
    args = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", None)
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, dtype=dtype).to(device)
    size = {"height": args.height, "width": args.width, "num_frames": args.frames}
    arguments = [{"prompt": p, "guidance_scale": args.guidance} for p in (*PROMPTS, args.prompt)]
    chosen = {"budget": args.budget, "methods": args.methods, "preset": args.preset}
    plan = accelkit.calibrate(pipe, arguments[:-1], **size, steps=args.steps, **chosen)
    plan.save_pretrained(args.out)
    shot = shots.Shot(args.prompt, arguments[-1], 0)
    settings = video.Settings(**size, num_inference_steps=args.steps)
    dense = video.run(pipe, settings, shot, decode=True)
    with accelkit.patch(pipe, plan):
        patched = video.run(pipe, settings, shot, decode=True)

    for name, take in (("dense", dense), ("patched", patched)):
        print(f"{frames.write(take.frames, args.out / f'{name}.mp4')}: {take.ends[-1]:.2f} s")
    print(frames.contact_sheet(dense.frames, patched.frames, args.out / "sheet.png"))
    gain = dense.ends[-1] / patched.ends[-1]
    print(f"{gain:.2f} × as fast,", fidelity.fidelity(patched, dense))


if __name__ == "__main__":
    main()
