"""Step caches that a model's library brings along: switched on together with their undo."""

from __future__ import annotations

from contextlib import ExitStack
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
    try:
        model.enable_cache(getattr(library, config)(**fields))
    except ValueError as error:
        # A block class that the library's hooks do not know.
        model._cache_config = None
        _restore(model, before, had)
        raise UnsupportedModelError(f"{name}: {config} cannot be used here ({error})") from error

    def off() -> None:
        if model.is_cache_enabled:
            model.disable_cache()
        _restore(model, before, had)

    undo.callback(off)


def _restore(model: Any, before: dict[Any, tuple[Any, Any]], had: bool) -> None:
    for module, (forward, registry) in before.items():
        if registry is None and not getattr(vars(module).get("_diffusers_hook"), "hooks", None):
            vars(module).pop("_diffusers_hook", None)
            if forward is None:
                vars(module).pop("forward", None)
    if not had:
        vars(model).pop("_cache_config", None)
