"""How much memory a stretch of work takes at most."""

from __future__ import annotations

import torch


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
