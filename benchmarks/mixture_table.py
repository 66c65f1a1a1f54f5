"""What the readings of `mixture.py` say: plain data in, plain data out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DENSE = "dense"
QUALITY = ("prompts", "worst_error", "worst_prompt", "answers", "points_lost", "tasks", "stopped")
"""What a row holds of the prompts it was run on."""
SAME = ("model", "tokens", "dtype")
"""What results must share to be put together."""
MOST_WIDER = 3.0
"""How much wider a budget may be than that of the mixture from which it is scaled."""
LARGEST = 0.9

Row = dict[str, Any]


def name_of(mixture: Row) -> str:
    """A mixture among the settings that are timed together."""
    return f"mixture {mixture['budget']:g} {mixture['plan'][:8]}"


def shares(found: Row) -> dict[str, float]:
    """Milliseconds ÷ those of dense prefills of everything that was timed together."""
    if "speed" not in found:
        return {}
    ms = {name: statistics.median(times) for name, times in found["speed"]["ms"].items()}
    return {name: one / ms[DENSE] for name, one in ms.items()}


def share_of(mixture: Row, share: dict[str, float]) -> float | None:
    """A mixture's time ÷ dense; 1 where calibration chose dense, whatever the clock read. None: it
    was not timed with the others yet.
    """
    return 1.0 if mixture["stopped"] else share.get(name_of(mixture))


def verdict(found: Row) -> list[Row]:
    """For each mixture that was timed the fastest single setting whose worst-task error is no
    larger.
    """
    share, table = shares(found), []
    if not share:
        return []
    whole = statistics.median(found["speed"]["ms"][DENSE])
    for mixture in sorted(found["mixtures"], key=lambda m: m["budget"]):
        mine = share_of(mixture, share)
        if mine is None:
            continue
        rivals = [s for s in timed(found) if s["worst_error"] <= mixture["worst_error"]]
        best = min(rivals, key=lambda s: share[s["setting"]], default=None)
        if best is not None and share[best["setting"]] >= 1:
            best = None
        theirs = 1.0 if best is None else share[best["setting"]]
        kept = ("budget", "worst_error", "worst_prompt", "answers", "points_lost")
        table.append(
            {k: mixture[k] for k in kept}
            | {
                "mixture_ms": whole * mine,
                "dense_ms": whole,
                "best_single": DENSE if best is None else best["setting"],
                "best_single_error": 0.0 if best is None else best["worst_error"],
                "best_single_points_lost": 0.0 if best is None else best["points_lost"],
                "best_single_ms": whole * theirs,
                "ratio": theirs / mine,
            }
        )
    return table


def losses(found: Row) -> list[Row]:
    """Single settings that are faster than dense and than every mixture of no larger error."""
    share, lost = shares(found), []
    for s in timed(found):
        no_worse = [m for m in found["mixtures"] if m["worst_error"] <= s["worst_error"]]
        mine = [one for m in no_worse if (one := share_of(m, share)) is not None]
        ratio = min([1.0, *mine]) / share[s["setting"]]
        if ratio > 1:
            kept = {k: s[k] for k in ("setting", "worst_error", "answers", "points_lost")}
            lost.append({**kept, "ratio": ratio})
    return lost


def matching(mixtures: Sequence[Row], error: float) -> float:
    """The budget at which a mixture should lose as much as this: scaled from the mixture that comes
    nearest from below, or else from above.
    """
    known = [m for m in mixtures if m["stopped"] is None and m["worst_error"]]
    known.sort(key=lambda m: m["worst_error"])
    near = [m for m in known if m["worst_error"] <= error][-1:] or known[:1]
    budget = error
    if near:
        budget = near[0]["budget"] * min(error / near[0]["worst_error"], MOST_WIDER)
    return float(f"{min(budget, LARGEST):.3g}")


def timed(found: Row) -> list[Row]:
    """The settings of single methods that were timed together with the mixtures."""
    share = shares(found)
    return [s for s in found["singles"] if s["setting"] in share and s["stopped"] is None]


def rivals(found: Row, most: float) -> list[Row]:
    """Settings worth timing together: followed to the end, and by their own first reading no slower
    than this share of dense.
    """
    return [s for s in found["singles"] if s["stopped"] is None and s["ms"] <= most * s["dense_ms"]]


def told_refusals(found: Row) -> None:
    """Write beside every setting why calibration refuses its method, None where it does not."""
    refused: dict[str, str] = {}
    for mixture in found["mixtures"]:
        refused |= mixture["calibration"]["refused"]
    for single in found["singles"]:
        single["refused"] = refused.get(single["method"])


def same(one: Row, other: Row, where: str) -> None:
    """Raise `SystemExit` where two results are about different things."""
    differ = [f"{k} ({one[k]}, {other[k]})" for k in SAME if one[k] != other[k]]
    if differ:
        raise SystemExit(f"{where}: {', '.join(differ)} differ between the parts")


def joined(paths: Sequence[Path]) -> Row:
    """Several results as one. The first says what it is about; later ones add rows, and replace
    what a row says of quality where they asked more prompts about the same plan.
    """
    parts = [json.loads(p.read_text("utf-8")) for p in paths]
    whole = parts[0]
    for part in parts[1:]:
        same(whole, part, "--join")
        other = None if part["environment"] == whole["environment"] else part["environment"]
        _add(whole["singles"], part["singles"], "setting", other)
        _add(whole["mixtures"], part["mixtures"], "plan", other)
        if "speed" in part:
            whole["speed"] = part["speed"]
    return whole


def _add(rows: list[Row], more: Sequence[Row], key: str, environment: Row | None) -> None:
    known = {row[key]: row for row in rows}
    for row in more:
        mine = known.get(row[key])
        asked_on = {} if environment is None else {"asked_on": environment}
        if mine is None:
            rows.append(row | asked_on)
        elif row["prompts"] > mine["prompts"]:
            mine |= {k: row[k] for k in QUALITY} | asked_on


def save(found: Row, path: Path) -> None:
    """Write everything with the table that follows from it."""
    told_refusals(found)
    found["table"], found["losses"] = verdict(found), losses(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")


def shown(found: Row) -> str:
    """Lines for whoever waits."""
    lines = [
        f"budget {row['budget']:<6g} error {row['worst_error']:.4f}  mixture "
        f"{row['mixture_ms']:.1f} ms  best single {row['best_single']} "
        f"{row['best_single_ms']:.1f} ms  dense {row['dense_ms']:.1f} ms  {row['ratio']:.3f}×"
        for row in found["table"]
    ]
    lines += [
        f"faster by {row['ratio']:.3f} than the mixtures at its error {row['worst_error']:.4f}: "
        f"{row['setting']}"
        for row in found["losses"]
    ]
    return "\n".join(lines)
