"""One query row over a long cache, its lists cut into parts, against plain softmax over them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_cases import random_index, tensors

from accelkit.errors import InvalidInputError
from accelkit.kernels import decode as room
from accelkit.kernels.decode import cut, decode
from accelkit.kernels.index import ALL

N = 300


def softmax(q, k, v, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 over the keys of a bool mask `[B, Hkv, Nk]`; q has two heads for each KV head."""
    k, v, mask = (t.repeat_interleave(2, 1) for t in (k.double(), v.double(), mask))
    s = (q.double() @ k.transpose(2, 3))[:, :, 0] * q.shape[-1] ** -0.5
    s = s.masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    p = (s - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return (p[:, :, None] @ v), lse[..., None]


def case(unit: int, batch: int = 2):
    q, k, v = tensors(batch, 4, 2, 1, N, 32)
    index = random_index(batch, 2, 1, N, (1, unit), dense_heads=(1,))
    mask = index.to_mask(-(-N // unit))[:, :, 0].repeat_interleave(unit, -1)[..., :N]
    return (q, k, v, index), mask


@pytest.mark.parametrize("unit", [1, 16, 64])
@pytest.mark.parametrize("splits", [1, 3, 7, 400])
@pytest.mark.parametrize("padded", [False, True])
def test_parts_equal_softmax(unit, splits, padded) -> None:
    """A list of blocks or keys, a head that reads all, fewer keys than parts."""
    call, mask = case(unit)
    options = {}
    if padded:
        options["key_mask"] = torch.arange(N).expand(2, N) >= torch.tensor([[40], [0]])
        mask = mask & options["key_mask"][:, None]
    got = decode(*call, splits=splits, **options)
    out, lse = softmax(*call[:3], mask)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), lse, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("unit", [1, 16])
def test_triton_runs_it(unit) -> None:
    call, mask = case(unit, batch=1)
    got = decode(*call, splits=2, backend="triton")
    out, lse = softmax(*call[:3], mask)
    torch.testing.assert_close(got.out.double(), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse.double(), lse, atol=1e-5, rtol=1e-5)


def test_lists_are_cut_evenly_and_lose_nothing() -> None:
    (_, _, _, index), _ = case(1)
    parts = cut(index, 3, N, 2)
    assert parts.count.shape == (2, 6, 1)
    assert parts.size == (16, 1)
    lengths = parts.count.view(2, 2, 3)
    assert int(lengths.amax() - lengths[..., :2].amin(-1).amax()) == 0
    assert (
        lengths.sum(-1).tolist() == torch.where(index.count == ALL, N, index.count)[..., 0].tolist()
    )
    for row in range(2):
        runs = [
            parts.blocks[s : s + c].tolist()
            for s, c in zip(parts.start[row, :3, 0], parts.count[row, :3, 0], strict=True)
        ]
        s, c = int(index.start[row, 0, 0]), int(index.count[row, 0, 0])
        assert [x for run in runs for x in run] == index.blocks[s : s + c].tolist()


def test_a_head_without_keys_gives_zeros() -> None:
    (q, k, v, index), _ = case(16)
    empty = replace(index, count=torch.zeros_like(index.count))
    got = decode(q, k, v, empty, splits=3)
    assert not got.out.any()
    assert (got.lse == -math.inf).all()


def test_a_bias_for_each_key_goes_with_its_head() -> None:
    call, _ = case(16)
    bias = torch.randn(1, 2, N)
    got = decode(*call[:3], replace(call[3], bias=bias), splits=4)
    whole = decode(*call[:3], replace(call[3], bias=bias), splits=1)
    torch.testing.assert_close(got.out, whole.out, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got.out, decode(*call, splits=4).out, atol=1e-3)


def test_what_it_refuses() -> None:
    (q, k, v, index), _ = case(16)
    with pytest.raises(InvalidInputError, match="expected one row"):
        decode(q.expand(-1, -1, 2, -1), k, v, index)
    with pytest.raises(InvalidInputError, match="lists for 2 KV heads"):
        decode(q, k, v, random_index(1, 4, 1, N, (1, 16)))
    with pytest.raises(InvalidInputError, match="splits is 0"):
        decode(q, k, v, index, splits=0)


def test_parts_fill_the_device_and_are_not_short(monkeypatch) -> None:
    class Card:
        is_cuda, device, shape = True, "cuda", (1, 8, 131072, 128)

    many = type("P", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: many)
    assert room._splits(Card, 1) == 17
    assert room._splits(Card, 32) == 1
    Card.shape = (1, 1, 4096, 128)
    assert room._splits(Card, 1) == 8
    assert room._splits(torch.empty(1, 2, 4096, 8), 1) == 1
