"""SageAttention: dense attention in eight bits.

Zhang et al., 2024–2025, arXiv 2410.02367, 2411.10958 (`thu-ml/SageAttention`). Keys share a large
mean that would eat the range of an integer; softmax does not see it, so it goes first. Then q and k
are rounded to int8 with a scale for each block, p and v to fp8.

    k ← k − mean over tokens of k            out unchanged; LSE gets q · mean(k) · scale back
    s = (q̂ · k̂ᵀ) · scale_q · scale_k         int8 products
    out = p̂ · v̂ · scale_v                     fp8 products, scale_v for each channel

It answers with the arithmetic only and goes with any index. Calibration also tries the other pairs
of precisions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from accelkit.patches.method import AttentionMethod, Calibrator, Execution, Method, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.patches.call import AttentionCall, Phase, Site


PRECISIONS: tuple[tuple[Precision, Precision], ...] = (
    ("fp8", "fp8"), ("int8", "fp8"), ("fp8", "native"), ("int8", "native"),
)  # fmt: skip
"""Formats of QK and PV from the coarsest to the finest; the second is the paper's."""


class SageAttention(AttentionMethod):
    """Int8 q and k without their mean, fp8 p and v."""

    phases: ClassVar[tuple[Phase, ...]] = ("prefill", "denoise")

    qk: Precision = "int8"
    """Format of q and k."""
    pv: Precision = "fp8"
    """Format of the probabilities and of v."""
    smooth_k: bool = True
    """Whether the mean key is taken off before rounding."""

    def execution(self, call: AttentionCall) -> Execution | None:
        return Execution(qk=self.qk, pv=self.pv, smooth_k=self.smooth_k)

    def calibrator(self, site: Site) -> Calibrator:
        return _Precisions(self)


class _Precisions(Calibrator):
    """All pairs of precisions: which is fastest depends on head size and causality, which is exact
    enough on the data; without smoothing as well, of a denoiser the fastest pairs, of a language
    model the finest, for which quantising costs the most.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.rough: tuple[tuple[Precision, Precision], ...] = ()

    def see(self, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        # Video models normalise their keys: what smoothing takes may be for nothing.
        self.rough = PRECISIONS[:2] if call.clock.phase == "denoise" else PRECISIONS[3:]

    def settings(self) -> tuple[Method, ...]:
        whole = self.method.model_copy
        rough = [whole(update={"qk": q, "pv": p, "smooth_k": False}) for q, p in self.rough]
        return (*rough, *(whole(update={"qk": q, "pv": p}) for q, p in PRECISIONS))
