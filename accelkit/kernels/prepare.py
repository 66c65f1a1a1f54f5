"""Checks of `attend`'s arguments: what was found, what was expected, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from accelkit.errors import InvalidInputError, UnsupportedConfigurationError
from accelkit.kernels.index import BlockIndex, ceil_div, device_ids
from accelkit.kernels.launch import Launch


def _fail(what: str, found: Any, expected: Any) -> InvalidInputError:
    return InvalidInputError(f"attend: {what} is {found}, expected {expected}")


def _head_ids(ids: Sequence[int] | Tensor, limit: int, name: str, device: torch.device) -> Tensor:
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point():
            raise _fail(name, f"{ids.dtype} {tuple(ids.shape)}", "a flat integer tensor")
        if ids.device.type == "cpu":
            ids = ids.tolist()
        else:
            return ids.to(device=device, dtype=torch.int32)
    values = tuple(int(i) for i in ids)
    bad = [i for i in values if not 0 <= i < limit]
    if bad:
        raise _fail(name, f"{bad[0]} among {len(values)} ids", f"ids in 0 … {limit - 1}")
    return device_ids(values, device)


@lru_cache(maxsize=256)
def _equal_groups(
    heads: tuple[int, ...], all_heads: int, group: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tables of query heads and of the KV heads that serve them in groups of equal size."""
    ids = _head_ids(heads, all_heads, "heads", device)
    return ids, device_ids(tuple(h // group for h in heads), device)


def _heads(
    heads: Sequence[int] | Tensor | None,
    kv_of_head: Sequence[int] | Tensor | None,
    all_heads: int,
    kv_heads: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
    """Tables of the query heads and of their KV heads, and the query heads as `Launch.head_ids`."""
    named = (
        heads if isinstance(heads, Tensor) else tuple(range(all_heads) if heads is None else heads)
    )
    if kv_of_head is not None:
        q_heads = _head_ids(named, all_heads, "heads", device)
        kv_ids = _head_ids(kv_of_head, kv_heads, "kv_of_head", device)
        if (found := kv_ids.numel()) != (count := q_heads.numel()):
            raise _fail("kv_of_head", f"of length {found}", f"{count}, one for each of `heads`")
        return q_heads, kv_ids, None
    if all_heads % kv_heads:
        raise _fail(
            "kv_of_head",
            f"None with {all_heads} query heads",
            f"ids, or a multiple of {kv_heads} heads",
        )
    group = all_heads // kv_heads
    if isinstance(named, Tensor):
        q_heads = _head_ids(named, all_heads, "heads", device)
        return q_heads, q_heads // group, None
    return *_equal_groups(named, all_heads, group, device), named


def _positions(pos: Tensor | None, batch: int, heads: int, n: int, name: str) -> Tensor | None:
    if pos is None:
        return None
    fits = (
        pos.dim() == 3
        and pos.shape[0] in (1, batch)
        and pos.shape[1] in (1, heads)
        and pos.shape[2] == n
    )
    if not fits or pos.is_floating_point():
        raise _fail(name, f"{pos.dtype} {tuple(pos.shape)}", f"int32 [1|{batch}, 1|{heads}, {n}]")
    return pos.to(torch.int32)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise _fail(name, f"of shape {tuple(t.shape)}", "four dimensions [B, H, N, D]")
        if t.dtype != q.dtype or t.device != q.device:
            raise _fail(name, f"{t.dtype} on {t.device}", f"{q.dtype} on {q.device}, as q")
    if not q.is_floating_point():
        raise _fail("q", q.dtype, "a floating dtype")
    if k.shape[:3] != v.shape[:3]:
        raise _fail("v", f"of shape {tuple(v.shape)}", f"{(*k.shape[:3], 'Dv')}, as k")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise _fail(
            "k",
            f"of shape {tuple(k.shape)}",
            f"batch {q.shape[0]} and head size {q.shape[3]}, as q",
        )


def _check_index(index: BlockIndex, batch: int, heads: int, n_q: int, device: torch.device) -> None:
    bq, bk = index.size
    if bq < 1 or bk < 1:
        raise _fail("index.size", index.size, "two positive numbers of tokens")
    if index.pyramid:
        raise UnsupportedConfigurationError(
            "attend: the index speaks of a pyramid, but kernels read keys and no levels; lower the "
            "call with `pyramid.lower` first"
        )
    shape = (batch, heads, ceil_div(n_q, bq))
    if index.count.shape[1:] != shape[1:] or index.count.shape[0] not in (1, batch):
        hint = f"[1|{batch}, {heads} heads, {shape[2]} query tiles of {bq} rows]"
        raise _fail("index.count", f"of shape {tuple(index.count.shape)}", hint)
    if index.start.shape != index.count.shape:
        raise _fail(
            "index.start",
            f"of shape {tuple(index.start.shape)}",
            f"{tuple(index.count.shape)}, as count",
        )
    for name, want in (("start", torch.int64), ("count", torch.int32), ("blocks", torch.int32)):
        t = getattr(index, name)
        if t.dtype != want or t.device != device:
            raise _fail(f"index.{name}", f"{t.dtype} on {t.device}", f"{want} on {device}")
    if index.blocks.dim() != 1:
        raise _fail("index.blocks", f"of shape {tuple(index.blocks.shape)}", "one flat list")


def _bias(index: BlockIndex, batch: int, heads: int, n_k: int) -> Tensor | float:
    if not isinstance(index.bias, Tensor):
        return float(index.bias)
    bias = index.bias
    fits = (
        bias.dim() == 3
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads)
        and bias.shape[2] == n_k
    )
    if not fits:
        raise _fail(
            "index.bias",
            f"of shape {tuple(bias.shape)}",
            f"[1|{batch}, 1|{heads}, {n_k}] or a number",
        )
    return bias.float()


def _skip(skip: float | Tensor | None, heads: int, bk: int, device: torch.device) -> Tensor | None:
    if skip is None:
        return None
    if bk == 1:
        raise UnsupportedConfigurationError(
            "attend: skip drops tiles of keys and an index of single keys has none"
        )
    if not isinstance(skip, Tensor):
        if not 0.0 <= skip <= 1.0:
            raise _fail("skip", skip, "a share of the row maximum, 0 … 1")
        skip = torch.full((heads,), float(skip), device=device)
    if skip.numel() not in (1, heads):
        raise _fail("skip", f"of shape {tuple(skip.shape)}", f"one number or [{heads}]")
    return skip.to(device=device, dtype=torch.float32).reshape(-1).expand(heads).log()


def _check_precision(qk: str, pv: str, bk: int, skip: bool) -> None:
    if qk not in ("native", "int8", "fp8") or pv not in ("native", "int8", "fp8"):
        raise _fail("qk and pv", f"{qk!r} and {pv!r}", "native, int8 or fp8")
    if (qk, pv) == ("native", "native"):
        return
    reason = None
    if pv == "int8":
        reason = "probabilities have no int8 form; pv is 'native' or 'fp8'"
    elif qk == "native":
        reason = "fp8 values go with 8-bit scores; qk is 'int8' or 'fp8'"
    elif skip:
        reason = "skip runs in the inputs' own precision"
    elif bk % 16:
        reason = f"8 bits need units of a multiple of 16 keys, and this index has {bk}"
    if reason:
        raise UnsupportedConfigurationError(f"attend: qk={qk!r}, pv={pv!r}: {reason}")


def _rows(rows: Sequence[int] | Tensor | None, count: int, device: torch.device) -> Tensor | None:
    if rows is None:
        return None
    if not isinstance(rows, Tensor) or rows.device.type == "cpu":
        values = [int(i) for i in rows]
        bad = [i for i in values if not 0 <= i < count]
        if bad:
            raise _fail(
                "rows", f"{bad[0]} among {len(values)} ids", f"query tiles in 0 … {count - 1}"
            )
        rows = torch.tensor(values, dtype=torch.int64)
    return rows.to(device=device, dtype=torch.int64).reshape(-1)


def _outputs(
    out: Tensor | None, lse: Tensor | None, q: Tensor, width: int, heads: int, part: bool
) -> tuple[Tensor, Tensor]:
    batch, all_heads, n, _ = q.shape
    if out is None:
        if lse is not None:
            raise _fail(
                "lse",
                "given without out",
                "both or neither, because both are written at the same heads",
            )
        make = torch.zeros if part else torch.empty
        out = make((batch, heads, n, width), dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
        return out, lse.fill_(-math.inf) if part else lse
    if out.shape != (batch, all_heads, n, width) or out.stride(-1) != 1 or out.device != q.device:
        found = f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
        raise _fail(
            "out", found, f"{(batch, all_heads, n, width)} with unit last stride on {q.device}"
        )
    if lse is None:
        lse = torch.full((batch, all_heads, n), -math.inf, dtype=torch.float32, device=q.device)
    elif lse.shape != (batch, all_heads, n) or lse.dtype != torch.float32 or lse.device != q.device:
        raise _fail(
            "lse",
            f"{lse.dtype} {tuple(lse.shape)} on {lse.device}",
            f"fp32 {(batch, all_heads, n)}",
        )
    return out, lse


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_start: int = 0,
    heads: Sequence[int] | Tensor | None = None,
    kv_of_head: Sequence[int] | Tensor | None = None,
    key_mask: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    rows: Sequence[int] | Tensor | None = None,
    skip: float | Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    qk: str = "native",
    pv: str = "native",
    smooth_k: bool = False,
) -> Launch:
    """Check `attend`'s arguments and resolve their defaults. Reads no device memory.

    Raises `InvalidInputError` with what was found and expected, or `UnsupportedConfigurationError`.
    """
    _check_tensors(q, k, v)
    batch, all_heads, n_q, head_size = q.shape
    kv_heads, n_k, device = k.shape[1], k.shape[2], q.device
    q_heads, kv_ids, head_ids = _heads(heads, kv_of_head, all_heads, kv_heads, device)
    count = q_heads.numel()
    _check_index(index, batch, count, n_q, device)
    if q_start < 0:
        raise _fail("q_start", q_start, "a position ≥ 0")
    q_pos = _positions(q_pos, batch, count, n_q, "q_pos")
    k_pos = _positions(k_pos, batch, count, n_k, "k_pos")
    if key_mask is not None:
        if key_mask.shape != (batch, n_k) or key_mask.dtype != torch.bool:
            raise _fail(
                "key_mask", f"{key_mask.dtype} {tuple(key_mask.shape)}", f"bool {(batch, n_k)}"
            )
        place = torch.arange(n_k, device=device, dtype=torch.int32) if k_pos is None else k_pos
        k_pos = torch.where(key_mask[:, None], place, -1).to(torch.int32)
    _check_precision(qk, pv, index.size[1], skip is not None)
    given = out is not None
    threshold = _skip(skip, count, index.size[1], device)
    tiles = _rows(rows, index.rows, device)
    out, lse = _outputs(out, lse, q, v.shape[3], count, part=rows is not None)
    out_heads = q_heads if given else device_ids(tuple(range(count)), device)
    return Launch(
        q, k, v, index, head_size**-0.5 if scale is None else float(scale), causal, q_start,
        q_heads, kv_ids, out_heads, q_pos, k_pos, tiles, threshold,
        _bias(index, batch, count, n_k), out, lse, head_ids, qk=qk, pv=pv, smooth_k=smooth_k,
    )  # fmt: skip
