"""How `benchmarks/peers.py` runs and judges released code, by releases made up here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FLEX = """
import torch

def get_active_blocks(q, k, v, block, gamma, least, most, tau):
    n = q.shape[1] // block
    own = torch.arange(n) * (n + 1)
    return [[torch.cat([own, torch.arange(1, n) * n]) if TRUE else own] * q.shape[2]]

def flex_prefill_attention(q, k, v, gamma, tau, min_budget):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    row, key = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    read = (key <= row) & ((key // 128 == row // 128) | (key < 128))
    s = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~read, float("-inf"))
    return (s.softmax(-1) @ v).transpose(1, 2)
"""
XATTN = """
import torch
from block_sparse_attn import block_sparse_attn_func
from nowhere_at_all import anything

def Xattention_prefill(q, k, v, stride, threshold):
    mask = torch.ones(q.shape[2] // 128, q.shape[2] // 128, dtype=torch.bool).tril()
    x = q.transpose(1, 2)[0]
    out = block_sparse_attn_func(x, k, v, 0, 0, 0, None, mask.expand(1, q.shape[1], -1, -1), 1, 1)
    return out.view(1, q.shape[2], q.shape[1], -1).transpose(1, 2)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("peers")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("flex_prefill", "xattn", "block_sparse_attn"):
            del sys.modules[name]


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.py"
    file.parent.mkdir(parents=True)
    (folder / name.split("/")[0] / "__init__.py").write_text("raise ImportError")
    file.write_text(text)
    (folder / "COMMIT").write_text("abc\n")
    return folder


@pytest.mark.parametrize("true", [True, False])
def test_a_release_is_judged_by_the_keys_it_names(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true: bool
) -> None:
    folder = written(tmp_path, "flex_prefill/ops/flex_prefill_attention", f"TRUE = {true}\n{FLEX}")
    monkeypatch.setattr(peers, "CASES", peers.CASES[:1])
    out = tmp_path / "out.json"
    asked = f"--peer flexprefill={folder} --tokens 1536 --heads 2 1 --out {out}"
    report = peers.main(asked.split())
    assert json.loads(out.read_text())["peers"]["flexprefill"]["commit"] == "abc"
    if not true:  # it reads the first block, and says that it does not
        (failed,) = report["failed"]
        assert failed.startswith("FlexPrefill, gamma 0.9, 1536: own error 0.")
        return
    assert not report["failed"]
    theirs, *ours = report["rows"]
    rows = peers.Judge(peers.planted(1536, 2, 1)).rows
    read = torch.where(rows < 128, rows + 1, 128 + rows % 128 + 1)
    assert theirs["density"] == pytest.approx(float(read.sum() / (rows + 1).sum()), rel=1e-5)
    assert theirs["own error"] < 1e-4 < theirs["error"]
    assert 0 < theirs["mass"] < 1 and theirs["× release"] is None
    same = ours[0]
    assert same["like release"] == "settings" and same["own error"] < 1e-4
    matched = {row["like release"]: row for row in ours[1:]}
    for what, row in matched.items():
        assert abs(row[what] - theirs[what]) <= abs(same[what] - theirs[what])


def test_keys_and_mass_of_own_lists(peers: ModuleType) -> None:
    call = peers.planted(1536, 2, 1)
    judge = peers.Judge(call)
    everything = peers.own(call, "flex_prefill", {"coverage": 1.0, "divergence": 0.0})
    assert judge.chosen(everything.reads()) == pytest.approx((1.0, 1.0), abs=1e-5)
    dense = judge.errors(everything.reads(), everything.run())
    assert max(dense) < 1e-4
    lines = peers.own(call, "vertical_slash", {"vertical_columns": 40, "slash_offsets": 200})
    density, mass = judge.chosen(lines.reads())
    assert 0.2 < density < 0.9 and density < mass
    assert judge.errors(lines.reads(), lines.run())[1] < 1e-4


def test_what_a_release_lacks_is_stood_in_for(peers: ModuleType, tmp_path: Path) -> None:
    text = XATTN.replace("from nowhere_at_all import anything\n", "")
    folder = written(tmp_path, "xattn/src/Xattention", text)
    side = peers.RELEASES["xattention"](folder).side(peers.planted(512, 2, 1), 8, 0.9)
    judge = peers.Judge(peers.planted(512, 2, 1))
    assert judge.chosen(side.reads()) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert max(judge.errors(side.reads(), side.run())) < 1e-4
    assert side.choose().shape == (1, 2, 512, 128)


def test_a_release_that_cannot_be_imported_is_told(peers: ModuleType, tmp_path: Path) -> None:
    folder = written(tmp_path, "xattn/src/Xattention", XATTN)
    report = peers.main(["--peer", f"xattention={folder}", "--tokens", "512"])
    assert not report["rows"]
    assert ["nowhere_at_all" in text for text in report["failed"]] == [True]
