"""BlockIndex: building, joining, taking, and reading back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import random_index

from accelkit.kernels.index import ALL, BlockIndex, ceil_div, plain_inputs


def test_mask_round_trip() -> None:
    mask = torch.rand(2, 3, 5, 7) < 0.4
    index = BlockIndex.from_mask(mask, (64, 32))
    assert index.start.dtype == torch.int64
    assert index.count.dtype == index.blocks.dtype == torch.int32
    assert (index.heads, index.rows) == (3, 5)
    assert torch.equal(index.to_mask(7), mask)


def test_rows_come_back_in_ascending_order() -> None:
    index = BlockIndex.from_mask(torch.tensor([[[[True, False, True, True]]]]), (64, 64))
    assert index.blocks[: int(index.count)].tolist() == [0, 2, 3]


def test_dense_rows_are_whole() -> None:
    index = BlockIndex.dense(2, 3, (64, 64), torch.device("cpu"))
    assert (index.count == ALL).all()
    assert index.to_mask(4).all()


def test_cat_joins_heads_of_different_batch_width() -> None:
    one, two = (
        random_index(1, 2, 300, 300, (64, 64)),
        random_index(2, 1, 300, 300, (64, 64), seed=1),
    )
    both = BlockIndex.cat([one, two])
    assert both.count.shape == (2, 3, 5)
    mask = both.to_mask(5)
    assert torch.equal(mask[:, :2], one.to_mask(5).expand(2, -1, -1, -1))
    assert torch.equal(mask[:, 2:], two.to_mask(5))


def test_take_shares_the_list_and_follows_the_map() -> None:
    index = random_index(1, 3, 200, 200, (64, 64))
    taken = index.take([2, 0, 2])
    assert taken.blocks.data_ptr() == index.blocks.data_ptr()
    assert torch.equal(taken.to_mask(4), index.to_mask(4)[:, [2, 0, 2]])


def test_what_cannot_be_joined_is_refused() -> None:
    one, two = random_index(1, 1, 128, 128, (64, 64)), random_index(1, 1, 128, 128, (32, 64))
    with pytest.raises(ValueError, match="one unit size"):
        BlockIndex.cat([one, two])
    with pytest.raises(ValueError, match="plain pieces"):
        BlockIndex.cat([one, replace(one, bias=torch.zeros(1, 1, 128))])
    with pytest.raises(ValueError, match=r"one bias, found \[0.0, 1.0\]"):
        BlockIndex.cat([one, replace(one, bias=1.0)])


def test_entries_outside_are_ignored_when_read_back() -> None:
    start, count = (
        torch.zeros(1, 1, 1, dtype=torch.int64),
        torch.full((1, 1, 1), 3, dtype=torch.int32),
    )
    index = BlockIndex(start, count, torch.tensor([1, 9, -1], dtype=torch.int32), (64, 64))
    assert index.to_mask(3).flatten().tolist() == [False, True, False]


def test_what_kernels_kept_does_not_outlive_a_change() -> None:
    index = random_index(1, 1, 128, 128, (64, 64))
    index.lowered["key"] = "work"
    assert replace(index, size=(64, 32)).lowered == {}


def test_plain_inputs_know_their_tiles() -> None:
    q, k = torch.zeros(1, 4, 100, 16), torch.zeros(1, 2, 300, 16)
    call = plain_inputs(q, k, k, causal=True, q_start=200)
    assert call.tiles((64, 128)) == (ceil_div(100, 64), ceil_div(300, 128)) == (2, 3)
    assert call.kv_of_head.tolist() == [0, 0, 1, 1]
    assert call.scale == 0.25
