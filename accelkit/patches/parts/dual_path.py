"""Two passes of a denoiser for one step: the second reads the cross-attention of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from accelkit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor


def connect(model: Any, full: str, every: int, until_step: int, undo: ExitStack) -> None:
    """Put the two passes in place of `model.forward`; `undo` takes them away.

    At one of `every` steps below `until_step` a pass runs in the guidance branch `full` first, and
    keeps what stands in front of each cross-attention's output projection; conditional passes below
    `until_step` read it there.

    Raises:
        UnsupportedModelError: no layers with cross-attention, or no `cache_context`.
    """
    outputs = [
        m.to_out[0] for path, m in model.named_modules() if path.rpartition(".")[2] == "attn2"
    ]
    if not outputs or not hasattr(model, "cache_context"):
        raise UnsupportedModelError(
            f"{type(model).__name__}: the dual path needs layers with cross-attention (attn2) and "
            "a cache_context, as Wan's transformer has them"
        )
    path = _Path(model.forward, model.cache_context, full, every, until_step)
    for output in outputs:
        undo.callback(output.register_forward_pre_hook(path.crossed).remove)
    for attribute, mine in (("forward", path.run), ("cache_context", path.named)):
        undo.callback(_put_back, model, attribute, vars(model).get(attribute))
        setattr(model, attribute, mine)


@dataclass
class _Path:
    """Stands for a denoiser's forward: which pass runs, and what the last full one left."""

    forward: Callable[..., Any]
    context: Callable[..., Any]
    full: str
    every: int
    until_step: int
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
        if self.step >= self.until_step:
            return self.forward(*args, **kwargs)
        if self.step % self.every == 0:
            with self.context(self.full):
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
