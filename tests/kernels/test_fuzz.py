"""A short form of `benchmarks/fuzz_kernels.py`: small random calls on this machine's backends."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from accelkit.kernels import cpu
from accelkit.kernels import quantize as q8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATH = Path(__file__).parents[2] / "benchmarks" / "fuzz_kernels.py"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PATH.parent))
    return importlib.import_module(PATH.stem)


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


SHARP = 83313
"""Sharp queries, and at 300 tokens one key: a row's LSE is one product of 8-bit operands."""


def in_eight_bits(fuzz: ModuleType, **change) -> object:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    family = fuzz.Family(dtype, 64, 64, (128, 128), False, 4, 2, frozenset(), qk="int8")
    return replace(family, **change)


@pytest.mark.parametrize("seed", [82533, SHARP])
@pytest.mark.parametrize("qk", ["int8", "fp8"])
def test_few_keys_in_eight_bits(fuzz: ModuleType, qk: str, seed: int) -> None:
    served, wrong = fuzz.run(in_eight_bits(fuzz, qk=qk), seed, DEVICE, 300)
    assert "triton" in served
    assert not wrong


@pytest.mark.skipif(DEVICE != "cpu", reason="breaks the quantiser's plain form")
@pytest.mark.parametrize("part", ["rounding", "scale"])
def test_wrong_operands_are_found(fuzz: ModuleType, monkeypatch, part: str) -> None:
    """Operands that are off by more than half a step, in a kernel that is right about them."""
    right = q8._rounded

    def wrong(x: torch.Tensor, form: str, dims: tuple[int, ...]):
        eight, scale = right(x, form, dims)
        if part == "scale":
            return eight, scale * 1.01
        return (eight.int() - (eight > 0).int()).to(eight.dtype), scale

    monkeypatch.setattr(q8, "_rounded", wrong)
    _, found = fuzz.run(in_eight_bits(fuzz), SHARP, DEVICE, 300)
    assert any("half steps" in text for text in found)


@pytest.mark.skipif(DEVICE != "cpu", reason="breaks the plain form")
def test_a_kernel_that_reads_other_operands_is_found(fuzz: ModuleType, monkeypatch) -> None:
    """One step in one operand of a kernel is more than its sums may lose."""
    from accelkit.kernels import block_sparse

    right = block_sparse.quantize

    def one_step_off(*args: object) -> q8.Operands:
        ops = right(*args)
        q = ops.q.clone()
        q[..., 5] += torch.where(q[..., 5] > 0, -1, 1).to(q.dtype)
        return replace(ops, q=q)

    monkeypatch.setattr(block_sparse, "quantize", one_step_off)
    _, found = fuzz.run(in_eight_bits(fuzz), SHARP, DEVICE, 300)
    assert [text.split(":")[0] for text in found] == ["reference"]
    assert "LSE off" in found[0]
