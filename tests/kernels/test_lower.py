"""Lowered work: every block in its place, rows in sections and longest first."""

from __future__ import annotations

import pytest
import torch
from attention_cases import random_index, tensors

from accelkit.kernels._triton import lower as module
from accelkit.kernels._triton.lower import lower
from accelkit.kernels.dispatch import attend
from accelkit.kernels.prepare import prepare

pytestmark = pytest.mark.interpreter


def launch_of(heads: int = 8, kv_heads: int = 4, **options):
    q, k, v = tensors(2, heads, kv_heads, 300, 700, 32)
    index = random_index(2, heads, 300, 700, (32, 16), dense_heads=(1,), empty_rows=(2,))
    return prepare(q, k, v, index, q_start=400, **options)


def test_lists_hold_the_visible_blocks_masked_first() -> None:
    launch = launch_of()
    work = lower(launch)
    mask = launch.index.to_mask(launch.key_blocks).flatten(0, 2)
    for row in range(0, mask.shape[0], 7):
        tile = row % launch.index.rows
        low, high = 400 + tile * 32, 400 + min(tile * 32 + 31, 299)
        wanted = [j for j in mask[row].nonzero().flatten().tolist() if j * 16 <= high]
        clean = {j for j in wanted if j * 16 + 15 <= low}
        masked, count = int(work.masked[row]), int(work.clean[row])
        got = work.lists[row * work.capacity :][: masked + count].tolist()
        assert sorted(got) == wanted
        assert set(got[masked:]) == clean


def test_every_row_once_longest_first_in_each_section(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CACHE_BYTES", 0)  # a section is one KV head
    launch = launch_of()
    work = lower(launch)
    rows, length = work.order.long(), work.masked + work.clean
    assert rows.sort().values.tolist() == list(range(length.numel()))
    tiles = launch.index.rows
    section = rows // (tiles * 8) * 4 + rows // tiles % 8 // 2
    assert (section.diff() >= 0).all()
    for one in range(8):
        found = length[rows[section == one]]
        assert (found.diff() <= found[:-1] / 16).all()  # bins are a sixteenth wide
    wanted = torch.stack(
        [rows, rows % tiles * 32, rows // (tiles * 8), rows // tiles % 8, work.masked[rows],
         work.clean[rows]], 1,
    )  # fmt: skip
    assert torch.equal(work.items.long(), wanted)


def test_rows_of_a_part_are_numbered_from_zero() -> None:
    launch = launch_of(rows=[3, 8])
    work = lower(launch)
    assert work.items[:, 0].sort().values.tolist() == list(range(2 * 8 * 2))
    assert set(work.items[:, 1].tolist()) == {96, 256}


def test_kept_work_serves_other_heads_of_the_same_index() -> None:
    q, k, v = tensors(1, 4, 2, 100, 100, 32)
    index = random_index(1, 2, 100, 100, (32, 32))
    for heads in ((0, 1), (3, 2)):
        got = attend(q, k, v, index, heads=heads, backend="triton")
        want = attend(q, k, v, index, heads=heads, backend="reference")
        torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    assert len(index.lowered) == 1
