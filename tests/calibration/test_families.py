"""Which families of settings go on to the long prompts."""

from __future__ import annotations

from typing import Any

from accelkit.calibration.candidates import stored
from accelkit.calibration.measure import kept
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.patches.method import load

COSTS = CostTable(
    "cpu", "float32", 2, 1, 64, ((1024, 10.0), (4096, 160.0)), ((1024, 10.0), (4096, 160.0)),
    {"128x128": Kernel(0.0, 0.0, 80.0 / 8.39)},
    {name: MethodCost(((4096, 1.0),)) for name in ("window", "a_shape", "xattention")},
)  # fmt: skip


def family(name: str, error: list[float], density: list[float]) -> dict[str, Any]:
    """One setting with an error and a density for each of two heads."""
    one = {"settings": [stored(load(name)())], "field": None, "size": [(128, 128)], "ms": [None]}
    return one | {"error": [error], "density": [density]}


def test_families_complement_each_other() -> None:
    """The best single family comes first, then what helps the other head, not the second best."""
    record = {
        "families": {
            "window": family("window", [0.01, 0.9], [0.1, 0.1]),
            "a_shape": family("a_shape", [0.01, 0.9], [0.15, 0.1]),
            "xattention": family("xattention", [0.9, 0.15], [0.1, 0.1]),
        }
    }
    assert [f.name for f in kept(record, COSTS, 4096, 1024, 2)] == ["window", "xattention"]
    assert [f.name for f in kept(record, COSTS, 4096, 1024, 9)][-1] == "a_shape"
