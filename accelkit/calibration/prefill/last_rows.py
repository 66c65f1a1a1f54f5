"""What plans for `generate` do at the end of a prompt, and what it costs: the last layer for the
rows alone that somebody reads, and the last rows of all other layers dense.

Rows before those are read by later layers and never answered. What is wrong with them reaches an
answer only through the keys and values that are made of them, mixed with many others, so they bear
far larger errors than the rows with the question. Dense last rows are those of Tri-shape (SCBench,
arXiv 2412.10319), around any method.
"""

from __future__ import annotations

from accelkit.calibration.assemble import rounded
from accelkit.calibration.data import Inputs
from accelkit.kernels.cost import CostTable
from accelkit.patches.plan import Evidence, LayerPlan, Plan

MOST = 512
SHARE = 16
"""Last rows of a prompt that stay dense, but not more than one row in so many of a long prompt."""


def dense_rows(inputs: Inputs) -> int:
    """How many last rows stay dense."""
    return min(MOST, inputs.longest // SHARE, inputs.shortest // 4)


def kept_row(heads: int, costs: CostTable, tokens: int) -> Evidence:
    """The last layer when only the last row of `tokens` is computed, as the costs predict it."""
    density, dense_ms = 2 / (tokens + 1), costs.dense_ms(tokens)
    return Evidence(
        tokens=tokens,
        error=(0.0,) * heads,
        recall=(1.0,) * heads,
        density=rounded((density,) * heads),
        ms=round(density * dense_ms, 5),
        dense_ms=round(dense_ms, 5),
    )


def for_generation(
    plan: Plan, path: str, seen: Evidence, dense_rows: int, costs: CostTable
) -> Plan:
    """A plan for prompts with so many dense rows at their ends, its evidence of densities and
    milliseconds with them; the last layer, whose attention is at `path`, is trimmed, with `seen` as
    its evidence.
    """
    sites = {
        site: layer.model_copy(
            update={
                "evidence": {k: _with_rows(e, dense_rows, costs) for k, e in layer.evidence.items()}
            }
        )
        for site, layer in plan.sites.items()
    }
    sites[path] = LayerPlan(evidence={"prefill": seen})
    update = {"dense_rows": dense_rows, "trim_last_layer": True, "sites": sites}
    return plan.model_copy(update=update).with_tables(plan.tables)


def _with_rows(seen: Evidence, rows: int, costs: CostTable) -> Evidence:
    """What was seen of a prompt, with further dense rows behind it."""
    n, tokens = seen.tokens, seen.tokens + rows
    share = n * (n + 1) / (tokens * (tokens + 1))
    more = costs.dense_ms(tokens) - costs.dense_ms(n)
    update = {
        "tokens": tokens,
        "density": rounded([1.0 - share * (1.0 - d) for d in seen.density]),
        "ms": round(seen.ms + more, 5),
        "dense_ms": round(seen.dense_ms + more, 5),
    }
    return seen.model_copy(update=update)
