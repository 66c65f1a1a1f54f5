"""Grids of visual tokens: where they lie, cells of tokens, windows on an axis, bands over frames.

Tokens of a grid `(frames, rows, columns)` come in raster order; an image has one frame. Masks are
bool and follow from the geometry alone, so whoever asks keeps them per geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod, sqrt

import torch
from torch import Tensor

from accelkit.errors import InvalidInputError
from accelkit.kernels.index import ceil_div
from accelkit.kernels.select_stats import staircase
from accelkit.patches.call import AttentionCall

Grid = tuple[int, int, int]
Axes = tuple[Tensor, Tensor, Tensor]
WHOLE: Grid = (1, 1, 1)
RASTER: Grid = (0, 1, 2)
"""Frames, rows and columns, slowest first."""
ASPECT = 2.7
"""Most that the sides of a tile that fits a grid differ, as a ratio."""


@dataclass(frozen=True)
class Visual:
    """Visual tokens `[start, stop)` on a grid, among `tokens` in all."""

    start: int
    grid: Grid
    tokens: int

    @property
    def count(self) -> int:
        return prod(self.grid)

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def frame(self) -> int:
        """Tokens of one frame."""
        return self.grid[1] * self.grid[2]


def visual(call: AttentionCall) -> Visual | None:
    """The visual tokens of a self-attention over a known grid, or None: no grid, a causal call,
    a chunk or cross-attention.

    The tokens are those of the span whose length is the grid's, or all tokens without spans. The
    answer speaks of token order, also for a call that is laid out in another one.
    """
    grid = call.geometry.grid
    chunk = call.n_q != call.n_k and call.q_pos is None
    if grid is None or call.causal or call.q_start or chunk:
        return None
    spans = [(s.start, s.stop) for s in call.geometry.spans if s.kind != "text"]
    if not call.geometry.spans and (call.n_k == prod(grid) or call.k_pos is not None):
        spans = [(0, prod(grid))]
    for start, stop in spans:
        if stop - start == prod(grid):
            return Visual(start, grid, call.n_k)
    return None


def narrowed(call: AttentionCall, window: Sequence[float]) -> Visual | None:
    """The visual tokens where a window, in shares of the axes, leaves any of them out; or None."""
    return None if min(window) >= 1 else visual(call)


# ── cells: tiles and chunks ──────────────────────────────────────────────────────────────────


def axis_cells(length: int, cell: int, dilation: int = 1) -> tuple[Tensor, Tensor, int]:
    """For each position of an axis its cell and its slot there, int64 `[length]`, and the number
    of cells. With dilation, every `dilation`-th position forms a group with its own cells (GNA).
    """
    at = torch.arange(length)
    per_group = ceil_div(ceil_div(length, dilation), cell)
    group, place = at % dilation, at // dilation
    return group * per_group + place // cell, place % cell, dilation * per_group


def cells(
    grid: Grid, cell: Grid, dilation: Grid = WHOLE, slowest: Grid = RASTER
) -> tuple[Tensor, Tensor, int]:
    """Cell and slot of each token in raster order, int64 `[F·H·W]`, and the number of cells.
    Slots are counted in raster order, cells along the axes from the `slowest` one on.
    """
    number = slot = torch.zeros((), dtype=torch.int64)
    axes = [axis_cells(*axis) for axis in zip(grid, cell, dilation, strict=True)]
    for axis in slowest:
        at, _, count = axes[axis]
        number = number * count + at.view([-1 if n == axis else 1 for n in RASTER])
    for axis, (_, place, _) in enumerate(axes):
        slot = slot * cell[axis] + place.view([-1 if n == axis else 1 for n in RASTER])
    return number.flatten(), slot.flatten(), prod(count for _, _, count in axes)


def tokens_of_cells(where: Visual, cell: Grid, dilation: Grid, block: int) -> Tensor:
    """How many tokens of each cell lie in each block once cells come one after the other, fp32
    `[blocks, cells]`; other tokens are not counted.
    """
    number, _, count = cells(where.grid, cell, dilation)
    size = number.bincount(minlength=count)
    first = where.start + size.cumsum(0) - size
    begin = torch.arange(ceil_div(where.tokens, block))[:, None] * block
    low, high = torch.maximum(begin, first), torch.minimum(begin + block, first + size)
    return (high - low).clamp(min=0).float()


def cells_in_blocks(where: Visual, cell: Grid, dilation: Grid, block: int, slowest: Grid) -> Tensor:
    """Which cells, counted in raster order, have a token in each block once cells come one after
    the other from the `slowest` axis on; bool `[blocks, cells]`.
    """
    number, slot, count = cells(where.grid, cell, dilation)
    place = cells(where.grid, cell, dilation, slowest)[0] * prod(cell) + slot
    found = torch.zeros(ceil_div(where.tokens, block), count, dtype=torch.bool)
    at = torch.arange(where.start, where.stop) // block
    found[at, number[place.argsort()]] = True
    return found


@lru_cache(maxsize=256)
def fit_tile(grid: Grid, block: int = 128) -> Grid:
    """The tile of at most `block` tokens that cuts the grid into the fewest tiles, sides within
    `ASPECT` of one another where the grid allows; among equals the most cubic one.
    """
    best: tuple[tuple[bool, int, float], Grid] | None = None
    for f, y in product(range(1, min(grid[0], block) + 1), range(1, min(grid[1], block) + 1)):
        for x in range(1, min(grid[2], block // (f * y)) + 1 if f * y <= block else 1):
            tile = (f, y, x)
            # A side that spans its whole axis cannot be longer and counts as fitting.
            longest = max(tile)
            short = [t for t, n in zip(tile, grid, strict=True) if t < n]
            skew = longest / min(short, default=longest)
            count = prod(ceil_div(n, t) for n, t in zip(grid, tile, strict=True))
            rank = (skew > ASPECT, count, skew)
            if best is None or rank < best[0]:
                best = (rank, tile)
    assert best is not None
    return best[1]


# ── windows on an axis (generalised neighbourhood attention) ─────────────────────────────────


def neighbourhood(length: int, window: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """Which position of an axis reads which, bool `[length, length]` (GNA, 2504.16922).

    Positions of a dilation group are numbered i = 0 …; `stride` neighbours share the window of
    their leader, which is moved inwards at the borders so that all windows have one size.
    """
    at = torch.arange(length)
    group, i = at % dilation, at // dilation
    size = (length - group + dilation - 1) // dilation  # positions of each one's group
    w = torch.full_like(size, window).minimum(size)
    left, right = w // 2, w // 2 + w % 2 - 1
    leader = torch.minimum(i // stride * stride + stride // 2, size - 1)
    start = (leader - left).clamp(min=0)
    start += (leader + right >= size) * (size - right - leader - 1)
    inside = (i >= start[:, None]) & (i < (start + w)[:, None])
    return inside & (group == group[:, None])


def sliding(length: int, cell: int, window: int) -> Tensor:
    """Windows of an odd number of whole cells around each cell, centre moved inwards at the
    borders, as positions: bool `[length, length]` (Sliding Tile Attention, 2502.04507).
    """
    number, _, count = axis_cells(length, cell)
    half = min(window, count) // 2
    centre = number.clamp(half, max(half, count - 1 - half))
    reach = (number - centre[:, None]).abs() <= half
    return reach if window < count else torch.ones_like(reach)


def tile_shares(axes: Axes, tile: Grid, dilation: Grid = WHOLE) -> Tensor:
    """Share of the pairs of two tiles in which the first one's token reads the second one's, fp32
    `[tiles, tiles]`, from what the positions of each axis read (`[L, L]`); a token reads another if
    all axes do.
    """
    per_axis = []
    for reads, cell, step in zip(axes, tile, dilation, strict=True):
        number, _, count = axis_cells(reads.shape[0], cell, step)
        of = torch.nn.functional.one_hot(number, count).float()
        size = of.sum(0).clamp(min=1)
        per_axis.append((of.T @ reads.float() @ of) / (size[:, None] * size))
    f, y, x = per_axis
    share = f[:, None, None, :, None, None] * y[:, None, None, :, None] * x[:, None, None, :]
    return share.flatten(3).flatten(0, 2)


def reach(axes: Axes, tile: Grid, dilation: Grid = WHOLE) -> tuple[float, ...]:
    """Key tiles that a query tile visits ÷ all tiles, on average, for each axis."""
    one = torch.ones(1, 1)
    return tuple(
        float((tile_shares((reads, one, one), (cell, 1, 1), (step, 1, 1)) > 0).float().mean())
        for reads, cell, step in zip(axes, tile, dilation, strict=True)
    )


def visited(axes: Axes, tile: Grid, dilation: Grid = WHOLE) -> float:
    """Key tiles that a query tile visits ÷ all tiles, on average: 1 ÷ this bounds the gain."""
    return prod(reach(axes, tile, dilation))


def narrow_first(axes: Axes, tile: Grid, dilation: Grid = WHOLE) -> Grid:
    """The axes from the one of which a tile reads the least on: tiles that are laid out so are
    read in the fewest and longest runs.
    """
    share = reach(axes, tile, dilation)
    first, second, third = sorted(RASTER, key=lambda axis: share[axis])
    return first, second, third


# ── bands ────────────────────────────────────────────────────────────────────────────────────


def half_width(tokens: int, density: float) -> int:
    """Half width of a band around the diagonal that holds `density` of a square of `tokens`."""
    return max(1, round(tokens * (1 - sqrt(1 - min(density, 1.0)))))


def frame_bands(
    where: Visual, widths: list[int], unit: tuple[int, int], least: float = 0.0
) -> Tensor:
    """Blocks of a mask that has a band of its own for each distance between frames, bool
    `[nq, nk]` over all tokens (text rows and columns are left to `keep.text`).

    Row `y` and key `z` of frames `D` apart meet if `|y − z| ≤ widths[D]`, counted along the
    flattened frame; a negative width is nothing. A block counts if more than `least` of its pairs
    do. Raises `InvalidInputError` unless every distance has a width.
    """
    if len(widths) != where.grid[0]:
        raise InvalidInputError(
            f"frame_bands: {len(widths)} widths for {where.grid[0]} frames, expected one for each"
        )
    q, k = _segments(where, unit[0]), _segments(where, unit[1])
    width = torch.tensor(widths)
    pairs = torch.zeros(q[0][0].numel(), k[0][0].numel(), dtype=torch.int64)
    for frame_q, y0, rows in q:
        for frame_k, z0, keys in k:
            w = width[(frame_q[:, None] - frame_k).abs()]
            shift = y0[:, None] - z0
            some, rows_, keys_ = w >= 0, rows[:, None], keys[None]
            upper = staircase(shift + w + 1, rows_, keys_)
            pairs += torch.where(some, upper - staircase(shift - w, rows_, keys_), 0)
    rows, keys = (torch.stack([s[2] for s in side]).sum(0) for side in (q, k))
    whole = rows[:, None] * keys
    return pairs > least * whole


def _segments(where: Visual, block: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The frames that blocks of tokens touch: (frame, first place in it, tokens) of each block,
    int64 `[nb]`, as many times as a block may touch frames.
    """
    n, s = ceil_div(where.tokens, block), where.frame
    first = torch.arange(n) * block - where.start
    begin, end = first.clamp(min=0), (first + block).clamp(max=where.count)
    out = []
    for step in range(ceil_div(block, s) + 1):
        frame = (begin // s + step).clamp(max=where.grid[0] - 1)
        low = torch.maximum(begin, frame * s)
        high = torch.minimum(end, (frame + 1) * s)
        tokens = (high - low).clamp(min=0) * (begin // s + step == frame)
        out.append((frame, low - frame * s, tokens))
    return out


def first_blocks(where: Visual, count: int, block: int) -> Tensor:
    """Blocks that hold some of the first `count` visual tokens, bool `[nk]`."""
    begin = torch.arange(ceil_div(where.tokens, block)) * block
    return (begin < where.start + count) & (begin + block > where.start) & (count > 0)


def spread(start: int, stop: int, count: int, device: torch.device) -> Tensor:
    """`count` places evenly over `[start, stop)`, or all of them; int64."""
    count = min(count, stop - start)
    return start + (torch.arange(count, device=device) * 2 + 1) * (stop - start) // (2 * count)


def laid_over(cells: int, tiles: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The cells, of `cells` a side of a coarse map, in which the middles of query tiles `[nq]` and
    of key blocks `[nk]` fall, int64; `tiles` is `(nq, nk)`.
    """
    q, k = ((torch.arange(n, device=device) * 2 + 1) * cells // (2 * n) for n in tiles)
    return q, k
