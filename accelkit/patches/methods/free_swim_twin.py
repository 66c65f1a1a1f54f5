"""FreeSwim's dual path: a pass without a window tells the windowed one what the prompt means.

Wu et al., 2025 (`WillWu111/FreeSwim`). For the same latents the denoiser runs twice, and in every
layer the cross-attention of the full pass, before its output projection, replaces that of the
windowed one, whose prediction counts. The full pass is made at one of `every` steps; at the others
its cross-attention is read again. The last steps and the unconditional pass have the window alone.

    steps 0, every, 2 · every … below `until_step`:  full pass, then the windowed one reads it
    the other steps below `until_step`:              the windowed pass reads the last full one
    behind them:                                     the windowed pass by itself

Patch with `[FreeSwim(), FreeSwimTwin()]`: the full pass is a guidance branch of its own, "full". It
costs time for quality, so calibration does not choose it. The release begins from a video of the
training size, enlarged and noised to 0.7, which is the pipeline's part. Each denoiser of a pipeline
counts its own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from accelkit.errors import UnsupportedModelError
from accelkit.patches.method import BlockMethod, Method

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.patches.call import Phase

FULL = "full"
"""The guidance branch of the pass without a window."""


class FreeSwimTwin(BlockMethod):
    """Guides windowed denoising by the cross-attention of a pass without a window."""

    phases: ClassVar[tuple[Phase, ...]] = ("denoise",)

    every: int = Field(2, ge=1)
    until_step: int = Field(40, ge=1)

    def branches(self, methods: Sequence[Method]) -> Mapping[str, Sequence[Method]]:
        windows = [m for m in methods if "windowed" in type(m).model_fields]
        return {FULL: [m.model_copy(update={"windowed": False}) for m in windows]}

    def rewire(self, model: Any, undo: ExitStack) -> None:
        name = type(model).__name__
        outputs = [
            m.to_out[0] for path, m in model.named_modules() if path.rpartition(".")[2] == "attn2"
        ]
        if not outputs or not hasattr(model, "cache_context"):
            raise UnsupportedModelError(
                f"{name}: the dual path needs layers with cross-attention (attn2) and a "
                "cache_context, as Wan's transformer has them"
            )
        path = _Path(self, model.forward, model.cache_context)
        for output in outputs:
            undo.callback(output.register_forward_pre_hook(path.crossed).remove)
        for attribute, mine in (("forward", path.run), ("cache_context", path.named)):
            undo.callback(_put_back, model, attribute, vars(model).get(attribute))
            setattr(model, attribute, mine)


@dataclass
class _Path:
    """Stands for a denoiser's forward: which pass runs, and what the last full one left."""

    method: FreeSwimTwin
    forward: Callable[..., Any]
    context: Callable[..., Any]
    left: dict[Any, Tensor] = field(default_factory=dict)
    doing: Literal["write", "read"] | None = None
    branch: str = "cond"
    step: int = 0
    last: float | None = None
    slope: float = 0.0

    @contextmanager
    def named(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """The denoiser's `cache_context`, which says what branch a forward belongs to."""
        before, self.branch = self.branch, name
        try:
            with self.context(name, *args, **kwargs):
                yield
        finally:
            self.branch = before

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the denoiser: one pass, or the full one and then the windowed one."""
        if self.branch.removeprefix("pred_").startswith("uncond"):
            return self.forward(*args, **kwargs)
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self._count(float(timestep.max()))
        if self.step >= self.method.until_step:
            return self.forward(*args, **kwargs)
        if self.step % self.method.every == 0:
            with self.context(FULL):
                self._pass("write", *args, **kwargs)
        return self._pass("read", *args, **kwargs)

    def _pass(self, doing: Literal["write", "read"], *args: Any, **kwargs: Any) -> Any:
        self.doing = doing
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.doing = None

    def crossed(self, output: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of the output projection of a layer's cross-attention."""
        if self.doing == "write":
            self.left[output] = given[0]
        if self.doing == "read":
            return (self.left[output], *given[1:])
        return None

    def _count(self, timestep: float) -> None:
        """Another conditional forward is another step; where the timestep stands still or turns
        round, a generation begins.
        """
        slope = 0.0 if self.last is None else timestep - self.last
        if slope == 0.0 or slope * self.slope < 0:
            self.step, self.slope = 0, 0.0
            self.left.clear()
        else:
            self.step, self.slope = self.step + 1, slope
        self.last = timestep


def _put_back(model: Any, attribute: str, before: Any) -> None:
    if before is None:
        delattr(model, attribute)
    else:
        setattr(model, attribute, before)
