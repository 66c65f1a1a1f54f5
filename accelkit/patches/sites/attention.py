"""One attention call: order → pieces → kernels → merge → finish.

`answer` asks a policy what to do, `compute` does it for one policy (calibration lives on these
two), and `attend` runs all head groups of a call, joining those that can share a launch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit import kernels
from accelkit.kernels.index import BlockIndex, Partial, device_ids
from accelkit.kernels.merge import merge
from accelkit.kernels.permute import put_rows
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, Execution, Order
from accelkit.patches.plan import HeadGroup, Policy
from accelkit.patches.sites import dense
from accelkit.patches.sites.order import in_kernel_order, in_token_order, is_common
from accelkit.patches.sites.portions import portions
from accelkit.patches.sites.reuse import borrow, order_of, store
from accelkit.patches.state import Saved

if TYPE_CHECKING:
    from accelkit.patches.state import PatchState

Piece = BlockIndex | Partial
PLAIN = Execution()


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

    def density(self) -> Tensor:
        """Visible pairs in the lists ÷ all visible pairs, fp32 `[H]` on the host; a method that
        computes everything by itself, as a search does, counts as dense. For reports: it waits for
        the device.
        """
        from accelkit.kernels.select import density

        listed = [p for p in self.pieces if isinstance(p, BlockIndex)]
        return density(listed, self.call).cpu() if listed else torch.ones(len(self.call.heads))

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
            tables = (id(order.q_table), id(order.k_table)) if is_common(order) else id(order)
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
        pieces = dense.lists(call)
    if not isinstance(pieces, tuple):
        pieces = (pieces,)
    return (Answer(seen, pieces, execution, order, finishers, call.n_q),)


def compute(answered: Answer, *, rows: Tensor | Sequence[int] | None = None) -> Partial:
    """Run one answer: output `[B, len(heads), Nq, Dv]` and lse of its heads, in token order.

    `rows` computes these query tiles of the index only (others are zero); it needs pieces of one
    tile height.
    """
    call = answered.call
    parts = tuple(
        piece if isinstance(piece, Partial) else run(call, piece, answered.execution, rows=rows)
        for piece in answered.pieces
    )
    joined = parts[0] if len(parts) == 1 else merge(parts)
    if answered.order is not None and answered.order.q_table is not None:
        alone = parts[0] is joined
        if answered.finishers and not alone:
            parts = tuple(in_token_order(p, answered.order, answered.n_q) for p in parts)
        joined = in_token_order(joined, answered.order, answered.n_q)
        parts = (joined,) if alone else parts
    out = joined.out
    for method in answered.finishers:
        out = method.finish(call, out, joined.lse, parts)
    return replace(joined, out=out)


def attend(
    call: AttentionCall,
    groups: Sequence[HeadGroup],
    state: PatchState,
    out: Tensor,
    body: int | None = None,
) -> bool:
    """Run every head group of `call` into `out` `[B, Hq, Nq, Dv]` (any strides, last one 1). Of
    `body` rows only, those after them are dense.

    Returns False, with `out` untouched, when every group turned out dense: the caller then runs
    what it ran before.
    """
    if body is not None and body < call.n_q:
        if not attend(call.first_rows(body), groups, state, out[:, :, :body]):
            return False
        _dense_from(call, body, out[:, :, body:])
        return True
    answers: list[Answer] = []
    rest: list[int] = []
    ran = False
    for group, whole in portions(call, groups):
        narrowed = call.take(group.heads)
        found = _asked(narrowed, group, state)
        store(narrowed, group.policy, _saved(narrowed, group.policy, found), state)
        if found is None:
            rest.extend(group.heads)
        elif whole:
            answers.extend(found)
        else:  # lists of this length make room for the next ones
            _compute_all(call, found, state, out)
            ran = True
        if not whole:
            narrowed.forget()
    if not answers and not ran:
        return False
    others = [replace(groups[0], heads=tuple(sorted(rest)))] if rest else []
    for group, whole in portions(call, others):
        one = _dense_answer(call.take(group.heads), answers)
        if whole:
            answers.append(one)
        else:
            _compute_all(call, (one,), state, out)
    if answers:
        _compute_all(call, answers, state, out)
    return True


def _dense_from(call: AttentionCall, row: int, out: Tensor) -> None:
    """All heads of the rows from `row` on over every key, into `out` `[B, Hq, rows, Dv]`."""
    last = replace(call, q=call.q[:, :, row:], q_start=call.q_start + row)
    run(last, dense.lists(last), out=out)


def _compute_all(
    call: AttentionCall, answers: Sequence[Answer], state: PatchState, out: Tensor
) -> None:
    """Compute answers into `out`, those of one lane in one launch."""
    state.saw(call, answers)
    lanes: dict[Hashable, list[Answer]] = {}
    for a in answers:
        if a.lane is not None:
            lanes.setdefault(a.lane, []).append(a)
        else:
            _write(compute(a).out, a.call.heads, out)
    for lane in lanes.values():
        _launch(lane, out)


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


def run(
    call: AttentionCall,
    index: BlockIndex,
    execution: Execution = PLAIN,
    *,
    rows: Tensor | Sequence[int] | None = None,
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
        call.q, call.k, call.v, index, scale=call.scale * execution.sharpen, causal=call.causal,
        q_start=call.q_start, heads=call.heads, kv_of_head=call.kv_heads if theirs else None,
        key_mask=call.key_mask, q_pos=q_pos, k_pos=k_pos, rows=rows, skip=execution.skip,
        qk=execution.qk, pv=execution.pv, smooth_k=execution.smooth_k, out=out,
    )  # fmt: skip


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
    put_rows(out, part.out, order.q_table, None if is_common(order) else order.row, heads)


def _dense_answer(call: AttentionCall, others: Sequence[Answer]) -> Answer:
    """Dense heads as lists that ride along in a launch of blocks when there is one."""
    size = dense.unit(call, [a.index.size for a in others if a.plain and a.index.size[1] >= 16])
    return Answer(call, (dense.lists(call, size),))


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
