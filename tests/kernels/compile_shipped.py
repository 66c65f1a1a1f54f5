"""Compile every shipped kernel configuration for sm_90a without a GPU and print what its machine
code looks like, as JSON. Run by `test_compiled.py` in a process of its own, because the kernels
must not be interpreted there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from accelkit.kernels._triton import block_sparse, gluon_block_sparse, gluon_gather, lower
from accelkit.kernels._triton.tile import Tile
from accelkit.kernels._triton.tuned import _table
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.prepare import prepare

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """What Triton asks of a driver before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(found: list[Any]) -> None:
    """Make every kernel call compile, keep the result in `found` and launch nothing."""
    triton.runtime.driver.set_active(Hopper())
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append(kernel)
        return kernel

    JITFunction.run = run
    gluon_block_sparse._processors = lambda device: 132


def call(kernel: str, unit: tuple[int, int], width: int, bias: str = "") -> Any:
    """A call that a kernel serves; its tensors are never read."""
    skip = 0.01 if kernel == "gluon_skip" else None
    q, k, v = (
        torch.empty(1, 1024, h, width, dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2, 2)
    )
    index = BlockIndex.dense(8, 1024 // unit[0], unit, q.device)
    if bias:
        bias_of = torch.zeros(1, 1, 1024)
        index = replace(index, bias=bias_of, bias_by_entry=bias == "entry")
    return prepare(q, k, v, index, causal=kernel != "gluon_full", skip=skip)


def report(name: str, kernel: Any, tile: tuple[int, int], width: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            )
            for option in ("-sass", "-res-usage")
        )
    use = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    threads = int(re.search(r"\.reqntid\s+(\d+)", kernel.asm["ptx"])[1])
    registers = -(-int(use[1]) // 8) * 8
    # From the scores to a vote on the tile; the V warp's votes stand behind a whole item.
    votes = re.findall(r"WARPGROUP\.DEPBAR((?:(?!WARPGROUP|STSM).)*?)BAR\.RED", code.stdout, re.S)
    return {
        "name": name,
        "local": len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
        "stack": int(use[2]),
        "products": len(re.findall(r"HGMMA\.", code.stdout)),
        "groups": len(re.findall(r"HGMMA\..*gsb0", code.stdout)),
        "waits": code.stdout.count("WARPGROUP.DEPBAR"),
        "barriers": max(map(int, re.findall(r"\.sync\s+(\d+)", kernel.asm["ptx"])), default=-1),
        "votes": len(votes),
        "exchanges": len(re.findall(r"\b(?:SHFL|BAR\.SYNC|LDS)\b", "".join(votes))),
        "steps": min(width, tile[1]) // 16,
        "registers": registers,
        "programs": min(65536 // (threads * registers), 233_472 // (kernel.metadata.shared + 1024)),
    }


def shipped() -> list[dict[str, Any]]:
    found: list[Any] = []
    compile_only(found)
    reports = []
    for kernel, widths in _table()["9.0"].items():
        for width, tiles in widths.items():
            for text in tiles:
                bm, bn = map(int, text.split("x"))
                keys = kernel == "gluon_gather"
                # Without a causal edge, entries of 64 keys fill tiles of 128 by twos.
                unit_keys = 3 * bn if (kernel, bn) == ("gluon_full", 64) else bn
                launch = call(kernel, (bm, 1 if keys else unit_keys), int(width))
                work = None if keys else lower.lower(launch)
                found.clear()
                if keys:
                    gluon_gather.gather(launch)
                elif kernel == "triton":
                    tile = block_sparse._tile(launch)
                    if (tile.bm, tile.bn) != (bm, bn):
                        raise SystemExit(f"{text} at {width} is in the table and never chosen")
                    block_sparse.run(launch, work, Tile(bm, bn, 1, tile.warps, tile.stages))
                elif kernel != "gluon_skip":
                    gluon_block_sparse.run(launch, work)
                else:
                    gluon_block_sparse.run_skipping(launch, work)
                name = f"{kernel} d{width} {text}"
                reports.append(report(name, found[-1], (bm, bn), int(width)))
    for width in (64, 128):
        for bk, bias in ((64, ""), (64, "key"), (64, "entry"), (128, "key")):
            launch = call("gluon_full", (128, bk), width, bias)
            gluon_block_sparse.run(launch, lower.lower(launch))
            name = f"gluon_full d{width} entries of {bk} {bias}"
            reports.append(report(name, found[-1], (128, 128), width))
    return reports


if __name__ == "__main__":
    json.dump(shipped(), sys.stdout)
