"""Opens a pipeline of diffusers, and says plainly what is wrong when that fails."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import BUILT_IN, Shot
from accelkit.calibration.opening.models import (
    choose_device,
    choose_dtype,
    describe_model,
    first_line,
    open_model,
    open_plan,
    site_row,
)
from accelkit.errors import InvalidInputError, MissingExtraError, UnsupportedModelError
from accelkit.patches.adapters import facts, sites
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

INDEX = "model_index.json"


def is_pipeline(name: str) -> bool:
    """Whether a folder, or a hub repository within reach, holds a pipeline."""
    if Path(name).exists() or name.count("/") != 1:
        return (Path(name) / INDEX).is_file()
    from huggingface_hub import file_exists, try_to_load_from_cache

    try:
        cached = isinstance(try_to_load_from_cache(name, INDEX), str)
        return cached or file_exists(name, INDEX)
    except Exception:  # offline, a private repository, no such name: opening it will say more
        return False


def open_pipeline(name: str, *, dtype: str = "auto", device: str = "auto") -> Any:
    """A pipeline on its device. `dtype="auto"` is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        InvalidInputError: damaged files, an unknown dtype or device.
        UnsupportedModelError: a pipeline that diffusers cannot open.
    """
    diffusers = _diffusers()
    where = choose_device(device)
    kind = choose_dtype(None, dtype, where)
    if dtype == "auto":
        kind = torch.bfloat16 if where.type == "cuda" else torch.float32
    if not (sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")):
        diffusers.utils.logging.disable_progress_bar()
        if find_spec("transformers"):  # text encoders show bars of their own
            from transformers.utils import logging as encoders

            encoders.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, dtype=kind)
    except (AttributeError, TypeError, ImportError) as error:
        raise UnsupportedModelError(
            f"{name}: diffusers {diffusers.__version__} cannot open this pipeline "
            f"({first_line(error)}); a newer diffusers may"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{name}: the pipeline cannot be read ({first_line(error)}); restore or download it "
            "again"
        ) from error
    return pipe.to(where)


def open_any(name: str, *, dtype: str, device: str) -> tuple[Any, Any]:
    """A pipeline, or a language model with its tokenizer."""
    if is_pipeline(name):
        return open_pipeline(name, dtype=dtype, device=device), None
    return open_model(name, dtype=dtype, device=device)


def opened(
    name: str,
    plan: str | None,
    prompt: str | None,
    size: Mapping[str, int],
    seed: int,
    *,
    dtype: str,
    device: str,
) -> tuple[Any, Plan, video.Settings, Shot]:
    """What a run of a pipeline with a plan needs; size and steps are the plan's unless wished for.
    Without a prompt the first of the built-in ones is taken. A plan that does not fit says so here,
    before anything runs.
    """
    read, _ = open_plan(plan, name)
    text = prompt or BUILT_IN[0]
    shot = Shot(text, {"prompt": text}, seed)
    pipe = open_pipeline(name, dtype=dtype, device=device)
    patch(pipe, read).remove()
    return pipe, read, settings_of(read, size), shot


def settings_of(plan: Plan, size: Mapping[str, int]) -> video.Settings:
    """Size and steps as wished, and else as calibrated."""
    known = {k: plan.calibration.get(k) for k in vars(video.Settings())}
    wished = {"num_inference_steps" if k == "steps" else k: v for k, v in size.items()}
    return video.Settings(**{k: v for k, v in {**known, **wished}.items() if isinstance(v, int)})


def describe_any(name: str) -> dict[str, Any]:
    """Class, size and attention sites of a folder's model or pipeline; no weights are read."""
    return describe_pipeline(name) if is_pipeline(name) else describe_model(name)


def size_told(pipe: Any, size: Mapping[str, int]) -> str:
    """What a pipeline draws with these wishes: `480 × 832, 81 frames`."""
    whole = video.Settings(*map(size.get, ("height", "width", "num_frames"))).filled(pipe)
    frames = f", {whole.num_frames} frames" * (whole.num_frames is not None)
    sides = whole.height is not None and whole.width is not None
    return (f"{whole.height} × {whole.width}" if sides else "its own size") + frames


def describe_pipeline(name: str) -> dict[str, Any]:
    """Class, size and attention sites of a pipeline's denoisers, from their configs alone;
    cross-attention, which always runs dense, among them. Raises `UnsupportedModelError` for a
    pipeline without a transformer.
    """
    diffusers = _diffusers()
    from accelkit.patches.adapters.diffusers import attention_modules

    index = json.loads((Path(name) / INDEX).read_text("utf-8"))
    rows: list[dict[str, Any]] = []
    components: dict[str, Any] = {}
    for part in ("transformer", "transformer_2"):
        library, kind = index.get(part) or ("", "")
        if library != "diffusers":
            continue
        cls = getattr(diffusers, kind)
        with torch.device("meta"):
            model = cls.from_config(cls.load_config(name, subfolder=part))
        fingerprint, _ = facts(model)
        components[part] = fingerprint.components["transformer"].model_dump()
        open_sites = {site.path for site in sites(model)}
        for place in attention_modules(model):
            name_there = place.path.replace("transformer", part, 1)
            sparse = place.path in open_sites
            rows.append(site_row(name_there, place.heads, sparse) | {"kind": place.kind})
    if not rows:
        raise UnsupportedModelError(f"{name}: {index.get('_class_name')} has no transformer")
    return {
        "class_name": index["_class_name"],
        "model_type": fingerprint.model_type,
        "components": components,
        "sites": rows,
    }


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError(
            'diffusers is needed to open a pipeline: pip install "accelkit[diffusion]"'
        ) from error
    return diffusers
