"""LPIPS (Zhang et al. 2018) of frames, where package and weights lie on this machine; nothing is
fetched.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch


@cache
def network() -> Any | None:
    """The metric over AlexNet from the package `lpips`; None without it or its weights."""
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if find_spec("lpips") is None or not any(weights.glob("alexnet-*.pth")):
        return None
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


@torch.inference_mode()
def lpips_of(a: np.ndarray, b: np.ndarray) -> float | None:
    """Mean LPIPS of frames `[F, H, W, 3]` in 0 … 1; 0 is equal. None: not to be had here."""
    metric = network()
    if metric is None:
        return None
    x, y = (torch.from_numpy(f).permute(0, 3, 1, 2).float() * 2 - 1 for f in (a, b))
    each = [metric(p[None], q[None]).mean() for p, q in zip(x, y, strict=True)]
    return float(torch.stack(each).mean())
