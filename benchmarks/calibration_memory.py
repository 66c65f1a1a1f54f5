"""Peak memory of whole calibrations beside that of a dense prefill of equal length and batch.

On a GPU it is what tensors take, kernels' scratch included; on a CPU what is resident, interpreter
and libraries included. An empty `TRITON_CACHE_DIR` shows what compiling side by side adds.

    python benchmarks/calibration_memory.py --sizes 8192x1 --out memory-cpu.json
    python benchmarks/calibration_memory.py --sizes 16384x8 32768x1 --out memory.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import accelkit
from accelkit.calibration.opening.models import open_model
from accelkit.calibration.results import environment

MIB = 2**20


def calibrated(model: Any, tokenizer: Any, tokens: int, batch: int, preset: str) -> dict[str, Any]:
    """One calibration: what it took at most, and in which time."""
    about = accelkit.calibrate(
        model, tokenizer=tokenizer, lengths=[tokens], batch=batch, preset=preset, progress=False
    ).calibration
    return {
        "tokens": tokens,
        "batch": batch,
        "preset": preset,
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
    parser.add_argument("--model", default="examples/models/tiny-llama")
    parser.add_argument("--sizes", nargs="+", default=["8192x1"], help="tokens x prompts at once")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = open_model(args.model, device=args.device, dtype=args.dtype)
    result: dict[str, Any] = {
        "title": f"Peak memory of calibrating {Path(args.model).name}",
        "environment": environment(model.device),
        "dtype": str(model.dtype),
        "rows": [],
    }
    for size in args.sizes:
        tokens, batch = map(int, size.split("x"))
        row = calibrated(model, tokenizer, tokens, batch, args.preset)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
