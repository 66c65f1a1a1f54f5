"""What this machine has and what would run on it: versions, GPUs, kernels, capability probes,
environment variables."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelkit.patches.method import load, names

if TYPE_CHECKING:
    from rich.console import Group

VARIABLES = {
    "ACCELKIT_KERNEL": "backend of a launch: auto, triton, gluon, fa4, torch or reference",
    "ACCELKIT_DISABLE": "1: patched models run dense",
    "ACCELKIT_PROGRESS": "0: no progress bars, and no stages in logs",
    "HF_HOME": "where models from the hub are kept",
    "HF_HUB_OFFLINE": "1: the hub is not asked",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1: no progress bars",
    "CUDA_VISIBLE_DEVICES": "which GPUs are seen",
    "TRITON_INTERPRET": "1: Triton kernels run in Python on the CPU, for tests",
    "OMP_NUM_THREADS": "CPU threads",
}
OPTIONAL = {
    "transformers": "language models: accelkit[llm]",
    "matplotlib": "pictures: accelkit[report]",
    "jinja2": "HTML reports: accelkit[report]",
    "flash-attn-4": "a faster block-sparse kernel on H100 and H200: accelkit[fa4]",
}


def examine() -> dict[str, Any]:
    """Everything that `accelkit doctor` shows, as plain data. A probe that fails is reported, never
    raised."""
    import torch

    from accelkit.calibration.results import environment, installed

    found: dict[str, Any] = {"versions": {k: v for k, v in environment().items() if k != "gpu"}}
    found["optional"] = {
        name: {"version": installed(name), "for": use} for name, use in OPTIONAL.items()
    }
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found["gpus"] = [_gpu(n) for n in range(count)]
    device = torch.device("cuda" if count else "cpu")
    found["kernels"] = [_kernel(device, *case) for case in _cases(device)]
    found["probes"] = {name: _try(probe) for name, probe in _probes(device).items()}
    found["environment"] = {
        name: {"value": os.environ.get(name), "meaning": text} for name, text in VARIABLES.items()
    }
    found["problems"] = problems(found)
    return found


def explain(name: str) -> dict[str, Any]:
    """A method: its idea, its numbers with defaults, the phases it serves and the questions it
    answers. No torch."""
    cls = load(name)
    about = inspect.getdoc(sys.modules[cls.__module__]) or inspect.getdoc(cls) or ""
    fields = [
        {
            "field": field,
            "default": about_it.get("default", "required"),
            "values": _values(about_it),
            "meaning": " ".join(about_it.get("description", "").split()),
        }
        for field, about_it in cls.model_json_schema().get("properties", {}).items()
    ]
    return {
        "name": name,
        "class_name": cls.__name__,
        "idea": about.split("\n\n")[0].replace("\n", " "),
        "phases": list(cls.phases),
        "answers": sorted(cls.answers()),
        "dial": {"field": cls.dial.field, "values": list(cls.dial.values)} if cls.dial else None,
        "about": about,
        "fields": fields,
    }


def listing() -> list[dict[str, Any]]:
    """All methods in short; one that cannot be loaded says why and does not hide the others."""
    found = []
    for name in names():
        try:
            entry = explain(name)
        except Exception as error:
            told = f"cannot be loaded: {type(error).__name__}: {error}"
            entry = {"idea": told, "phases": [], "answers": []}
        found.append({"name": name, **{k: entry[k] for k in ("idea", "phases", "answers")}})
    return found


def _values(schema: dict[str, Any]) -> str:
    """What a field may be, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if "prefixItems" in schema:
        return f"{len(schema['prefixItems'])} × {_values(schema['prefixItems'][0])}"
    if "items" in schema:
        return f"any number of {_values(schema['items'])}"
    names = {"string": "name of a side tensor", "boolean": "true or false", "null": "none"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    if "multipleOf" in schema:
        bounds.append(f"a multiple of {schema['multipleOf']}")
    kind = names.get(schema.get("type", ""), schema.get("type", "anything"))
    return " ".join([kind, ", ".join(bounds)]).strip()


def problems(found: dict[str, Any]) -> list[str]:
    """What keeps accelkit from being useful here, each with its mend."""
    told = []
    if not found["gpus"]:
        told.append(
            "no CUDA GPU is visible: speed-ups can be tried on the CPU but are made for GPUs"
        )
    if found["gpus"] and any(
        k["backend"] in ("torch", "reference", "none")
        for k in found["kernels"]
        if k["dtype"] != "float32"
    ):
        told.append("some launches run slowly in torch; the reasons stand in the table of kernels")
    if not found["optional"]["transformers"]["version"]:
        told.append('language models need transformers: pip install "accelkit[llm]"')
    if os.environ.get("ACCELKIT_DISABLE", "0") not in ("", "0"):
        told.append("ACCELKIT_DISABLE is set: patched models run dense; unset it")
    return told


def render(found: dict[str, Any]) -> Group:
    """What a person reads. Texts may hold brackets, which are not markup."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    versions = Table(title="Versions", title_justify="left", show_header=False)
    for name, value in found["versions"].items():
        versions.add_row(name, str(value or "not installed"))
    for name, entry in found["optional"].items():
        if name not in found["versions"]:
            versions.add_row(name, entry["version"] or escape(f"not installed ({entry['for']})"))
    gpus = Table(title="GPUs", title_justify="left")
    for column in ("", "name", "capability", "memory GiB", "multiprocessors"):
        gpus.add_column(column)
    for n, gpu in enumerate(found["gpus"]):
        gpus.add_row(
            str(n), *(str(gpu[k]) for k in ("name", "capability", "memory_gib", "multiprocessors"))
        )
    kernels = Table(title="Which kernel would serve", title_justify="left")
    for column in ("dtype", "head size", "unit", "causal", "backend", "why"):
        kernels.add_column(column)
    if len({(k["backend"], k["reason"]) for k in found["kernels"]}) == 1:
        one = found["kernels"][0]
        kernels.add_row(*["any"] * 4, one["backend"], escape(one["reason"]))
    else:
        for k in found["kernels"]:
            unit, causal = "×".join(map(str, k["unit"])), "yes" if k["causal"] else "no"
            kernels.add_row(
                k["dtype"], str(k["head_dim"]), unit, causal, k["backend"], escape(k["reason"])
            )
    probes = Table(title="Probes", title_justify="left", show_header=False)
    for name, answer in found["probes"].items():
        probes.add_row(name, escape(answer))
    variables = Table(title="Environment", title_justify="left")
    for column in ("variable", "value", "meaning"):
        variables.add_column(column)
    for name, entry in found["environment"].items():
        variables.add_row(name, entry["value"] or "–", entry["meaning"])
    parts: list[Any] = [versions, *([gpus] if found["gpus"] else []), kernels, probes, variables]
    return Group(*parts, *(f"note: {text}" for text in found["problems"]))


def _gpu(number: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
    }


def _cases(device: Any) -> list[tuple[str, int, tuple[int, int], bool]]:
    dtypes = (
        ("bfloat16", "float16", "float32") if device.type == "cuda" else ("float32", "bfloat16")
    )
    return [
        (dtype, dim, unit, causal)
        for dtype in dtypes
        for dim in (64, 128)
        for unit, causal in (((128, 128), True), ((128, 128), False), ((128, 1), True))
    ]


def _kernel(
    device: Any, dtype: str, head_dim: int, unit: tuple[int, int], causal: bool
) -> dict[str, Any]:
    """Which backend a launch of this kind would take; asks, and computes nothing."""
    import torch

    from accelkit.kernels import dispatch
    from accelkit.kernels.index import BlockIndex

    entry: dict[str, Any] = {
        "dtype": dtype,
        "head_dim": head_dim,
        "unit": unit,
        "causal": causal,
    }
    try:
        q = torch.zeros(1, 4, 128, head_dim, dtype=getattr(torch, dtype), device=device)
        mask = torch.ones(1, 4, 1, 128 // unit[1], dtype=torch.bool, device=device)
        index = BlockIndex.from_mask(mask, unit)
        choice = dispatch.explain(q, q[:, :2], q[:, :2], index, causal=causal)
        return entry | {"backend": choice.backend, "reason": choice.reason}
    except Exception as error:
        return entry | {"backend": "none", "reason": f"{type(error).__name__}: {error}"}


def _probes(device: Any) -> dict[str, Callable[[], str]]:
    import torch

    from accelkit.calibration.opening.models import fast_bf16

    def triton() -> str:
        from accelkit.kernels.dispatch import triton_missing

        return triton_missing(device) or "usable"

    def sdpa(name: str) -> str:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device)
        with sdpa_kernel([getattr(SDPBackend, name)]):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return "runs"

    def methods() -> str:
        return ", ".join(names()) or "none"

    probes: dict[str, Callable[[], str]] = {"methods": methods, "triton": triton}
    if device.type == "cuda":
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            probes[f"torch SDPA {name.split('_')[0].lower()}"] = lambda name=name: sdpa(name)  # type: ignore[misc]
    else:
        probes["bfloat16 on this CPU"] = lambda: (
            "fast" if fast_bf16() else "slow: models load as float32"
        )
    return probes


def _try(probe: Callable[[], str]) -> str:
    try:
        return probe()
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"no: {type(error).__name__}: {lines[0][:160]}"
