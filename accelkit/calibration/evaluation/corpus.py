"""Text that every Python installation has: the source code of its standard library."""

from __future__ import annotations

import functools
import os
import sysconfig
import zlib
from pathlib import Path

_SKIPPED = frozenset(("site-packages", "dist-packages", "test", "tests", "__pycache__"))
_LEAST = 100_000  # characters without which the corpus is of no use


@functools.lru_cache(maxsize=4)
def source_corpus(held_out: bool | None = None, limit: int = 16_000_000) -> str:
    """Source code of this Python's standard library, ASCII, at most `limit` characters.

    The files come in order of their paths; tests and installed packages are left out.

    held_out: True for a fixed sixteenth of the files, False for the others, None for all.

    Raises `ValueError` where a Python has been stripped of its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    total = 0
    for path in _sources(root):
        if held_out is not None and held_out != is_held_out(path.relative_to(root).as_posix()):
            continue
        texts.append(path.read_text("utf-8", "ignore").encode("ascii", "ignore").decode())
        total += len(texts[-1])
        if total >= limit:
            break
    if total < _LEAST:
        raise ValueError(f"too little Python source below {root}; pass a filler text instead")
    return "".join(texts)[:limit]


@functools.lru_cache(maxsize=1)
def _sources(root: Path) -> list[Path]:
    """Python files below `root` without walking what is skipped, installed packages above all."""
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIPPED]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found)


def is_held_out(name: str) -> bool:
    """Whether the source file of this relative path belongs to the held-out sixteenth."""
    return zlib.crc32(name.encode()) % 16 == 0
