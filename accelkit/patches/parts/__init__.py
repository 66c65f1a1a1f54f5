"""What methods share. Submodules load on first use, so that methods can be listed without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelkit.patches.parts import grids, keep, orders, patterns, ranking, visiting  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in ("grids", "keep", "orders", "patterns", "ranking", "visiting"):
        return import_module(f"accelkit.patches.parts.{name}")
    raise AttributeError(f"module 'accelkit.patches.parts' has no attribute {name!r}")
