"""What one generation remembers, and what a handle counts. All of it lives here, never on
modules or methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall

if TYPE_CHECKING:
    from accelkit.patches.method import Order
    from accelkit.patches.plan import HeadGroup, Plan


GEOMETRIES = 32
"""Of so many geometries (prompts of different length, chunks, grids) static answers are cached."""


@dataclass
class SiteCount:
    """Calls of one site: how many ran sparse, why the others did not, and densities if they were
    measured; `left_out` is what trimmed calls left out, in whole dense calls.
    """

    calls: int = 0
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    densities: list[Tensor] = field(default_factory=list)
    left_out: float = 0.0

    @property
    def density(self) -> float | None:
        """Mean computed ÷ visible pairs over heads and measured sparse calls."""
        if not self.densities:
            return None
        return float(torch.cat(self.densities).float().mean())


@dataclass(frozen=True)
class Saved:
    """Lists of some heads of an anchor, in the order of tokens that they were made for."""

    heads: tuple[int, ...]
    pieces: tuple[BlockIndex, ...]
    order: Order | None = None


class PatchState:
    """Memory of one patched model.

    `memory` belongs to a site and guidance branch for one generation, and lists that are reused
    over its steps lie there; `indices` are the lists of anchor sites for the layers that reuse them
    in the same forward; `answers` caches, by geometry, what follows from geometry alone, and
    survives generations.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.anchors = plan.anchors()
        self.own_anchors = plan.own_anchors()
        self.memory: dict[tuple[str, int, str], dict[Any, Any]] = {}
        self.indices: dict[tuple[str, int], list[Saved]] = {}
        self.static: dict[Hashable, Any] = {}
        self.answers: dict[Hashable, dict[Hashable, Any]] = {}
        self.counts: dict[str, SiteCount] = {}
        self.measure_density = False
        # Order and ordinal of the last call: a forward begins where they fall.
        self.last_place = (-1, -1)

    def begin_generation(self) -> None:
        """Forget everything that belongs to the generation before."""
        self.memory.clear()
        self.indices.clear()

    def begin_forward(self) -> None:
        """Indices reused across layers never outlive a forward."""
        self.indices.clear()

    def tables_of(self, site: str, device: torch.device) -> dict[str, Tensor]:
        """The plan's side tensors of one site on a device, by their short names."""
        key = ("tables", site, device)
        if key not in self.static:
            prefix = f"{site}/"
            mine = {k: v for k, v in self.plan.tables.items() if k.startswith(prefix)}
            self.static[key] = {k[len(prefix) :]: v.to(device) for k, v in mine.items()}
        return self.static[key]

    def static_key(self, call: AttentionCall, group: HeadGroup) -> Hashable | None:
        """Key of a cached answer, or None when the answer depends on more than geometry."""
        methods = group.policy.methods
        if group.policy.reuse or not methods or not all(m.static for m in methods):
            return None
        if call.key_mask is not None:
            return None
        # A field that names a side tensor has other values at other sites and heads.
        told = any(isinstance(v, str) for m in methods for _, v in m)
        heads = (call.site.path, call.heads) if told else len(call.heads)
        return (group.policy_id, heads, call.q_start)

    def static_shelf(self, call: AttentionCall) -> dict[Hashable, Any]:
        """The cached answers of a call's geometry; those of the oldest geometry make room."""
        shape = self.shape_of(call)
        if shape not in self.answers and len(self.answers) == GEOMETRIES:
            del self.answers[next(iter(self.answers))]
        return self.answers.setdefault(shape, {})

    @staticmethod
    def shape_of(call: AttentionCall) -> Hashable:
        """What a list depends on besides the tensors' values."""
        return (call.n_q, call.n_k, call.q.shape[0], call.q.device, call.geometry)

    def count(self, site: str, reason: str | None = None, left_out: float = 0.0) -> None:
        """One more call of `site`; `reason` says why it ran dense, `left_out` which share of its
        visible pairs was not computed.
        """
        entry = self.counts.setdefault(site, SiteCount())
        entry.left_out += left_out
        entry.calls += 1
        if reason is None:
            entry.sparse += 1
        else:
            entry.dense[reason] += 1

    def saw(self, call: AttentionCall, answers: Sequence[Any]) -> None:
        """Record the densities of a sparse call when asked to; what it was cut from ran dense
        elsewhere.
        """
        if not self.measure_density:
            return
        entry = self.counts.setdefault(call.site.path, SiteCount())
        found = torch.cat([a.density() for a in answers])
        entry.densities.append(1.0 - call.share * (1.0 - found))
