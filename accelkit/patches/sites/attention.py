"""One attention call: order → pieces → kernels → merge → finish.

`answer` asks a policy what to do, `compute` does it for one policy (calibration lives on these
two), and `attend` runs all head groups of a call, joining those that can share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accelkit import kernels
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.merge import merge
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, Execution, Order
from accelkit.patches.plan import HeadGroup, Policy, Reuse

if TYPE_CHECKING:
    from accelkit.patches.state import PatchState

Piece = BlockIndex | Partial
DENSE_UNIT = (128, 128)
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

    @property
    def plain(self) -> bool:
        """One list in token order and nothing afterwards: may share a launch with others of its
        kind.
        """
        return (
            len(self.pieces) == 1
            and isinstance(self.pieces[0], BlockIndex)
            and self.pieces[0].level is None
            and isinstance(self.pieces[0].bias, float)
            and self.order is None
            and not self.finishers
        )

    @property
    def lane(self) -> object:
        """What answers of one launch have in common; thresholds may differ by head."""
        arithmetic = replace(self.execution, skip=None)
        return self.index.size, arithmetic, self.execution.skip is None

    @property
    def index(self) -> BlockIndex:
        """The one list of a plain answer."""
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
    found = (m.execution(seen) for m in policy.methods if "execution" in m.answers())
    execution = _first(found) or PLAIN
    finishers = tuple(m for m in policy.methods if "finish" in m.answers())
    if policy.reuse is not None:
        if state is None:
            return None
        borrowed = _borrow(call, policy.reuse, state)
        if borrowed is None:
            return None
        return tuple(
            Answer(seen.take(heads), pieces, execution, order, finishers)
            for heads, pieces in borrowed
        )
    pieces = _first(m.index(seen) for m in policy.methods if "index" in m.answers())
    if pieces is None:
        # An execution alone (softmax skip, precision) runs over every visible block.
        if execution == PLAIN and not finishers:
            return None
        rows = -(-call.n_q // DENSE_UNIT[0])
        pieces = BlockIndex.dense(len(call.heads), rows, DENSE_UNIT, call.q.device)
    if not isinstance(pieces, tuple):
        pieces = (pieces,)
    return (Answer(seen, pieces, execution, order, finishers),)


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
        joined = _in_token_order(joined, answered.order, call)
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
    for group in groups:
        narrowed = call.take(group.heads)
        key = state.static_key(narrowed, group)
        found = state.static.get(key) if key is not None else None
        if found is None:
            found = answer(narrowed, group.policy, state)
            if key is not None and found is not None:
                state.static[key] = tuple(replace(a, call=None) for a in found)  # type: ignore[arg-type]
        else:
            found = tuple(replace(a, call=narrowed) for a in found)
        if found is None:
            dense.extend(group.heads)
        else:
            answers.extend(found)
        _store(narrowed, group.policy, found, state)
    if not answers:
        return False
    if dense:
        answers.append(_dense_answer(call.take(sorted(dense)), answers))
    state.saw(call, answers)
    lanes: dict[object, list[Answer]] = {}
    for a in answers:
        if a.plain:
            lanes.setdefault(a.lane, []).append(a)
            continue
        result = compute(a)
        out[:, list(a.call.heads)] = result.out.to(out.dtype)
    for lane in lanes.values():
        _launch(call, lane, out)
    return True


def in_kernel_order(call: AttentionCall, order: Order) -> AttentionCall:
    """The call with its rows laid out by `order`; positions travel along in `q_pos` and `k_pos`.

    Keys are gathered once per query head of the call, since heads may differ in their order.
    """
    changed: dict[str, object] = {}
    if order.k_table is not None:
        ids = _ids(order.k_table, order.row)  # [B|1, H, n]
        changed["k"] = _rows_at(call.k[:, call.kv_of_head], ids)
        changed["v"] = _rows_at(call.v[:, call.kv_of_head], ids)
        changed["kv_of_head"] = torch.arange(len(call.heads), device=call.q.device)
        changed["k_pos"] = ids
        changed["key_mask"] = None
        if call.key_mask is not None:
            real = call.key_mask[:, None].expand(-1, ids.shape[1], -1)
            ids = ids.expand(real.shape[0], -1, -1)
            real = real.gather(2, ids.clamp(min=0).long())
            changed["k_pos"] = torch.where(real, ids, -1)
    if order.q_table is not None:
        ids = _ids(order.q_table, order.row)
        heads = list(call.heads)
        q = call.q.new_zeros(call.q.shape[0], call.q.shape[1], ids.shape[2], call.q.shape[3])
        q[:, heads] = _rows_at(call.q[:, heads], ids)
        changed["q"] = q
        changed["q_pos"] = torch.where(ids < 0, -1, ids + call.q_start)
    return replace(call, **changed, _shared={})  # type: ignore[arg-type]


def _ids(table: Tensor, row: Tensor) -> Tensor:
    ids = table[row.long()]
    return ids if ids.ndim == 3 else ids[None]


def _rows_at(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` `[B|1, H, n]` of `x` `[B, H, N, D]`."""
    at = ids.clamp(min=0).long().expand(x.shape[0], -1, -1)
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[3]))


def _in_token_order(part: Partial, order: Order, call: AttentionCall) -> Partial:
    assert order.q_table is not None
    ids = _ids(order.q_table, order.row).expand(part.out.shape[0], -1, -1).long()
    n = int(part.out.shape[2]) if ids.shape[2] == part.out.shape[2] else call.n_q
    spare = torch.where(ids < 0, n, ids)
    out = part.out.new_zeros(*part.out.shape[:2], n + 1, part.out.shape[3])
    out.scatter_(2, spare[..., None].expand_as(part.out), part.out)
    lse = part.lse.new_full((*part.lse.shape[:2], n + 1), float("-inf"))
    lse.scatter_(2, spare, part.lse)
    return Partial(out[:, :, :n], lse[:, :, :n])


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
    return kernels.attend(
        call.q,
        call.k,
        call.v,
        index,
        scale=call.scale,
        causal=call.causal,
        q_start=call.q_start,
        heads=call.heads,
        # Keys as the model left them serve equal groups; said so, the host knows it too.
        kv_of_head=None if call.k_pos is None else call.kv_of_head,
        key_mask=call.key_mask,
        q_pos=call.q_pos,
        k_pos=call.k_pos,
        rows=rows,
        skip=execution.skip,
        qk=execution.qk,
        pv=execution.pv,
        smooth_k=execution.smooth_k,
        out=out,
        backend=backend,
    )


def _launch(call: AttentionCall, lane: list[Answer], out: Tensor) -> None:
    """One launch for all answers of a lane, written in place."""
    heads = tuple(h for a in lane for h in a.call.heads)
    joined = replace(call, heads=heads, kv_of_head=torch.cat([a.call.kv_of_head for a in lane]))
    index = BlockIndex.cat([a.index for a in lane])
    execution = lane[0].execution
    if execution.skip is not None:
        columns = [
            torch.as_tensor(a.execution.skip, dtype=torch.float32, device=call.q.device)
            .reshape(-1)
            .expand(len(a.call.heads))
            for a in lane
        ]
        execution = replace(execution, skip=torch.cat(columns))
    run(joined, index, execution, out=out)


def _dense_answer(call: AttentionCall, others: Sequence[Answer]) -> Answer:
    """Dense heads ride along in a launch of blocks when there is one."""
    sizes = [a.index.size for a in others if a.plain and a.index.size[1] >= 16]
    size = max(sizes, default=DENSE_UNIT)
    index = BlockIndex.dense(len(call.heads), -(-call.n_q // size[0]), size, call.q.device)
    return Answer(call, (index,))


def _borrow(
    call: AttentionCall, reuse: Reuse, state: PatchState
) -> list[tuple[tuple[int, ...], tuple[Piece, ...]]] | None:
    """The anchor's lists for this call's heads, by anchor group. None: the anchor ran dense."""
    saved = state.indices.get((reuse.site or call.site.path, call.ordinal))
    if not saved:
        return None
    source = {h: (reuse.heads[h] if reuse.heads is not None else h) for h in call.heads}
    found: list[tuple[tuple[int, ...], tuple[Piece, ...]]] = []
    for heads, pieces in saved:
        mine = tuple(h for h in call.heads if source[h] in heads)
        if mine:
            at = [heads.index(source[h]) for h in mine]
            found.append((mine, tuple(_moved(p, call.q.device).take(at) for p in pieces)))
    if sum(len(heads) for heads, _ in found) != len(call.heads):
        return None
    return found


def _moved(index: BlockIndex, device: torch.device) -> BlockIndex:
    if index.blocks.device == device:
        return index
    return replace(
        index,
        start=index.start.to(device),
        count=index.count.to(device),
        blocks=index.blocks.to(device),
    )


def _store(
    call: AttentionCall, policy: Policy, answers: tuple[Answer, ...] | None, state: PatchState
) -> None:
    """Keep the lists of an anchor site for the layers that read them in this forward."""
    if call.site.path not in state.anchors:
        return
    saved = state.indices.setdefault((call.site.path, call.ordinal), [])
    if answers is None:
        for method in policy.methods:
            if "emit" in method.answers():
                emitted = method.emit(call, None)
                if emitted is not None:
                    pieces = emitted if isinstance(emitted, tuple) else (emitted,)
                    saved.append((call.heads, _lists(pieces)))
        return
    for a in answers:
        if a.order is None and len(lists := _lists(a.pieces)) == len(a.pieces):
            saved.append((a.call.heads, lists))


def _lists(pieces: Sequence[Piece]) -> tuple[BlockIndex, ...]:
    return tuple(p for p in pieces if isinstance(p, BlockIndex))


def _first(values):  # type: ignore[no-untyped-def]
    return next((v for v in values if v is not None), None)
