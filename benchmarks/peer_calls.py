"""Calls with structure planted in them, and a judge of what a method reads of a call."""

from __future__ import annotations

import math
from functools import partial

import torch
from peer_releases import Keys
from torch import Tensor

from accelkit.kernels.index import ceil_div, equal_groups
from accelkit.patches.call import AttentionCall, Site

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 96
"""Rows of each head by which density, mass and errors are judged."""


def planted(tokens: int, heads: int = 32, kv_heads: int = 8) -> AttentionCall:
    """A causal call of heads of 128. KV heads see in turn a band and lines of loud keys, lines and
    a far diagonal, blocks of topics, a band and topics. Loud keys lie in half a dozen blocks and
    the first one, however long the call is. Strengths are nats above an equal share.
    """
    g, root = torch.Generator(DEVICE).manual_seed(0), 128**0.5
    draw = partial(torch.randn, generator=g, device=DEVICE)
    whole = math.log(tokens)
    band, line = (whole + 5.0, whole + 3.0, 0.0, whole + 5.0), (whole + 1.0, whole + 1.0, 0.0, 0.0)
    topic_nats = (0.0, 0.0, 11.0, 8.0)
    place = torch.arange(tokens, device=DEVICE)
    wave = torch.logspace(-3, 0.3, 32, device=DEVICE)
    topics = torch.nn.functional.normalize(draw(40, 28), dim=-1)
    sides = []
    for count, keys in ((heads, False), (kv_heads, True)):
        x = 0.5 * draw(1, count, tokens, 128)
        for h in range(count):
            kv = h if keys else h // (heads // kv_heads)
            kind = kv % 4
            far = tokens // 5 * (kind == 1) * keys  # the key that lies so far back looks near
            angle = (place + far)[:, None] * wave
            x[0, h, :, :64] += torch.cat([angle.cos(), angle.sin()], -1) * (
                (band[kind] * root / 32) ** 0.5
            )
            rare = torch.rand(2, tokens, generator=g, device=DEVICE)
            loud = (rare[0, place // 64 * 64] < 6 * 64 / tokens) & (rare[1] < 0.3)
            loud[:4] = True
            x[0, h, :, 64] += (line[kind] * root) ** 0.5 * (loud if keys else 1.0)
            topic = torch.randint(40, (ceil_div(tokens, 256),), generator=g, device=DEVICE)
            x[0, h, :, 100:] += (topics * (topic_nats[kind] * root) ** 0.5)[topic[place // 256]]
        sides.append(x.to(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32))
    v = draw(1, kv_heads, tokens, 128).to(sides[0].dtype)
    ids, kv = tuple(range(heads)), equal_groups(heads, kv_heads)
    return AttentionCall(*sides, v, 1 / root, True, 0, None, ids, kv, site=Site("a", 0))


class Judge:
    """Some rows of every head of a call in fp32."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call
        g = torch.Generator(DEVICE).manual_seed(1)
        place = torch.arange(ROWS, device=DEVICE) + torch.rand(ROWS, generator=g, device=DEVICE)
        self.rows = (place * call.n_q / ROWS).long().clamp(max=call.n_q - 1)
        keys = torch.arange(call.n_k, device=DEVICE)
        self.visible = (keys <= self.rows[:, None]) | (not call.causal)
        self.share = torch.stack([self._share(h) for h in call.heads])

    def _share(self, head: int) -> Tensor:
        q = self.call.q[0, head, self.rows].float()
        logits = q @ self.call.k[0, self.call.kv_heads[head]].float().T * self.call.scale
        return logits.masked_fill(~self.visible, -math.inf).softmax(-1)

    def chosen(self, keys: Keys) -> tuple[float, float]:
        """Density and captured mass."""
        pairs = mass = 0.0
        for head, share in enumerate(self.share):
            read = keys(head, self.rows) & self.visible
            pairs += float(read.sum() / self.visible.sum())
            mass += float((share * read).sum(-1).mean())
        return pairs / len(self.share), mass / len(self.share)

    def errors(self, keys: Keys, out: Tensor) -> tuple[float, float]:
        """Mean relative error against dense attention, and the worst head's against the keys."""
        dense, worst = 0.0, 0.0
        for head, share in enumerate(self.share):
            v = self.call.v[0, self.call.kv_heads[head]].float()
            part = share * keys(head, self.rows)
            got = out[0, head, self.rows].float()
            whole, some = share @ v, part / part.sum(-1, keepdim=True) @ v
            dense += float(((got - whole).norm(dim=-1) / whole.norm(dim=-1)).mean())
            worst = max(worst, float(((got - some).norm(dim=-1) / some.norm(dim=-1)).mean()))
        return dense / len(self.share), worst
