"""Where the curves of `video_pareto` lie beside that of its mixtures, in numbers and as a picture.

A curve is a list of rows, each with `cost` (÷ dense), `mean` qualities over the prompts, `right` of
`of` videos that show what was asked, and `shown`, a digit for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelkit.calibration.denoise.caches import OWN

KEYS = {"psnr": (60.0, "PSNR (dB)"), "ssim": (1.0, "SSIM"), "right": (1.0, "share shown right")}
"""What is drawn: where the dense point stands at most, and its words."""
NAMES = {"psnr": "PSNR", "ssim": "SSIM", "right": "score"}
CLEAR = 2
"""Standard errors by which a setting is above the mixture in what it shows for more than chance."""
LEVELS = (40, 35, 30, 25, 20)
"""PSNR at which the table tells each curve's speed-up."""


def quality(row: dict[str, Any], key: str) -> float:
    """What is drawn of a row: no higher than its axis."""
    return row["right"] / row["of"] if key == "right" else min(row["mean"][key], KEYS[key][0])


def front(
    rows: Sequence[dict[str, Any]], key: str, dense: dict[str, Any]
) -> tuple[list[float], list[float], list[dict[str, Any]]]:
    """Costs, qualities and rows of a curve's best points, rising; the dense one counts among them,
    at a cost of 1.
    """
    points = sorted(
        ((r["cost"], quality(r, key), r) for r in rows if r["finite"] and r["cost"] < 1),
        key=lambda p: p[:2],
    )
    kept: list[tuple[float, float, dict[str, Any]]] = []
    for point in [*points, (1.0, quality(dense, key), dense)]:
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    costs, best, found = (list(column) for column in zip(*kept, strict=True))
    return costs, best, found


def by_videos(
    row: dict[str, Any], costs: Sequence[float], points: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """How many videos more a setting shows right than a curve does at its cost, with the standard
    error of that difference over the prompts, which are the same ones for both.
    """
    shown = [[int(c) for c in r["shown"]] for r in points]
    between = [np.interp(row["cost"], costs, column) for column in zip(*shown, strict=True)]
    differ = np.array([int(c) for c in row["shown"]]) - np.array(between)
    error = np.std(differ, ddof=1) * np.sqrt(len(differ))
    return {"videos": round(float(differ.sum()), 2), "error": round(float(error), 2)}


def tolerance(curves: dict[str, list[dict[str, Any]]], key: str) -> float:
    """The most by which an equal run of a mixture differed; 0 where runs repeat to the bit."""
    return max(
        (
            abs(r["again"][key] - r["mean"][key])
            for r in curves.get("mixture", ())
            if key in r.get("again", ())
        ),
        default=0.0,
    )


def places(found: dict[str, Any], key: str = "psnr") -> list[dict[str, Any]]:
    """Where each setting of the other curves lies beside the mixture's, which runs straight through
    its best points and the dense one: `by` is how far above, None where no mixture is as fast.
    """
    curves = found["curves"]
    costs, best, points = front(curves.get("mixture", ()), key, found["dense"])
    some = []
    for name, rows in curves.items():
        for row in rows if name != "mixture" else ():
            value, cost = quality(row, key), row["cost"]
            if not row["finite"] or cost >= 1:
                continue
            mixed = float(np.interp(cost, costs, best)) if cost >= costs[0] else None
            setting = {k: v for k, v in row["setting"].items() if k not in OWN}
            some.append({
                "curve": name, "setting": setting, "cost": round(cost, 4),
                "value": round(value, 4), "mixture": mixed and round(mixed, 4),
                "by": None if mixed is None else round(value - mixed, 4),
                **(by_videos(row, costs, points) if key == "right" and mixed is not None else {}),
            })  # fmt: skip
    return some


def beaten(found: dict[str, Any], key: str = "psnr") -> list[dict[str, Any]]:
    """The settings that lie above the mixture's curve by more than equal runs differ."""
    noise = tolerance(found["curves"], key)
    return [p for p in places(found, key) if p["by"] is None or p["by"] > noise]


def verdict(found: dict[str, Any], key: str, above: list[dict[str, Any]]) -> dict[str, Any]:
    """How many settings lie above the mixture, and by how much at most."""
    known = [p for p in above if p["by"] is not None]
    clear = [p for p in known if "videos" in p and p["videos"] > CLEAR * p["error"]]
    return {
        "settings": len(found["places"]),
        "above": len(known),
        "most": max((p["by"] for p in known), default=0.0),
        **({"above_by_two_standard_errors": len(clear)} if key == "right" else {}),
        "faster_than_any_mixture": len(above) - len(known),
        "equal_runs_differ_by": tolerance(found["curves"], key),
    }


def speed_at(rows: Sequence[dict[str, Any]], level: float, dense: dict[str, Any]) -> float | None:
    """Speed-up of a curve where its PSNR is `level`; None where it has no such point."""
    costs, best, _ = front(rows, "psnr", dense)
    return round(1 / float(np.interp(level, best, costs)), 2) if best[0] <= level else None


SPEEDS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
NEAR_ONE = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""SSIM that is marked on its axis, which is stretched towards 1."""


def draw(found: dict[str, Any], path: Path) -> None:
    """PSNR, SSIM and the detector's score against predicted speed-up, a line for every curve; that
    of the mixture runs through its best points and the dense one.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(20, 9.5), layout="constrained")
    panels = figure.subplots(1, len(KEYS))
    marks, colours = "osv^<>DPX*hp", colormaps["tab20"].colors
    for axes, (key, (_, words)) in zip(panels, KEYS.items(), strict=True):
        for n, (name, rows) in enumerate(found["curves"].items()):
            points = sorted((1 / r["cost"], quality(r, key)) for r in rows if r["finite"])
            special = name in ("mixture", "fewer steps")
            cache = name.partition("{")[0] in (*found["caches"], "step_schedule")
            look = {
                "marker": marks[n % len(marks)], "markersize": 8 if special else 4,
                "label": name[:60],
                "linewidth": 2.5 if special else 1.0, "linestyle": "--" if cache else "-",
                "color": {"mixture": "black", "fewer steps": "grey"}.get(name, colours[n % 20]),
                "zorder": 3 if special else 2,
            }  # fmt: skip
            if name == "mixture" and key != "right":
                axes.plot(*zip(*points, strict=True), **{**look, "linestyle": ""})
                costs, best, _ = front(rows, key, found["dense"])
                points = [(1 / c, v) for c, v in zip(costs, best, strict=True)]
                look |= {"marker": "", "label": None}
            axes.plot(*zip(*points, strict=True), **look)
        if key == "right":
            line = axes.axhline(quality(found["dense"], key), color="black", linestyle=":")
            axes.legend([line], ["dense"])
        axes.set_xlabel("predicted speed-up of the whole denoising, Wan2.1-1.3B 480p")
        axes.set_ylabel(f"{words}, mean over {found['prompts']} held-out prompts")
        axes.set_xscale("log")
        axes.set_xticks(SPEEDS, [f"{x:g} ×" for x in SPEEDS])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(10, 60)
    stretch = lambda v: -np.log10(np.maximum(1.002 - v, 1e-9))  # noqa: E731
    panels[1].set_yscale("function", functions=(stretch, lambda v: 1.002 - 10.0**-v))
    panels[1].set_ylim(NEAR_ONE[0], 1.0)
    panels[1].set_yticks([*NEAR_ONE, 1.0], [f"{v:g}" for v in (*NEAR_ONE, 1.0)])
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=9, ncols=5, loc="outside lower center"
    )
    figure.savefig(path, dpi=110)
