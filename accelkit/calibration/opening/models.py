"""Opens a pretrained language model and its tokenizer, and says plainly what is wrong when that
fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from accelkit.calibration import memory
from accelkit.errors import InvalidInputError, MissingExtraError, UnsupportedModelError
from accelkit.patches.adapters import facts, sites
from accelkit.patches.patch import patch, save_pretrained
from accelkit.patches.plan import Plan
from accelkit.patches.plan_file import FILE

DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode on its device, and its tokenizer (None if the folder has none).

    `name` is a folder or a hub id. `dtype="auto"` is the checkpoint's own on CUDA, and float32 on
    CPUs that are slow in the checkpoint's; `device="auto"` is the first GPU if there is one.

    Raises:
        InvalidInputError: no such folder, damaged files, an unknown dtype or device.
        UnsupportedModelError: a class that transformers cannot open as a causal language model.
    """
    transformers = _transformers()
    where = choose_device(device)
    config = open_config(name)
    kind = choose_dtype(config, dtype, where)
    if where.type == "cpu":
        memory.keep()
    if not (sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")):
        transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype=kind)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{name}: transformers has no causal language model for {type(config).__name__} "
            f"({first_line(error)}); choose a text generation model"
        ) from error
    except Exception as error:
        if not _damaged(error):
            raise
        raise InvalidInputError(
            f"{name}: the weights cannot be read ({first_line(error)}); "
            "restore or download them again"
        ) from error
    return model.eval().to(where), open_tokenizer(name)


def open_config(name: str) -> Any:
    """The model's configuration; the first thing that fails for a wrong name.

    Raises:
        InvalidInputError: no saved language model there, nor on the hub within reach.
        UnsupportedModelError: transformers does not know the model.
    """
    transformers, path = _transformers(), Path(name)
    if (path / "model_index.json").exists():
        raise InvalidInputError(
            f"{name} is a pipeline; this needs a language model "
            "(`accelkit calibrate`, `patch`, `bench` and `show` take pipelines)"
        )
    if path.is_dir() and not (path / "config.json").exists():
        raise InvalidInputError(f"{name}: no config.json in this folder; expected a saved model")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InvalidInputError(
            f"{name}: no such folder; expected a saved model or a hub id 'owner/name'"
        )
    if path.is_file():
        raise InvalidInputError(
            f"{name} is a file; expected the folder of a saved model or a hub id"
        )
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{name}: transformers {transformers.__version__} does not know this model "
            f"({first_line(error)}); a newer transformers may"
        ) from error
    except OSError as error:
        raise InvalidInputError(
            f"{name}: neither a folder nor a hub model within reach "
            f"({first_line(error)}); check the name"
        ) from error


def open_tokenizer(name: str) -> Any:
    """The model's tokenizer, or None if it has none."""
    try:
        return _transformers().AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def need_tokenizer(tokenizer: Any, name: str) -> Any:
    """The tokenizer. Raises `InvalidInputError`, which says where it should be, for None."""
    if tokenizer is None:
        raise InvalidInputError(f"{name}: no tokenizer in this model's folder; save one there")
    return tokenizer


def choose_device(device: str) -> torch.device:
    """The device to run on. Raises `InvalidInputError` for one that is unknown or not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(
            f"--device: {device!r} is unknown; expected auto, cpu or cuda:0"
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(
            f"--device {device}: {torch.cuda.device_count()} CUDA devices are visible; "
            "`accelkit doctor` says why"
        )
    return chosen


def choose_dtype(config: Any, dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to load as; see `open_model`. Raises `InvalidInputError` for an unknown name."""
    if dtype not in DTYPES:
        raise InvalidInputError(
            f"--dtype: {dtype!r} is unknown; expected one of {', '.join(DTYPES)}"
        )
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    if device.type == "cpu" and not (stored == torch.bfloat16 and fast_bf16()):
        return torch.float32
    return stored


def fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware tiles. Narrower support loses in
    attention."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() or {}
    return bool(found.get("amx_bf16") or found.get("sve_bf16"))


def describe_model(name: str) -> dict[str, Any]:
    """Class, size and attention sites of a model, from its config; no weights are read. Raises
    `UnsupportedModelError` where that cannot be built.
    """
    config = open_config(name)
    try:
        with torch.device("meta"):
            model = _transformers().AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: {first_line(error)}") from error
    fingerprint, heads = facts(model)
    open_sites = {site.path for site in sites(model)}
    return {
        "class_name": fingerprint.class_name,
        "model_type": fingerprint.model_type,
        "components": {k: c.model_dump() for k, c in fingerprint.components.items()},
        "sites": [site_row(path, n, path in open_sites) for path, n in heads.items()],
    }


def site_row(path: str, heads: int, sparse: bool) -> dict[str, Any]:
    """What is listed of an attention module."""
    return {"site": path, "query_heads": heads, "may_run_sparse": "yes" if sparse else "no"}


def has_plan(name: str) -> bool:
    """Whether a model's folder holds a plan."""
    return (Path(name) / FILE).exists()


def open_plan(plan: str | None, model: str) -> tuple[Plan, str]:
    """The plan that was named, or the one in the model's folder, and where it lies. Raises
    `InvalidInputError` without either.
    """
    if plan is None and not has_plan(model):
        raise InvalidInputError(
            f"--plan is missing and {model} holds no {FILE}; "
            f"make one with `accelkit calibrate {model}`"
        )
    where = plan or model
    return Plan.from_pretrained(where), str(Path(where) / FILE if Path(where).is_dir() else where)


def opened(name: str, plan: str | None, *, dtype: str, device: str) -> tuple[Any, Any, Plan, str]:
    """What a run of a language model with a plan needs: model, tokenizer (None if it has none),
    the plan and where that lies. A plan that does not fit says so here, before anything runs.
    """
    read, where = open_plan(plan, name)
    model, tokenizer = open_model(name, dtype=dtype, device=device)
    patch(model, read).remove()
    return model, tokenizer, read, where


def report_beside(plan: str) -> str | None:
    """The report that calibration wrote beside a plan's file, if it is there."""
    page = Path(plan).parent / "report.html"
    return str(page) if page.exists() else None


def save_model(model: Any, tokenizer: Any, plan: Plan, folder: Path) -> Path:
    """Write an unpatched model with its tokenizer and plan; `accelkit.from_pretrained` opens it
    patched. Raises `InvalidInputError` for a folder that cannot be written.
    """
    try:
        with patch(model, plan):
            path = save_pretrained(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InvalidInputError(f"{folder}: the model cannot be written ({error})") from error
    return path


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            'transformers is needed to open a language model: pip install "accelkit[llm]"'
        ) from error
    return transformers


def _damaged(error: Exception) -> bool:
    return isinstance(error, OSError | RuntimeError) or "safetensor" in type(error).__name__.lower()


def first_line(error: BaseException) -> str:
    """What an error says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
