"""How close a result comes to another of equal seed."""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from accelkit.calibration.denoise.video import Take
from accelkit.calibration.evaluation.quality import relative
from accelkit.errors import InvalidInputError


def fidelity(found: Take, true: Take) -> dict[str, float | None]:
    """How close a run comes to one of equal seed: relative L1 error and PSNR of the latents (peak:
    their range), and PSNR, SSIM and LPIPS of the frames where both have some.
    """
    there = true.latents.to(found.latents.device)
    square = float((found.latents - there).square().mean())
    spread = float(true.latents.max() - true.latents.min()) or 1.0
    rows: dict[str, float | None] = {
        "error": relative(found.latents, there),
        "latent_psnr": decibels(square, spread),
        "psnr": None,
        "ssim": None,
        "lpips": None,
    }
    if found.frames is not None and true.frames is not None:
        rows["psnr"] = decibels(float(np.square(found.frames - true.frames).mean()), 1.0)
        rows["ssim"] = ssim(found.frames, true.frames, found.latents.device)
        rows["lpips"] = lpips_of(found.frames, true.frames)
    return rows


def decibels(square: float, peak: float) -> float:
    """PSNR of a mean square error; 100 dB stands for equal, −100 dB for what is not finite."""
    if not math.isfinite(square):
        return -100.0
    return min(100.0, 10 * math.log10(peak**2 / max(square, 1e-30)))


def ssim(a: np.ndarray, b: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Structural similarity of frames `[F, H, W, C]` in 0 … 1, computed on `device`: Gaussian
    window of 11 pixels and σ 1.5, mean over frames, pixels and channels (Wang et al. 2004).
    Raises `InvalidInputError` for frames smaller than the window.
    """
    x, y = (
        torch.from_numpy(f).to(device).permute(0, 3, 1, 2).flatten(0, 1)[:, None].double()
        for f in (a, b)
    )
    if min(x.shape[2:]) < 11:
        raise InvalidInputError(f"SSIM needs frames of 11 pixels a side; these are {a.shape[1:3]}")
    at = torch.arange(11, dtype=torch.float64, device=device) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    line = (line / line.sum())[None, None, None]

    def mean(image: Tensor) -> Tensor:
        # The window is a product of two lines.
        return functional.conv2d(functional.conv2d(image, line), line.mT)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mx * my + c1) * (2 * vxy + c2)
    return float((top / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


@cache
def network() -> Any | None:
    """LPIPS (Zhang et al. 2018) over AlexNet; None where the package or its weights are not on this
    machine: nothing is fetched.
    """
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
