"""The results file of `benchmarks/kernels.py`, filled a part at a time, and the table of speeds."""

from __future__ import annotations

import json
import platform
import statistics
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from accelkit.kernels import dispatch
from accelkit.kernels.speeds import TILE, Kind

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


def speeds(report: Report, known: list[Report] | None = None) -> list[Report]:
    """The table by which `dispatch` chooses: each kernel's mean rate relative to dense cuDNN, units
    larger than a tile under the tile's. What the report says nothing about stays as `known` has it.
    """
    found = {Kind.of(row): [row["speed"]] for row in known or []}
    measured: dict[Kind, list[float]] = {}
    for row in chain(report["results"], report["parts"]):
        ratio = row.get("ratio") or row.get("rates") or {}
        for name in (n for n in ratio if n in dispatch.KERNELS):
            bq, bk = (min(n, TILE) for n in row["unit"])
            shape = row["head_size"], (bq, bk), row["causal"], row["tokens"]
            kind = Kind(name, report["gpu"], report["capability"], *shape)
            measured.setdefault(kind, []).append(ratio[name])
    return [
        kind._asdict() | {"unit": list(kind.unit), "speed": round(statistics.fmean(values), 3)}
        for kind, values in sorted((found | measured).items())
    ]
