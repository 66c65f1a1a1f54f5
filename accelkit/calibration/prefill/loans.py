"""Lists of earlier layers: what a site may lend, and which lenders a later site is measured with.

The lists of every site last for the whole prompt, as bits. How much of a later site's attention
each of them holds is read from the exact mass of that site's key blocks; only the lists that
promise most are run there. So an anchor may be any earlier layer, as Kascade chooses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accelkit.calibration.candidates import REUSE_UNIT, Bench, Family, stored
from accelkit.calibration.stages import family_of
from accelkit.kernels.index import BlockIndex
from accelkit.kernels.scores import block_mass
from accelkit.kernels.select import compact
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod
from accelkit.patches.parts import bits
from accelkit.patches.plan import Policy, Reuse
from accelkit.patches.sites.attention import answer
from accelkit.patches.state import Saved

LENDABLE = 0.15
"""Error up to which a head's lists are worth lending."""


@dataclass(frozen=True)
class Lender:
    """The setting whose lists a site lends, and the heads that are good at it."""

    method: AttentionMethod
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Offer:
    """Lists that later sites may read, for a lender's heads.

    `bits` is uint8 `[heads, query tiles, ceil(key blocks / 8)]`. `geometry` holds the numbers of
    tiles and blocks and the first row; calls of another one cannot read them.
    """

    lender: Lender
    size: tuple[int, int]
    geometry: tuple[int, int, int]
    bits: Tensor

    def fits(self, call: AttentionCall) -> bool:
        """Whether the tiles and blocks are those of `call`."""
        return self.geometry == _geometry(call, self.size)

    def lists(self, heads: Sequence[int]) -> BlockIndex:
        """The lists of some of the lender's heads, keys ascending."""
        at = [self.lender.heads.index(h) for h in heads]
        return compact(bits.unpack(self.bits[at], self.geometry[1])[None], self.size)


def lender(
    record: Mapping[str, Any], kept: Sequence[Family], families: Sequence[Family]
) -> Lender | None:
    """What a site lends: of the best family after screening (`record`), the sparsest setting at
    which half of the heads stay below the lendable error, if that setting is still measured.
    """
    if not kept:
        return None
    name = kept[0].name
    found = record["families"][name]
    if found["size"][0][1] < REUSE_UNIT:
        return None
    for method, row in zip(family_of(name, found).settings, found["error"], strict=True):
        good = tuple(h for h, e in enumerate(row) if e <= LENDABLE)
        if 2 * len(good) >= len(row):
            return Lender(method, good) if any(method in f.settings for f in families) else None
    return None


def offered(bench: Bench, lender: Lender) -> Offer | None:
    """The lender's lists in the bench's call. None: they are not one plain list."""
    call = bench.call
    index = bench.lent.get(lender.method)
    if index is None:  # a resumed run does not measure the site again
        answers = answer(call, Policy(methods=(lender.method,)))
        piece = answers[0].pieces[0] if answers is not None and answers[0].plain else None
        if not isinstance(piece, BlockIndex):
            return None
        index = piece
    geometry = _geometry(call, index.size)
    mask = index.take(lender.heads).to_mask(geometry[1])[0]
    return Offer(lender, index.size, geometry, bits.pack(mask))


def promising(bench: Bench, offers: Mapping[str, Offer], most: int) -> dict[str, tuple[int, ...]]:
    """The `most` lenders that promise most at a site, and for each the lender's head whose lists
    hold most of every head's attention. Nothing is run.

    A lender promises the mass that its lists hold, the mean over heads; of equal ones the nearest
    is taken.
    """
    masses: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    held: dict[str, Tensor] = {}
    for path, offer in reversed(list(offers.items())):
        if not offer.fits(bench.call):
            continue
        if offer.size not in masses:
            rows = bench.tiles(offer.size[0])[0]
            masses[offer.size] = rows, block_mass(bench.call, bench.dense.lse, offer.size, rows)[0]
        held[path] = captured(offer, *masses[offer.size])
    if not held:
        return {}
    # Read back at once: one lender after another would keep the device waiting.
    worth = torch.stack([one.amax(-1).mean() for one in held.values()]).tolist()
    best = sorted(zip(worth, held, strict=True), key=lambda one: -one[0])[:most]
    chosen = {path for _, path in best}
    return {
        path: tuple(offer.lender.heads[at] for at in held[path].argmax(-1).tolist())
        for path, offer in offers.items()
        if path in chosen
    }


def captured(offer: Offer, rows: Tensor, mass: Tensor) -> Tensor:
    """Mean mass in an offer's lists of each head of a later site, fp32 `[heads, lender's heads]`;
    `mass` `[heads, len(rows), key blocks]` is that of some query tiles.
    """
    inside = bits.unpack(offer.bits[:, rows], mass.shape[-1])
    return torch.einsum("hrk,ark->ha", mass, inside.to(mass.dtype)) / len(rows)


def measured(
    bench: Bench, offers: Mapping[str, Offer], maps: Mapping[str, Sequence[int]]
) -> list[dict[str, Any]]:
    """The bench's site with the lists of each lender in `maps`, read by its map of heads."""
    out = []
    for anchor, heads in maps.items():
        if anchor not in offers:
            continue
        offer, some = offers[anchor], tuple(sorted(set(heads)))
        saved = [Saved(some, (offer.lists(some),))]
        state = SimpleNamespace(indices={(anchor, bench.call.ordinal): saved})
        policy = Policy(reuse=Reuse(site=anchor, heads=tuple(heads)))
        answers = answer(bench.call, policy, state)  # type: ignore[arg-type]
        if answers is not None:
            row = {"heads": list(heads), **bench.measure(answers)}
            out.append({"anchor": anchor, "setting": stored(offer.lender.method), **row})
    return out


def _geometry(call: AttentionCall, size: tuple[int, int]) -> tuple[int, int, int]:
    return *call.tiles(size), call.q_start
