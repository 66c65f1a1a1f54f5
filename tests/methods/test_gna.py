"""GNA by hand: windows of tiles, strides, and what the simulator leaves out."""

import hand
import planted
import torch

from accelkit.patches.call import Site
from accelkit.patches.methods.gna import GNA
from accelkit.patches.parts.grids import Visual
from accelkit.patches.sites import attention


def line(tokens: int, text: int = 0):
    """One row of an image, text in front."""
    q, k, v = planted.noise(tokens + text)
    return planted.video_call(q, k, v, (1, 1, tokens))


def test_lists():
    """Six tiles of 16, a window of three of them, moved inwards at the borders."""
    method = GNA(window=(1.0, 1.0, 0.5), tile=(1, 1, 16), block=16)
    assert hand.lists(method, line(96)) == [
        [0, 1, 2],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
        [3, 4, 5],
    ]


def test_stride_of_one_touches_a_tile_more():
    """A window of 16 around each token of a tile of 16 lies over three tiles; in the neighbours
    less than a quarter of the pairs do, so rounded lists leave them.
    """
    fields = {"window": (1.0, 1.0, 1 / 6), "stride": (1, 1, 1), "tile": (1, 1, 16), "block": 16}
    assert hand.lists(GNA(**fields, whole_tiles=True), line(96))[2:4] == [[1, 2, 3], [2, 3, 4]]
    assert hand.lists(GNA(**fields), line(96))[2:4] == [[2], [3]]


def test_text_has_its_own_blocks():
    """20 text tokens fill two blocks of queries, which read all. Keys follow one another: all read
    the blocks 0 and 1 with text, and the third tile, tokens 52 to 67, its two blocks.
    """
    method = GNA(window=(1.0, 1.0, 0.2), tile=(1, 1, 16), block=16, whole_tiles=True)
    lists = hand.lists(method, line(96, text=20))
    assert lists[:2] == [list(range(8))] * 2
    assert lists[4] == [0, 1, 3, 4]


def test_blocks_drift_against_tiles():
    """Without holes 20 text tokens push tiles of 16 a quarter of a block: what is mostly text is
    dense, other blocks read the tile that they mostly lie in, and its neighbours by a quarter.
    """
    method = GNA(window=(1.0, 1.0, 0.2), tile=(1, 1, 16), block=16)
    lists = hand.lists(method, line(96, text=20))
    assert lists[:2] == [list(range(8))] * 2
    assert lists[4] == [0, 1, 4]


def test_holes_or_rounding():
    """Tiles of 12 in blocks of 16: with whole tiles every token reads its window, rounded most do.
    Rows of holes leave no trace.
    """
    q, k, v = planted.noise(4 * 6 * 6)
    call = planted.video_call(q, k, v, (4, 6, 6))
    box = torch.ones(144, 144, dtype=torch.bool)
    at = torch.cartesian_prod(*(torch.arange(n) for n in (4, 6, 6)))
    fields = {"window": (0.5, 0.5, 0.5), "tile": (2, 2, 3), "block": 16, "stride": (1, 1, 1)}
    for axis, reads in enumerate(GNA(**fields).axes(Visual(0, (4, 6, 6), 144))):
        box &= reads[at[:, axis]][:, at[:, axis]]
    whole = planted.select(GNA(**fields, whole_tiles=True), call).seen[0, 0]
    assert (whole | ~box).all() and not whole.all()
    out = attention.compute(planted.ask(GNA(**fields, whole_tiles=True), call)).out
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = (call.scale * q @ k.mT).masked_fill(~whole, -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ v, atol=1e-4, rtol=1e-4)
    rounded = planted.select(GNA(**fields), call).seen[0, 0]
    assert (rounded & box).sum() > 0.5 * box.sum() and rounded.sum() < whole.sum()


def test_dilation_reads_every_second_token():
    """Groups of even and odd places are apart."""
    call = line(64)
    method = GNA(window=(1.0, 1.0, 1.0), dilation=(1, 1, 2), tile=(1, 1, 16), block=16)
    assert planted.ask(method, call) is None  # all windows whole: nothing to leave out
    method = method.model_copy(update={"window": (1.0, 1.0, 0.5), "stride": (1, 1, 16)})
    seen = planted.select(method, call).seen[0, 0]
    assert not (seen[::2, 1::2]).any() and not (seen[1::2, ::2]).any()
    assert (seen.sum(-1) == 16).all()


def test_the_published_window_keeps_nine_percent():
    """18 × 24 × 24 of 30 × 48 × 80 with its tiles."""
    method = GNA(tile=(2, 8, 8), stride=(16, 8, 8))
    assert 0.09 < method.visited(Visual(0, (30, 48, 80), 115200)) < 0.12


def test_calibration_passes_windows_through_the_simulator():
    calibrator = GNA(stride=(1, 1, 1)).calibrator(Site("a", 0))
    assert len(calibrator.settings()) == 9
    call = planted.video()
    calibrator.see(call, call.q, call.q[..., 0])
    found = calibrator.settings()
    where = Visual(planted.TEXT, planted.GRID, call.n_k)
    shares = [m.visited(where) for m in found]
    assert shares == sorted(shares) and max(shares) <= 0.75 and 3 < len(found) < 9


def test_images_have_one_frame():
    q, k, v = planted.noise(1024)
    call = planted.video_call(q, k, v, (1, 32, 32))
    found = planted.select(GNA(window=(1.0, 0.3, 0.3)), call)
    assert torch.equal(found.seen.sum(-1).unique(), torch.tensor([128]))  # its own tile
