"""Lowered work: every block in its place, rows in sections and longest first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import random_index, tensors

from accelkit.kernels._triton import lower as module
from accelkit.kernels._triton.lower import lower, lower_keys
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex
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
        masked, count = int(work.counts[0][row]), int(work.counts[1][row])
        got = work.lists[row * work.capacity :][: masked + count].tolist()
        assert sorted(got) == wanted
        assert set(got[masked:]) == clean


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_every_row_once_by_length_in_each_section(kv_heads: int, monkeypatch) -> None:
    """Sections of three of the four KV heads reach from one prompt into the other."""
    monkeypatch.setattr(module, "_section", lambda launch: kv_heads)
    launch = launch_of()
    work = lower(launch)
    rows, length = work.items[:, 0].long(), work.counts[:2].sum(0)
    assert rows.sort().values.tolist() == list(range(length.numel()))
    tiles = launch.index.rows
    section = (rows // (tiles * 8) * 4 + rows // tiles % 8 // 2) // kv_heads
    assert (section.diff() <= 0).all()
    for one in range(-(-8 // kv_heads)):
        found = length[rows[section == one]]
        if one % 2:  # rising, where the section before fell
            found = found.flip(0)
        assert (found.diff() <= 0).all()
    wanted = torch.stack(
        [rows, rows % tiles * 32, rows // (tiles * 8), rows // tiles % 8, work.counts[0][rows],
         work.counts[1][rows]], 1,
    )  # fmt: skip
    assert torch.equal(work.items.long(), wanted)


def test_equal_rows_keep_their_order_among_hundreds() -> None:
    """Each row counts those before it, over several chunks of keys."""
    q, k, v = tensors(1, 2, 1, 2400, 64, 16)
    mask = torch.rand(1, 2, 150, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    launch = prepare(q, k, v, BlockIndex.from_mask(mask, (16, 16)), causal=False)
    work = lower(launch)
    longest = mask.sum(-1).flatten().argsort(descending=True, stable=True)
    assert work.items[:, 0].tolist() == longest.tolist()


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


@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_single_keys_end_in_what_not_every_row_sees(causal) -> None:
    q, k, v = tensors(2, 4, 2, 300, 500, 16)
    mask = torch.rand(1, 4, 3, 500, generator=torch.Generator().manual_seed(0))
    mask = mask < torch.tensor([0.9, 0.3, 0.0, 1.0]).view(1, 4, 1, 1)
    index = BlockIndex.from_mask(mask, (128, 1))
    count = index.count.clone()
    count[:, 1] = ALL
    launch = prepare(q, k, v, replace(index, count=count), causal=causal, q_start=150)
    work, starts = lower_keys(launch, 32)
    for row in range(2 * 4 * 3):
        head, tile = row // 3 % 4, row % 3
        low = min(499, 150 + tile * 128) if causal else 499
        end = min(500, 150 + min(300, tile * 128 + 128)) if causal else 500
        keys = mask[0, head, tile].nonzero().flatten() if head != 1 else torch.arange(end)
        seen = int((keys <= low).sum())
        assert int(work.counts[1][row]) == seen // 32
        assert int(work.counts[0][row]) == len(keys) - seen // 32 * 32
        assert int(starts[row]) == (-1 if head == 1 else index.start[0, head, tile])
    assert work.items[:, 0].sort().values.tolist() == list(range(24))
    tiles = work.counts[1] + (work.counts[0] + 31) // 32
    assert (tiles[work.items[:, 0].long()].diff() <= 0).all()


def test_keys_in_any_order_are_masked_from_the_first_that_a_row_does_not_see() -> None:
    q, k, v = tensors(1, 1, 1, 64, 200, 16)
    keys = torch.arange(96, dtype=torch.int32)
    keys[40] = 150
    start, count = torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 96).int()
    launch = prepare(q, k, v, BlockIndex(start, count, keys, (64, 1)), q_start=100)
    work, _ = lower_keys(launch, 32)
    assert work.counts[:2].flatten().tolist() == [64, 1]
