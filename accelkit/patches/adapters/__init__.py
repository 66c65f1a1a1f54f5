"""Adapters find the sites of a model and open the doors to them. One adapter a library, imported
when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from accelkit.errors import InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.patches.call import AttentionCall, Site
    from accelkit.patches.plan import Fingerprint


class Runner(Protocol):
    """What an adapter calls at every site."""

    @property
    def trims_last(self) -> bool:
        """Whether the last layer may be computed for the rows alone whose logits are asked for."""

    def trims(self, tokens: int) -> bool:
        """Whether that is wished in a forward over `tokens` tokens, earlier ones included."""

    def trimmed(self, site: str, left_out: float) -> None:
        """The adapter left out this share of a call's visible pairs, and ran the rest dense."""

    def run(self, call: AttentionCall) -> Tensor | None:
        """The output `[B, Nq, Hq, Dv]` of one call; None: run what ran before, already counted."""

    def skipped(self, site: str, reason: str) -> None:
        """The adapter ran `site` dense by itself and says why."""

    def reset(self) -> None:
        """The adapter saw a generation begin (a scheduler's `set_timesteps`)."""


class Adapter(Protocol):
    """What an adapter module offers."""

    PHASES: tuple[str, ...]

    def facts(self, model: Any) -> tuple[Fingerprint, dict[str, int]]: ...
    def sites(self, model: Any) -> tuple[Site, ...]: ...
    def trimmable(self, model: Any) -> str | None: ...
    def parts(self, model: Any) -> dict[str, Any]: ...
    def connect(self, model: Any, runner: Runner, undo: ExitStack) -> None: ...


BASES = {"transformers": ("PreTrainedModel",), "diffusers": ("DiffusionPipeline", "ModelMixin")}
"""Base classes of the models of each library that has an adapter."""


def adapter_for(model: Any) -> tuple[Adapter, Any]:
    """The adapter of a model's library and the bare model inside wrappers (PEFT, DDP, FSDP).

    Raises:
        InvalidInputError: a compiled model.
        UnsupportedModelError: no adapter knows the class.
    """
    if type(model).__name__ == "OptimizedModule":
        raise InvalidInputError(
            "the model is compiled; give accelkit the model that was compiled (patch first, call "
            "torch.compile afterwards)"
        )
    bare = model
    if hasattr(bare, "module") and type(bare).__name__.endswith("Parallel"):
        bare = bare.module
    if hasattr(bare, "get_base_model"):
        bare = bare.get_base_model()
    for c in type(bare).__mro__:
        library = c.__module__.partition(".")[0]
        if c.__name__ in BASES.get(library, ()):
            return import_module(f"accelkit.patches.adapters.{library}"), bare
    raise UnsupportedModelError(
        f"{type(model).__name__}: no adapter knows this class; expected a transformers "
        "PreTrainedModel, a DiffusionPipeline or a diffusion transformer of diffusers, loaded"
    )


def facts(model: Any) -> tuple[Fingerprint, dict[str, int]]:
    """Fingerprint of a model and its sites in running order, with their query heads."""
    adapter, bare = adapter_for(model)
    return adapter.facts(bare)


def sites(model: Any) -> tuple[Site, ...]:
    """The attention calls of a model that may run sparse, in running order."""
    adapter, bare = adapter_for(model)
    return adapter.sites(bare)


def parts(model: Any) -> dict[str, Any]:
    """The bare model under "", and by their paths its parts that can be patched by themselves."""
    adapter, bare = adapter_for(model)
    return adapter.parts(bare)


def trimmable(model: Any) -> str | None:
    """Path of the last layer's attention, if the layer can be computed for the rows alone whose
    logits are asked for.
    """
    adapter, bare = adapter_for(model)
    return adapter.trimmable(bare)


class _Watcher:
    trims_last = False

    def __init__(self, see: Callable[[AttentionCall], Tensor | None]) -> None:
        self.see = see

    def trims(self, tokens: int) -> bool:
        return False

    def trimmed(self, site: str, left_out: float) -> None:
        pass

    def run(self, call: AttentionCall) -> Tensor | None:
        out = self.see(call)
        return None if out is None else out.transpose(1, 2).contiguous()

    def skipped(self, site: str, reason: str) -> None:
        pass

    def reset(self) -> None:
        pass


class watch:
    """While open, every attention call of `model` is shown to `see(call)` before it runs.

    A tensor `[B, Hq, Nq, Dv]` that `see` returns replaces the call's output; None runs dense as
    before.
    """

    def __init__(self, model: Any, see: Callable[[AttentionCall], Tensor | None]) -> None:
        self.model, self.see, self.undo = model, see, ExitStack()

    def __enter__(self) -> watch:
        adapter, bare = adapter_for(self.model)
        with ExitStack() as undo:
            adapter.connect(bare, _Watcher(self.see), undo)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo.close()
