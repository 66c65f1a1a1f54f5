#!/usr/bin/env python3
"""Score the video pipeline in ``examples/models/tiny-wan`` and write its model card.

    python examples/train/tiny_wan_scores.py DIR [--report DIR] [--prompts 100]

Draws held-out prompts (see ``shapes.py``) with the saved pipeline, asks the detector what each
video shows, and writes README.md into DIR; scores as JSON and pictures go to the report directory.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import shapes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

Grid = tuple[int, int, int]  # latent frames, rows and columns


def pixels(grid: Grid) -> Grid:
    """Frames, height and width of the video whose latents have this grid."""
    return 2 * grid[0] - 1, 2 * grid[1], 2 * grid[2]


def load(out: Path, device: str) -> WanPipeline:
    """The saved pipeline as it is used: bfloat16 on a GPU, its autoencoder in float32."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vae = AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(out, vae=vae, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sheet(videos: list[Tensor], path: Path, columns: int = 7) -> None:
    """A picture with one video a row, `columns` frames of each, two videos side by side."""
    from PIL import Image

    rows = []
    for video in videos:
        picked = video[torch.linspace(0, len(video) - 1, columns).long()]
        rows.append(F.pad(torch.cat(list(picked), 1), (0, 0, 4, 4, 2, 2), value=1.0))
    half = len(rows) // 2
    image = torch.cat((torch.cat(rows[:half], 0), torch.cat(rows[half : 2 * half], 0)), 1)
    Image.fromarray((image * 255).round().byte().numpy()).save(path)


@torch.no_grad()
def decibels(pipe: WanPipeline, device: str, n: int) -> float:
    """PSNR of the autoencoder on n new clips, through the pipeline's own encode and decode."""
    rng, generator = random.Random(10**6), torch.Generator(device).manual_seed(10**6)
    errors: list[float] = []
    for _ in range(n // 4):
        scenes = [shapes.random_scene(rng, 1, True) for _ in range(4)]
        video = shapes.draw(scenes, *pixels((13, 32, 32)), generator)
        again = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode()).sample
        errors += ((again - video) / 2).square().mean((1, 2, 3, 4)).tolist()
    return sum(-10 * math.log10(e) for e in errors) / len(errors)


def measure(
    pipe: WanPipeline,
    grid: Grid,
    n: int,
    seed: int,
    steps: int = 20,
    guidance: float = 3.0,
) -> tuple[dict[str, Any], list[Tensor]]:
    """The detector's scores on n held-out prompts, and the first videos.

    Returns counts of right videos by attribute (see `shapes.score`), and those that failed.
    """
    rng = random.Random(seed)
    scenes = [shapes.random_scene(rng, 1, True) for _ in range(n)]
    frames, height, width = pixels(grid)
    device = pipe.device.type
    videos: list[Tensor] = []
    begun = time.time()
    for i in range(0, n, 25):
        generator = torch.Generator(device).manual_seed(seed + i)
        prompts = [s.prompt for s in scenes[i : i + 25]]
        out = pipe(
            prompts,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
        )
        videos += list(torch.from_numpy(out.frames))
    seconds = time.time() - begun
    seen = [shapes.look(v) for v in videos]
    marks = [shapes.score(a, s) for a, s in zip(scenes, seen, strict=True)]
    report: dict[str, Any] = {
        "pixels": [frames, height, width],
        "latents": list(grid),
        "n": n,
        "steps": steps,
        "guidance": guidance,
        "seconds": round(seconds, 2),
        "right": {k: sum(m[k] for m in marks) for k in marks[0]},
        "wrong": [
            [a.prompt, s.prompt]
            for a, s, m in zip(scenes, seen, marks, strict=True)
            if not m["all"]
        ],
    }
    return report, videos[:16]


CARD = """---
license: apache-2.0
pipeline_tag: text-to-video
library_name: diffusers
---

# tiny-wan

A Wan video pipeline of {parameters:,} parameters, trained from scratch to draw a coloured shape
that moves over a plain background. It exists so that sparse attention for video diffusion can be
calibrated, tested and timed with a really trained model in seconds; it draws nothing else.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("examples/models/tiny-wan")
pipe("a red circle moving left on a gray background",
     height=64, width=64, num_frames=25, num_inference_steps=20, guidance_scale=3.0)
```

- Transformer ({transformer:,} parameters): {layers} layers, {heads} heads of {head_dim},
  feed-forward size {ffn}, patches of 1×2×2 latents of {channels} channels, normalised queries and
  keys, rotary positions.
- Autoencoder ({vae:,}): `AutoencoderKLWan` that halves frames, rows and columns; {psnr:.1f} dB
  PSNR on {psnr_n} new clips of 25 frames of 64×64.
- Text encoder ({text_encoder:,}): two `UMT5EncoderModel` layers over a vocabulary of words.
- Scheduler: UniPC with flow shift {shift:g}. Trained for prompts padded to 512 positions, as
  `WanPipeline` does; it was not trained for another `max_sequence_length`.
- Prompts: "a COLOUR SHAPE moving DIRECTION", perhaps "on a BACKGROUND background" at the end.
  Shapes: {shapes}. Colours: {colours}. Directions: {directions}.
  Backgrounds: {backgrounds}. An empty prompt draws anything.
- Sizes: height and width are multiples of 16, frames are odd; two pixels or two frames make one
  latent, and the first frame is alone. It was trained on the sizes in the table, all square.
- Trained by `examples/train/tiny_wan.py`, one line a run:
{how}
- `examples/train/tiny_wan_scores.py` measured the scores below and wrote this file.

## Scores

Videos in which the detector of `examples/train/shapes.py` finds everything right, drawn with dense
attention in bfloat16 from prompts whose combinations of shape, colour and direction were all left
out of training ({held_out} of {combinations}); backgrounds and noise vary. `all` needs shape,
colour and direction right and no thing of another colour. The detector takes all pixels of a
colour for one thing: a stray part counts against the shape, not as a second thing.

{table}

Wrong attributes in all these videos: {failures}.
"""


def write_card(pipe: WanPipeline, report: dict[str, Any], out: Path) -> None:
    """README.md with the measured scores."""
    reports = report["scores"]
    runs = json.loads((out / "training.json").read_text())
    how = "\n".join(
        f"  - {r['part']}: {r['seconds']} s, {r['steps']} steps, one {r['device']}" for r in runs
    )
    every = [
        shapes.Thing(s, c, d)
        for s in shapes.SHAPES
        for c in shapes.COLOURS
        for d in shapes.DIRECTIONS
    ]
    counts = {
        name: sum(p.numel() for p in getattr(pipe, name).parameters())
        for name in ("transformer", "vae", "text_encoder")
    }
    names = list(reports[0]["right"])
    lines = [
        "| video | tokens | steps | guidance | n | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * (4 + len(names)),
    ]
    for r in reports:
        f, h, w = r["latents"]
        cells = ["×".join(map(str, r["pixels"])), f * h * w // 4, r["steps"]]
        cells += [
            r["guidance"],
            r["n"],
            *(f"{100 * v / r['n']:.0f} %" for v in r["right"].values()),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    missed = {k: sum(r["n"] - r["right"][k] for r in reports) for k in names if k != "all"}
    failures = ", ".join(f"{k} {v}" for k, v in missed.items() if v) or "nothing"
    config = pipe.transformer.config
    text = CARD.format(
        parameters=sum(counts.values()),
        **counts,
        layers=config.num_layers,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        ffn=config.ffn_dim,
        channels=config.in_channels,
        shift=pipe.scheduler.config.flow_shift,
        shapes=", ".join(shapes.SHAPES),
        colours=", ".join(shapes.COLOURS),
        directions=", ".join(shapes.DIRECTIONS),
        backgrounds=", ".join(shapes.BACKGROUNDS),
        table="\n".join(lines),
        failures=failures,
        how=how,
        held_out=sum(map(shapes.is_held_out, every)),
        combinations=len(every),
        psnr=report["psnr"],
        psnr_n=report["psnr_n"],
    )
    (out / "README.md").write_text(text)


def evaluate(model: Path, report: Path, prompts: int, device: str, grids: list[Grid]) -> None:
    """Score the pipeline in `model` on every grid, and write its card."""
    report.mkdir(parents=True, exist_ok=True)
    pipe = load(model, device)
    n = min(prompts, 100)
    facts: dict[str, Any] = {"psnr_n": n, "psnr": decibels(pipe, device, n), "scores": []}
    print(f"autoencoder {facts['psnr']:.1f} dB", flush=True)
    for grid in grids:
        count = prompts if math.prod(grid) <= 13 * 32 * 32 else prompts // 2
        result, videos = measure(pipe, grid, count, 1000)
        facts["scores"].append(result)
        print({k: v for k, v in result.items() if k != "wrong"}, flush=True)
        sheet(videos, report / f"sheet-{'x'.join(map(str, grid))}.png")
        (report / "scores.json").write_text(json.dumps(facts, indent=1) + "\n")
    write_card(pipe, facts, model)


def main() -> None:
    from tiny_wan import GRIDS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="pipeline directory")
    parser.add_argument("--report", type=Path, required=True, help="for scores and pictures")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts a measure")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluate(args.model, args.report, args.prompts, device, list(GRIDS))


if __name__ == "__main__":
    main()
