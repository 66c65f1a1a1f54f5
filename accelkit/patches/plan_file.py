"""How a plan lies on disk or on the hub: text and versions, side tensors with their hash; a file
is replaced whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelkit.errors import InvalidInputError, PlanCorruptError, PlanError, PlanVersionError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 4
FILE = "accelkit_plan.json"
TABLES_FILE = "accelkit_plan.safetensors"

# From version N to N+1, pure dict → dict, kept for ever.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda plan: {"trim_last_layer": False, **plan},
    2: lambda plan: _without(plan, "fingerprint", "weights_hash"),  # was never filled in
    3: lambda plan: {"dense_rows": 0, **plan},
}


def _without(plan: dict[str, Any], part: str, field: str) -> dict[str, Any]:
    """A plan without a field of one of its parts."""
    rest = plan.get(part)
    if not isinstance(rest, dict):
        return plan  # validation says what is wrong
    return plan | {part: {k: v for k, v in rest.items() if k != field}}


def parse(text: str, where: str) -> dict[str, Any]:
    """The plan's data at the present schema version; `where` names the source in errors."""
    if not isinstance(text, str):
        raise PlanError(f"{where}: {type(text).__name__} is no text; expected the JSON of a plan")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanCorruptError(
            f"{where}: not valid JSON ({error}); restore the file or calibrate again"
        ) from error
    if not isinstance(data, dict) or type(data.get("schema_version")) is not int:
        raise PlanCorruptError(
            f"{where}: not a plan (no integer 'schema_version'); expected a file of accelkit's"
        )
    version = data["schema_version"]
    if version > SCHEMA_VERSION:
        producer = data.get("producer")
        made_by = producer.get("version") if isinstance(producer, dict) else None
        wanted = f"accelkit {made_by} or newer" if made_by else "a newer accelkit"
        raise PlanVersionError(
            f"{where}: schema {version}, this accelkit reads up to {SCHEMA_VERSION}; "
            f"install {wanted}"
        )
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise PlanVersionError(
                f"{where}: schema {version} is too old to be read; calibrate again"
            )
        data = MIGRATIONS[version](data)
        version += 1
        data["schema_version"] = version
    return data


def as_path(value: Any, what: str) -> Path:
    """A path from text or a path-like object.

    Raises:
        InvalidInputError: something else.
    """
    if not isinstance(value, str | os.PathLike):
        raise InvalidInputError(f"{what} is {value!r:.80}; expected a path as text or Path")
    return Path(value)


def write(folder: Path, text: str, tables: bytes | None) -> Path:
    """Put a plan's text and packed side tensors into `folder`; returns the text's path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(
            f"{folder}: no folder can be made there ({error}); choose another one"
        ) from error
    if tables is not None:
        _replace(folder / TABLES_FILE, tables)
    _replace(folder / FILE, text.encode())
    return folder / FILE


def find(
    name_or_path: str | os.PathLike[str], subfolder: str | None, **hub: Any
) -> tuple[Path, Callable[[str], Path]]:
    """The plan's path and how to get a file beside it; `hub` are `hf_hub_download`'s arguments."""
    path, name = as_path(name_or_path, "the plan's place"), str(name_or_path)
    try:
        if path.is_dir():
            path = path / (subfolder or "") / FILE
        if path.exists():
            return path, lambda name: path.parent / name
    except (OSError, ValueError) as error:  # a text that no file can be called
        raise PlanError(
            f"no plan at {name[:80]!r}…: that is no path ({type(error).__name__}); "
            "Plan.from_json reads the text itself"
        ) from error
    if path.suffix == ".json" or name.startswith((".", "/")) or name.count("/") != 1:
        raise PlanError(
            f"no plan at {path}; expected a file, a folder holding {FILE} or a hub id 'owner/name'"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file, subfolder=subfolder, **hub))

    try:
        return fetch(FILE), fetch
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise PlanError(
            f"no plan at {name}: neither a folder here nor to be had from the hub ({error})"
        ) from error


def read(path: Path) -> str:
    """The plan's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanCorruptError(f"{path}: could not be read ({error}); restore the file") from error


def pack(tables: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Side tensors as safetensors bytes, and their SHA-256."""
    from safetensors.torch import save

    ordered = {k: v.contiguous() for k, v in sorted(tables.items())}
    blob = save(ordered, {"accelkit_schema": str(SCHEMA_VERSION)})
    return blob, hashlib.sha256(blob).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target and rename: a full disk leaves the old file whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise PlanError(
            f"{path}: could not be written ({error}); an older plan there is untouched"
        ) from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def unpack(path: Path, sha256: str) -> dict[str, Tensor]:
    """Side tensors of a plan, checked against the hash that the plan gives."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise PlanCorruptError(
            f"{path}: side tensors are missing; they belong beside {FILE}"
        ) from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest != sha256:
        raise PlanCorruptError(
            f"{path}: SHA-256 is {digest[:12]}…, the plan expects {sha256[:12]}…; restore the file"
        )
    from safetensors.torch import load as load_tensors

    return load_tensors(blob)
