"""Pictures of a plan: heads × layers, milliseconds by layer, quality rounds. Made from the plan
alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from accelkit.errors import InvalidInputError, MissingExtraError
from accelkit.patches.plan import Evidence, LayerPlan, Plan, evidence_key

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every kind of colour vision; dense is grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#332288")
DENSE = "#D9D9D9"


def figure(plan: Plan, phase: str | None = None, tokens: int | None = None) -> Figure:
    """Heads × layers: policies, densities and errors; milliseconds by layer; quality rounds; for
    denoising the density over steps × layers. What was not measured is left out."""
    matplotlib = _matplotlib()
    phase = phase or phase_of(plan)
    panels = [lambda axes: _policy_map(axes, plan, phase, tokens)]
    seen = {
        s: plan.sites[s].evidence[phase]
        for s in sorted(plan.sites, key=natural)
        if phase in plan.sites[s].evidence
    }
    if seen and phase == "denoise":
        panels.insert(0, lambda axes: _step_map(axes, plan, list(seen)))
    # What was measured belongs to the longest prompts.
    longest = tokens is None or tokens == max(tiers(plan, phase))
    if seen and longest:
        panels += [
            lambda axes: _number_map(
                axes, [e.density for e in seen.values()], list(seen), "Density", "Blues", (0, 1)
            ),
            lambda axes: _number_map(
                axes, [e.error for e in seen.values()], list(seen), "Error of each head", "Oranges"
            ),
            lambda axes: _ms_bars(axes, seen),
        ]
    if longest and drawn_rounds(plan):
        panels.append(lambda axes: _round_lines(axes, plan))
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tall = 1.5 + 0.16 * max(8, len(plan.sites))
    # A last line with nothing but rounds needs no room for layers.
    heights = [tall] * (lines - 1) + [min(tall, 3.0) if len(panels) % 2 else tall]
    drawing = matplotlib.Figure(figsize=(6.4 * columns, sum(heights)), layout="constrained")
    # Sub-figures: each panel has its own margins, so that a legend in one does not push another's.
    grid = drawing.subfigures(lines, columns, squeeze=False, height_ratios=heights).flatten()
    for part, panel in zip(grid, panels, strict=False):
        panel(part.subplots())
    return drawing


def save_figure(plan: Plan, path: Path, phase: str | None = None) -> None:
    """Write the picture; the ending of `path` chooses the format. Raises `InvalidInputError` where
    it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure(plan, phase).savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: the picture cannot be written ({error})") from error


def _step_map(axes: Axes, plan: Plan, sites: list[str]) -> None:
    """Mean density of each layer's heads over the denoising steps; a cached step counts as run."""
    from matplotlib.ticker import PercentFormatter

    shares = step_shares(plan)
    values = [
        [_mean_density(plan.sites[s].evidence.get(evidence_key("denoise", b))) for b in shares]
        for s in sites
    ]
    edges = [low for low, _ in shares] + [1.0]
    image = axes.pcolormesh(
        edges, [i - 0.5 for i in range(len(sites) + 1)], values, cmap="Blues", vmin=0, vmax=1
    )
    axes.invert_yaxis()
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    _ticks(axes, sites, 1)
    axes.set_xlim(0, 1)
    axes.set_xticks(edges, [f"{e:.0%}" for e in edges])
    axes.set_xlabel("share of the denoising steps", fontsize=8)
    axes.set_title("Density over steps", loc="left", fontsize=10)


def _mean_density(evidence: Evidence | None) -> float:
    return 1.0 if evidence is None else statistics.fmean(evidence.density)


def _policy_map(axes: Axes, plan: Plan, phase: str, tokens: int | None) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    rows = head_rows(plan, phase, tokens)
    width = max((len(r) for r in rows.values()), default=1)
    pixels = [
        [to_rgb(colour_of(plan, p)) for p in r] + [(1.0, 1.0, 1.0)] * (width - len(r))
        for r in rows.values()
    ]
    axes.imshow(pixels or [[to_rgb(DENSE)]], aspect="auto", interpolation="nearest")
    used: dict[str, str] = {}
    for policy in sorted({p for r in rows.values() for p in r}):
        used.setdefault(label_of(plan, policy), colour_of(plan, policy))
    axes.legend(
        handles=[Patch(facecolor=c, edgecolor="#555555", label=n) for n, c in used.items()],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=8,
    )
    _ticks(axes, list(rows), width)
    if phase == "denoise":
        axes.set_xlabel("query head, once for each share of the steps", fontsize=8)
    axes.set_title("Method of each head", loc="left", fontsize=10)


def _number_map(
    axes: Axes,
    values: Sequence[Sequence[float]],
    sites: list[str],
    title: str,
    colours: str,
    limits: tuple[float, float] | None = None,
) -> None:
    from matplotlib.ticker import PercentFormatter

    width = max((len(v) for v in values), default=1)
    padded = [[*v, *[math.nan] * (width - len(v))] for v in values]
    low, high = limits or (
        0.0,
        max((x for v in values for x in v if math.isfinite(x)), default=1.0) or 1.0,
    )
    image = axes.imshow(
        padded, aspect="auto", interpolation="nearest", cmap=colours, vmin=low, vmax=high
    )
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    _ticks(axes, sites, width)
    axes.set_title(title, loc="left", fontsize=10)


def _ticks(axes: Axes, sites: list[str], heads: int) -> None:
    from matplotlib.ticker import MaxNLocator

    step = max(1, -(-len(sites) // 24))
    axes.set_yticks(range(0, len(sites), step), [_short(s) for s in sites[::step]], fontsize=8)
    axes.set_xlim(-0.5, heads - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("query head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    for edge in axes.spines.values():
        edge.set_visible(False)


def _ms_bars(axes: Axes, seen: dict[str, Evidence]) -> None:
    places = list(range(len(seen)))
    axes.barh(places, [e.dense_ms for e in seen.values()], height=0.8, color=DENSE, label="dense")
    axes.barh(places, [e.ms for e in seen.values()], height=0.45, color=COLOURS[0], label="plan")
    step = max(1, -(-len(seen) // 24))
    axes.set_yticks(places[::step], [_short(s) for s in list(seen)[::step]], fontsize=8)
    axes.set_ylim(len(seen) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Attention of each layer, predicted", loc="left", fontsize=10)


def _round_lines(axes: Axes, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    found = drawn_rounds(plan)
    for key, name, shade in (
        ("predicted_error", "predicted", COLOURS[1]),
        ("measured_error", "measured", COLOURS[0]),
    ):
        points = [(n, r[key]) for n, r in enumerate(found, 1) if is_number(r.get(key))]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=shade, label=name)
    if plan.budget:
        axes.axhline(
            plan.budget.max_rel_error, color="#555555", linestyle="--", linewidth=1, label="allowed"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("round", fontsize=8)
    axes.set_ylabel("relative L1 error", fontsize=8)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Quality rounds", loc="left", fontsize=10)


# -- what the pictures and the report read from a plan ------------------------------------------


def phase_of(plan: Plan) -> str:
    """The phase that a plan is about."""
    return "denoise" if plan.fingerprint.library == "diffusers" else "prefill"


def step_shares(plan: Plan) -> list[tuple[float, float]]:
    """The shares of the denoising steps that a plan treats apart, in order."""
    rules = {r.steps for s in plan.sites.values() for r in s.rules}
    seen = plan.calibration.get("buckets")
    return [(low, high) for low, high in seen] if seen else sorted(rules) or [(0.0, 1.0)]


def head_rows(
    plan: Plan, phase: str | None = None, tokens: int | None = None
) -> dict[str, list[int]]:
    """Policy row of every head by site, in layer order, for a call of `tokens` keys (default: the
    longest rule); −1: dense without a row. Denoising has its heads once for each share of steps."""
    phase = phase or phase_of(plan)
    shares = step_shares(plan) if phase == "denoise" else [(0.0, 1.0)]
    n = max(tiers(plan, phase)) if tokens is None else tokens
    rows: dict[str, list[int]] = {}
    for site in sorted(plan.sites, key=natural):
        layer = plan.sites[site]
        if layer.block is not None and not layer.rules:
            continue  # a whole denoiser with a step cache
        rows[site] = []
        for low, high in shares:
            clock = SimpleNamespace(phase=phase, step=(low + high) / 2, total=1, branch="cond")
            row = [-1] * _heads(plan, layer)
            for group in plan.groups(site, n, clock):  # type: ignore[arg-type]
                for head in group.heads:
                    row[head] = group.policy_id
            rows[site] += row
    return rows


def tiers(plan: Plan, phase: str = "prefill") -> list[int]:
    """Lengths in tokens from which another rule applies."""
    found = {r.min_tokens for s in plan.sites.values() for r in s.rules if r.phase == phase}
    return sorted({max(n, plan.limits.min_length) for n in found}) or [plan.limits.min_length]


def label_of(plan: Plan, row: int) -> str:
    return "dense" if row < 0 else plan.policies[row].label()


def colour_of(plan: Plan, row: int) -> str:
    """One colour a label, in the order of the plan's table."""
    name = label_of(plan, row)
    labels = list(dict.fromkeys(p.label() for p in plan.policies if not p.dense))
    return COLOURS[labels.index(name) % len(COLOURS)] if name in labels else DENSE


def _heads(plan: Plan, layer: LayerPlan) -> int:
    known = [len(r.policies) for r in layer.rules]
    return max(
        known, default=max((c.q_heads for c in plan.fingerprint.components.values()), default=1)
    )


def drawn_rounds(plan: Plan) -> list[dict[str, Any]]:
    """Rounds that have an error to draw; what a plan keeps of them is free-form data."""
    rounds = plan.measured.get("rounds")
    found = [r for r in rounds if isinstance(r, dict)] if isinstance(rounds, list | tuple) else []
    errors = ("measured_error", "predicted_error")
    return [r for r in found if any(is_number(r.get(key)) for key in errors)]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdigit() else (1, p) for p in path.split(".")]


def _short(site: str) -> str:
    """The layer's number where the path has one."""
    return next((p for p in site.split(".") if p.isdigit()), site)


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise missing("matplotlib") from error
    return matplotlib.figure


def missing(package: str) -> MissingExtraError:
    return MissingExtraError(f'{package} is needed for reports: pip install "accelkit[report]"')
