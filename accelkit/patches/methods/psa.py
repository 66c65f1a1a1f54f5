"""PSA: less important blocks are not dropped but read as means of 2, 4 or 8 keys.

Pyramid Sparse Attention, 2025, arXiv 2512.04025 (`ziplab/Pyramid-Sparse-Attention`). Sampled rows
and keys rank the blocks of a row; ranks decide the level at which a block is read, and a mean of h
keys counts for h of them.

    A[i, c] = max over sampled rows r of tile i  exp(max over sampled keys of c of s − max of row r)
    ranks up to ends[0]: keys themselves · up to ends[1]: means of 2 · 4 · 8 · the rest is left out
    logits of means get + log h

Tokens lie along a space-filling curve, so that the keys of a mean are neighbours; keys and values
are taken in that order where their means are made, not before. `by_energy` counts the running sum
of A instead of ranks. Entries are whole tiles of keys: see `kernels.pyramid`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import pydantic
from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Method, Order

if TYPE_CHECKING:
    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase, Site

End = Annotated[float, Field(ge=0, le=1)]
TABLES = (
    (0.02, 0.06, 0.12, 0.4), (0.05, 0.12, 0.2, 0.5), (0.1, 0.25, 0.4, 0.75), (0.2, 0.4, 0.6, 0.9),
    (0.35, 0.6, 0.8, 1.0),
)  # fmt: skip
"""Ends of the levels by rank; the third is the released one."""
LEAST = 0.06
"""Share of a row's blocks that are read whole, at least, where levels go by energy."""
UNIT = 64
"""Keys of an entry: the least tile that the kernels run at full rate."""
SIDE, LONG = 128, 65536
"""Side of a block, and keys of a call from which it is twice that."""


class PSA(AttentionMethod):
    """Blocks at four levels of a key pyramid."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    full: ClassVar[dict[str, Any]] = {"ends": (1.0, 1.0, 1.0, 1.0)}

    ends: tuple[End, End, End, End] = (0.1, 0.25, 0.4, 0.75)
    """Where levels end (keys themselves, means of 2, 4, 8), as shares of the ranked blocks."""
    by_energy: bool = False
    """Whether `ends` are shares of the running sum of A instead of ranks."""
    every: int = Field(8, ge=1)
    """Of so many rows, and so many keys, one is sampled; 4 in the release, which multiplies four
    times as much.
    """
    block: Annotated[int, Field(ge=64, multiple_of=64)] | None = None
    """Side of a block in tokens. None: 128, and 256 in calls of more than 65,536 keys, which no
    cache holds: blocks of so many rows read them half as often.
    """

    @pydantic.field_validator("ends")
    @classmethod
    def _rising(cls, ends: tuple[float, ...]) -> tuple[float, ...]:
        if list(ends) != sorted(ends):
            raise ValueError(f"ends {ends} must rise: each level begins where the one before ends")
        return ends

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.visual(call)
        if where is None or call.key_mask is not None:
            return None
        return replace(parts.orders.hilbert(call, where), k_table=None)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        where = parts.grids.visual(call)
        if where is None or call.key_mask is not None:
            return None
        side = self.block or (2 * SIDE if call.n_k > LONG else SIDE)
        size = (side, side)
        order = parts.orders.along_curve(call, where)[0]
        score = call.once(
            ("sampled_max", size, self.every),
            lambda: kernels.scores.sampled_max(call, size, self.every, key_order=order),
        )
        least = LEAST if self.by_energy else 0.0
        seen = kernels.select.visible_blocks(call, size)
        text = call.remember((self, size), lambda: parts.keep.text(seen & False, call, size))
        index = kernels.select.pyramid(
            score, self.ends, text, call.n_k, size, UNIT, by_energy=self.by_energy, least=least
        )
        return replace(index, key_order=order)

    def calibrator(self, site: Site) -> Calibrator:
        return _Tables(self)


class _Tables(Calibrator):
    """Released ends, and some below and above."""

    def settings(self) -> tuple[Method, ...]:
        return tuple(self.method.model_copy(update={"ends": t}) for t in TABLES)
