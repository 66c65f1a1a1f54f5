"""PAROAttention: the order that calibration finds, and its map on other grids."""

from dataclasses import replace

import planted
import torch

from accelkit.patches.call import Geometry, Site, Span
from accelkit.patches.methods.paro_attention import PAROAttention
from accelkit.patches.parts import orders


def calibrated(call):
    lse = (call.q @ call.k.transpose(-1, -2) * call.scale).logsumexp(-1)
    calibrator = PAROAttention().calibrator(Site("a", 0))
    calibrator.see(call, planted.dense(call), lse)
    return calibrator


def test_orders_found():
    """Head 1 looks along time, so frames go last; head 0 around in its frame, so they go first."""
    axes = calibrated(planted.video()).tables()["paro_axes"]
    assert orders.AXES[axes[1]][2] == 0
    assert orders.AXES[axes[0]][0] == 0


def test_tables_are_small():
    tables = calibrated(planted.video()).tables()
    assert tables["paro_blocks"].shape == (4, 1, 64, 64)
    assert tables["paro_axes"].shape == (4,)


def test_the_map_is_laid_over_another_grid():
    """A block-diagonal map of four cells over twelve blocks: three of them in each cell."""
    q, k, v = planted.noise(12 * 16)
    call = planted.video_call(q, k, v, (12, 4, 4))
    tables = {"m": torch.eye(4).expand(4, 1, 4, 4)}
    call = replace(call, tables=tables)
    method = PAROAttention(density=0.25, blocks="m", block=16)
    found = planted.ask(method, call).pieces[0]
    mask = found.to_mask(12)[0, 0]
    assert torch.equal(mask, torch.block_diag(*[torch.ones(3, 3)] * 4).bool())


def test_step_buckets():
    """Three maps: two for the first half of the steps, the last for all that follow."""
    q, k, v = planted.noise(64)
    call = planted.video_call(q, k, v, (4, 4, 4))
    maps = torch.stack([torch.eye(4).roll(i, 1) for i in range(3)]).expand(4, 3, 4, 4)
    call = replace(call, tables={"m": maps})
    method = PAROAttention(density=0.25, blocks="m", block=16)
    shift = []
    for step in (0, 12, 13, 24, 25, 49):
        now = replace(call, clock=replace(call.clock, step=step), memory={}, _shared={})
        mask = planted.ask(method, now).pieces[0].to_mask(4)[0, 0]
        shift.append(int(mask[0].nonzero()[0, 0]))
    assert shift == [0, 0, 1, 1, 2, 2]


def test_text_is_dense_and_without_a_map_all_is():
    q, k, v = planted.noise(64 + 16)
    call = planted.video_call(q, k, v, (4, 4, 4))
    assert planted.ask(PAROAttention(), call) is None
    spans = (Span("text", 0, 16), Span("video", 16, 80))
    call = replace(call, tables={"m": torch.eye(5).expand(4, 1, 5, 5)})
    call = replace(call, geometry=Geometry(spans, (4, 4, 4)))
    mask = planted.ask(PAROAttention(density=0.2, blocks="m", block=16), call).pieces[0].to_mask(5)
    assert mask[0, 0, 0].all() and mask[0, 0, :, 0].all() and mask[0, 0, 3].sum() == 2


def test_eight_bits_are_optional():
    assert PAROAttention().execution(planted.video()) is None
    assert PAROAttention(int8=True).execution(planted.video()).qk == "int8"
