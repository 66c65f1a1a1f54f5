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
    from accelkit.patches.plan import HeadGroup, Plan


@dataclass
class SiteCount:
    """Calls of one site: how many ran sparse, why the others did not, and densities if they were
    measured.
    """

    calls: int = 0
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    densities: list[Tensor] = field(default_factory=list)

    @property
    def density(self) -> float | None:
        """Mean computed ÷ visible pairs over heads and measured sparse calls."""
        if not self.densities:
            return None
        return float(torch.stack([d.float().mean() for d in self.densities]).mean())


class PatchState:
    """Memory of one patched model.

    `memory` belongs to a site and guidance branch for one generation; `indices` are the lists of
    anchor sites for the layers that reuse them in the same forward; `static` caches answers that
    follow from geometry alone and survives generations.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.anchors = plan.anchors()
        self.memory: dict[tuple[str, int, str], dict[str, Any]] = {}
        self.indices: dict[
            tuple[str, int], list[tuple[tuple[int, ...], tuple[BlockIndex, ...]]]
        ] = {}
        self.static: dict[Hashable, Any] = {}
        self.counts: dict[str, SiteCount] = {}
        self.measure_density = False
        self.last_order = -1  # running order of the last call: a forward begins where it falls

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
        shape = (call.n_q, call.n_k, call.q_start, call.q.shape[0], call.q.device)
        return (group.policy_id, len(call.heads), shape)

    def count(self, site: str, reason: str | None = None) -> None:
        """One more call of `site`; `reason` says why it ran dense."""
        entry = self.counts.setdefault(site, SiteCount())
        entry.calls += 1
        if reason is None:
            entry.sparse += 1
        else:
            entry.dense[reason] += 1

    def saw(self, call: AttentionCall, answers: Sequence[Any]) -> None:
        """Record the densities of a sparse call when asked to."""
        if not self.measure_density:
            return
        from accelkit.kernels.select import density

        found = [density(a.pieces if len(a.pieces) > 1 else a.pieces[0], a.call) for a in answers]
        entry = self.counts.setdefault(call.site.path, SiteCount())
        entry.densities.append(torch.cat([f.reshape(-1).cpu() for f in found]))
