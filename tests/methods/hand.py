"""Cases small enough for paper: every query alike, chosen logits for chosen keys."""

from __future__ import annotations

from collections.abc import Iterable

import planted
import torch

from accelkit.kernels import BlockIndex
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod


def call_with(n: int, nats: dict[int | range, float], *, width: int = 16) -> AttentionCall:
    """Every query has these logits with these keys and 0 with all others; 2 heads on 1 KV head."""
    q, k = torch.zeros(1, 2, n, width), torch.zeros(1, 1, n, width)
    q[..., 0] = 1.0
    for keys, value in nats.items():
        k[:, :, list(keys) if isinstance(keys, Iterable) else keys, 0] = value * width**0.5
    v = torch.randn(1, 1, n, width, generator=torch.Generator().manual_seed(0))
    return planted.make_call(q, k, v)


def rows(piece: BlockIndex, head: int = 0) -> list[list[int]]:
    """A head's lists, in visiting order."""
    start, count = piece.start[0, head].tolist(), piece.count[0, head].tolist()
    return [piece.blocks[s : s + c].tolist() for s, c in zip(start, count, strict=True)]


def pieces(method: AttentionMethod, call: AttentionCall) -> tuple[BlockIndex, ...]:
    """The pieces as the house gets them."""
    answer = planted.ask(method, call)
    assert answer is not None
    return answer.pieces  # type: ignore[return-value]


def lists(method: AttentionMethod, call: AttentionCall, head: int = 0) -> list[list[int]]:
    """The lists of a method that answers one piece."""
    (piece,) = pieces(method, call)
    return rows(piece, head)
