"""Dense heads of a call in which others run sparse.

In long causal calls they run as torch's own dense attention, as they do without a patch, lest
another way of rounding them use what a plan may lose. Elsewhere they ride along in a launch of
blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from accelkit.kernels.index import device_ids
from accelkit.patches.call import AttentionCall

UNIT = (128, 128)
ALONE = 2**27
"""Query-key pairs from which dense heads get a launch of their own on a GPU: below, it costs more
than what wide blocks save.
"""


def many(call: AttentionCall) -> bool:
    """Whether heads have so many pairs on a GPU that a launch of their own costs little."""
    pairs = len(call.q) * len(call.heads) * call.n_q * call.n_k / (1 + call.causal)
    return call.q.is_cuda and pairs >= ALONE


def apart(call: AttentionCall) -> bool:
    """Whether heads run by themselves, as without a patch: many pairs of a whole causal prompt."""
    whole = call.causal and not call.q_start and call.n_q == call.n_k
    bare = call.key_mask is None and call.q_pos is None and call.k_pos is None
    return whole and bare and many(call)


def unit(call: AttentionCall, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Blocks in which heads ride along with lists of these sizes: the largest; on a GPU, which
    computes pairs in narrow ones a quarter slower, those of UNIT where they are there, and where
    pairs are many.
    """
    known = set(sizes)
    wide = call.q.is_cuda and (UNIT in known or many(call))
    return UNIT if wide or not known else max(known)


def attend(call: AttentionCall, out: Tensor) -> None:
    """Causal attention of the call's heads over a whole prompt into their places in `out`. Keys
    that serve as many of them go together, so that none are copied for every query head.
    """
    counts = Counter(call.kv_heads)
    for count in sorted(set(counts.values())):
        names = sorted(n for n in counts if counts[n] == count)
        heads = [h for n, h in sorted(zip(call.kv_heads, call.heads, strict=True)) if n in names]
        found = torch.nn.functional.scaled_dot_product_attention(
            _some(call.q, heads), _some(call.k, names), _some(call.v, names),
            is_causal=True, scale=call.scale, enable_gqa=count > 1,
        )  # fmt: skip
        for first, last in _runs(heads):
            out[:, heads[first] : heads[last] + 1] = found[:, first : last + 1]


def _some(t: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of `t` `[B, H, N, D]`; consecutive ones are not copied."""
    if list(heads) == list(range(heads[0], heads[0] + len(heads))):
        return t[:, heads[0] : heads[-1] + 1]
    return t.index_select(1, device_ids(tuple(heads), t.device, torch.int64))


def _runs(heads: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last place of every run of consecutive heads."""
    first = 0
    for at in range(1, len(heads) + 1):
        if at == len(heads) or heads[at] != heads[at - 1] + 1:
            yield first, at - 1
            first = at
