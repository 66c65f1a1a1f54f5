"""Lists that one site makes and others read: kept for later layers of a forward, or for the same
site at later steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import Order
from accelkit.patches.plan import Policy, Reuse
from accelkit.patches.state import Saved

if TYPE_CHECKING:
    from accelkit.patches.state import PatchState


def borrow(call: AttentionCall, reuse: Reuse, state: PatchState) -> list[Saved] | None:
    """The anchor's lists for this call's heads, newest first. None: the anchor ran dense."""
    if reuse.site is None:
        saved = call.memory.get("saved")
    else:
        saved = state.indices.get((reuse.site, call.ordinal))
    source = {h: (reuse.heads[h] if reuse.heads is not None else h) for h in call.heads}
    found: list[Saved] = []
    for s in reversed(saved or []):
        mine = tuple(h for h in call.heads if source.get(h) in s.heads)
        if mine:
            at = [s.heads.index(source.pop(h)) for h in mine]
            pieces = tuple(_moved(p, call.q.device).take(at) for p in s.pieces)
            order = s.order and order_of(s.order, at)
            found.append(Saved(mine, pieces, order))
    return None if source else found


def order_of(order: Order, at: Sequence[int]) -> Order:
    """The order of some of its heads."""
    return replace(order, row=order.row[..., list(at)])


def _moved(index: BlockIndex, device: torch.device) -> BlockIndex:
    if index.blocks.device == device:
        return index
    return replace(
        index,
        start=index.start.to(device),
        count=index.count.to(device),
        blocks=index.blocks.to(device),
    )


def store(call: AttentionCall, policy: Policy, lists: Iterable[Saved], state: PatchState) -> None:
    """Keep an anchor's lists for the layers that read them in this forward, and those of a site
    that reads its own for the steps to come. `lists` are only asked for if somebody reads them.
    """
    shelves: list[list[Saved]] = []
    if call.site.path in state.anchors:
        shelves.append(state.indices.setdefault((call.site.path, call.ordinal), []))
    if call.site.path in state.own_anchors and policy.reuse is None:
        own = call.memory.setdefault("saved", [])
        own[:] = [s for s in own if not set(s.heads) <= set(call.heads)]
        shelves.append(own)
    if not shelves:
        return
    for saved in lists:
        for shelf in shelves:
            shelf.append(saved)
