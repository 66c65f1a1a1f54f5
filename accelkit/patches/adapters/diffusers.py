"""diffusers: every processor's last step is `scaled_dot_product_attention`, and `adapters.sdpa`
stands there. This file knows where the denoisers and their attention modules are.

A pipeline's denoisers are `transformer` and `transformer_2`; a bare denoiser counts as
`transformer`, so one plan fits both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from accelkit.errors import (
    AlreadyPatchedError,
    InvalidInputError,
    NothingPatchedError,
    ParallelNotSupportedError,
    UnsupportedModelError,
)
from accelkit.patches.adapters import Runner, sdpa
from accelkit.patches.adapters.clock import DenoiseClock
from accelkit.patches.adapters.geometry import (
    FAMILIES,
    Family,
    Patch,
    Root,
    family_of,
    patch_of,
)
from accelkit.patches.adapters.processors import keep_padding
from accelkit.patches.call import Kind, Site
from accelkit.patches.plan import Component, Fingerprint

PHASES = ("denoise",)
"""Phases whose calls are opened to methods; all others run what ran before."""
COMPONENTS = ("transformer", "transformer_2")
BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks")
"""Where a denoiser keeps its blocks; attention elsewhere (text refiners) stays dense."""
THROUGH_SDPA = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Attention backends of diffusers that end in `scaled_dot_product_attention`."""


@dataclass(frozen=True)
class _Place:
    """One attention module of a denoiser."""

    path: str
    module: nn.Module
    heads: int
    kind: Kind
    component: str
    family: Family
    patch: Patch
    reason: str | None


def denoisers(model: DiffusionPipeline | ModelMixin) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name, without wrappers.

    Raises:
        UnsupportedModelError: none, or one of a class whose token layout is not known.
        InvalidInputError: one of them is compiled.
    """
    found = (
        {name: getattr(model, name, None) for name in COMPONENTS}
        if isinstance(model, DiffusionPipeline)
        else {COMPONENTS[0]: model}
    )
    known: dict[str, nn.Module] = {}
    for name, root in found.items():
        if root is None:
            continue
        if hasattr(root, "get_base_model"):
            root = root.get_base_model()
        if type(root).__name__ == "OptimizedModule" or any(
            m._compiled_call_impl is not None for m in root.modules()
        ):
            raise InvalidInputError(
                f"{name} is compiled; give the pipeline to accelkit first and compile afterwards"
            )
        if family_of(root) is None:
            raise UnsupportedModelError(
                f"{name}: the token layout of {type(root).__name__} is not known; "
                f"known are: {', '.join(FAMILIES)}"
            )
        known[name] = root
    if not known:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no denoiser found; expected a pipeline with "
            f"{' or '.join(repr(c) for c in COMPONENTS)}, or a diffusion transformer"
        )
    return known


def attention_modules(model: DiffusionPipeline | ModelMixin) -> Iterator[_Place]:
    """Every attention module of the denoisers' blocks, in running order."""
    for component, root in denoisers(model).items():
        family = family_of(root)
        assert family is not None
        for path, module in root.named_modules():
            attends = hasattr(module, "processor") and hasattr(module, "heads")
            if not attends or path.partition(".")[0] not in BLOCKS:
                continue
            kind: Kind = "self" if family.text is None else "joint"
            if path.endswith(".attn2"):
                kind = family.second
            reason = None
            if isinstance(module.processor, nn.Module):
                reason = "trained attention processor"
            yield _Place(
                f"{component}.{path}",
                module,
                int(module.heads),
                kind,
                component,
                family,
                patch_of(root),
                reason,
            )


def sites(model: DiffusionPipeline | ModelMixin) -> tuple[Site, ...]:
    """The self- and joint-attention sites that may run sparse."""
    return tuple(
        Site(p.path, order, p.kind, p.component)
        for order, p in enumerate(attention_modules(model))
        if p.kind != "cross" and p.reason is None
    )


def facts(model: DiffusionPipeline | ModelMixin) -> tuple[Fingerprint, dict[str, int]]:
    """Fingerprint and the query heads of every self- and joint-attention site."""
    roots = denoisers(model)
    places = [p for p in attention_modules(model) if p.kind != "cross"]
    first = next(iter(roots.values()))
    kept = {
        name: {k: v for k, v in dict(root.config).items() if not k.startswith("_")}
        for name, root in roots.items()
    }
    config = json.loads(json.dumps(kept, sort_keys=True, default=str))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    fingerprint = Fingerprint(
        library="diffusers",
        class_name=type(first).__name__,
        model_type=type(first).__name__,
        base_id=str(getattr(model, "name_or_path", "")) or None,
        config_hash=f"sha256:{digest}",
        config=config,
        components={
            name: Component(
                layers=sum(p.component == name for p in places),
                q_heads=root.config.num_attention_heads,
                kv_heads=root.config.num_attention_heads,
                head_dim=root.config.attention_head_dim,
            )
            for name, root in roots.items()
        },
    )
    return fingerprint, {p.path: p.heads for p in places}


def parts(model: DiffusionPipeline | ModelMixin) -> dict[str, DiffusionPipeline | nn.Module]:
    """The model under "", and its denoisers by component name, compiled since or not."""
    found: dict[str, DiffusionPipeline | nn.Module] = {"": model}
    if not isinstance(model, DiffusionPipeline):
        return found | {COMPONENTS[0]: model}
    for name in COMPONENTS:
        root = getattr(model, name, None)
        root = getattr(root, "_orig_mod", root)
        if root is not None:
            found[name] = root.get_base_model() if hasattr(root, "get_base_model") else root
    return found


def trimmable(model: DiffusionPipeline | ModelMixin) -> None:
    """None: every row of a denoiser's output is read."""


def connect(model: DiffusionPipeline | ModelMixin, runner: Runner, undo: ExitStack) -> None:
    """Route the denoisers' attention to `runner`; every edit pushes its reverse onto `undo`.

    Raises:
        NothingPatchedError: no self- or joint-attention in the denoisers' blocks.
        InvalidInputError: an attention backend that does not end in SDPA.
        ParallelNotSupportedError: ring attention.
        AlreadyPatchedError: connected already.
    """
    places = [(n, p) for n, p in enumerate(attention_modules(model)) if p.kind != "cross"]
    if not places:
        raise NothingPatchedError(
            f"{type(model).__name__}: no self- or joint-attention in the denoisers' blocks"
        )
    for _, place in places:
        _refuse(place)
    pipe = model if isinstance(model, DiffusionPipeline) else None
    link = sdpa.Connection(runner, DenoiseClock(pipe, runner.reset, undo))
    sdpa.route(link, undo)
    roots = {name: Root() for name in denoisers(model)}
    for name, root in denoisers(model).items():
        sdpa.follow(root, roots[name], undo)
        link.clock.follow(root, undo)
    for order, place in places:
        if place.family.square and place.reason is None:
            keep_padding(place.module, undo)
        site = Site(place.path, order, place.kind, place.component)
        door = sdpa.Door(site, place.heads, place.family, place.patch, link, _missed, place.reason)
        sdpa.connect(place.module, door, roots[place.component], undo)


def _refuse(place: _Place) -> None:
    """Raise for an attention module whose calls would pass the router by."""
    if hasattr(place.module, sdpa.ATTRIBUTE):
        raise AlreadyPatchedError(f"{place.path} runs under another handle; remove that one first")
    if (reason := _missed(place.module)) is not None:
        raise InvalidInputError(
            f"{place.path}: {reason}; call set_attention_backend('native') on the denoiser first"
        )
    parallel = getattr(place.module.processor, "_parallel_config", None)
    context = getattr(parallel, "context_parallel_config", None)
    if context is not None and (context.ring_degree or 1) > 1:
        raise ParallelNotSupportedError(
            f"{place.path}: ring attention passes keys around piece by piece and cannot run "
            "sparse; use one device"
        )


def _missed(module: nn.Module) -> str | None:
    """Why a forward of an attention module passes the router by. None: it does not."""
    backend = getattr(module.processor, "_attention_backend", None)
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    name = str(getattr(backend, "value", backend))
    if name in THROUGH_SDPA:
        return None
    return f"the attention backend {name!r} does not pass through scaled_dot_product_attention"
