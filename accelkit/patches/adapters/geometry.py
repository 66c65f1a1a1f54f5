"""What the tokens of a denoiser are: where the text lies, and the grid of the visual tokens.

A family is one line: the class of its transformer, on which side of the joint sequence its text
lies (None: text is in cross-attention only) and how the grid follows from the root's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from accelkit.patches.call import Geometry, Span

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Token layout of one transformer class; attention modules named `cross` read text only."""

    grid: Callable[[nn.Module, Tensor, Arguments], Tensor]
    text: Literal["first", "last"] | None = None
    cross: str | None = "attn2"


def _patches(root: nn.Module) -> tuple[int, int, int]:
    size = root.config.patch_size  # type: ignore[union-attr]
    if isinstance(size, int):
        return (getattr(root.config, "patch_size_t", None) or 1, size, size)
    return tuple(size)


def _layout(frames: int, rows: int, columns: int) -> Tensor:
    return torch.tensor([frames * rows * columns, frames, rows, columns])


def _video(root: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Latents `[B, C, F, H, W]`."""
    t, h, w = _patches(root)
    return _layout(hidden.shape[2] // t, hidden.shape[3] // h, hidden.shape[4] // w)


def _frames_first(root: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Latents `[B, F, C, H, W]`."""
    t, h, w = _patches(root)
    return _layout(hidden.shape[1] // t, hidden.shape[3] // h, hidden.shape[4] // w)


def _image(root: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Latents `[B, C, H, W]`."""
    _, h, w = _patches(root)
    return _layout(1, hidden.shape[2] // h, hidden.shape[3] // w)


def _told(root: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Packed latents `[B, N, C]` with `num_frames`, `height` and `width` beside them."""
    return _layout(arguments["num_frames"], arguments["height"], arguments["width"])


def _by_ids(root: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Packed latents `[B, N, C]` with a position `(frame, row, column)` for each token."""
    ids = arguments["img_ids"]
    last = ids.reshape(-1, ids.shape[-1])[:, :3].amax(0).long() + 1
    return torch.cat([last.new_full((1,), hidden.shape[1]), last])


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(_video),
    "HunyuanVideoTransformer3DModel": Family(_video, "last"),
    "HunyuanVideo15Transformer3DModel": Family(_video, "last"),
    "CogVideoXTransformer3DModel": Family(_frames_first, "first"),
    "LTXVideoTransformer3DModel": Family(_told),
    "MochiTransformer3DModel": Family(_video, "last"),
    "CosmosTransformer3DModel": Family(_video),
    "FluxTransformer2DModel": Family(_by_ids, "first"),
    "SD3Transformer2DModel": Family(_image, "last", cross=None),
    "PixArtTransformer2DModel": Family(_image),
}


def layout_of(root: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Tensor:
    """Visual tokens, frames, rows and columns of a forward's input, int64 `[4]`.

    A tensor, so that neither a traced forward nor a compiled block specialises on the values.
    """
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return FAMILIES[type(root).__name__].grid(root, hidden, kwargs)


def geometry(family: Family, layout: tuple[int, ...], tokens: int) -> Geometry:
    """Spans and grid of a call over `tokens` tokens; the rest beside the visual ones is text."""
    visual, *grid = layout
    text = tokens - visual
    if text < 0:
        return Geometry()
    kind = "video" if grid[0] > 1 else "image"
    first = text if family.text == "first" else 0
    spans = [Span(kind, first, first + visual)]
    if text and family.text == "first":
        spans.insert(0, Span("text", 0, text))
    elif text:
        spans.append(Span("text", visual, tokens))
    whole = grid[0] * grid[1] * grid[2] == visual
    return Geometry(tuple(spans), (grid[0], grid[1], grid[2]) if whole else None)
