"""Find how to compile the attention kernels for the GPU at hand.

    python benchmarks/tune_kernels.py [--write]

Times a few configurations of each kernel, padded head size and tile on random block lists at
densities 0.5, 0.1 and 0.05 and keeps the one with the least sum of times relative to the best at
each density. `--write` puts them into the table that the package ships.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention.shapes import Shape, random_call, random_mask, stripes
from attention.timing import milliseconds

from accelkit.kernels import dispatch
from accelkit.kernels._triton import block_sparse, gluon_block_sparse, gluon_gather
from accelkit.kernels._triton import tuned as table
from accelkit.kernels._triton.lower import lower
from accelkit.kernels._triton.tile import Tile
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.launch import Launch
from accelkit.kernels.prepare import prepare

DENSITIES = (0.5, 0.1, 0.05)
KERNELS = ("triton", "gluon", "gluon_full", "gluon_gather", "gluon_skip")
RINGS = ((2, 1), (2, 2), (3, 2), (4, 2), (5, 2))
"""Stages of keys and of queries."""
UNITS = ((128, 128), (128, 64), (64, 128), (64, 64))
TABLE = Path(table.__file__).with_name("tuned.json")
Run = Callable[[], object]


def candidates(kernel: str, launch: Launch) -> dict[str, tuple[Any, Run]]:
    """By tile and configuration: the table's entry and a run."""
    (bq, bk), found = launch.index.size, {}
    if kernel == "triton":
        work = lower(launch)
        for warps in (4, 8):
            for stages in (2, 3, 4):
                tile = Tile(bq, bk, 1, warps, stages)
                found[f"{warps} {stages}"] = (
                    [warps, stages],
                    partial(block_sparse.run, launch, work, tile),
                )
    elif kernel in ("gluon", "gluon_full") and bq == 128:
        work = lower(launch)
        for (stages, q_stages), mode in product(RINGS, ("lag", "turns")):
            run = partial(gluon_block_sparse.run, launch, work, stages, mode, q_stages)
            found[f"{stages} {q_stages} {mode}"] = ([stages, q_stages, mode], run)
    elif kernel == "gluon_gather":
        for (stages, q_stages), mode in product(RINGS, ("lag", "turns")):
            run = partial(gluon_gather.gather, launch, stages, mode, q_stages)
            found[f"{stages} {q_stages} {mode}"] = ([stages, q_stages, mode], run)
    elif kernel == "gluon_skip" and bq == 128:
        work = lower(launch, in_order=True)
        for stages in (2, 3, 4):
            run = partial(gluon_block_sparse.run_skipping, launch, work, stages)
            found[str(stages)] = (stages, run)
    return found


def listed(kernel: str, shape: Shape, unit: tuple[int, int], density: float) -> Launch:
    """A call over random lists that a kernel is tuned on."""
    if kernel == "gluon_gather":
        (q, k, v), index, _ = stripes(shape, round(density * 2048))
        return prepare(q, k, v, index)
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    index = BlockIndex.from_mask(random_mask(shape, unit, density, "cuda"), unit)
    skip = 1e-4 if kernel == "gluon_skip" else None
    return prepare(q, k, v, index, causal=shape.causal, skip=skip)


def best(kernel: str, width: int, unit: tuple[int, int]) -> Any:
    """The table's entry for a kernel, head size and tile."""
    shape = Shape("", 1, 16, 4, 16384, width, kernel != "gluon_full")
    if kernel == "gluon_gather" and unit != UNITS[0]:
        return None
    losses: dict[str, list[float]] = {}
    entries: dict[str, Any] = {}
    for density in DENSITIES:
        launch = listed(kernel, shape, unit, density)
        if kernel != "triton" and dispatch.gluon_refusal(launch) is not None:
            return None
        runs = candidates(kernel, launch)
        times = milliseconds({n: c[1] for n, c in runs.items()}, 60)
        for name, ms in times.items():
            entries[name] = runs[name][0]
            losses.setdefault(name, []).append(ms / min(times.values()))
        print(
            kernel, width, unit, density, {n: round(ms, 3) for n, ms in times.items()}, flush=True
        )
    # One that cannot run at some density has few losses to sum, and is none to ship.
    whole = {name: sum(some) for name, some in losses.items() if len(some) == len(DENSITIES)}
    return entries[min(whole, key=whole.__getitem__)] if whole else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--kernels", nargs="+", default=KERNELS)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    args = parser.parse_args()
    torch.manual_seed(0)
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    known = json.loads(TABLE.read_text())
    found = known.setdefault(capability, {})
    for kernel in args.kernels:
        for width in args.widths:
            for unit in UNITS:
                # Tiles that no unit is cut into: head size 64 takes 64 rows, 256 takes 64 keys.
                usual = block_sparse.choose_tile(unit, width, torch.bfloat16, False)
                if kernel == "triton" and usual is not None and (usual.bm, usual.bn) != unit:
                    continue
                entry = best(kernel, width, unit)
                if entry is not None:
                    tiles = found.setdefault(kernel, {}).setdefault(str(width), {})
                    tiles[f"{unit[0]}x{unit[1]}"] = entry
    print(json.dumps(known, indent=1))
    if args.write:
        TABLE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
