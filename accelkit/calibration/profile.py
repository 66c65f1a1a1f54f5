"""What the attention of a site looks like: where its mass lies, how few blocks would hold it, and
how much it resembles that of earlier sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from accelkit.kernels.index import Partial
from accelkit.kernels.scores import block_mass
from accelkit.patches.call import AttentionCall
from accelkit.patches.parts import bits

UNIT = (128, 128)
DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Shares of the visible blocks at which the best possible recall is noted."""
_LOCAL_BLOCKS = 2
_TOP_SHARE = 0.1


@dataclass(frozen=True)
class AttentionProfile:
    """Numbers of one site on one prompt, all per query head.

    mass: attention in the first block, in the two blocks up to the diagonal (and behind it, where
    a token sees later ones), and elsewhere.
    recall: mass in the heaviest blocks at each of `DENSITIES`; no block method can do better.
    entropy: of the masses of a row's blocks, ÷ its largest possible value.
    similarity: by earlier site, how much of this head's mass lies in the heaviest blocks of that
    site's head of the same number.
    """

    mass: dict[str, list[float]]
    recall: list[list[float]]
    entropy: list[float]
    similarity: dict[str, list[float]]


def profile(
    call: AttentionCall, dense: Partial, tiles: Tensor, earlier: Mapping[str, Tensor]
) -> tuple[AttentionProfile, Tensor]:
    """The profile of one call on some query tiles of `UNIT`, and the mask of its heaviest blocks
    (bits, uint8 `[H, tiles, ceil(nk / 8)]`), to be given as `earlier` of later sites.
    """
    mass = block_mass(call, dense.lse, UNIT, tiles)[0]  # [H, R, nk]
    first = call.q_start + tiles.to(mass.device) * UNIT[0]
    diagonal = (first // UNIT[1])[None, :, None]
    block = torch.arange(mass.shape[-1], device=mass.device)
    seen = block <= diagonal + (0 if call.causal else _LOCAL_BLOCKS - 1)
    local = seen & (block > diagonal - _LOCAL_BLOCKS) & (block > 0)
    sink = mass[..., 0].mean(-1)
    near = (mass * local).sum(-1).mean(-1)
    ordered = mass.sort(-1, descending=True).values.cumsum(-1)
    count = diagonal[0, :, 0] + 1
    visible = (count if call.causal else torch.full_like(count, mass.shape[-1])).float()
    recall = []
    for share in DENSITIES:
        last = (visible * share).ceil().long().clamp(min=1) - 1
        recall.append(
            ordered.gather(-1, last[None, :, None].expand(mass.shape[0], -1, 1)).mean((1, 2))
        )
    entropy = -(mass * mass.clamp(min=1e-12).log()).sum(-1) / visible.clamp(min=2).log()
    heavy = bits.pack(_heaviest(mass, visible))
    alike = {
        site: _numbers((mass * bits.unpack(other, mass.shape[-1])).sum(-1).mean(-1))
        for site, other in earlier.items()
        if other.shape == heavy.shape
    }
    found = AttentionProfile(
        {"sink": _numbers(sink), "local": _numbers(near), "rest": _numbers(1 - sink - near)},
        [_numbers(r) for r in recall],
        _numbers(entropy.mean(-1)),
        alike,
    )
    return found, heavy


def _heaviest(mass: Tensor, visible: Tensor) -> Tensor:
    """The heaviest tenth of each row's visible blocks."""
    rank = mass.argsort(-1, descending=True).argsort(-1)
    return rank < (visible * _TOP_SHARE).ceil()[None, :, None]


def _numbers(values: Tensor) -> list[float]:
    return [round(float(v), 5) for v in values.tolist()]
