"""Step caches that a model's library brings along: switched on together with their undo.

What a cache decides depends on data and on the step, so it never is part of a compiled graph.
Blocks that are compiled one by one (`compile_repeated_blocks`) compile what lies inside the cache,
the same graphs for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from accelkit.errors import UnsupportedConfigurationError, UnsupportedModelError


def enable(model: Any, config: str, undo: ExitStack, **fields: Any) -> None:
    """`model.enable_cache(config(**fields))`; `undo` leaves every module as it was.

    `config` names a class of the library that the model comes from.

    Raises:
        UnsupportedModelError: the model's class knows no step cache.
        UnsupportedConfigurationError: another step cache is switched on already.
    """
    name = type(model).__name__
    if not hasattr(model, "enable_cache"):
        raise UnsupportedModelError(
            f"{name}: its class has no step caches (no enable_cache); calibrate without them"
        )
    if model.is_cache_enabled:
        raise UnsupportedConfigurationError(
            f"{name}: {type(model._cache_config).__name__} is enabled already and only one step "
            "cache can be; call disable_cache() first"
        )
    library = import_module(type(model).__module__.partition(".")[0])
    before = {m: (*map(m.__dict__.get, ("forward", "_diffusers_hook")),) for m in model.modules()}
    had = "_cache_config" in vars(model)
    wanted = getattr(library, config)(**fields)
    try:
        model.enable_cache(wanted)
    except ValueError as error:
        # A block class that the library's hooks do not know: take back those that are set.
        model._cache_config = wanted
        model.disable_cache()
        _restore(model, before, had)
        raise UnsupportedModelError(f"{name}: {config} cannot be used here ({error})") from error

    def off() -> None:
        inside.close()
        if model.is_cache_enabled:
            model.disable_cache()
        _restore(model, before, had)

    inside = _compiling_inside(model)
    undo.callback(off)


def _compiling_inside(model: Any) -> ExitStack:
    """Let `compile` of a cached module compile what its cache calls, and `compile` of a module
    around cached ones the pieces between them as well; closed, modules compile as before.
    """
    import torch  # methods are listed where there is none

    undo = ExitStack()
    cached = {m for m in model.modules() if getattr(vars(m).get("_diffusers_hook"), "hooks", None)}
    for module in model.modules():
        inside = [m for m in module.modules() if m in cached]
        if module is model or not inside:
            continue
        if module in cached:
            reference = module._diffusers_hook._fn_refs[-1]
            for name in ("original_forward", "forward"):
                undo.callback(setattr, reference, name, getattr(reference, name))
            reference.forward = torch.compiler.disable(reference.forward)
            module.compile = partial(_compile_cached, reference, reference.original_forward)
        else:
            module.compile = partial(_compile_around, module, inside)
        undo.callback(vars(module).pop, "compile", None)
    return undo


def _compile_cached(reference: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """As `nn.Module.compile`, but for the function that a cache calls at computed steps."""
    import torch

    reference.original_forward = torch.compile(forward, *args, **kwargs)


def _compile_around(module: Any, cached: list[Any], *args: Any, **kwargs: Any) -> None:
    """As `nn.Module.compile`; cached modules inside are graphs of their own, so the one graph that
    is asked for with `fullgraph` becomes one for each piece between them.
    """
    for inner in cached:
        inner.compile(*args, **kwargs)
    type(module).compile(module, *args, **{**kwargs, "fullgraph": False})


@contextmanager
def magnitudes(model: Any, steps: int) -> Iterator[Callable[[], list[float]]]:
    """While open, ‖r_t‖ ÷ ‖r_{t−1}‖ of the stack's residual is noted at every step of a run; asked
    before the run has ended, the function gives those of the first guidance branch.
    """
    with ExitStack() as undo:
        # One step more than there are, so that the library neither prints nor forgets them.
        enable(model, "MagCacheConfig", undo, calibrate=True, num_inference_steps=steps + 1)
        hooks = (getattr(m, "_diffusers_hook", None) for m in model.modules())
        named = (h.hooks.get("mag_cache_leader_block_hook") for h in hooks if h is not None)
        leader = next(h for h in named if h is not None)

        def noted() -> list[float]:
            states = list(leader.state_manager._state_cache.values())
            return list(states[0].calibration_ratios) if states else []

        yield noted


def _restore(model: Any, before: dict[Any, tuple[Any, Any]], had: bool) -> None:
    for module, (forward, registry) in before.items():
        if registry is None and not getattr(vars(module).get("_diffusers_hook"), "hooks", None):
            vars(module).pop("_diffusers_hook", None)
            if forward is None:
                vars(module).pop("forward", None)
    if not had:
        vars(model).pop("_cache_config", None)
