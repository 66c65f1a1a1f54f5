"""Who sees whom: positions of rows and keys, and logits of a few rows with the unseen ones hidden.

Estimators, selectors and patterns share these, so that padding, chunked prefill (`q_start`) and
permuted tokens mean the same everywhere. A key is seen by a row if its place is not −1 and at most
the row's limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from accelkit.errors import UnsupportedConfigurationError
from accelkit.kernels.index import Inputs, device_ids
from accelkit.kernels.launch import END, FAR

LOG2_E = 1 / math.log(2)


def key_places(call: Inputs) -> Tensor:
    """Position of each key, int32 `[B|1, H|1, Nk]`; −1 for padding and holes."""
    place = call.k_pos
    if place is None:
        place = torch.arange(call.n_k, device=call.k.device, dtype=torch.int32).view(1, 1, -1)
    if call.key_mask is not None:
        place = torch.where(call.key_mask[:, None], place, -1)
    return place


def row_places(call: Inputs) -> Tensor:
    """Position of each query row, int32 `[B|1, H|1, Nq]`; −1 for holes."""
    if call.q_pos is not None:
        return call.q_pos
    row = torch.arange(call.n_q, device=call.q.device, dtype=torch.int32)
    return (row + call.q_start).view(1, 1, -1)


def row_limits(call: Inputs) -> Tensor:
    """Last position that each row sees, int32 `[B|1, H|1, Nq]`; −1: nothing."""
    place = row_places(call)
    return place if call.causal else torch.where(place < 0, -1, END).int()


def voting_rows(call: Inputs) -> Tensor | None:
    """Rows that estimators listen to, bool `[B|1, H|1, Nq]`, or None for all: no holes, and no
    padding where the rows are the newest of the keys' own tokens.
    """
    if call.q_pos is not None:
        return call.q_pos >= 0
    own = call.k_pos is None and call.q_start + call.n_q == call.n_k
    if call.key_mask is None or not own:
        return None
    return call.key_mask[:, None, call.q_start :]


def filled(t: Tensor, rows: int) -> Tensor:
    """`[…, N, D]` with some rows of zeros behind; the tensor itself where there are none, of which
    `pad` makes a copy.
    """
    return pad(t, (0, 0, 0, rows)) if rows else t


def bounds(place: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and greatest position in each block of `place` `[…, N]`, int32 `[…, nb]`; holes do not
    count, a block of holes gives `(FAR, −1)`.
    """
    short = -place.shape[-1] % block
    cells = pad(place, (0, short), value=-1).unflatten(-1, (-1, block))
    return torch.where(cells >= 0, cells, FAR).amin(-1), cells.amax(-1)


def sees_all(call: Inputs) -> bool:
    """Whether every row sees every key: no causality, padding or holes."""
    return not call.causal and in_place(call)


def visible_blocks(call: Inputs, size: tuple[int, int]) -> Tensor:
    """Key blocks of which some row of the query tile sees some key, bool `[B|1, H|1, nq, nk]`. Not
    to be written into: calls of one geometry share it.
    """
    if in_place(call):
        return _visible(call.n_q, call.n_k, call.q_start, call.causal, size, call.q.device)
    return _visible_blocks(call, size)


def in_place(call: Inputs) -> bool:
    """Whether rows and keys lie in their own order without padding, so that masks of blocks follow
    from the geometry.
    """
    return in_order(call) and call.key_mask is None


def in_order(call: Inputs) -> bool:
    """Whether rows and keys lie in their own order, padding or not."""
    return call.q_pos is None and call.k_pos is None


def need_causal_order(call: Inputs, name: str) -> None:
    """Refuse a call for something that goes by the distance from row to key.

    Raises:
        UnsupportedConfigurationError: it is not causal, or its tokens are permuted.
    """
    if not (call.causal and in_order(call)):
        raise UnsupportedConfigurationError(
            f"{name} goes by positions: it needs causal rows and keys in their own order (q_pos "
            "and k_pos None)"
        )


def bare_inputs(n_q: int, n_k: int, q_start: int, causal: bool, device: torch.device) -> Inputs:
    """A call of this geometry without contents, for what depends on nothing else."""
    q, k = (torch.empty((1, 1, n, 0), device=device) for n in (n_q, n_k))
    return Inputs(q, k, k, 1.0, causal, q_start, None, (0,), (0,))


@lru_cache(maxsize=16)
def _visible(
    n_q: int, n_k: int, q_start: int, causal: bool, size: tuple[int, int], device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        return _visible_blocks(bare_inputs(n_q, n_k, q_start, causal, device), size)


def _visible_blocks(call: Inputs, size: tuple[int, int]) -> Tensor:
    first, _ = bounds(key_places(call), size[1])
    _, limit = bounds(row_limits(call), size[0])
    return first[..., None, :] <= limit[..., :, None]


def groups(call: Inputs) -> list[tuple[int, list[int]]]:
    """`(KV head, its slots among call.heads)`."""
    found: dict[int, list[int]] = {}
    for slot, kv in enumerate(call.kv_heads):
        found.setdefault(kv, []).append(slot)
    return list(found.items())


def take_heads(t: Tensor, heads: Sequence[int]) -> Tensor:
    """`t[:, heads]`, a view when the heads are neighbours."""
    first, n = heads[0], len(heads)
    if list(heads) == list(range(first, first + n)):
        return t[:, first : first + n]
    return t.index_select(1, device_ids(tuple(heads), t.device))


def per_slot(table: Tensor, slots: Sequence[int]) -> Tensor:
    """Rows of a `[B|1, H|1, N]` table for some slots, `[B|1, g|1, N]`."""
    return table if table.shape[1] == 1 else take_heads(table, slots)


def key_head(call: Inputs, kv: int) -> Tensor:
    """Keys of one KV head `[B, Nk, D]`; fp32 on the CPU, where half products are slow."""
    k = call.k[:, kv]
    return k.float() if k.device.type == "cpu" else k


def logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """fp32 `[B, g, R, N]` of q `[B, g, R, D]` and k `[B, N, D]`: the rows of a group share k."""
    b, g, r, d = q.shape
    rows = q.reshape(b, g * r, d)
    if rows.is_cuda and rows.dtype != torch.float32:
        s = torch.bmm(rows, k.to(rows.dtype).transpose(1, 2), out_dtype=torch.float32)
        return s.mul_(scale).view(b, g, r, -1)
    # Scaling the few rows is cheaper than scaling all logits.
    return torch.bmm(rows.float() * scale, k.float().transpose(1, 2)).view(b, g, r, -1)


def hide(s: Tensor, limit: Tensor, place: Tensor, free: int = 0) -> Tensor:
    """Logits `[B, g, R, N]` with −inf (in place) where row limits `[B|1, g|1, R]` and key places
    `[B|1, g|1, N]` do not see each other. The first `free` keys are known to be seen by all rows.
    """
    place = place[..., None, free:]
    seen = (place >= 0) & (place <= limit[..., :, None])
    s[..., free:].masked_fill_(~seen, -float("inf"))
    return s


def exp_(s: Tensor) -> Tensor:
    """`exp` in place. On a CPU by way of `exp2`, which torch computes itself everywhere; its `exp`
    is MKL's, three times as slow on processors of another maker.
    """
    return s.exp_() if s.is_cuda else s.mul_(LOG2_E).exp2_()


def softmax_(s: Tensor) -> Tensor:
    """Softmax over the last dimension, in place; rows of −inf become zeros."""
    top = s.amax(-1, keepdim=True)
    exp_(s.sub_(top.masked_fill_(top == -float("inf"), 0.0)))
    return s.div_(s.sum(-1, keepdim=True).clamp_(min=1e-30))


def row_shares(
    call: Inputs,
    k: Tensor,
    slots: Sequence[int],
    rows: slice,
    seen: tuple[Tensor, Tensor],
    lse: Tensor | None,
) -> Tensor:
    """Attention of some rows of the heads that share `k` `[B, Nk, D]`, fp32 `[B, g, R, n]`; behind
    its n keys no row sees any. `seen` is `(row_limits, key_places)` of the call, `lse` fp32
    `[B, H, Nq]` the natural-log LSE of its heads, or None: found on the way.
    """
    limit, places = seen
    n = call.n_k
    if call.causal and in_order(call):
        n = max(1, min(n, call.q_start + rows.stop))
    at = [call.heads[s] for s in slots]
    s = logits(take_heads(call.q[:, :, rows], at).to(k.dtype), k[:, :n], call.scale)
    hide(s, per_slot(limit, slots)[..., rows], per_slot(places, slots)[..., :n])
    if lse is None:
        return softmax_(s)
    norm = take_heads(lse[:, :, rows], slots)[..., None].float()
    return exp_(s.sub_(norm.masked_fill(norm == -float("inf"), 0.0)))
