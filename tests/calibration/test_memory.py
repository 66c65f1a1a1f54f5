"""Peak memory of a stretch of work and of a whole calibration, and memory that a process keeps.

What is read from the system is asked in a process of its own, for one that kept memory goes on
keeping it.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ledger import Ledger
from torch import nn
from transformers import AutoModelForCausalLM

from accelkit.calibration.calibrate import calibrate
from accelkit.calibration.capture import prefill
from accelkit.calibration.evaluation.tasks import source_corpus
from accelkit.calibration.fit import fit
from accelkit.kernels.cost import CostTable

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts")
MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama"
MIB = 2**20
LENGTH = 3072
LAYERS = 4
METHODS = ["window", "anchor_attention", "xattention"]
MOST = 1.25
"""Peak of a calibration ÷ that of a dense prefill."""

PEAK = """
import torch
from accelkit.calibration import memory
cpu, size = torch.device("cpu"), 1 << 27
memory.restart(cpu)
before = memory.peak(cpu)
held = torch.ones(size, dtype=torch.uint8)
del held
risen = memory.peak(cpu)
memory.restart(cpu)
print((risen - before) / size, (risen - memory.peak(cpu)) / size)
"""
PAGES = """
import resource, sys, torch
from accelkit.calibration import memory
if sys.argv[1] == "keep":
    memory.keep()
def fresh():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(10_000_000) for _ in range(2)]  # more than glibc ever keeps
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(9):
    fresh()  # finds its places by and by
print(min(fresh() for _ in range(3)))
"""
FREE = """
import torch
from accelkit.calibration import memory
cpu, size = torch.device("cpu"), 1 << 27
memory.keep()
low = torch.ones(size, dtype=torch.uint8)
high = torch.ones(1000)  # above it in the heap
del low
memory.restart(cpu)
before = memory.peak(cpu)
memory.give_back(cpu)
memory.restart(cpu)
print((before - memory.peak(cpu)) / size, float(high.sum()))
"""


def said(code: str, *arguments: str) -> list[float]:
    run = [sys.executable, "-c", code, *arguments]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    return [float(word) for word in text.split()]


@on_linux
def test_a_peak_is_seen_and_forgotten() -> None:
    risen, fallen = said(PEAK)
    assert risen >= 0.9
    assert fallen >= 0.5


@on_linux
def test_kept_memory_is_not_cleared_again() -> None:
    (kept,), (left,) = said(PAGES, "keep"), said(PAGES, "leave")
    assert kept < 100
    assert left > 5_000


@on_linux
def test_free_memory_goes_back() -> None:
    back, _ = said(FREE)
    assert back >= 0.9


@torch.library.custom_op("accelkit_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Through numbers eight times as wide."""
    return (x.double() * 2).to(x.dtype)


def test_the_ledger_counts_what_lives() -> None:
    def work() -> None:
        kept = torch.zeros(2 * MIB, dtype=torch.uint8)
        for _ in range(4):  # one at a time
            torch.zeros(3 * MIB, dtype=torch.uint8)
        kept.view(2, -1).t().mul_(2)  # views cost nothing

    model = nn.Linear(256, 1024, bias=False)  # 1 MiB
    with Ledger(model) as ledger:
        assert ledger.of(work) == 6 * MIB
        small = torch.zeros(MIB, dtype=torch.uint8)
        assert ledger.of(lambda: doubled(small)) == (1 + 1 + 2 * 8) * MIB
        ledger.restart()
        assert ledger.peak == 2 * MIB


def test_a_calibration_takes_little_more_than_a_prefill(monkeypatch) -> None:
    """Every stage runs, the fit too, on the first layers of the shipped model; then dense attention
    is made dear, so that sparse plans are checked and timed whatever else this machine does.
    """
    real = fit.fit

    def dear(*a: Any, **k: Any) -> CostTable:
        table = real(*a, **k)
        dense, ride = (tuple((n, 100 * ms) for n, ms in x) for x in (table.dense, table.ride))
        return replace(table, dense=dense, ride=ride)

    monkeypatch.setattr(fit, "fit", dear)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    text = torch.tensor(list(source_corpus()[: 3 * LENGTH].encode()))  # the tokenizer's are bytes
    prompts = list(text.view(3, LENGTH))
    plans = []

    def whole() -> None:
        plans.append(
            calibrate(
                model, prompts, budget=0.5, lengths=[LENGTH], methods=METHODS, preset="fast",
                progress=False,
            )
        )  # fmt: skip

    with Ledger(model) as ledger:
        prefill(model, prompts[0][None])  # makes what is made once
        dense = ledger.of(lambda: prefill(model, prompts[0][None]))
        peak = ledger.of(whole)
    assert peak < MOST * dense
    assert plans[0].measured["rounds"]
    assert "prefill_ms" in plans[0].measured
