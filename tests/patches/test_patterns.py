"""Patterns against masks drawn token by token, ranges that are kept, and orders."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from score_cases import NAMES, blocks, case, seen, visible_by_hand

from accelkit.errors import InvalidInputError
from accelkit.kernels import select
from accelkit.patches.call import AttentionCall, Clock, Geometry, Span
from accelkit.patches.parts import keep, orders, patterns

UNITS = [(32, 16), (16, 48), (32, 1)]


def coordinates(call):
    """Position of each row [Nq, 1] and of each key [.., 1, Nk]."""
    rows = call.q_start + torch.arange(call.n_q)[:, None]
    keys = torch.arange(call.n_k)[None, None] if call.k_pos is None else call.k_pos
    return rows, keys[..., None, :]


def first_key(call):
    if call.key_mask is None:
        return torch.zeros(1, 1, 1, 1, dtype=torch.long)
    return call.key_mask.int().argmax(-1).view(-1, 1, 1, 1)


def to_blocks(tokens, size):
    """A tile lists a block if any of its pairs is wanted."""
    n_q, n_k = tokens.shape[-2:]
    rows = [
        torch.stack([tokens[..., r, c].any(-1).any(-1) for c in blocks(n_k, size[1])], -1)
        for r in blocks(n_q, size[0])
    ]
    return torch.stack(rows, -2)


def promises(index, call):
    """No key twice, none that nobody sees, no row without a key."""
    nk = call.tiles(index.size)[1]
    mask = index.to_mask(nk).expand(2, len(call.heads), -1, -1)
    assert int(index.count.expand(mask.shape[:3]).sum()) == int(mask.sum())
    assert not (mask & ~visible_by_hand(call, index.size)).any()
    tokens = mask.repeat_interleave(index.size[0], 2)[:, :, : call.n_q]
    tokens = tokens.repeat_interleave(index.size[1], 3)[..., : call.n_k]
    ok = seen(call)
    assert torch.equal((tokens & ok).any(-1), ok.any(-1))
    return mask, tokens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(("sink", "width"), [(0, 1), (4, 20), (20, 64)])
def test_window(name, unit, sink, width):
    call = case(name)
    index = patterns.window(call, sink, width, unit)
    mask, tokens = promises(index, call)
    rows, keys = coordinates(call)
    distance = rows - keys if call.causal else (rows - keys).abs()
    wanted = ((distance < width) | (keys < first_key(call) + sink)) & seen(call)
    assert not (wanted & ~tokens).any()
    if call.k_pos is None and call.key_mask is None:
        # Nothing beyond the blocks that the window touches, however the tile lies.
        extra = mask & ~to_blocks(wanted, unit)
        assert not extra.any()


def test_window_by_hand():
    """One sink and the last nine positions, in blocks of eight."""
    call = case("grouped", n=48)
    mask = patterns.window(call, 1, 9, (8, 8)).to_mask(6)[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    last = patterns.window(call, 1, 9, (8, 8), last_rows=10).to_mask(6)[0, 0]
    assert last.sum(-1).tolist() == [1, 2, 3, 3, 5, 6]
    with pytest.raises(InvalidInputError, match="window_tokens"):
        patterns.window(call, 1, 0)


def test_heads_share_one_list():
    index = patterns.window(case("grouped"), 4, 32, (32, 16))
    assert index.heads == 4
    assert index.start.stride(1) == 0
    assert index.blocks.numel() == 5 * 10


@pytest.mark.parametrize("name", [n for n in NAMES if n != "permuted keys"])
@pytest.mark.parametrize("unit", [(16, 16), (32, 16), (16, 48)])
def test_power_of_two(name, unit):
    call = case(name)
    mask, _ = promises(patterns.power_of_two(call, unit, local_blocks=2), call)
    rows, _ = coordinates(call)
    wanted = torch.zeros_like(mask)
    origin = first_key(call).expand(2, 1, 1, 1)
    for t, r in enumerate(blocks(call.n_q, unit[0])):
        for c in range(mask.shape[-1]):
            away = {int(x) // unit[1] - c for x in rows[r]}
            if not call.causal:
                away |= {-a for a in away}
            if any(a >= 0 and (a < 2 or a & (a - 1) == 0) for a in away):
                wanted[:, :, t, c] = True
    for b in range(2):
        wanted[b, ..., : int(origin[b]) // unit[1] + 1] = True
    assert torch.equal(mask, wanted & visible_by_hand(call, unit))


@pytest.mark.parametrize("name", NAMES)
def test_all_blocks(name):
    call = case(name)
    dense = patterns.dense(call, (32, 16))
    assert dense.blocks.numel() == 0
    assert (dense.count == -1).all()
    assert dense.count.shape[1:] == (len(call.heads), 5)


def test_text_is_dense_rows_and_columns():
    call = case("not causal", n=64)
    given = {f.name: getattr(call, f.name) for f in fields(call)}
    tokens = Geometry((Span("text", 0, 10), Span("video", 10, 64)))
    call = AttentionCall(**given, geometry=tokens, clock=Clock("denoise"))
    nothing = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    mask = keep.text(nothing, call, (16, 16))
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert keep.text(nothing, replace(call, clock=Clock("prefill")), (16, 16)) is nothing
    assert keep.text(nothing, replace(call, geometry=Geometry()), (16, 16)) is nothing
    # A causal text never looks ahead.
    mask = keep.text(nothing, replace(call, causal=True), (16, 16))
    assert not (mask & ~select.visible_blocks(replace(call, causal=True), (16, 16))).any()


def test_segments():
    call = case("some heads", n=10)
    importance = torch.tensor([1.0, 3, 2, 3, 9, 8, 7, 9, 5, 6]).expand(2, 2, 10)
    found = orders.segments(call, importance, 4)
    assert found.dtype == torch.int32
    # Descending inside a segment, equal keys as they come, the short last segment untouched.
    assert found[0, 0].tolist() == [1, 3, 2, 0, 4, 7, 5, 6, 8, 9]
    assert orders.segments(call, importance, 16)[0, 0].tolist() == list(range(10))


@pytest.mark.parametrize("name", ["grouped", "chunk", "right padding"])
def test_segments_keep_the_past_in_the_past(name):
    call = case(name)
    importance = torch.rand(2, 4, call.n_k)
    found = orders.segments(call, importance, 32)
    every = torch.arange(call.n_k).expand(2, 4, -1)
    assert torch.equal(found.long().sort(-1).values, every)
    whole = call.n_k // 32 * 32
    assert torch.equal(found[..., :whole] // 32, every[..., :whole].int() // 32)
    if call.key_mask is not None:
        real = call.key_mask[1][found[1, 0].long()]
        for s in blocks(whole, 32):  # padding behind the real keys of its segment
            assert torch.equal(real[s].int().sort(descending=True).values, real[s].int())
