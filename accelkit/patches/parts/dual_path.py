"""Two passes of a denoiser for one step: the second reads the cross-attention of the first.

Layers may be compiled one by one: what is kept and read goes by an operator that graphs do not look
into, and the layers differ for it by a number alone, so that they share one graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accelkit.errors import UnsupportedModelError

PLACE = "accelkit_crossing"
"""Attribute of a layer's output projection: its number, int64 on the CPU."""


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
    for number, output in enumerate(outputs):
        setattr(output, PLACE, torch.tensor(number))
        undo.callback(delattr, output, PLACE)
        undo.callback(output.register_forward_pre_hook(_crossed).remove)
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
    left: dict[int, Tensor] = field(default_factory=dict)
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

    @torch.compiler.disable  # which pass runs is decided anew in every step
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
        _HERE.doing, _HERE.left = doing, self.left
        try:
            return self.forward(*args, **kwargs)
        finally:
            _HERE.doing, _HERE.left = None, {}

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


class _Here(threading.local):
    """The pass that runs in this thread, and what it keeps or reads by the number of a layer."""

    doing: Literal["write", "read"] | None = None
    left: dict[int, Tensor]


_HERE = _Here()


def _crossed(output: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """In front of the output projection of a layer's cross-attention. One function for all layers:
    graphs of compiled ones ask for it.
    """
    place = getattr(output, PLACE)
    if torch.compiler.is_compiling():
        return (torch.ops.accelkit.crossed(given[0], place), *given[1:])
    return (_exchange(given[0], place), *given[1:])


def _exchange(x: Tensor, place: Tensor) -> Tensor:
    """What a layer goes on with: what it has, which the full pass keeps, or what that has kept."""
    if _HERE.doing == "read":
        return _HERE.left[int(place)]
    if _HERE.doing == "write":
        _HERE.left[int(place)] = x
    return x


# A replayed CUDA graph would repeat the first pass.
@torch.library.custom_op(
    "accelkit::crossed",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
    schema=torch.library.infer_schema(_exchange, mutates_args=()),
)
def _op(x: Tensor, place: Tensor) -> Tensor:
    """`_exchange` as an operator. Graphs write in their tensors anew, so it keeps and gives
    copies.
    """
    return _exchange(x.clone(), place).clone()


@_op.register_fake
def _(x: Tensor, place: Tensor) -> Tensor:
    return torch.empty_like(x)


def _put_back(model: Any, attribute: str, before: Any) -> None:
    if before is None:
        delattr(model, attribute)
    else:
        setattr(model, attribute, before)
