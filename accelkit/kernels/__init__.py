"""Ground floor: tensors in, tensors out. Submodules load on first use, so that plans can be read
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_MODULES = (
    "index",
    "dispatch",
    "expansion",
    "block_sparse",
    "gather",
    "decode",
    "merge",
    "permute",
    "pyramid",
    "quantize",
    "scores",
    "select",
    "cost",
)

if TYPE_CHECKING:
    from accelkit.kernels import (  # noqa: F401
        block_sparse,
        cost,
        decode,
        dispatch,
        expansion,
        gather,
        index,
        merge,
        permute,
        pyramid,
        quantize,
        scores,
        select,
    )
    from accelkit.kernels.dispatch import attend as attend
    from accelkit.kernels.index import ALL as ALL
    from accelkit.kernels.index import BlockIndex as BlockIndex
    from accelkit.kernels.index import Inputs as Inputs
    from accelkit.kernels.index import Partial as Partial


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"accelkit.kernels.{name}")
    if name == "attend":
        return import_module("accelkit.kernels.dispatch").attend
    if name in ("ALL", "BlockIndex", "Inputs", "Partial"):
        return getattr(import_module("accelkit.kernels.index"), name)
    raise AttributeError(f"module 'accelkit.kernels' has no attribute {name!r}")
