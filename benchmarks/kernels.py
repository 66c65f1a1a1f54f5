"""Attention kernels and estimators against every peer that is installed, in one process on one GPU.

    python benchmarks/kernels.py --out results.json [--only llm,d64] [--speeds table.json]

Random normal data; medians of device times, the pieces of work taking turns. A kernel's rate is
TFLOP/s of the blocks that it computes; rates are given relative to the dense cuDNN kernel of the
same shape and causality. Every kernel is first compared with an fp32 reference on a few query
tiles, and a wrong one is not timed.

`--out` keeps what an existing file says of the parts that are not measured now. `--merge` adds the
parts of other files: two GPUs can share the work.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attention.cpu import measure_cpu
from attention.parts import estimating, gathering, skipping, whole_call
from attention.preparing import preparing
from attention.report import Report, machine, merge, read, speeds, write
from attention.shapes import BLOCK, D64, FULL, LLM, LONG, VIDEO
from attention.sparse import ANY, FREE, LEFT_OUT, rates, right

FOUR = tuple((BLOCK, d) for d in (0.5, 0.25, 0.1, 0.05))
PARTS: dict[str, Callable[[float], Iterator[dict[str, Any]]]] = {
    "llm": lambda ms: rates(LLM, FOUR, ANY, ms),
    "mixed": lambda ms: rates(LLM, ((BLOCK, "mixed"), ((64, 64), 0.1)), ANY, ms),
    "long": lambda ms: rates(LONG, FOUR, ANY, ms),
    "full": lambda ms: rates(FULL, FOUR, FREE, ms),
    "video": lambda ms: rates(VIDEO, FOUR, FREE, ms),
    "d64": lambda ms: rates(D64, FOUR, FREE, ms),
    "skip": skipping,
    "gather": gathering,
    "estimators": estimating,
    "call": whole_call,
    "preparing": preparing,
}


def measure(names: list[str], budget_ms: float, out: Path | None) -> tuple[Report, list[str]]:
    """The report, and the names of parts that failed. Written after every row."""
    report: Report = {**machine(), "results": [], "parts": []}
    known = [read(out)] if out and out.exists() else []
    failed = []
    for name in names:
        begin = time.monotonic()
        try:
            for row in PARTS[name](budget_ms):
                if len(right(errors := row.get("errors", {}))) < len(errors) and name not in failed:
                    failed.append(name)
                report["results" if "ratio" in row else "parts"].append({"part": name, **row})
                if out:
                    write(out, merge([*known, report], list(PARTS)))
        except Exception:  # one part must not take the others with it
            traceback.print_exc()
            failed.append(name)
        torch.cuda.empty_cache()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
    return merge([*known, report], list(PARTS)), failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--without", default="", help="backends and peers to leave out")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, merge these files")
    parser.add_argument("--budget", type=float, default=600.0, help="ms of device time a case")
    parser.add_argument("--speeds", type=Path, help="update this table of measured speeds")
    parser.add_argument("--cpu", action="store_true", help="time the CPU path instead")
    args = parser.parse_args()
    LEFT_OUT.update(args.without.split(","))
    torch.manual_seed(0)
    failed: list[str] = []
    if args.cpu:
        about = platform.processor() or platform.machine()
        report = {"torch": torch.__version__, "python": platform.python_version()}
        report |= {"processor": about, "threads": torch.get_num_threads()}
        report["results"] = measure_cpu(12)
    elif args.merge:
        report = merge([read(path) for path in args.merge], list(PARTS))
    else:
        names = args.only.split(",") if args.only else list(PARTS)
        report, failed = measure(names, args.budget, args.out)
    if args.out:
        write(args.out, report)
    if args.speeds:
        known = json.loads(args.speeds.read_text()) if args.speeds.exists() else []
        args.speeds.write_text(json.dumps(speeds(report, known), indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
