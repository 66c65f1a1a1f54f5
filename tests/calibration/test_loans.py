"""Which earlier layers' lists a layer is measured with: told by bits and masses, not by runs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import planted
import pytest
import torch
from planted_model import unclocked
from tiny_cases import tiny_model

from accelkit.calibration import calibrate as flow
from accelkit.calibration import candidates
from accelkit.calibration.candidates import Bench, Family
from accelkit.calibration.capture import dense_attention
from accelkit.calibration.fit import fit
from accelkit.calibration.prefill import check as prefill_check
from accelkit.calibration.prefill import loans, measure, prices
from accelkit.calibration.prefill.loans import Lender, Offer
from accelkit.kernels.cost import CostTable, Kernel, MethodCost
from accelkit.kernels.index import BlockIndex
from accelkit.patches.method import load
from accelkit.patches.parts import bits
from accelkit.patches.plan import Policy
from accelkit.patches.sites.attention import answer

TOKENS = 2048
UNIT = (128, 128)
METHOD = load("xattention")(coverage=0.8, qk="native")
EVERYONE = tuple(range(planted.HEADS))


@pytest.fixture(scope="module")
def call():
    return planted.planted(TOKENS, everywhere=False)


@pytest.fixture
def bench(call):
    return Bench(call, dense_attention(call), np.zeros(0, dtype=np.int64))


def offer_of(call, mask: torch.Tensor, heads: tuple[int, ...] = EVERYONE) -> Offer:
    """An offer of the blocks in `mask` `[heads, nq, nk]`."""
    return Offer(Lender(METHOD, heads), UNIT, (*call.tiles(UNIT), 0), bits.pack(mask))


def own_blocks(call) -> torch.Tensor:
    """What the method itself picks at the call."""
    index = answer(call, Policy(methods=(METHOD,)))[0].index
    return index.to_mask(call.tiles(index.size)[1])[0]


def test_lists_come_back_from_their_bits(call, bench) -> None:
    """An eighth of a byte a block, for the heads that are lent."""
    mask, (nq, nk) = own_blocks(call), call.tiles(UNIT)
    offer = loans.offered(bench, Lender(METHOD, (1, 3)))
    assert offer.bits.shape == (2, nq, nk // 8)
    assert offer.bits.dtype == torch.uint8
    assert torch.equal(offer.lists((3, 1)).to_mask(nk)[0], mask[[3, 1]])
    bench.families([Family("xattention", (METHOD,), None)])
    measured = bench.lent[METHOD]
    assert torch.equal(loans.offered(bench, Lender(METHOD, (1, 3))).bits, offer.bits)
    assert torch.equal(measured.to_mask(nk)[0], mask)


def test_captured_by_hand(bench) -> None:
    mass = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])  # a head, two of four tiles
    inside = torch.zeros(2, 4, 3, dtype=torch.bool)
    inside[0, 1, 0] = inside[0, 3, 2] = inside[1, :, 1] = True
    offer = Offer(Lender(METHOD, (0, 5)), UNIT, (4, 3, 0), bits.pack(inside))
    held = loans.captured(offer, torch.tensor([1, 3]), mass)
    assert held[0].tolist() == pytest.approx([(0.5 + 0.8) / 2, (0.3 + 0.1) / 2])


def test_the_layer_that_promises_most_is_found_far_back(call, bench, monkeypatch) -> None:
    """By mass alone, for each head the lender's head that holds most of its own."""
    nq, nk = call.tiles(UNIT)
    g = torch.Generator().manual_seed(0)
    mass = (6 * torch.randn(len(EVERYONE), nq, nk, generator=g)).softmax(-1)
    heaviest = mass >= mass.topk(nk // 2, -1).values[..., -1:]
    asked = []

    def block_mass(call, lse, size, rows):
        asked.append(size)
        return mass[None][:, :, rows]

    monkeypatch.setattr(loans, "block_mass", block_mass)
    monkeypatch.setattr(candidates, "compute", pytest.fail)
    offers = {"far": offer_of(call, heaviest.flip(0))} | {
        f"near {n}": offer_of(call, ~heaviest) for n in range(5)
    }
    assert loans.promising(bench, offers, 1) == {"far": EVERYONE[::-1]}
    assert asked == [UNIT]  # once for all lenders
    assert list(loans.promising(bench, offers, 2)) == ["far", "near 4"]
    assert loans.promising(bench, offers, 0) == {}


def test_other_tiles_cannot_be_read(call, bench) -> None:
    own = offer_of(call, own_blocks(call))
    nq, nk = call.tiles(UNIT)
    for geometry in ((nq + 1, nk, 0), (nq, nk + 1, 0), (nq, nk, 64)):
        assert loans.promising(bench, {"other": replace(own, geometry=geometry)}, 2) == {}


def test_lent_lists_are_measured_as_the_lists_themselves(call, bench) -> None:
    own = bench.families([Family("xattention", (METHOD,), None)])["xattention"]
    offers = {"a": loans.offered(bench, Lender(METHOD, EVERYONE))}
    (found,) = loans.measured(bench, offers, {"a": EVERYONE, "gone": EVERYONE})
    assert (found["anchor"], found["heads"]) == ("a", list(EVERYONE))
    for key in ("error", "recall", "density"):
        assert found[key] == pytest.approx(own[key][0], abs=1e-5)


def test_what_a_site_lends() -> None:
    """The sparsest setting good at half of the heads, as long as it is measured."""
    settings = tuple(METHOD.model_copy(update={"coverage": c}) for c in (0.6, 0.8, 0.9))
    family = Family("xattention", settings, "coverage")
    record = {
        "settings": [candidates.stored(m) for m in settings], "field": "coverage",
        "size": [[128, 128]] * 3,
        "error": [[0.1, 0.3, 0.3, 0.3], [0.1, 0.3, 0.15, 0.3], [0.0, 0.1, 0.0, 0.1]],
    }  # fmt: skip
    screen = {"families": {"xattention": record}}
    assert loans.lender(screen, [family], [family]) == Lender(settings[1], (0, 2))
    assert loans.lender(screen, [family], [replace(family, settings=settings[2:])]) is None
    assert loans.lender(screen, [], [family]) is None
    record["size"] = [[128, 8]] * 3
    assert loans.lender(screen, [family], [family]) is None


# -- the whole flow -------------------------------------------------------------------------------

LAYERS, LENGTH = 6, 1024
DIFFUSE = (1, 2, 3)
"""Layers that look everywhere: they lend nothing, and stand between those that could."""


@pytest.fixture
def costs(monkeypatch):
    """A device on which choosing takes as long as half of dense attention."""
    table = CostTable(
        "toy", "float32", 4, 2, 16, ((256, 1.0), (1024, 16.0)), ((256, 1.0), (1024, 16.0)),
        {"64x64": Kernel(0.01, 0.001, 7.0)},
        {"probe_window": MethodCost(((256, 2.0), (1024, 2.0)))},
    )  # fmt: skip
    monkeypatch.setattr(fit, "fit", lambda *a, **k: table)
    monkeypatch.setattr(prices, "beside_table", lambda *a: {})
    monkeypatch.setattr(prices, "beside_dense", unclocked)
    speed = {"dense_ms": 2.0, "ms": 1.0, "tokens": LENGTH}
    monkeypatch.setattr(prefill_check.Checker, "speed", lambda self, plan: speed)


def calibrated(journal, **changes):
    model = tiny_model(attention_bias=True, num_hidden_layers=LAYERS)
    for n, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for part in (attention.q_proj, attention.k_proj):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
            part.bias.data.view(-1, 16)[:, :8] = 8.0
        if n in DIFFUSE:
            attention.q_proj.bias.data.zero_()
            attention.v_proj.weight.data *= 20.0
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (LENGTH,), generator=g) for _ in range(4)]
    options = {"budget": 0.05, "lengths": [LENGTH], "methods": ["probe_window"], "progress": False}
    return flow.calibrate(model, prompts, every_row=True, journal=journal, **options, **changes)


def unit_of(line: str) -> str:
    return json.loads(line).get("unit", "")


@pytest.mark.usefixtures("probes", "costs")
def test_a_plan_with_a_far_anchor_and_a_resumed_one(tmp_path) -> None:
    """Killed after any of the sites, it lends and finds the same again."""
    path = tmp_path / "journal.jsonl"
    first = calibrated(path)
    lines = path.read_text().splitlines(keepends=True)
    units = {u["unit"]: u["value"] for u in map(json.loads, lines[1:])}
    site = "model.layers.{}.self_attn".format
    assert [x["anchor"] for x in units[f"measure/0/{site(4)}"]["loans"]] == [site(0)]
    reused = [p.reuse for p in first.policies if p.reuse is not None]
    assert site(0) in {r.site for r in reused}
    assert {p for p, layer in first.sites.items() if layer.rules} <= {site(0), site(4), site(5)}
    for last in (f"measure/0/{site(0)}", f"measure/0/{site(4)}", f"measure/1/{site(3)}"):
        keep = next(n for n, line in enumerate(lines) if unit_of(line) == last) + 1
        path.write_text("".join(lines[:keep]))
        again = calibrated(path, resume=True)
        repeated = path.read_text().splitlines(keepends=True)
        assert repeated[:keep] == lines[:keep]
        assert list(map(unit_of, repeated)) == list(map(unit_of, lines))
        assert json.loads(again.to_json())["sites"] == json.loads(first.to_json())["sites"]
        assert again.policies == first.policies


def test_the_fast_preset_lends_nothing() -> None:
    run = SimpleNamespace(preset=measure.PRESETS["fast"])
    assert measure._lenders(run, ["a"], 0, {}, {}, {}) == {}


def test_bits_of_one_row_of_all() -> None:
    """Rows of all blocks are whole; those of no list are empty."""
    some = BlockIndex.dense(1, 2, UNIT, torch.device("cpu"))
    assert bits.pack(some.to_mask(9)).tolist() == [[[[255, 1], [255, 1]]]]
