"""One attention call: order → pieces → kernels → merge → finish.

`answer` asks a policy what to do, `compute` does it for one policy (calibration lives on these
two), and `attend` runs all head groups of a call, joining those that can share a launch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit import kernels
from accelkit.kernels import positions
from accelkit.kernels.index import BlockIndex, Partial, device_ids
from accelkit.kernels.merge import merge
from accelkit.kernels.permute import put_rows, take_rows
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, Execution, Order
from accelkit.patches.plan import HeadGroup, Policy
from accelkit.patches.sites.reuse import borrow, order_of, store
from accelkit.patches.state import Saved

if TYPE_CHECKING:
    from accelkit.patches.state import PatchState

Piece = BlockIndex | Partial
DENSE_UNIT = (128, 128)
PLAIN = Execution()
MOST_CELLS = 2**28
"""Pairs of blocks, as DENSE_UNIT, of all heads that run at once: what a method scores, marks and
lists of them takes up to some GB.
"""


@dataclass(frozen=True)
class Answer:
    """What a policy decided for some heads: the call in kernel order, disjoint pieces and the
    arithmetic.
    """

    call: AttentionCall
    pieces: tuple[Piece, ...]
    execution: Execution = PLAIN
    order: Order | None = None
    finishers: tuple[AttentionMethod, ...] = ()
    n_q: int = 0
    """Query rows in token order."""

    @property
    def lane(self) -> Hashable | None:
        """Answers of equal lane share a launch: one list each, of one unit and bias, in one order,
        with one arithmetic and nothing afterwards; lists over a pyramid or with a bias for each key
        run by themselves. None: several pieces, or a method that finishes.
        """
        index, order = self.pieces[0], self.order
        if len(self.pieces) > 1 or not isinstance(index, BlockIndex) or self.finishers:
            return None
        if index.pyramid or not isinstance(index.bias, float):
            return id(self)
        tables: Hashable = None
        if order is not None:  # rows that differ by head are laid out for one answer
            tables = (id(order.q_table), id(order.k_table)) if _common(order) else id(order)
        arithmetic = replace(self.execution, skip=None)  # thresholds may differ by head
        return index.size, index.bias, tables, arithmetic, self.execution.skip is None

    @property
    def plain(self) -> bool:
        """One list in token order, which others may join, and nothing afterwards."""
        return isinstance(self.lane, tuple) and self.order is None

    @property
    def kind(self) -> Hashable | None:
        """Answers of equal kind can be joined: plain ones of equal lane, and as many lists of the
        same units and biases in the inputs' own arithmetic.
        """
        if self.plain:
            return self.lane
        lists = [p for p in self.pieces if isinstance(p, BlockIndex) and not p.pyramid]
        alone = len(lists) < len(self.pieces) or any(not isinstance(p.bias, float) for p in lists)
        if alone or self.order is not None or self.finishers or self.execution != PLAIN:
            return None
        return tuple((p.size, p.bias) for p in lists)

    @property
    def index(self) -> BlockIndex:
        """The first list of an answer that has a kind."""
        index = self.pieces[0]
        assert isinstance(index, BlockIndex)
        return index


def answer(
    call: AttentionCall, policy: Policy, state: PatchState | None = None
) -> tuple[Answer, ...] | None:
    """Ask the methods of `policy` about `call` (narrowed to its heads). None: dense.

    Reuse may give several answers, since the anchor's heads can lie in different groups.
    """
    if policy.dense:
        return None
    order = _first(m.order(call) for m in policy.methods if "order" in m.answers())
    seen = call if order is None else in_kernel_order(call, order)
    executions = (m.execution(seen) for m in policy.methods if "execution" in m.answers())
    execution = _first(executions) or PLAIN
    finishers = tuple(m for m in policy.methods if "finish" in m.answers())
    if policy.reuse is not None:
        if state is None:
            return None
        borrowed = borrow(call, policy.reuse, state)
        if borrowed is None:
            return None
        found = []
        for b in borrowed:
            own = order and order_of(order, [call.heads.index(h) for h in b.heads])
            a = Answer(call, b.pieces, execution, b.order or own, finishers, call.n_q)
            found.append(_again(a, call.take(b.heads)))
        return tuple(found)
    pieces = _first(m.index(seen) for m in policy.methods if "index" in m.answers())
    if pieces is None:
        # An execution alone (softmax skip, precision) runs over every visible block.
        if execution == PLAIN and not finishers:
            return None
        rows = -(-call.n_q // DENSE_UNIT[0])
        pieces = BlockIndex.dense(len(call.heads), rows, DENSE_UNIT, call.q.device)
    if not isinstance(pieces, tuple):
        pieces = (pieces,)
    return (Answer(seen, pieces, execution, order, finishers, call.n_q),)


def compute(
    answered: Answer,
    *,
    rows: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> Partial:
    """Run one answer: output `[B, len(heads), Nq, Dv]` and lse of its heads, in token order.

    `rows` computes these query tiles of the index only (others are zero); it needs pieces of one
    tile height.
    """
    call = answered.call
    parts = tuple(
        piece
        if isinstance(piece, Partial)
        else run(call, piece, answered.execution, rows=rows, backend=backend)
        for piece in answered.pieces
    )
    joined = parts[0] if len(parts) == 1 else merge(parts)
    if answered.order is not None and answered.order.q_table is not None:
        alone = parts[0] is joined
        if answered.finishers and not alone:
            parts = tuple(_in_token_order(p, answered.order, answered.n_q) for p in parts)
        joined = _in_token_order(joined, answered.order, answered.n_q)
        parts = (joined,) if alone else parts
    out = joined.out
    for method in answered.finishers:
        out = method.finish(call, out, joined.lse, parts)
    return replace(joined, out=out)


def attend(
    call: AttentionCall, groups: Sequence[HeadGroup], state: PatchState, out: Tensor
) -> bool:
    """Run every head group of `call` into `out` `[B, Hq, Nq, Dv]` (any strides, last one 1).

    Returns False, with `out` untouched, when every group turned out dense: the caller then runs
    what it ran before.
    """
    answers: list[Answer] = []
    dense: list[int] = []
    ran = False
    for group, whole in _portions(call, groups):
        narrowed = call.take(group.heads)
        found = _asked(narrowed, group, state)
        store(narrowed, group.policy, _saved(narrowed, group.policy, found), state)
        if found is None:
            dense.extend(group.heads)
        elif whole:
            answers.extend(found)
        else:  # lists of this length make room for the next ones
            _compute_all(call, found, state, out)
            ran = True
        if not whole:
            narrowed.forget()
    if not answers and not ran:
        return False
    rest = [replace(groups[0], heads=tuple(sorted(dense)))] if dense else []
    for group, whole in _portions(call, rest):
        one = _dense_answer(call.take(group.heads), answers)
        if whole:
            answers.append(one)
        else:
            _compute_all(call, (one,), state, out)
    if answers:
        _compute_all(call, answers, state, out)
    return True


def _compute_all(
    call: AttentionCall, answers: Sequence[Answer], state: PatchState, out: Tensor
) -> None:
    """Compute answers into `out`, those of one lane in one launch."""
    state.saw(call, answers)
    lanes: dict[Hashable, list[Answer]] = {}
    for a in answers:
        if a.lane is not None:
            lanes.setdefault(a.lane, []).append(a)
            continue
        _write(compute(a).out, a.call.heads, out)
    for lane in lanes.values():
        _launch(lane, out)


def _portions(call: AttentionCall, groups: Sequence[HeadGroup]) -> Iterator[tuple[HeadGroup, bool]]:
    """Groups of few enough heads for a call of this length, and whether those are whole ones. Heads
    that share keys stay together.
    """
    pairs = len(call.q) * math.prod(call.tiles(DENSE_UNIT))
    most = max(1, MOST_CELLS // max(pairs, 1))
    for group in groups:
        if len(group.heads) <= most:
            yield group, True
            continue
        some: list[int] = []
        for _, slots in positions.groups(call.take(group.heads)):
            if some and len(some) + len(slots) > most:
                yield replace(group, heads=tuple(some)), False
                some = []
            some += [group.heads[slot] for slot in slots]
        yield replace(group, heads=tuple(some)), False


def _write(found: Tensor, heads: Sequence[int], out: Tensor) -> None:
    """Heads into their places; plain copies are several times as fast as places by their ids."""
    if tuple(heads) == tuple(range(out.shape[1])):
        out.copy_(found)
    elif not out.is_cuda:
        for n, head in enumerate(heads):
            out[:, head] = found[:, n]
    else:
        out[:, device_ids(tuple(heads), out.device)] = found.to(out.dtype)


@dataclass
class _Kept:
    """Answers by their heads' places in the group, without their call, and how many calls used
    them. Other heads may come in the same number: lists from geometry are alike for all.
    """

    answers: list[tuple[tuple[int, ...], Answer]]
    used: int = 1


def _asked(call: AttentionCall, group: HeadGroup, state: PatchState) -> tuple[Answer, ...] | None:
    """The answers of a group: kept ones where they follow from geometry alone, or as long as the
    schedule lets a site keep them over computed steps; asked for otherwise.
    """
    shelf: MutableMapping[Any, Any]
    key: Any = state.static_key(call, group)
    uses = 0
    if key is not None:
        shelf = state.static_shelf(call)
    else:
        shelf, key = call.memory, ("answers", group.policy_id, call.heads, state.shape_of(call))
        every = state.plan.sites[call.site.path].schedule.refresh_every
        uses = 1 if group.policy.reuse else every  # what is reused is kept by its anchor
    kept: _Kept | None = shelf.get(key)
    if kept is not None and kept.used != uses:
        kept.used += 1
        return tuple(
            _again(a, call.take([call.heads[p] for p in places])) for places, a in kept.answers
        )
    found = answer(call, group.policy, state)
    if found is None or uses == 1 or not all(map(_keepable, found)):
        return found
    shelf[key] = _Kept(
        [
            (tuple(map(call.heads.index, a.call.heads)), replace(a, call=None))  # type: ignore[arg-type]
            for a in found
        ]
    )
    return found


def _keepable(a: Answer) -> bool:
    """Whether other steps may run it: computed pieces and what a method finishes belong to one."""
    return not a.finishers and all(isinstance(p, BlockIndex) for p in a.pieces)


def _again(a: Answer, call: AttentionCall) -> Answer:
    """An answer for the heads of `call`, made from another call's tensors."""
    return replace(a, call=call if a.order is None else in_kernel_order(call, a.order))


def in_kernel_order(call: AttentionCall, order: Order) -> AttentionCall:
    """The call with its rows laid out by `order`.

    An order that all heads have in common is gathered once for all of them, whatever group asks;
    otherwise rows are gathered for each query head of the call. Causal calls carry original
    positions along in `q_pos` and `k_pos`; others only say which places are holes or padding.
    """
    changed: dict[str, object] = {}
    common = _common(order)
    row = None if common else order.row
    if order.k_table is not None:
        if common:
            changed["k"] = _gathered(call, "k", order.k_table)
            changed["v"] = _gathered(call, "v", order.k_table)
        else:
            changed["k"] = take_rows(call.k, order.k_table, row, call.kv_of_head)
            changed["v"] = take_rows(call.v, order.k_table, row, call.kv_of_head)
            changed["kv_heads"] = tuple(range(len(call.heads)))
        if call.causal or call.key_mask is not None or not (order.whole or order.whole_keys):
            ids = _ids(order.k_table, order.row)  # [B|1, H, n]
            if call.causal:
                place = ids
            else:
                place = _common_places(order.k_table) if common else _places(ids)
            if call.key_mask is not None:
                real = call.key_mask[:, None].expand(-1, ids.shape[1], -1)
                ids = ids.expand(real.shape[0], -1, -1)
                place = torch.where(real.gather(2, ids.clamp(min=0).long()), place, -1)
            changed["k_pos"] = place
        changed["key_mask"] = None
    if order.q_table is not None:
        if common:
            changed["q"] = _gathered(call, "q", order.q_table)
        else:
            q = take_rows(call.q, order.q_table, row, call.heads)
            if q.shape[1] < call.q.shape[1]:  # heads keep their ids
                whole = q.new_empty(q.shape[0], call.q.shape[1], *q.shape[2:])
                whole[:, device_ids(call.heads, q.device)] = q
                q = whole
            changed["q"] = q
        if call.causal or not order.whole:
            ids = _ids(order.q_table, order.row)
            at = torch.where(ids < 0, -1, ids + call.q_start)
            changed["q_pos"] = at if call.causal else _places(ids)
    return replace(call, **changed, _shared={})  # type: ignore[arg-type]


def _common(order: Order) -> bool:
    """Whether all heads have one order."""
    return all(t is None or t.shape[0] == 1 for t in (order.q_table, order.k_table))


def _gathered(call: AttentionCall, name: str, table: Tensor) -> Tensor:
    """All heads of q, k or v in a common order, once for all groups of the call."""
    key = ("in order", name, id(table))
    if key not in call._shared:
        # The table is kept beside the rows, so that its id is not given to another one.
        call._shared[key] = (take_rows(getattr(call, name), table), table)
    return call._shared[key][0]


def _ids(table: Tensor, row: Tensor) -> Tensor:
    if table.shape[0] == 1:
        return table[None]
    ids = table[row.long()]
    return ids if ids.ndim == 3 else ids[None]


def _places(ids: Tensor) -> Tensor:
    """Places in the kernel, −1 for holes: without causality, positions say nothing else."""
    place = torch.arange(ids.shape[-1], device=ids.device, dtype=torch.int32)
    return torch.where(ids < 0, -1, place)


@lru_cache(maxsize=64)
def _common_places(table: Tensor) -> Tensor:
    """`_places` of an order that all heads have in common, the same tensor in every call."""
    return _places(table[None])


def _in_token_order(part: Partial, order: Order, n: int) -> Partial:
    assert order.q_table is not None
    table, row = order.q_table, None if _common(order) else order.row
    out = part.out.new_empty(*part.out.shape[:2], n, part.out.shape[3])
    lse = part.lse.new_empty((*part.lse.shape[:2], n, 1))
    if not (order.whole or order.whole_keys):  # tokens that the order leaves out
        out.zero_()
        lse.fill_(float("-inf"))
    put_rows(out, part.out, table, row)
    put_rows(lse, part.lse[..., None], table, row)
    return Partial(out, lse[..., 0])


def run(
    call: AttentionCall,
    index: BlockIndex,
    execution: Execution = PLAIN,
    *,
    rows: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Partial:
    """Attention of the call's heads over the keys of `index`, with the given arithmetic; options as
    in `kernels.attend`.
    """
    q_pos, k_pos = call.q_pos, call.k_pos
    # Keys as the model left them serve equal groups; said so, the host knows it too. Keys laid out
    # for some heads only are theirs one by one.
    theirs = k_pos is not None or call.k.shape[1] == len(call.heads) < call.q.shape[1]
    if k_pos is not None and not call.causal and call.q.is_cuda:
        # Holes as keys of weight zero keep the kernel in its main loop.
        index, k_pos = _weightless(index, k_pos), None
    if k_pos is None and not call.causal:
        q_pos = None  # rows of holes go nowhere
    return kernels.attend(
        call.q,
        call.k,
        call.v,
        index,
        scale=call.scale * execution.sharpen,
        causal=call.causal,
        q_start=call.q_start,
        heads=call.heads,
        kv_of_head=call.kv_heads if theirs else None,
        key_mask=call.key_mask,
        q_pos=q_pos,
        k_pos=k_pos,
        rows=rows,
        skip=execution.skip,
        qk=execution.qk,
        pv=execution.pv,
        smooth_k=execution.smooth_k,
        out=out,
        backend=backend,
    )


def _weightless(index: BlockIndex, place: Tensor) -> BlockIndex:
    """The same lists with a bias of −inf on holes; kept with the index, as methods keep that."""
    kept = index.lowered.get("holes")
    if kept is None or kept[0] is not place:
        bias = torch.where(place < 0, -torch.inf, 0.0) + index.bias
        kept = index.lowered["holes"] = (place, replace(index, bias=bias))
    return kept[1]


def joined(lane: Sequence[Answer]) -> Answer:
    """Answers of equal lane or kind as one, for the heads of all of them; a head may come several
    times.
    """
    first, heads = lane[0], tuple(h for a in lane for h in a.call.heads)
    kv = tuple(h for a in lane for h in a.call.kv_heads)
    call = replace(first.call, heads=heads, kv_heads=kv)
    lists = zip(*(a.pieces for a in lane), strict=True)
    pieces = tuple(BlockIndex.cat([p for p in some if isinstance(p, BlockIndex)]) for some in lists)
    execution = first.execution
    if execution.skip is not None:
        columns = [
            torch.as_tensor(a.execution.skip, dtype=torch.float32, device=call.q.device)
            .reshape(-1)
            .expand(len(a.call.heads))
            for a in lane
        ]
        execution = replace(execution, skip=torch.cat(columns))
    return Answer(call, pieces, execution, first.order)


def _launch(lane: list[Answer], out: Tensor) -> None:
    """One launch for all answers of a lane, written in place."""
    one = joined(lane)
    order, heads = one.order, one.call.heads
    if order is None or order.q_table is None:
        run(one.call, one.index, one.execution, out=out)
        return
    part = run(one.call, one.index, one.execution)
    if not (order.whole or order.whole_keys):  # tokens that the order leaves out
        out.index_fill_(1, device_ids(heads, out.device, torch.int64), 0)
    put_rows(out, part.out, order.q_table, None if _common(order) else order.row, heads)


def _dense_answer(call: AttentionCall, others: Sequence[Answer]) -> Answer:
    """Dense heads ride along in a launch of blocks when there is one."""
    sizes = [a.index.size for a in others if a.plain and a.index.size[1] >= 16]
    size = max(sizes, default=DENSE_UNIT)
    index = BlockIndex.dense(len(call.heads), -(-call.n_q // size[0]), size, call.q.device)
    return Answer(call, (index,))


def _saved(
    call: AttentionCall, policy: Policy, answers: tuple[Answer, ...] | None
) -> Iterator[Saved]:
    if answers is None:
        for method in policy.methods:
            if "emit" in method.answers() and (emitted := method.emit(call, None)) is not None:
                pieces = emitted if isinstance(emitted, tuple) else (emitted,)
                yield Saved(call.heads, _lists(pieces))
        return
    for a in answers:
        if len(lists := _lists(a.pieces)) == len(a.pieces):
            yield Saved(a.call.heads, lists, a.order)


def _lists(pieces: Sequence[Piece]) -> tuple[BlockIndex, ...]:
    return tuple(p for p in pieces if isinstance(p, BlockIndex))


def _first(values):  # type: ignore[no-untyped-def]
    return next((v for v in values if v is not None), None)
