"""Writes what a pipeline made: videos, pictures, and both sides of a comparison on one sheet."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from accelkit.errors import InvalidInputError, MissingExtraError

VIDEO = (".mp4", ".mov", ".mkv", ".webm", ".gif")
COLUMNS = 6
"""Most frames of a video on a sheet."""
GAIN = 4.0
"""By which the difference of two frames is multiplied on a sheet."""
_GAP = 4  # white pixels between the pictures of a sheet


def can_write(path: Path, count: int) -> None:
    """What `write` needs for `count` frames: to be asked before they are made.

    Raises:
        InvalidInputError: a video for one frame, a picture for several, or a folder that cannot be.
        MissingExtraError: no imageio.
    """
    if (path.suffix.lower() in VIDEO) != (count > 1):
        wanted = "a video, such as .mp4" if count > 1 else "a picture, such as .png"
        raise InvalidInputError(f"{path}: {count} frames; choose the ending of {wanted}")
    _imageio()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be written ({error})") from error


def write(frames: np.ndarray, path: Path, fps: float = 16.0) -> Path:
    """Write frames fp32 `[F, H, W, 3]` in 0 … 1 as a video, or the only one as a picture.

    Raises:
        InvalidInputError: a video for one frame, a picture for several, or nothing can be written.
        MissingExtraError: no imageio.
    """
    can_write(path, len(frames))
    moving = path.suffix.lower() in VIDEO
    whole = _bytes(frames)
    # H.264 halves the colours' resolution: sides are even.
    even = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2), (0, 0)), "edge")
    codec = {"codec": "libx264", "macro_block_size": 2} if path.suffix.lower() != ".gif" else {}
    return _write(path, even, fps=fps, **codec) if moving else _write(path, whole[0])


def contact_sheet(dense: np.ndarray, patched: np.ndarray, path: Path) -> Path:
    """A picture whose rows are some dense frames, the patched ones, and their difference × 4."""
    can_write(path, 1)
    at = np.linspace(0, len(dense) - 1, min(COLUMNS, len(dense))).round().astype(int)
    rows = [dense[at], patched[at], 1.0 - np.abs(patched[at] - dense[at]) * GAIN]
    spaced = [np.pad(_bytes(r), ((0, 0), (_GAP,) * 2, (_GAP,) * 2, (0, 0)), constant_values=255)
              for r in rows]  # fmt: skip
    return _write(path, np.concatenate([np.concatenate(list(r), axis=1) for r in spaced], axis=0))


def _bytes(frames: np.ndarray) -> np.ndarray:
    return (np.clip(np.nan_to_num(frames), 0.0, 1.0) * 255).round().astype(np.uint8)


def _imageio() -> Any:
    try:
        from imageio import v3
    except ImportError as error:
        raise MissingExtraError(
            'imageio is needed to write videos and pictures: pip install "accelkit[diffusion]"'
        ) from error
    return v3


def _write(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    try:
        _imageio().imwrite(path, pixels, **options)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: cannot be written ({error})") from error
    return path
