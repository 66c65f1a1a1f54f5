"""Synthetic videos of moving shapes: scenes, their prompts, their frames, and a detector.

A scene is one or two coloured shapes that move in straight lines over a plain background:
"a red circle moving left and a blue cross moving up on a black background". `draw` renders
scenes, `look` finds out from frames alone what a video shows, `score` compares the two. Some
combinations of shape, colour and direction are held out from training (`is_held_out`).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.15, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.85, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS = {"black": (0.08,) * 3, "gray": (0.45,) * 3, "white": (0.92,) * 3}
DIRECTIONS = {  # (x, y) per unit of travel, y downwards
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
WORDS = sorted(
    {*SHAPES, *COLOURS, *BACKGROUNDS, *" ".join(DIRECTIONS).split()}
    | {"a", "and", "moving", "on", "background", ","}
)
# As fractions of the frame's shorter side; a whole clip's path, whatever its number of frames.
RADIUS, TRAVEL = (0.20, 0.24), (0.30, 0.40)
CROWD = 0.8  # how much smaller things are that share a scene
TRIES = 16  # starting points of which the one farthest from the other thing's path is taken
REACH = 1.2  # the farthest that a shape extends from its centre, in radii
SMALLEST = 0.02  # what covers less than this share of (shorter side)² is not a thing


@dataclass(frozen=True)
class Thing:
    """One moving shape; the fields are keys of SHAPES, COLOURS and DIRECTIONS."""

    shape: str
    colour: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


@dataclass(frozen=True)
class Scene:
    """Things of different colours over a background; None leaves the background open."""

    things: tuple[Thing, ...]
    background: str | None = None

    @property
    def prompt(self) -> str:
        text = " and ".join(map(str, self.things))
        return text + (f" on a {self.background} background" if self.background else "")

    @classmethod
    def parse(cls, prompt: str) -> Scene:
        """The scene that a prompt asks for; ValueError if it is not in the words of `prompt`."""
        found = re.findall(r"a (\w+) (\w+) moving ((?:up|down)? ?(?:left|right)?)", prompt)
        ground = re.search(r"on a (\w+) background", prompt)
        scene = cls(tuple(Thing(s, c, d.strip()) for c, s, d in found), ground and ground.group(1))
        if scene.prompt != prompt:
            raise ValueError(f"found {scene.prompt!r} in the prompt {prompt!r}")
        return scene


# -- scenes -------------------------------------------------------------------------------------


def is_held_out(thing: Thing) -> bool:
    """True for 12 of the 96 combinations, among which every single value occurs."""
    c, d = list(COLOURS).index(thing.colour), list(DIRECTIONS).index(thing.direction)
    return (2 * SHAPES.index(thing.shape) + 3 * c + d) % 8 == 0


def random_scene(rng: random.Random, things: int, held_out: bool) -> Scene:
    """A scene whose things are all held out, or all not."""
    found: list[Thing] = []
    while len(found) < things:
        thing = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(DIRECTIONS)))
        fresh = thing.colour not in [t.colour for t in found]
        if fresh and is_held_out(thing) == held_out:
            found.append(thing)
    return Scene(tuple(found), rng.choice([None, *BACKGROUNDS]))


# -- drawing ------------------------------------------------------------------------------------


def distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance to the edge of every shape of radius r around the origin, last dimension
    in the order of SHAPES; negative inside, in the unit of x, y and r."""
    ax, ay = x.abs(), y.abs()
    circle = torch.hypot(x, y) - r
    square = torch.maximum(ax, ay) - 0.85 * r
    triangle = torch.maximum(y, math.sqrt(0.75) * ax - 0.5 * y) - 0.6 * r
    long, short = r, 0.35 * r
    cross = torch.minimum(
        torch.maximum(ax - long, ay - short), torch.maximum(ax - short, ay - long)
    )
    return torch.stack((circle, square, triangle, cross), -1)


# area / radius² of each shape
AREAS = torch.tensor([math.pi, 1.7**2, 3 * math.sqrt(3) * 0.36, 4 * 0.7 - 0.7**2])


def draw(
    scenes: Sequence[Scene],
    frames: int,
    height: int,
    width: int,
    generator: torch.Generator,
) -> Tensor:
    """Videos of the scenes on the generator's device, (n, 3, frames, height, width) in [-1, 1].

    Start, size, length of the path and a faint slope of the background's brightness are random.
    """
    device, n = generator.device, len(scenes)
    side = min(height, width)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, device=device, generator=generator)

    y = torch.arange(height, device=device).add(0.5)[:, None]
    x = torch.arange(width, device=device).add(0.5)[None, :]
    choices = torch.randint(len(BACKGROUNDS), (n,), generator=generator, device=device).tolist()
    names = list(BACKGROUNDS)
    ground = torch.tensor(
        [BACKGROUNDS[s.background or names[c]] for s, c in zip(scenes, choices, strict=True)],
        device=device,
    )
    slope = uniform(-0.1, 0.1, 2, n, 1, 1)
    light = slope[0] * (y / height - 0.5) + slope[1] * (x / width - 0.5)
    video = (ground[:, :, None, None] + light[:, None])[:, :, None].repeat(1, 1, frames, 1, 1)
    time = torch.linspace(0, 1, frames, device=device)
    size = torch.tensor([width, height], device=device)
    taken = torch.full((n, 1, frames, 2), math.inf, device=device)  # the centres drawn before
    for layer in range(max(len(s.things) for s in scenes)):
        rows = [i for i, s in enumerate(scenes) if len(s.things) > layer]
        things = [scenes[i].things[layer] for i in rows]
        crowd = torch.tensor([CROWD if len(scenes[i].things) > 1 else 1.0 for i in rows])
        radius = side * uniform(*RADIUS, len(rows), 1) * crowd.to(device)[:, None]
        heading = torch.tensor([DIRECTIONS[t.direction] for t in things], device=device)
        path = side * uniform(*TRAVEL, len(rows), 1) * heading
        low = REACH * radius + (-path).clamp(min=0)
        high = size - REACH * radius - path.clamp(min=0)
        start = low[:, None] + uniform(0, 1, len(rows), TRIES, 2) * (high - low)[:, None]
        tries = start[:, :, None] + (time[:, None] * path[:, None])[:, None]
        index = torch.tensor(rows, device=device)
        apart = (tries - taken[index]).norm(dim=-1).amin(-1)  # keep things from hiding each other
        centre = tries[torch.arange(len(rows), device=device), apart.argmax(-1)]
        taken[index] = centre[:, None]  # (rows, 1, frames, 2)
        far = distances(
            *torch.broadcast_tensors(
                x - centre[..., 0, None, None],
                y - centre[..., 1, None, None],
                radius[..., None, None],
            )
        )
        kind = torch.tensor([SHAPES.index(t.shape) for t in things], device=device)
        far = far.gather(-1, kind.view(-1, 1, 1, 1, 1).expand(*far.shape[:-1], 1))[..., 0]
        alpha = (0.5 - far).clamp(0, 1)[:, None]
        colour = torch.tensor([COLOURS[t.colour] for t in things], device=device)
        video[index] = video[index].lerp(colour[:, :, None, None, None], alpha)
    return video * 2 - 1


# -- looking ------------------------------------------------------------------------------------


def look(video: Tensor) -> Scene:
    """What a video shows: frames (frames, height, width, 3) in [0, 1].

    Each pixel belongs to the nearest of the nine colours. A colour that covers enough of the
    frames is a thing; the slope of its centre over time gives the direction, and the shape is the
    one whose drawing of equal area around that centre overlaps most with the coloured pixels.
    """
    video = video.float().cpu()
    frames, height, width, _ = video.shape
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()])
    label = torch.cdist(video.reshape(-1, 3), palette).argmin(-1).view(frames, height, width)
    share = torch.bincount(label.flatten(), minlength=len(palette)) / frames
    share /= min(height, width) ** 2
    things = []
    for i, colour in enumerate(COLOURS):
        if share[i] >= SMALLEST:
            things.append(_describe((label == i).float(), colour))
    background = list(BACKGROUNDS)[int(share[len(COLOURS) :].argmax())]
    return Scene(tuple(things), background)


def _describe(mask: Tensor, colour: str) -> Thing:
    """The shape and the direction of the pixels in mask (frames, height, width)."""
    frames, height, width = mask.shape
    y = torch.arange(height).add(0.5)[:, None].expand(height, width)
    x = torch.arange(width).add(0.5)[None, :].expand(height, width)
    area = mask.sum((1, 2))
    centre = torch.stack([(mask * p).sum((1, 2)) for p in (x, y)], -1) / area.clamp(min=1)[:, None]
    whole = area >= 0.75 * area.quantile(0.9)  # not hidden by another thing
    time = torch.arange(frames, dtype=torch.float32)
    time = (time - time[whole].mean())[whole, None]
    slope = (time * centre[whole]).sum(0) / time.square().sum().clamp(min=1e-6)
    headings = torch.nn.functional.normalize(torch.tensor(list(DIRECTIONS.values())), dim=-1)
    moved = slope.norm() * (frames - 1) >= 0.1 * min(height, width)
    direction = list(DIRECTIONS)[int((headings @ slope).argmax())] if moved else "nowhere"

    radius = (area[whole, None] / AREAS).sqrt()[:, None, None]  # one for each shape
    offset = centre[whole, :, None, None]
    overlap = []
    for s in range(len(SHAPES)):
        far = distances(
            *torch.broadcast_tensors(x - offset[:, 0], y - offset[:, 1], radius[..., s])
        )
        ideal = (0.5 - far[..., s]).clamp(0, 1)
        real = mask[whole]
        both = torch.minimum(ideal, real).sum((1, 2))
        overlap.append((both / torch.maximum(ideal, real).sum((1, 2)).clamp(min=1)).mean())
    return Thing(SHAPES[int(torch.stack(overlap).argmax())], colour, direction)


def score(asked: Scene, seen: Scene) -> dict[str, bool]:
    """Which of the asked attributes the seen scene has, each for all the things asked for.

    `all` is stricter than its parts: nothing that was not asked for may be seen either. An open
    background is right whatever it is.
    """
    by_colour = {t.colour: t for t in seen.things}
    pairs = [(t, by_colour.get(t.colour)) for t in asked.things]
    return {
        "colour": all(s is not None for _, s in pairs),
        "shape": all(s is not None and s.shape == t.shape for t, s in pairs),
        "direction": all(s is not None and s.direction == t.direction for t, s in pairs),
        "background": asked.background in (None, seen.background),
        "all": set(asked.things) == set(seen.things),
    }
