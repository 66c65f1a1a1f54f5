"""The page of measurements: every file under benchmarks/results as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
KERNELS = (
    "Attention alone, random data, bfloat16, by `benchmarks/kernels.py`. The whole call lowers a "
    "fresh index on the backend that dispatch chooses; choosing what to read comes on top. Rates: "
    "TFLOP/s of the computed blocks over those of dense cuDNN. Mixed: a quarter of the heads dense."
)
FORCED = (
    "Time to first token with one method forced on every head (`benchmarks/prefill_8b.py`). The "
    "weights are random: this shows what the machinery reaches at that density, not quality."
)
MIXTURE = (
    "For each budget the fastest single setting whose worst-task error is no larger than the "
    "mixture's; dense where no single setting was both that good and faster "
    "(`benchmarks/mixture.py`). Unless the note says otherwise, all sides answered the same "
    "held-out prompts and were timed in turns in one process. Budgets that are no round number are "
    "the errors of single settings that no mixture had beaten before. Settings that are faster "
    "than every mixture of no larger error are under `losses` in the file, and beside every "
    "setting stands why calibration refuses its method, where it does. Rules of all sides hold for "
    "every row."
)
CALIBRATION = (
    "One calibration of random weights, whose attention is spread: what it finds there is small, "
    "what it costs is not affected (`benchmarks/prefill_8b.py --calibrate`)."
)


def cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return cell("" if value is None else value)


# A result is what the scripts in benchmarks/ write or `accelkit bench --json` prints; a `title` and
# a `note` may be added by hand.
def load(stem: str) -> dict[str, Any]:
    """One shipped result."""
    data = json.loads((RESULTS / f"{stem}.json").read_text("utf-8"))
    return {**data[0], "results": data} if isinstance(data, list) else data


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    keys = [k for k in rows[0] if not isinstance(rows[0][k], dict | list)]
    lines = ["| " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(number(r.get(k)) for k in keys) + " |" for r in rows]
    return "\n".join(lines)


def rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Table rows of a result, whichever script wrote it."""
    if "cases" in data:
        return [row for case in data["cases"].values() for row in fit_rows(case)]
    if "calibrations" in data:
        return [calibration_row(row) for row in data["calibrations"]]
    if "singles" in data:
        return [mixture_row(row) for row in data["table"]]
    rows = data.get("rows") or data.get("forced") or data["results"]
    if "median_ms" in rows[0]:
        return [speed_row(row) for row in rows]
    if "dense_own_ms" in rows[0]:
        return [forced_row(row) for row in rows]
    if "gain" in rows[0]:
        return [dit_row(row) for row in rows]
    return [kernel_row(row) if "ratio" in row else row for row in rows]


def fit_rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    """A fit of `benchmarks/cost_fit.py` and how each of its terms predicts what it did not see."""
    fit = {
        "layer": case["shape"],
        "tokens": case["tokens"],
        "fit, s": case["fit_s"],
        "of it compiling": case["compiling_s"],
    }
    terms = case.get("terms") or {"(not judged)": {}}
    return [
        fit
        | {"term": term, "rows": found.get("rows"), "within 10 %": found.get("within")}
        | {"worst": found.get("worst"), "of": found.get("worst_row")}
        for term, found in terms.items()
    ]


def speed_row(m: dict[str, Any]) -> dict[str, Any]:
    """A length of `accelkit bench`."""
    return {
        "tokens": m["length"],
        "own path, ms": m["median_ms"]["own"],
        "best dense, ms": m["median_ms"][m["best_dense"]],
        "which": m["best_dense"],
        "sparse, ms": m["median_ms"]["sparse"],
        "density": m["density"],
        "× own": m["speedup_vs_own"],
        "× best dense": m["speedup_vs_best_dense"],
    }


def forced_row(m: dict[str, Any]) -> dict[str, Any]:
    """A length of `benchmarks/prefill_8b.py`."""
    return {
        "tokens": m["tokens"],
        "own path, ms": m["dense_own_ms"],
        "cuDNN, ms": m["dense_cudnn_ms"],
        "sparse, ms": m["sparse_ms"],
        "density": m["density"],
        "× own": m["ratio_own"],
        "× best dense": m["ratio_best_dense"],
        "peak GiB": m["peak_gb"],
    }


def calibration_row(m: dict[str, Any]) -> dict[str, Any]:
    """A calibration of `benchmarks/prefill_8b.py --calibrate`."""
    return {
        "tokens": m["tokens"],
        "preset": m["preset"],
        "seconds": m["seconds"],
        "in dense prefills": m["dense_prefills"],
        "peak GiB": m["peak_gb"],
        "peak, × dense": m.get("peak_over_dense"),
        "error measured": m["measured"]["measured_error"],
        "prefill, × dense": m["measured"].get("prefill_speedup"),
    }


def mixture_row(m: dict[str, Any]) -> dict[str, Any]:
    """A budget of `benchmarks/mixture.py`."""
    return {
        "budget": m["budget"],
        "worst error": m["worst_error"],
        "on one prompt": m["worst_prompt"],
        "answers a task": m.get("answers"),
        "points lost": m.get("points_lost"),
        "mixture, ms": m["mixture_ms"],
        "dense, ms": m["dense_ms"],
        "best single": m["best_single"],
        "its error": m.get("best_single_error"),
        "its ms": m["best_single_ms"],
        "× best single": m["ratio"],
    }


def kernel_row(m: dict[str, Any]) -> dict[str, Any]:
    """A case of `benchmarks/kernels.py`: milliseconds, and rates relative to dense cuDNN."""
    ms, ratio = m["ms"], m["ratio"]
    return {
        "shape": m["name"],
        "unit": "×".join(map(str, m["unit"])),
        "density": number(m["density"]) + (f" ({w})" if isinstance(w := m["wanted"], str) else ""),
        "cuDNN dense, ms": ms["dense"],
        "whole call, ms": ms["call"],
        **{f"{name}, rate": ratio.get(name) for name in ("triton", "gluon", "fa4", "flex")},
        "× cuDNN": m["times_dense"]["call"],
    }


def part_row(m: dict[str, Any]) -> dict[str, Any]:
    """What `benchmarks/kernels.py` measures beside the dense time of a shape."""
    return {
        "what": m["what"],
        "ms": min(m["ms"].values()),
        "dense, ms": m["dense_ms"],
        "share of dense": m["share_of_dense"],
        "× dense": m["times_dense"],
    }


def dit_row(m: dict[str, Any]) -> dict[str, Any]:
    """A case of `benchmarks/dit_methods.py`: one attention call."""
    return {
        "shape": m["shape"],
        "method": m["method"],
        "density": m["density"],
        "cuDNN dense, ms": m["dense_ms"],
        "whole call, ms": m["call_ms"],
        "kernel, ms": m["kernel_ms"],
        "orders, ms": m["order_ms"],
        "estimate, ms": m.get("estimate_ms"),
        "× cuDNN": m["gain"],
        "search step, ms": m["search_ms"],
        "error": m["error"],
    }


def releases(data: dict[str, Any]) -> str:
    """The checkouts that `benchmarks/peers.py` ran, how, and what did not run."""
    lines = []
    for name, about in data["peers"].items():
        how = "; ".join(filter(None, (about["mended"], about["remark"])))
        lines.append(f"- `{name}`, commit {about['commit']}: {how}")
    lines += [f"- did not run: {cell(text)}" for text in data["failed"]]
    return "\n".join(lines)


def machine(data: dict[str, Any]) -> str:
    """Where a result was measured, in a line."""
    facts = data.get("environment") or data
    gpu = facts.get("gpu")
    threads = f"{facts.get('cpu') or 'CPU'}, {facts.get('cpu_threads')} threads"
    threads = threads if "cpu_threads" in facts else ""
    where = gpu["name"] if isinstance(gpu, dict) else gpu or threads
    versions = [f"{k} {facts[k]}" for k in ("torch", "triton", "transformers") if facts.get(k)]
    return ", ".join(filter(None, [where, *versions]))


def title(data: dict[str, Any]) -> str | None:
    """What a result is about."""
    if "singles" in data:
        return f"{data['model']}, {data['tokens']} tokens, {data['batch']} at once, {data['dtype']}"
    if "cases" in data:
        return "Fitting the cost table (`benchmarks/cost_fit.py`), and predictions of unseen calls"
    return data.get("title") or data.get("model")


def page() -> str:
    """Every shipped result with the machine it was measured on."""
    parts = ["# Measurements"]
    for stem in sorted(path.stem for path in RESULTS.glob("*.json")):
        data = load(stem)
        parts.append(
            f"**{title(data) or stem}**: {machine(data)} (`benchmarks/results/{stem}.json`)"
        )
        parts.append(table(rows_of(data)))
        if data.get("parts"):
            parts += [KERNELS, table([part_row(row) for row in data["parts"]])]
        for key, text in (("forced", FORCED), ("singles", MIXTURE), ("calibrations", CALIBRATION)):
            if key in data:
                parts.append(text)
        if data.get("peers"):
            parts.append(releases(data))
        if data.get("note"):
            parts.append(data["note"])
    return "\n\n".join(parts) + "\n"
