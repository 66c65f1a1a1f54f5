"""What the tokens of a denoiser are: where the text lies, and the grid of the visual tokens.

A family is one line: the class of its transformer, on which side of the joint sequence its text
lies (None: text is in cross-attention only) and how the grid follows from the root's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from accelkit.errors import InvalidInputError
from accelkit.patches.call import Geometry, Kind, Span

Patch = tuple[int, int, int]


@dataclass
class Root:
    """What the running forward of a denoiser was given, as far as geometry and clock need it:
    `tensors` are the latents, the timestep and, where there are any, the ids of the visual tokens;
    `told` are grid sizes that came as numbers.

    The tensors themselves and nothing computed from them: whatever is traced stays free of values.
    """

    tensors: tuple[Tensor, ...] = ()
    told: tuple[int, ...] = ()

    def receive(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take what is needed from a forward's arguments.

        Raises:
            InvalidInputError: the timestep did not come as a keyword, as all pipelines pass it.
        """
        if "timestep" not in kwargs:
            raise InvalidInputError(
                "a patched denoiser needs its timestep as a keyword: forward(…, timestep=…)"
            )
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        ids = kwargs.get("img_ids")
        self.tensors = (hidden, kwargs["timestep"], *(() if ids is None else (ids,)))
        self.told = ()
        if kwargs.get("num_frames") is not None:
            self.told = (kwargs["num_frames"], kwargs["height"], kwargs["width"])
        shapes = kwargs.get("img_shapes")
        if shapes is not None and len(shapes[0]) == 1:
            self.told = tuple(shapes[0][0])

    def forget(self) -> None:
        """The forward is over; the next one finds what this one found."""
        self.tensors, self.told = (), ()


Layout = tuple[int, int, int, int]
"""Visual tokens, frames, rows, columns."""


@dataclass(frozen=True)
class Family:
    """Token layout of one transformer class. `layout` computes it from a forward's tensors, the
    numbers it was told and the patch size; `text` is where text lies in joint attention, `second`
    what modules named `attn2` are. A `square` family's processors spread the padding mask over all
    pairs of tokens.
    """

    layout: Callable[[Sequence[Tensor], Sequence[int], Patch], Layout]
    text: Literal["first", "last"] | None = None
    second: Kind = "cross"
    square: bool = False


def family_of(root: nn.Module) -> Family | None:
    """The family of a denoiser, by its class or the nearest base class that is known."""
    return next((FAMILIES[c.__name__] for c in type(root).__mro__ if c.__name__ in FAMILIES), None)


def patch_of(root: nn.Module) -> Patch:
    """Frames, rows and columns of latents that become one token."""
    size = root.config.patch_size
    if isinstance(size, int):
        return (getattr(root.config, "patch_size_t", None) or 1, size, size)
    return tuple(size)


def _grid(latents: Sequence[int], patch: Patch) -> Layout:
    f, r, c = (n // p for n, p in zip(latents, patch, strict=True))
    return f * r * c, f, r, c


def _video(tensors: Sequence[Tensor], told: Sequence[int], patch: Patch) -> Layout:
    """Latents `[B, C, F, H, W]`."""
    return _grid(tensors[0].shape[2:], patch)


def _frames_first(tensors: Sequence[Tensor], told: Sequence[int], patch: Patch) -> Layout:
    """Latents `[B, F, C, H, W]`."""
    return _grid((tensors[0].shape[1], *tensors[0].shape[3:]), patch)


def _image(tensors: Sequence[Tensor], told: Sequence[int], patch: Patch) -> Layout:
    """Latents `[B, C, H, W]`."""
    return _grid((1, *tensors[0].shape[2:]), patch)


def _told(tensors: Sequence[Tensor], told: Sequence[int], patch: Patch) -> Layout:
    """Packed latents `[B, N, C]` with `num_frames`, `height` and `width` beside them, if the
    pipeline gives no coordinates instead.
    """
    frames, rows, columns = told or (0, 0, 0)
    return tensors[0].shape[1], frames, rows, columns


def _told_image(tensors: Sequence[Tensor], told: Sequence[int], patch: Patch) -> Layout:
    """Packed latents `[B, N, C]` of one image of a told shape, or of several."""
    return _told(tensors, told or (1, 0, 0), patch)


def _by_ids(tensors: Sequence[Tensor], told: Sequence[int], patch: Patch) -> Layout:
    """Packed latents `[B, N, C]` with a position `(frame, row, column)` for each token."""
    ids = tensors[2].reshape(-1, tensors[2].shape[-1])[:, :3]
    frames, rows, columns = (int(n) + 1 for n in ids.amax(0).tolist())
    return tensors[0].shape[1], frames, rows, columns


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": Family(_video),
    "HunyuanVideoTransformer3DModel": Family(_video, "last"),
    "HunyuanVideo15Transformer3DModel": Family(_video, "last", square=True),
    "CogVideoXTransformer3DModel": Family(_frames_first, "first"),
    "LTXVideoTransformer3DModel": Family(_told),
    "MochiTransformer3DModel": Family(_video, "last"),
    "CosmosTransformer3DModel": Family(_video),
    "FluxTransformer2DModel": Family(_by_ids, "first"),
    "QwenImageTransformer2DModel": Family(_told_image, "first"),
    "SD3Transformer2DModel": Family(_image, "last", second="self"),
    "PixArtTransformer2DModel": Family(_image),
}


def geometry(family: Family, layout: Layout, tokens: int) -> Geometry:
    """Spans and grid of a call over `tokens` tokens; the rest beside the visual ones is text."""
    visual, *grid = layout
    text = tokens - visual
    if text < 0:
        return Geometry()
    kind = "image" if grid[0] == 1 else "video"
    first = text if family.text == "first" else 0
    spans = [Span(kind, first, first + visual)]
    if text and family.text == "first":
        spans.insert(0, Span("text", 0, text))
    elif text:
        spans.append(Span("text", visual, tokens))
    whole = grid[0] * grid[1] * grid[2] == visual
    return Geometry(tuple(spans), (grid[0], grid[1], grid[2]) if whole else None)
