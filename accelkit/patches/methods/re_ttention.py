"""Re-ttention: a narrow window, mended by what the last dense step says it leaves out.

Chen et al., NeurIPS 2025, arXiv 2505.22918. At 97 % sparsity the softmax has too small a
denominator and whole keys are missing. Both hardly change from step to step, so a dense step now
and then measures them, row by row:

    dense step    ρ = exp(LSE_window − LSE)          R = out − ρ · out_window
    sparse step   out = ρ · out_window + R           then  ρ ← min(ρ + λ, 1)

R is exactly what the masked keys gave. It is taken before the output projection, which is linear.
The release lets ρ grow beyond 1. The paper also runs the first steps dense (15 of CogVideoX's 50);
here a plan says which do.
The window stays the same: the same places (± half of `window` of a frame) in all frames, which is a
plain band once all frames of a place lie together. R takes as much memory as the site's output, for
each guidance branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accelkit import kernels
from accelkit.patches import parts
from accelkit.patches.method import AttentionMethod, Dial, Order

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels import BlockIndex, Partial
    from accelkit.patches.call import AttentionCall, Phase


class ReTtention(AttentionMethod):
    """Window, softmax ratio ρ and residual R of the last dense step."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)
    dial: ClassVar[Dial] = Dial("window", (0.03125, 0.0625, 0.125, 0.25, 0.5))
    full: ClassVar[dict[str, Any]] = {"window": 1.0}

    window: float = Field(0.03125, gt=0, le=1)
    """Width of the window in a frame, as a share of its tokens."""
    period_steps: int = Field(5, ge=1)
    """Of so many steps one is dense."""
    drift: float = Field(0.04, ge=0)
    """λ, by how much ρ grows from one sparse step to the next."""
    block: int = Field(128, ge=16)
    """Side of a block in tokens."""

    def order(self, call: AttentionCall) -> Order | None:
        where = parts.grids.visual(call)
        return None if where is None else parts.orders.transposed(call, where)

    def index(self, call: AttentionCall) -> tuple[BlockIndex, ...] | None:
        where = parts.grids.visual(call)
        if where is None:
            return None
        size = (self.block, self.block)
        half = where.count if self.window >= 1 else max(1, round(self.window * where.count / 2))
        near = call.remember(self, lambda: parts.patterns.window(call, 0, half, size))
        if self._kept(call) is not None:
            return (near,)
        mask = near.take([0]).to_mask(call.tiles(size)[1])
        far = kernels.select.compact(~mask, size)
        return near, parts.patterns.share(far, len(call.heads))

    def finish(
        self, call: AttentionCall, out: Tensor, lse: Tensor, pieces: tuple[Partial, ...]
    ) -> Tensor:
        kept = self._kept(call)
        if kept is not None:
            _, ratio, rest = kept
            self._keep(call, kept[0], (ratio + self.drift).clamp_(max=1.0), rest)
            return rest.addcmul(out, ratio[..., None].to(out.dtype))
        near = pieces[0]
        ratio = (near.lse - lse.masked_fill(lse == -float("inf"), 0.0)).exp()
        rest = out - (ratio[..., None] * near.out).to(out.dtype)
        self._keep(call, call.clock.step, ratio, rest)
        return out

    def renewed(self, steps: int) -> float:
        return 1 / min(self.period_steps, steps)

    def _kept(self, call: AttentionCall) -> tuple[int, Tensor, Tensor] | None:
        """Step, ρ and R of the last dense step, if it is not due again."""
        kept = call.memory.get((self, call.heads))
        if kept is None or not 0 <= call.clock.step - kept[0] < self.period_steps:
            return None
        return kept if kept[2].shape[2] == call.q.shape[2] else None

    def _keep(self, call: AttentionCall, step: int, ratio: Tensor, rest: Tensor) -> None:
        call.memory[(self, call.heads)] = (step, ratio, rest)
