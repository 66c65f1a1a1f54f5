"""Sparse-vDiT by hand: four shapes."""

import hand
import planted
import torch

from accelkit.patches.call import Site
from accelkit.patches.methods.sparse_vdit import SparseVDiT
from accelkit.patches.sites import attention


def call():
    """Six frames of 16 tokens."""
    q, k, v = planted.noise(96)
    return planted.video_call(q, k, v, (6, 4, 4))


def test_diagonal():
    """A band of ± 8 tokens around frames of a block each touches the neighbours."""
    lists = hand.lists(SparseVDiT(density=0.16, block=16), call())
    assert lists == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5]]


def test_multi_diagonal_is_the_band_after_transposing():
    """The same lists; but a block now holds 16 / 6 places in all frames."""
    method = SparseVDiT(mode="multi_diagonal", density=0.16, block=16)
    assert hand.lists(method, call()) == hand.lists(SparseVDiT(density=0.16, block=16), call())
    seen = planted.select(method, call()).seen[0, 0]
    place = torch.arange(96) % 16
    same = place[:, None] == place
    assert seen[same].all() and seen[0, 95].logical_not()


def test_stripe_is_read_by_all():
    assert hand.lists(SparseVDiT(mode="stripe", density=1 / 3, block=16), call()) == [[0, 1]] * 6


def test_skip_gives_zeros():
    answer = planted.ask(SparseVDiT(mode="skip", block=16), call())
    out = attention.compute(answer)
    assert not out.out.any() and out.lse.isneginf().all()


def test_calibration_tries_every_mode():
    settings = SparseVDiT().calibrator(Site("a", 0)).settings()
    assert {m.mode for m in settings} == {"diagonal", "multi_diagonal", "stripe", "skip"}
    assert sum(m.mode == "skip" for m in settings) == 1
