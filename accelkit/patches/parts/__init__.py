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


def __getattr__(name: str) -> Any:
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # a part that misses what it imports
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
