"""Peak memory of whole calibrations beside that of a dense prefill of equal length and batch.

On a GPU it is what tensors take, kernels' scratch included; on a CPU what is resident, interpreter
and libraries included. An empty `TRITON_CACHE_DIR` shows what compiling side by side adds.

    python benchmarks/calibration_memory.py --sizes 8192x1 --out memory-cpu.json
    python benchmarks/calibration_memory.py --sizes 16384x8 32768x1 --out memory.json
"""

from __future__ import annotations

import argparse
from typing import Any

import by_size

import accelkit

MIB = 2**20


def calibrated(
    model: Any, tokenizer: Any, tokens: int, batch: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One calibration: what it took at most, and in which time."""
    about = accelkit.calibrate(
        model,
        tokenizer=tokenizer,
        lengths=[tokens],
        batch=batch,
        preset=args.preset,
        progress=False,
    ).calibration
    return {
        "tokens": tokens,
        "batch": batch,
        "preset": args.preset,
        "dense_mib": about["dense_peak_bytes"] / MIB,
        "peak_mib": about["peak_bytes"] / MIB,
        "peak_over_dense": about["peak_bytes"] / about["dense_peak_bytes"],
        "seconds": about["seconds"]["whole"],
        "compiling_s": about["seconds"]["compiling"],
        "dense_prefills": about["dense_prefills"],
        "search_prefills": about["search_prefills"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="balanced")
    by_size.run(parser, "Peak memory of calibrating {}", calibrated)


if __name__ == "__main__":
    main()
