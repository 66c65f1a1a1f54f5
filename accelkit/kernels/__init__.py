"""Ground floor: tensors in, tensors out. Submodules load on first use, so that plans can be read
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelkit.kernels import expansion, pyramid, quantize, scores, select  # noqa: F401
    from accelkit.kernels.dispatch import attend as attend
    from accelkit.kernels.index import ALL as ALL
    from accelkit.kernels.index import BlockIndex as BlockIndex
    from accelkit.kernels.index import Inputs as Inputs
    from accelkit.kernels.index import Partial as Partial

_ROOMS = ("expansion", "pyramid", "quantize", "scores", "select")
"""What methods reach as `kernels.<room>`."""
_WHERE = {
    "attend": "dispatch", "ALL": "index", "BlockIndex": "index", "Inputs": "index",
    "Partial": "index",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"accelkit.kernels.{name}")
    if name in _WHERE:
        return getattr(import_module(f"accelkit.kernels.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'accelkit.kernels' has no attribute {name!r}")
