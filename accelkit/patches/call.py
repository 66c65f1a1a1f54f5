"""What a method sees: where it is (`Site`), when it is (`Clock`), what the tokens are
(`Geometry`) and the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import Tensor

from accelkit.kernels.index import Inputs, device_ids

Phase = Literal["prefill", "decode", "denoise"]
Kind = Literal["self", "joint", "cross"]
T = TypeVar("T")


@dataclass(frozen=True)
class Site:
    """One attention module, addressed by its canonical module path; `order` is its place in the
    running order.
    """

    path: str
    order: int
    kind: Kind = "self"
    component: str = "text"


@dataclass(frozen=True)
class Clock:
    """When a call happens: phase, step of `total` (denoising) and guidance branch."""

    phase: Phase
    step: int = 0
    total: int = 1
    branch: str = "cond"


@dataclass(frozen=True)
class Span:
    """Tokens `[start, stop)` of one modality: "text", "image", "video", …"""

    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Geometry:
    """What the tokens are: spans by modality and the `(frames, rows, columns)` grid of the
    visual span.
    """

    spans: tuple[Span, ...] = ()
    grid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class AttentionCall(Inputs):
    """One attention call as a method sees it, at run time and during calibration alike.

    The tensors are those of `kernels.index.Inputs`. `memory` belongs to this site and guidance
    branch and lives for one generation. `tables` holds the plan's side tensors of this site.
    `ordinal` counts the calls of this site in one forward and is part of the memory's key. `asked`
    counts the rows from the first one whose logits are asked for to the end; 0: all, or unknown.
    `share` is that of a whole call's visible pairs in a call that was cut from it (`first_rows`).
    """

    site: Site = Site("", 0)
    clock: Clock = Clock("prefill")
    geometry: Geometry = Geometry()
    memory: dict[Any, Any] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    ordinal: int = 0
    asked: int = 0
    share: float = 1.0
    _shared: dict[Any, Any] = field(default_factory=dict)

    def take(self, heads: Sequence[int]) -> AttentionCall:
        """The same call for some of its query heads; no tensor is copied."""
        if tuple(heads) == self.heads:
            return self
        slots = tuple(self.heads.index(h) for h in heads)
        at = device_ids(slots, self.q.device)
        narrowed: dict[str, Any] = {
            name: value if value is None or value.shape[1] == 1 else value.index_select(1, at)
            for name, value in (("q_pos", self.q_pos), ("k_pos", self.k_pos))
        }
        kv_heads = tuple(self.kv_heads[slot] for slot in slots)
        return replace(self, heads=tuple(heads), kv_heads=kv_heads, **narrowed)

    def first_rows(self, count: int) -> AttentionCall:
        """The first `count` query rows of a causal call in token order, over the keys that they
        see: what a shorter prompt would have been. No tensor is copied.
        """
        seen = self.q_start + count
        pairs, whole = (n * self.q_start + n * (n + 1) / 2 for n in (count, self.n_q))
        return replace(
            self,
            q=self.q[:, :, :count],
            k=self.k[:, :, :seen],
            v=self.v[:, :, :seen],
            key_mask=None if self.key_mask is None else self.key_mask[:, :seen],
            share=self.share * pairs / whole,
            _shared={},
        )

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """`compute()`, remembered for this call and these heads: methods and settings share one
        estimate.
        """
        key = (key, self.heads)
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def forget(self) -> None:
        """Give up what `once` has found."""
        self._shared.clear()

    def remember(self, key: Any, compute: Callable[[], T]) -> T:
        """`compute()`, remembered for this site, these heads and this length to the end of the
        generation.
        """
        key = (key, self.heads, self.n_q, self.n_k)
        if key not in self.memory:
            self.memory[key] = compute()
        return self.memory[key]

    def per_head(self, value: float | str) -> float | Tensor:
        """A field that may differ by head: the number itself or, where it names a side tensor of
        the plan, the values of this call's heads, fp32 `[H]`.
        """
        if not isinstance(value, str):
            return value
        table = self.tables[value]
        return table.index_select(0, device_ids(self.heads, table.device)).to(self.q.device)


@dataclass(frozen=True)
class TokenStream:
    """Hidden states `[B, N, C]` on their way into a block, with what is needed to judge the
    tokens.
    """

    hidden: Tensor
    positions: Tensor
    site: Site
    clock: Clock
    geometry: Geometry
    memory: dict[Any, Any]


@dataclass(frozen=True)
class BlockCall:
    """One call of a transformer block or of its FFN (`part`), with its input `[B, N, C]`."""

    hidden: Tensor
    part: Literal["block", "ffn"]
    site: Site
    clock: Clock
    memory: dict[Any, Any]
