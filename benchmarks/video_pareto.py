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
from pareto_verdict import KEYS, LEVELS, NAMES, beaten, draw, places, speed_at, verdict

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


def target_costs(
    args: argparse.Namespace, methods: Sequence[AttentionMethod], device: str
) -> dict[str, Any]:
    """Costs at the target, read from `args.costs` or measured and written there."""
    if args.costs and args.costs.exists():
        return json.loads(args.costs.read_text())
    about = measured_costs(methods, device, args.layers, further)
    about["confirmed"] = confirmed(about, device, args.layers)
    about["environment"] = environment(torch.device(device))
    if args.costs:
        args.costs.write_text(json.dumps(about, indent=1))
    return about


def mixtures(
    args: argparse.Namespace, subject: Subject, costs: CostTable, about: dict[str, Any]
) -> list[Job]:
    """A calibrated plan at every budget; calibration sees prompts of its own."""
    rng = random.Random(1)
    prompts = [
        {"prompt": subject.shapes.random_scene(rng, 1, False).prompt,
         "guidance_scale": args.guidance}
        for _ in range(8)
    ]  # fmt: skip
    mix = partial(
        run_mixture, subject, costs=costs, about=about, prompts=prompts, preset=args.preset,
        journal=args.journal or args.out.with_suffix(".journal.jsonl"), methods=args.methods,
    )  # fmt: skip
    return [("mixture", {"budget": b}, partial(mix, b)) for b in args.budgets]


def others(
    subject: Subject, caches: Sequence[Any], able: Sequence[AttentionMethod], costs: CostTable,
    about: dict[str, Any],
) -> list[list[Job]]:  # fmt: skip
    """Fewer steps, step caches alone and methods alone: the settings of every curve."""
    steps = sorted({max(2, round(subject.steps * s)) for s in FEWER})
    found: list[list[Job]] = [
        [("fewer steps", {"steps": n}, partial(fewer, subject, n)) for n in steps]
    ]
    for cache in (v for c in caches for v in measured_cache(c, subject).variants()):
        family = dialled(cache)
        found.append(
            [(family.name, stored(s), partial(run_cache, subject, s)) for s in family.settings]
        )
    return found + singles(subject, able, costs, about)


def main() -> None:
    args = options()
    if args.join:
        join(args.join, args.out, args.costs)
        return
    begin = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    caches, rest = denoise_caches.chosen_caches(args.methods)
    methods = chosen_methods(rest, "denoise") if rest != [] else []
    about = target_costs(args, methods, device)
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
    index, parts = args.part
    known = json.loads(args.more.read_text())["curves"] if args.more else {}
    waiting: list[list[Job]] = [] if index else [mixtures(args, subject, costs, about)]
    if index or parts == 1:
        able = [m for m in methods if m.kind in costs.methods]
        alone = missing(others(subject, caches, able, costs, about), known)
        waiting += alone[index - 1 :: parts - 1] if index else alone
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
