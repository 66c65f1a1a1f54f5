"""Measured speeds of the kernels: the shipped table by which `dispatch` chooses among those that
can serve a launch. `benchmarks/kernels.py --speeds` writes it.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from math import log
from typing import Any, NamedTuple

import torch

from accelkit.kernels.index import capability
from accelkit.kernels.launch import Launch

TILE = 128
"""Rows and keys of the largest tile of any kernel."""


class Kind(NamedTuple):
    """Launches that were measured together: on a GPU (its name, and its compute capability) at a
    number of keys (`tokens`).
    """

    backend: str
    gpu: str
    capability: str
    head_dim: int
    unit: tuple[int, int]
    causal: bool
    tokens: int

    @staticmethod
    def of(row: dict[str, Any]) -> Kind:
        """The kind of launch that a row of the table is about."""
        return Kind._make(tuple(row[f]) if f == "unit" else row[f] for f in Kind._fields)


@lru_cache(maxsize=1)
def table() -> dict[Kind, float]:
    """TFLOP/s of the computed blocks over those of the best dense kernel of the same shape, mean
    over densities.
    """
    rows = json.loads(files("accelkit.kernels").joinpath("speeds.json").read_text())
    return {Kind.of(row): row["speed"] for row in rows}


def speed(backend: str, launch: Launch) -> float | None:
    """The measured speed of a backend for launches like this one: on this GPU or another of its
    capability, then at the nearest measured head size and number of keys. None where nobody
    measured. Larger units run tile by tile, as those of a tile's size do.
    """
    gpu, capability = _device(launch.q.device)
    bq, bk = launch.index.size
    unit = (min(bq, TILE), min(bk, TILE))
    return _nearest(
        Kind(backend, gpu, capability, launch.q.shape[3], unit, launch.causal, launch.n_k)
    )


@lru_cache(maxsize=16)
def _device(device: torch.device) -> tuple[str, str]:
    return torch.cuda.get_device_name(device), "{}.{}".format(*capability(device))


@lru_cache(maxsize=256)
def _nearest(kind: Kind) -> float | None:
    def distance(other: Kind) -> tuple[bool, int, float]:
        longer = abs(log(other.tokens / max(kind.tokens, 1)))
        return other.gpu != kind.gpu, abs(other.head_dim - kind.head_dim), longer

    def same(k: Kind) -> tuple[object, ...]:
        return k.backend, k.capability, k.unit, k.causal

    found = [k for k in table() if same(k) == same(kind)]
    return table()[min(found, key=distance)] if found else None
