"""The results file of `benchmarks/kernels.py`, filled a part at a time, and the table of speeds."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from accelkit.kernels import dispatch

Report = dict[str, Any]


def machine() -> Report:
    """What the readings depend on beside the code."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "dtype": "bfloat16",
    }


def merge(reports: list[Report], order: list[str]) -> Report:
    """One report with the rows of all; of a part that several hold, the last one's. Raises
    `ValueError` where they come from different machines or versions.
    """
    rows = ("results", "parts")
    about = [{k: v for k, v in r.items() if k not in rows} for r in reports]
    if any(a != about[0] for a in about):
        raise ValueError(f"the results come from different machines or versions: {about}")
    whole: Report = {**about[0], "results": [], "parts": []}
    for part in order:
        having = [r for r in reports if any(x["part"] == part for k in rows for x in r[k])]
        for key in rows:
            whole[key] += [x for x in having[-1][key] if x["part"] == part] if having else []
    return whole


def read(path: Path) -> Report:
    return json.loads(path.read_text("utf-8"))


def write(path: Path, report: Report) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def speeds(report: Report) -> list[dict[str, Any]]:
    """The table by which `dispatch` chooses: each kernel's mean rate relative to dense cuDNN."""
    found: dict[tuple[str, int, tuple[int, int], bool], list[float]] = {}
    for row in report["results"]:
        for name in (n for n in row["ratio"] if n in dispatch.KERNELS):
            key = (name, row["head_size"], tuple(row["unit"]), row["causal"])
            found.setdefault(key, []).append(row["ratio"][name])
    return [
        {
            "backend": name,
            "capability": report["capability"],
            "head_dim": width,
            "unit": list(size),
            "causal": causal,
            "speed": round(statistics.fmean(values), 3),
        }
        for (name, width, size, causal), values in sorted(found.items())
    ]
