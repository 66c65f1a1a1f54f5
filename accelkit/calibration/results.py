"""What every result carries: date, model, versions, machine. Results are JSON lines."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from accelkit.errors import InvalidInputError
from accelkit.patches.adapters import facts

PACKAGES = ("torch", "triton", "transformers", "diffusers", "safetensors", "pydantic", "numpy")


def about(model: Any, name: str, plan: str) -> dict[str, Any]:
    """What every result line begins with: when, which model and plan, dtype, shapes, machine."""
    fingerprint, _ = facts(model)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": name,
        "plan": plan,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "components": {k: c.model_dump() for k, c in fingerprint.components.items()},
        "environment": environment(model.device),
    }


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, machine and GPU that a result belongs to."""
    from accelkit import __version__

    gpu = None
    if device is not None and device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        gpu = {
            "name": facts.name,
            "memory_gib": round(facts.total_memory / 2**30, 1),
            "multiprocessors": facts.multi_processor_count,
            "capability": f"{facts.major}.{facts.minor}",
        }
    return {
        "accelkit": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def cpu_name() -> str | None:
    """What the processor calls itself, where Linux says so."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return None


def installed(package: str) -> str | None:
    """A package's version without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def append_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append results to a JSON-lines file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be written ({error}); choose another file"
        ) from error
