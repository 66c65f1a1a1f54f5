"""Does the calibrated mixture beat every single method, fewer steps and step caches on video?

Every method runs at eight settings or more in all heads of all layers behind the same dense steps;
mixtures are calibrated at several budgets. All of them draw the same held-out prompts with the same
seeds. Fidelity is that to the dense result of equal seed (relative L1 error and PSNR of the
latents, PSNR and SSIM of the frames, worst prompt and mean); the detector's score says whether the
videos still show what was asked.

Speed is predicted for Wan2.1-1.3B at 480 × 832 and 81 frames (`pareto_target`): each plan's
densities, as they were measured here, are put into the table that was measured there.

    python benchmarks/video_pareto.py --costs costs.json --out benchmarks/results/video-pareto.json
    python benchmarks/video_pareto.py --costs costs.json --part 1 4 --out part1.json   # of four
    python benchmarks/video_pareto.py --join part*.json --out benchmarks/results/video-pareto.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pareto_curves import (
    ROOT,
    SETTINGS,
    Subject,
    dialled,
    finer,
    further,
    measured_cache,
    more,
    run_alone,
    run_cache,
    run_mixture,
    spread,
    variants,
)
from pareto_target import DENSE_STEPS, confirmed, measured_costs, moved, single_cost

from accelkit.calibration.bench import video as video_bench
from accelkit.calibration.candidates import Family, chosen_methods, stored, thinned
from accelkit.calibration.denoise import caches as denoise_caches
from accelkit.calibration.denoise.video import Settings
from accelkit.calibration.opening import pipelines
from accelkit.calibration.results import environment
from accelkit.kernels.cost import CostTable
from accelkit.patches.adapters import facts
from accelkit.patches.method import AttentionMethod

BUDGETS = (0.1, 0.3, 0.95, 0.06, 0.4, 0.15, 0.7, 0.085, 0.2, 0.9, 0.5, 0.25, 0.05, 0.8)
"""Of the mixtures, in the order of what they tell."""
FEWER = (0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Shares of the steps that 'fewer steps' runs."""
Job = tuple[str, dict[str, Any], Callable[[], dict[str, Any] | None]]
"""A point to draw: its curve, its setting, and what draws it."""


def singles(
    subject: Subject, able: Sequence[AttentionMethod], costs: CostTable, about: dict[str, Any]
) -> list[list[Job]]:
    """The settings of every curve of one method, in the order to run them."""
    families, tables = variants(subject, able)
    waiting: list[list[Job]] = []
    for name in dict.fromkeys(m.kind for m in able):
        mine = [f for f in families if f.settings[0].kind == name]
        # Settings without a dial are one curve; a dial's variants are a curve each.
        loose = tuple(s for f in mine if f.field is None for s in f.settings)
        some = [finer(more(f)) for f in mine if f.field is not None]
        some += [thinned(more(Family(name, loose, None)), 12)] if loose else []
        for family in some:
            run = partial(run_alone, subject, tables=tables, costs=costs, about=about)
            waiting.append(
                [(family.name, stored(s), partial(run, s)) for s in spread(family.settings)]
            )
    return waiting


def missing(waiting: list[list[Job]], known: dict[str, list[dict[str, Any]]]) -> list[list[Job]]:
    """The settings that an earlier file has not got, of curves that want some for `SETTINGS`
    points, the shortest curves first.
    """

    def plain(setting: dict[str, Any]) -> Any:  # a model's own numbers are measured in each run
        return json.loads(
            json.dumps({k: v for k, v in setting.items() if k not in denoise_caches.OWN})
        )

    found: list[list[Job]] = []
    for jobs in waiting:
        have = [plain(r["setting"]) for r in known.get(jobs[0][0], ())]
        if len(have) < SETTINGS:
            found.append([job for job in jobs if plain(job[1]) not in have])
    return sorted(found, key=lambda jobs: len(known.get(jobs[0][0], ())) if jobs else SETTINGS)


def fewer(subject: Subject, steps: int) -> dict[str, Any]:
    """The dense pipeline in fewer steps."""
    row = subject.judged(*subject.drawn(num_inference_steps=steps))
    return {"setting": {"steps": steps}, "cost": steps / subject.steps, **row}


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
            setting = {k: v for k, v in row["setting"].items() if k not in denoise_caches.OWN}
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


def join(paths: Sequence[Path], out: Path, costs: Path | None) -> None:
    """One file and one picture of several parts; single methods at the prices of `costs`."""
    parts = [json.loads(p.read_text()) for p in paths]
    found = parts[0]
    if costs is not None:
        about = json.loads(costs.read_text())
        table = moved(CostTable.from_dict(about["table"]), found["tokens"], found["heads"])
        for row in (r for part in parts for rows in part["curves"].values() for r in rows):
            if "density" in row:
                row["cost"] = single_cost(row, table, about)
        found |= {k: about[k] for k in ("share", "confirmed")}
    for part in parts[1:]:
        for name, rows in part["curves"].items():
            found["curves"].setdefault(name, []).extend(rows)
    first = ("mixture", "fewer steps")
    names = [*(n for n in first if n in found["curves"]),
             *sorted(n for n in found["curves"] if n not in first)]  # fmt: skip
    found["curves"] = {name: found["curves"][name] for name in names}
    mixed = "mixture" in found["curves"]  # without it there is nothing to be above of
    above = {key: beaten(found, key) for key in KEYS if mixed}
    found["above_the_mixture"] = above
    if mixed:
        found["places"] = places(found)
        found["verdict"] = {key: verdict(found, key, some) for key, some in above.items()}
    found["title"] = "Fidelity against predicted speed: every method alone, caches, fewer steps"
    found["title"] += ", calibrated mixtures" if mixed else ""
    found["rows"] = [
        {
            "curve": name,
            "points": len(rows),
            **{f"× at {level} dB": speed_at(rows, level, found["dense"]) for level in LEVELS},
            **{
                f"above in {NAMES[key]}": sum(r["curve"] == name for r in some)
                for key, some in above.items()
            },
        }
        for name, rows in found["curves"].items()
    ]
    out.write_text(json.dumps(found, indent=1))
    draw(found, out.with_suffix(".png"))
    for row in found["rows"]:
        print(row)
    for row in above.get("psnr", ()):
        print("above:", row)
    print(found.get("verdict"))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(ROOT / "examples" / "models" / "tiny-wan"))
    parser.add_argument(
        "--size", type=int, nargs=3, default=[64, 64, 25], help="height width frames"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--budgets", type=float, nargs="*", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", help="default: all for denoising")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--costs", type=Path, help="costs measured before; made if not there")
    parser.add_argument("--layers", type=int, default=4, help="of the target, to measure shares")
    parser.add_argument("--journal", type=Path, help="of calibrations; made if not there")
    parser.add_argument("--more", type=Path, help="an earlier file, whose curves are made whole")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after these")
    parser.add_argument(
        "--part", type=int, nargs=2, default=[0, 1], metavar=("I", "N"),
        help="run the I-th of N parts; of two or more, the first one runs the mixtures alone",
    )  # fmt: skip
    parser.add_argument("--join", type=Path, nargs="+", help="files of parts to put together")
    parser.add_argument("--out", type=Path, default=Path("runs/video_pareto.json"))
    return parser.parse_args()


def main() -> None:
    args = options()
    if args.join:
        join(args.join, args.out, args.costs)
        return
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    caches, rest = denoise_caches.chosen_caches(args.methods)
    methods = chosen_methods(rest, "denoise") if rest != [] else []
    if args.costs and args.costs.exists():
        about = json.loads(args.costs.read_text())
    else:
        about = measured_costs(methods, device, args.layers, further)
        about["confirmed"] = confirmed(about, device, args.layers)
        about["environment"] = environment(torch.device(device))
        if args.costs:
            args.costs.write_text(json.dumps(about, indent=1))
    big = CostTable.from_dict(about["table"])
    print(f"f = {about['share']:.3f}, {time.perf_counter() - begin:.0f} s; {big.refused}")

    pipe = pipelines.open_pipeline(args.model, device=device)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.to(torch.float32)  # what is compared is attention, not how pictures are decoded
    size = Settings(*args.size, args.steps)
    subject = Subject(pipe, size, args.prompts, args.guidance)
    seen = video_bench.denoise_look.glance(pipe, size, subject.one)
    tokens = max(seen["tokens"].values())
    heads = next(iter(facts(pipe)[0].components.values())).q_heads
    costs = moved(big, tokens, heads)
    found: dict[str, Any] = {
        "model": Path(args.model).name, "tokens": tokens, "heads": heads, **vars(size),
        "share": about["share"],
        "dense_steps": DENSE_STEPS, "target_tokens": big.dense[-1][0], "refused": dict(big.refused),
        "confirmed": about.get("confirmed", []), "prompts": args.prompts,
        "kernel": os.environ.get("ACCELKIT_KERNEL", "auto"),
        "environment": environment(torch.device(device)), "curves": {},
        "caches": [c.kind for c in caches],
        "dense": subject.judged(subject.dense, subject.pictures),
    }  # fmt: skip
    rng = random.Random(1)
    prompts = [
        {"prompt": subject.shapes.random_scene(rng, 1, False).prompt,
         "guidance_scale": args.guidance}
        for _ in range(8)
    ]  # fmt: skip
    journal = args.journal or args.out.with_suffix(".journal.jsonl")
    mix = partial(
        run_mixture, subject, costs=costs, about=about, prompts=prompts, journal=journal,
        preset=args.preset, methods=args.methods,
    )  # fmt: skip
    mixtures: list[list[Job]] = [
        [("mixture", {"budget": b}, partial(mix, b)) for b in args.budgets]
    ]
    index, parts = args.part
    others: list[list[Job]] = []
    if index or parts == 1:
        steps = sorted({max(2, round(args.steps * s)) for s in FEWER})
        others.append([("fewer steps", {"steps": n}, partial(fewer, subject, n)) for n in steps])
        for cache in (v for c in caches for v in measured_cache(c, subject).variants()):
            family = dialled(cache)
            others.append(
                [(family.name, stored(s), partial(run_cache, subject, s)) for s in family.settings]
            )
        others += singles(subject, [m for m in methods if m.kind in costs.methods], costs, about)
    known = json.loads(args.more.read_text())["curves"] if args.more else {}
    others = missing(others, known)
    if parts > 1:
        waiting = others[index - 1 :: parts - 1] if index else mixtures
    else:
        waiting = mixtures + others
    # A point of every curve before a second one of any: the time may end.
    for turn in range(max(map(len, waiting), default=0)):
        for name, _, run in (row[turn] for row in waiting if turn < len(row)):
            points = len(known.get(name, ())) + len(found["curves"].get(name, ()))
            late = time.perf_counter() - begin > args.seconds
            if late or (name in known and points >= SETTINGS):
                continue
            row = run()
            if row is None:  # the method leaves this size dense
                continue
            found["curves"].setdefault(name, []).append(row)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1))
            mean = row["mean"]
            print(
                f"{time.perf_counter() - begin:5.0f} s  {name[:40]:40} {1 / row['cost']:5.2f} ×  "
                f"error {mean['error']:.4f}  PSNR {mean['psnr']:.2f}  SSIM {mean['ssim']:.4f}  "
                f"right {row['right']}/{row['of']}",
                flush=True,
            )
    if parts == 1:
        join([args.out], args.out, None)


if __name__ == "__main__":
    main()
