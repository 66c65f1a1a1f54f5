"""Measured kernel configurations, shipped as data. `benchmarks/tune_kernels.py` writes them."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch

from accelkit.kernels.index import capability


def tuned(kernel: str, device: torch.device, width: int, tile: tuple[int, int]) -> Any:
    """How to compile a kernel for padded head size `width` and a tile on a device, or None where
    nobody measured: `[warps, stages]` of "triton", `[stages, query stages, mode]` of "gluon"
    (causal), "gluon_full" and "gluon_gather", stages of "gluon_skip".
    """
    return _table().get(_capability(device), {}).get(kernel, {}).get(str(width), {}).get(
        f"{tile[0]}x{tile[1]}"
    )  # fmt: skip


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return json.loads(files("accelkit.kernels._triton").joinpath("tuned.json").read_text())


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> str:
    """Compute capability; the interpreter compiles what the newest measured GPU would run."""
    if device.type != "cuda":
        return max(_table())
    return "{}.{}".format(*capability(device))


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
