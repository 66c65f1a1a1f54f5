"""The tables and pictures that a person reads, made from a plan alone."""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelkit.calibration.show.pictures import (
    colour_of,
    figure,
    head_rows,
    is_number,
    label_of,
    missing,
    natural,
    phase_of,
    tiers,
)
from accelkit.errors import InvalidInputError
from accelkit.patches.plan import Evidence, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

TEMPLATE = Path(__file__).with_name("report.html.j2")
TRIMMED = "prefill_trimmed_ms"
WHOLE = ("tokens", "ms", "dense_ms", "speedup")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def summary(plan: Plan, phase: str | None = None) -> dict[str, Any]:
    """What matters about a plan, as plain data: shares of heads by policy, errors, milliseconds and
    densities."""
    phase = phase or phase_of(plan)
    rows = head_rows(plan, phase)
    counted: dict[str, int] = {}
    for row in (r for site in rows.values() for r in site):
        name = label_of(plan, row)
        counted[name] = counted.get(name, 0) + 1
    heads = sum(counted.values())
    seen = [e for layer in plan.sites.values() if (e := layer.evidence.get(phase))]
    measured = plan.measured if phase == phase_of(plan) else {}
    ms = measured.get("ms", sum(e.ms for e in seen) if seen else None)
    dense_ms = measured.get("dense_ms", sum(e.dense_ms for e in seen) if seen else None)
    density = [d for e in seen for d in e.density]
    return {
        "model": plan.fingerprint.base_id or plan.fingerprint.class_name,
        "class_name": plan.fingerprint.class_name,
        "model_type": plan.fingerprint.model_type,
        "phase": phase,
        "sites": len(rows),
        "sparse_sites": sum(
            any(label_of(plan, r) != "dense" for r in site) for site in rows.values()
        ),
        "heads": heads,
        "shares": {k: n / heads for k, n in sorted(counted.items(), key=lambda x: (-x[1], x[0]))},
        "min_length": plan.limits.min_length,
        "max_length": plan.limits.max_length,
        "measured_at_tokens": sorted({e.tokens for e in seen}),
        "density": statistics.fmean(density) if density else None,
        "attention_ms": ms,
        "attention_dense_ms": dense_ms,
        "attention_speedup": dense_ms / ms
        if is_number(ms) and is_number(dense_ms) and ms
        else None,
        "budget": plan.budget.max_rel_error if plan.budget else None,
        "predicted_error": measured.get("predicted_error"),
        "measured_error": measured.get("measured_error"),
        "further_error": measured.get("further_error"),
        **{f"{phase}_{k}": measured.get(f"{phase}_{k}") for k in WHOLE},
        "step_cache": next((s.block.kind for s in plan.sites.values() if s.block), None),
        "note": measured.get("note"),
        "per_task": measured.get("per_task", {}),
        "rounds": measured.get("rounds", []),
        "producer": plan.producer,
        "calibration": plan.calibration,
    }


def tables(plan: Plan, phase: str | None = None, *, heads: bool = True) -> Group:
    """The summary as rich tables; `heads=False` leaves the map of heads out."""
    phase = phase or phase_of(plan)
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in headline(plan, phase):
        facts.add_row(name, value)
    legend = Table(title="Policies", title_justify="left")
    for column in ("", "policy", "heads", "parameters"):
        legend.add_column(column)
    signs = {row: _LETTERS[n % len(_LETTERS)] for n, row in enumerate(sparse_policies(plan))}
    counts = _counts(plan, phase)
    for row, sign in signs.items():
        legend.add_row(
            sign, plan.policies[row].label(), str(counts.get(row, 0)), parameters(plan, row)
        )
    dense = sum(n for row, n in counts.items() if row not in signs)
    legend.add_row("·", "dense", str(dense), "")
    parts: list[Any] = [facts, Text(), legend]
    if heads:
        grid = Table(title="Heads of each layer", title_justify="left")
        grid.add_column("site")
        grid.add_column("heads 0, 1, …", no_wrap=True)
        for column in ("density", "worst error", "ms", "dense ms"):
            grid.add_column(column, justify="right")
        for site, policies in head_rows(plan, phase).items():
            text = Text()
            for policy in policies:
                text.append(
                    signs.get(policy, "·"),
                    style=colour_of(plan, policy) if policy in signs else "dim",
                )
            seen = plan.sites[site].evidence.get(phase)
            if seen and not signs.keys() & set(policies) and any(d < 1 for d in seen.density):
                text.append(" asked rows only", style="dim")
            grid.add_row(site, text, *_evidence_cells(seen))
        parts += [Text(), grid]
    return Group(*parts)


def headline(plan: Plan, phase: str | None = None) -> list[tuple[str, str]]:
    """The few lines that begin every report."""
    s = summary(plan, phase)
    phase = s["phase"]
    low, high = s["min_length"], s["max_length"]
    reach = f"from {low} tokens, dense below" if low else "all"
    lines = [
        ("model", f"{s['model']} ({s['class_name']})"),
        ("lengths", reach + (f"; measured up to {high}" if high else "")),
        ("heads", ", ".join(f"{k} {v:.0%}" for k, v in s["shares"].items()) or "none"),
    ]
    if plan.limits.grid and plan.limits.steps:
        grid = " × ".join(map(str, plan.limits.grid))
        lines.insert(2, ("grid", f"{grid} tokens, {plan.limits.steps} denoising steps"))
    if s["density"] is not None:
        lines.append(
            ("density", f"{s['density']:.1%} of the visible pairs are computed, mean over heads")
        )
    if s["attention_speedup"]:
        at = ", ".join(map(str, s["measured_at_tokens"]))
        how = f"predicted at {at} tokens" if at else "predicted"
        lines.append(("attention", _beside_dense(s, "attention", how)))
    if plan.trim_last_layer and phase == phase_of(plan):
        whole, trimmed = plan.measured.get("prefill_dense_ms"), plan.measured.get(TRIMMED)
        gain = ""
        if whole and trimmed:
            gain = f"; by itself {trimmed:.2f} ms, dense {whole:.2f} ms: "
            gain += f"{whole / trimmed:.2f} × faster"
        lines.append(("last layer", f"only for rows whose logits are asked for, exact{gain}"))
    if plan.dense_rows and phase == phase_of(plan):
        lines.append(("last rows", f"{plan.dense_rows} or all that are asked for stay dense"))
    if s["step_cache"]:
        lines.append(("step cache", str(s["step_cache"])))
    if is_number(s[f"{phase}_speedup"]):
        how = f"measured at {s[f'{phase}_tokens']} tokens"
        lines.append((phase, _beside_dense(s, phase, how)))
    if errors := _errors(s):
        of = "final latents" if phase == "denoise" else "last hidden state"
        lines.append(("error", f"{errors} (relative L1, {of}, worst prompt)"))
    if s["note"]:
        lines.append(("note", str(s["note"])))
    if spent := _spent(s["calibration"]):
        lines.append(("calibration", spent))
    if made := _made_with(s["producer"]):
        lines.append(("made with", made))
    return lines


def _beside_dense(s: dict[str, Any], what: str, how: str) -> str:
    """Milliseconds of something in a summary beside dense."""
    ms, dense_ms, faster = (s[f"{what}_{k}"] for k in ("ms", "dense_ms", "speedup"))
    return f"{ms:.2f} ms, dense {dense_ms:.2f} ms: {faster:.2f} × faster ({how})"


def _errors(s: dict[str, Any]) -> str:
    """The error that is allowed and those that were found."""
    named = {
        "allowed": "budget",
        "predicted": "predicted_error",
        "measured": "measured_error",
        "further prompts up to": "further_error",
    }
    if s["further_error"] == s["measured_error"]:
        del named["further prompts up to"]
    return ", ".join(f"{name} {s[key]:.2%}" for name, key in named.items() if is_number(s[key]))


def _made_with(producer: dict[str, Any]) -> str:
    """The versions that made a plan, ours first."""
    others = sorted(k for k in producer if k not in ("version", "name", "date"))
    named = {"accelkit": producer.get("version"), **{k: producer[k] for k in others}}
    return ", ".join(f"{k} {v}" for k, v in named.items() if v)


def _spent(about: dict[str, Any]) -> str | None:
    """What a calibration took: the search itself, and everything."""
    whole = about.get("seconds", {}).get("whole")
    if not is_number(whole):
        return None
    if is_number(about.get("search_prefills")):
        took = (
            f"as long as {about['search_prefills']:.1f} dense prefills for the search itself, "
            f"{about['dense_prefills']:.1f} with fit, end-to-end check and timing"
        )
    elif is_number(about.get("dense_runs")):
        took = f"as long as {about['dense_runs']:.2f} dense runs"
        took += f", and {about['check_dense_runs']:.2f} for each prompt of the check"
    else:
        return None
    return f"{whole:.1f} s with what is compiled or loaded once; without, {took}"


def sparse_policies(plan: Plan) -> list[int]:
    """Rows of the plan's table that are not dense."""
    return [n for n, policy in enumerate(plan.policies) if not policy.dense]


def parameters(plan: Plan, row: int) -> str:
    """The numbers of a policy, as `field=value` pairs."""
    policy = plan.policies[row]
    parts = []
    for method in policy.methods:
        pairs = [f"{k}={_number(plan, k, v)}" for k, v in method.model_dump(mode="json").items()]
        parts.append((f"{method.kind}: " if len(policy.methods) > 1 else "") + ", ".join(pairs))
    if policy.reuse:
        heads = "" if policy.reuse.heads is None else f", heads {list(policy.reuse.heads)}"
        parts.append(f"from {policy.reuse.site or 'an earlier step'}{heads}")
    return "; ".join(p for p in parts if p)


def _number(plan: Plan, field: str, value: Any) -> str:
    """A method's number; of one that differs by head, which a side tensor holds, its range."""
    if not isinstance(value, str) or not value.endswith(f"/{field}"):
        return str(value)
    found = [t for name, t in plan.tables.items() if name.endswith(f"/{value}")]
    if not found:
        return "by head"
    low, high = min(float(t.min()) for t in found), max(float(t.max()) for t in found)
    return f"{low:.4g}" if low == high else f"{low:.4g}…{high:.4g} by head"


def write_html(plan: Plan, path: Path, title: str | None = None) -> Path:
    """Write one self-contained page: figures as SVG inside, the data as JSON, nothing loaded from
    elsewhere. Raises `InvalidInputError` where it cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise missing("jinja2") from error
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    phases: list[str] = sorted({r.phase for s in plan.sites.values() for r in s.rules})
    phases = phases or [phase_of(plan)]
    pictures = [
        (f"{phase}, from {n} tokens", Markup(_svg(figure(plan, phase, n))))
        for phase in phases
        for n in tiers(plan, phase)
    ]
    text = page.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title or f"accelkit plan for {summary(plan)['model']}",
        headline=headline(plan, phases[0]),
        policies=[
            (
                plan.policies[r].label(),
                colour_of(plan, r),
                _counts(plan, phases[0]).get(r, 0),
                parameters(plan, r),
            )
            for r in sparse_policies(plan)
        ],
        pictures=pictures,
        layers=[
            (site, *_evidence_cells(layer.evidence.get(phases[0])))
            for site, layer in sorted(plan.sites.items(), key=lambda x: natural(x[0]))
            if layer.evidence
        ],
        tasks=_as_table(plan.measured.get("per_task")),
        rounds=_as_table(plan.measured.get("rounds")),
        facts=_as_table({k: v for k, v in {**plan.producer, **plan.calibration}.items() if v}),
        data=plan.to_json(),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path}: the report cannot be written ({error})") from error
    return path


# -- small things -------------------------------------------------------------------------------


def _counts(plan: Plan, phase: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for row in (r for site in head_rows(plan, phase).values() for r in site):
        counts[row] = counts.get(row, 0) + 1
    return counts


def _evidence_cells(evidence: Evidence | None) -> tuple[str, str, str, str]:
    if evidence is None:
        return ("–",) * 4
    density = f"{statistics.fmean(evidence.density):.1%}" if evidence.density else "–"
    error = f"{max(evidence.error):.2%}" if evidence.error else "–"
    return density, error, f"{evidence.ms:.3f}", f"{evidence.dense_ms:.3f}"


def _as_table(value: Any) -> list[list[str]]:
    """Rows of text, the first being the head, from what a plan keeps as free-form data."""
    if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        value = [{"": k, **v} for k, v in value.items() if v]
    if isinstance(value, dict):
        return [["", "value"], *([str(k), _cell(v)] for k, v in value.items())] if value else []
    rows = [r for r in value if isinstance(r, dict)] if isinstance(value, list | tuple) else []
    if not rows:
        return []
    head = list(dict.fromkeys(k for r in rows for k in r))
    return [head, *([_cell(r.get(k)) for k in head] for r in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return str(value)


def _svg(drawing: Figure) -> str:
    buffer = io.StringIO()
    drawing.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]
