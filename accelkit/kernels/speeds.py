"""Measured speeds of the kernels: the shipped table by which `dispatch` chooses among those that
can serve a launch. `benchmarks/kernels.py --speeds` writes it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

import torch

from accelkit.kernels.launch import Launch

TILE = 128
"""Rows and keys of the largest tile of any kernel."""
Key = tuple[str, str, int, tuple[int, int], bool]


@lru_cache(maxsize=1)
def table() -> dict[Key, float]:
    """TFLOP/s of the computed blocks over those of the best dense kernel of the same shape, mean
    over densities; by backend, compute capability, head size, unit and causality.
    """
    rows = json.loads(files("accelkit.kernels").joinpath("speeds.json").read_text())
    return {
        (r["backend"], r["capability"], r["head_dim"], tuple(r["unit"]), r["causal"]): r["speed"]
        for r in rows
    }


def speed(backend: str, launch: Launch) -> float | None:
    """The measured speed of a backend for launches like this one, at the nearest measured head
    size; None where nobody measured. Larger units run tile by tile, as those of a tile's size do.
    """
    capability, (bq, bk) = _capability(launch.q.device), launch.index.size
    size = (min(bq, TILE), min(bk, TILE))
    return _nearest(backend, capability, launch.q.shape[3], size, launch.causal)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


@lru_cache(maxsize=256)
def _nearest(
    backend: str, capability: str, width: int, size: tuple[int, int], causal: bool
) -> float | None:
    kind = (backend, capability, size, causal)
    found = {k[2]: v for k, v in table().items() if (k[0], k[1], k[3], k[4]) == kind}
    return found[min(found, key=lambda n: (abs(n - width), n))] if found else None
