"""Measured speeds of the kernels: the shipped table by which `dispatch` chooses among those that
can serve a launch. `benchmarks/kernels.py --speeds` writes it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

import torch

from accelkit.kernels.launch import Launch

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
    """The measured speed of a backend for launches like this one, at the next measured head size;
    None where nobody measured.
    """
    capability = "{}.{}".format(*torch.cuda.get_device_capability(launch.q.device))
    found = {
        key[2]: value
        for key, value in table().items()
        if (key[0], key[1], key[3], key[4])
        == (backend, capability, launch.index.size, launch.causal)
    }
    width = launch.q.shape[3]
    return found[min(found, key=lambda n: (abs(n - width), n))] if found else None
