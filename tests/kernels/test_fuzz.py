"""A short form of `benchmarks/fuzz_kernels.py`: small random calls on this machine's backends."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from accelkit.kernels import cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATH = Path(__file__).parents[2] / "benchmarks" / "fuzz_kernels.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_kernels", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(16))
def test_random_call(fuzz: ModuleType, seed: int) -> None:
    family = fuzz.Family.draw(seed, DEVICE)
    served, wrong = fuzz.run(family, 100 + seed, DEVICE, 100)
    assert served
    assert not wrong, f"{100 + seed}:{seed} {family}"


@pytest.mark.skipif(DEVICE != "cpu", reason="breaks the CPU path")
def test_a_wrong_kernel_is_found(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attend_listed

    def wrong_scale(launch) -> None:
        right(launch)
        launch.out.mul_(1.01)

    monkeypatch.setattr(cpu, "attend_listed", wrong_scale)
    found = [fuzz.run(fuzz.Family.draw(s, DEVICE), s, DEVICE, 100)[1] for s in range(4)]
    assert any("torch: relative error" in text for wrong in found for text in wrong)
