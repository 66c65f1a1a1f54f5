"""accelkit: calibrated training-free acceleration of pretrained transformers. Everything loads
on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelkit.calibration.calibrate import calibrate as calibrate
    from accelkit.patches.method import load as method  # noqa: F401
    from accelkit.patches.method import names as methods  # noqa: F401
    from accelkit.patches.patch import PatchHandle as PatchHandle
    from accelkit.patches.patch import disabled as disabled
    from accelkit.patches.patch import from_pretrained as from_pretrained
    from accelkit.patches.patch import patch as patch
    from accelkit.patches.patch import unpatch as unpatch
    from accelkit.patches.plan import Budget as Budget
    from accelkit.patches.plan import Plan as Plan

__version__ = "0.1.0"

_WHERE = {
    "calibrate": ("accelkit.calibration.calibrate", "calibrate"),
    "patch": ("accelkit.patches.patch", "patch"),
    "unpatch": ("accelkit.patches.patch", "unpatch"),
    "disabled": ("accelkit.patches.patch", "disabled"),
    "from_pretrained": ("accelkit.patches.patch", "from_pretrained"),
    "PatchHandle": ("accelkit.patches.patch", "PatchHandle"),
    "Plan": ("accelkit.patches.plan", "Plan"),
    "Budget": ("accelkit.patches.plan", "Budget"),
    "method": ("accelkit.patches.method", "load"),
    "methods": ("accelkit.patches.method", "names"),
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        module, attribute = _WHERE[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'accelkit' has no attribute {name!r}")
