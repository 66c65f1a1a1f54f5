"""Sparse VideoGen: which heads look along time, and the band that both share."""

from dataclasses import replace

import planted
import torch

from accelkit.patches.methods.sparse_videogen import SparseVideoGen
from accelkit.patches.parts import orders


def two_heads():
    """Eight frames of 64 places: head 0 reads its frame, head 1 its place in all frames."""
    at = torch.arange(512)
    frame, place = (torch.nn.functional.one_hot(x, 64).float() for x in (at // 64, at % 64))
    q = torch.stack([frame, place])[None] * 8
    v = torch.randn(1, 2, 512, 64, generator=torch.Generator().manual_seed(0))
    return planted.video_call(q, q * 8, v, (8, 8, 8))


def test_heads_choose_their_order():
    assert SparseVideoGen().order(two_heads()).row.tolist() == [[0, orders.TOKEN_MAJOR]]


def test_the_choice_is_made_anew_in_every_call():
    """Swapped heads swap their orders, also with the memory of the step before."""
    call, method = two_heads(), SparseVideoGen()
    before = method.order(call).row
    swapped = {x: getattr(call, x).flip(1) for x in "qkv"}
    after = method.order(replace(call, **swapped, _shared={})).row
    assert torch.equal(after, before.flip(1))


def test_sampled_rows_are_exact():
    """The loss compares with exact attention of the same rows."""
    from accelkit.kernels import scores

    call = planted.video()
    rows = torch.tensor([0, 77, 2000])
    ones = torch.ones(3, call.n_k, dtype=torch.bool)
    half = ones.clone()
    half[:, 1000:] = False
    found = scores.masked_rows(call, rows, torch.stack([ones, half]))
    exact, same, part = found.unbind(2)
    torch.testing.assert_close(exact, planted.dense(call)[:, :, rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exact, same)
    p = planted.probabilities(call, rows) * half
    expected = p @ call.v / p.sum(-1, keepdim=True)
    torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-4)


def test_images_stay_dense():
    q, k, v = planted.noise(1024)
    assert planted.ask(SparseVideoGen(), planted.video_call(q, k, v, (1, 32, 32))) is None
