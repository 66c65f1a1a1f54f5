"""What methods share. Submodules load on first use, so that methods can be listed without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelkit.patches.parts import (  # noqa: F401
        bits,
        chunks,
        coarse,
        dual_path,
        grids,
        keep,
        orders,
        patterns,
        ranking,
        visiting,
    )

_PARTS = (
    "bits",
    "chunks",
    "coarse",
    "dual_path",
    "grids",
    "keep",
    "orders",
    "patterns",
    "ranking",
    "visiting",
)


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"accelkit.patches.parts.{name}")
    raise AttributeError(f"module 'accelkit.patches.parts' has no attribute {name!r}")
