"""PAROAttention: in the right order of the axes, every pattern is made of blocks that stay.

Zhao et al., NeurIPS 2025, arXiv 2506.16054. A head that looks along time, rows or columns has its
attention scattered over the map; laid out with that axis last it falls into blocks. Each head gets
the best of six orders, and a map of blocks that hardly depends on the prompt is made offline.

    order   = argmax over the six of the mass in the best `density` of the blocks
    blocks  = the best `density` of the head's mean map in that order

The paper scores an order by how many blocks are nearly empty and, for low bits, how even the others
are; the mass of the blocks that will be read asks for the first without thresholds. The plan keeps
the order and a coarse map of mass (at most 64 × 64, in the ordered axes), not masks: it is laid
over whatever grid comes. As in the paper a map may be several, one for the second half of the
steps and the others for equal parts of the first; calibration, which measures parts of the steps
apart, makes one for each. Text is dense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Calibrator, Dial, Execution, Method, Order

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex
    from accelkit.patches.call import AttentionCall, Phase, Site

CELLS = 64
"""Most cells of a coarse map's side."""


class PAROAttention(AttentionMethod):
    """Axis order and static blocks for each head."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    dial: ClassVar[Dial] = Dial("density", (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7))
    full: ClassVar[dict[str, Any]] = {"density": 1.0}

    density: float = Field(0.3, gt=0, le=1)
    """Share of the blocks that is read."""
    axes: int | str = 0
    """0 … 5 (FHW, FWH, HWF, HFW, WHF, WFH) for all heads, or a side tensor `[H]` of these."""
    blocks: str | None = None
    """Side tensor `[H, buckets, n, n]` of mass; None: dense."""
    int8: bool = False
    """Whether attention also runs in eight bits (QK in int8, PV in fp8)."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens; 64 in the paper, for which GPUs take longer a pair of tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.visual(call)
        if where is None or self.blocks is None:
            return None
        tables = parts.orders.axes(where, call.q.device)
        if isinstance(self.axes, int):
            return parts.orders.shared(call, tables[self.axes, None])
        axes = call.tables[self.axes]
        row = call.remember((self, "axes"), lambda: axes.to(call.q.device)[list(call.heads)])
        return Order(tables, tables, row, whole=True)

    def index(self, call: AttentionCall) -> BlockIndex | None:
        if parts.grids.visual(call) is None or self.blocks is None:
            return None
        maps = call.tables[self.blocks]
        half = maps.shape[1] - 1
        share = call.clock.step / max(call.clock.total, 1)
        bucket = min(int(share * 2 * half), half)
        return call.remember((self, bucket), lambda: self._lists(call, maps[:, bucket]))

    def execution(self, call: AttentionCall) -> Execution | None:
        return Execution(qk="int8", pv="fp8", smooth_k=True) if self.int8 else None

    def _lists(self, call: AttentionCall, mass: Tensor) -> BlockIndex:
        """The coarse map of each head laid over the blocks of this call."""
        mass = mass.to(call.q.device)[list(call.heads)]
        mask = kernels.select.top_k(mass.flatten(1)[None, :, None].float(), self.density)
        size = (self.block, self.block)
        at = parts.grids.laid_over(mass.shape[-1], call.tiles(size), call.q.device)
        mask = mask.view(mass.shape)[:, at[0][:, None], at[1]]
        return parts.patterns.listed(mask[None], call, size)

    def calibrator(self, site: Site) -> Calibrator:
        return _Maps(self)


class _Maps(Calibrator):
    """Mean maps of all calls in the six orders, from every few tiles."""

    method: PAROAttention

    def __init__(self, method: PAROAttention) -> None:
        super().__init__(method)
        self.maps: list[Tensor] = []  # [6, H, n, n], one for each call

    def see(self, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        where = parts.grids.visual(call)
        if where is not None:
            self.maps.append(parts.coarse.maps(call, lse, where, CELLS))

    def tables(self) -> dict[str, Tensor]:
        if not self.maps:
            return {}
        mean = sum(self.maps[1:], self.maps[0]) / len(self.maps)
        cells = mean.flatten(2)
        best = cells.topk(max(1, round(self.method.density * cells.shape[-1]))).values.sum(-1)
        axes = best.argmax(0)
        chosen = mean[axes, range(axes.numel())]
        return {"paro_axes": axes, "paro_blocks": chosen[:, None].half()}

    def settings(self) -> tuple[Method, ...]:
        if not self.maps:
            return ()
        update = {"axes": "paro_axes", "blocks": "paro_blocks"}
        return tuple(
            self.method.model_copy(update={**update, "density": d})
            for d in PAROAttention.dial.values
        )
