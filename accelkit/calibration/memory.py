"""How much memory a stretch of work takes at most, and keeping what was used once."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of `mallopt`: free bytes at the heap's end that go back to the system, and how many
blocks may be mapped from it one by one."""


def keep() -> None:
    """Let this process keep memory that it freed, on Linux with glibc: otherwise the activations of
    every layer are fresh pages again, which the system clears first. It speeds up dense and sparse
    attention alike.
    """
    option = _of_glibc("mallopt")
    if option is not None:
        option(_TRIM_THRESHOLD, 2**31 - 1)
        option(_MMAP_MAX, 0)


def give_back(device: torch.device) -> None:
    """Give back what nobody uses between two stages of work. On a CPU that lies free between blocks
    in use, where `keep` keeps it; on a GPU it is the workspace of every thread that multiplied
    matrices, which outlives the thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        return
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def restart(device: torch.device) -> None:
    """Begin to watch anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark of the resident size to what is in use now
    except OSError:
        pass


def peak(device: torch.device) -> int | None:
    """Most bytes in use since `restart`: allocated on a GPU, resident on a Linux CPU; None where
    nobody counts.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def room(device: torch.device, most: int | None) -> int | None:
    """Bytes beside those in use on a GPU up to `most`; None where nobody counts."""
    if device.type != "cuda" or most is None:
        return None
    return max(0, most - torch.cuda.memory_allocated(device))
