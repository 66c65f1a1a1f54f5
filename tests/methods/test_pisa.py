"""PISA by hand: heavy blocks are read until they hold the mass, the others are expanded."""

from dataclasses import replace

import hand
import numpy as np
import planted
import pytest
import torch

from accelkit.calibration.candidates import Bench
from accelkit.calibration.capture import dense_attention
from accelkit.kernels import BlockIndex, Partial
from accelkit.kernels.select import density
from accelkit.patches.methods.pisa import PISA
from accelkit.patches.plan import Plan
from accelkit.patches.sites.attention import compute
from accelkit.patches.state import PatchState


def small(**fields: float) -> PISA:
    return PISA(**{"sink_blocks": 1, "local_blocks": 1, "tile": 16, "block": 16, **fields})


@pytest.mark.parametrize(("mass", "kept"), [(0.6, [0, 1, 5]), (0.9, [0, 1, 2, 5])])
def test_mass_is_counted(mass: float, kept: list[int]):
    """Block 1 has 10 nats and block 2 has 9: 73 and 27 % of the mass."""
    call = hand.call_with(96, {range(16, 32): 10.0, range(32, 48): 9.0})
    (index, _) = planted.ask(small(mass=mass), call).pieces
    assert isinstance(index, BlockIndex)
    rows = index.to_mask(6)[0, 0, 5].nonzero().flatten().tolist()
    assert rows == kept


def test_expanding_beats_dropping():
    q, k, v = planted.noise(512, seed=3)
    call = planted.make_call(q, k, v)
    answer = planted.ask(small(mass=0.3), call)
    index, rest = answer.pieces
    assert isinstance(rest, Partial)
    dense = compute(planted.ask(small(mass=1.0), call)).out
    dropped = compute(replace(answer, pieces=(index,))).out
    both = compute(answer).out
    assert (both - dense).abs().sum() < 0.6 * (dropped - dense).abs().sum()


def test_its_density_is_that_of_what_it_reads():
    """As calibration counts it; a method that computes everything by itself is dense."""
    q, k, v = planted.noise(512, seed=3)
    answer = planted.ask(small(mass=0.3), planted.make_call(q, k, v))
    index, rest = answer.pieces
    state = PatchState(Plan.model_construct(sites={}, tables={}))
    state.measure_density = True
    state.saw(answer.call, [answer, replace(answer, pieces=(rest,))])
    (seen,) = state.counts[answer.call.site.path].densities
    heads = len(answer.call.heads)
    torch.testing.assert_close(seen[:heads], density(index, answer.call))
    assert seen[:heads].max() < 0.9
    assert seen[heads:].tolist() == [1.0] * heads


def test_a_chunk_decides_like_the_whole():
    q, k, v = planted.noise(512, seed=3)
    method = small(mass=0.6)
    whole = planted.select(method, planted.make_call(q * 4, k, v))
    chunk = planted.select(method, planted.make_call(q[:, :, 256:] * 4, k, v, q_start=256))
    assert torch.equal(chunk.seen, whole.seen[:, :, 256:])


def test_values_per_head():
    q, k, v = planted.noise(512, seed=3)
    call = planted.make_call(q, k, v)
    heads = len(call.heads)
    table = torch.tensor([0.2, 0.9] * (heads // 2))
    mixed = planted.select(small(mass="m"), replace(call, tables={"m": table}))
    low, high = (planted.select(small(mass=m), call) for m in (0.2, 0.9))
    assert torch.equal(mixed.seen[:, 0::2], low.seen[:, 0::2])
    assert torch.equal(mixed.seen[:, 1::2], high.seen[:, 1::2])


def test_calibration_judges_some_tiles_of_it():
    """Errors on a share of the tiles are those of the whole answer at the same rows."""
    q, k, v = planted.noise(2048, seed=3)
    call = planted.make_call(q, k, v)
    dense = dense_attention(call)
    answer = planted.ask(small(mass=0.3, tile=64), call)
    bench = Bench(call, dense, np.zeros(0, np.int64))
    found = torch.tensor(bench.measure((answer,))["error"])
    rows = bench.tiles(64)[1]
    assert len(rows) < 1024
    gap = (compute(answer).out - dense.out)[:, :, rows].abs().sum((0, 2, 3))
    torch.testing.assert_close(
        found, gap / dense.out[:, :, rows].abs().sum((0, 2, 3)), rtol=1e-3, atol=1e-4
    )
