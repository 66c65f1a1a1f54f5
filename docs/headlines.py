"""README's table of measurements: a line or two of each main result.

A result is named by its file. What a line says is read from the file when README is generated.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from measurements import load, machine, title

Line = tuple[str, str]
"""What was measured, and the reading."""


def times(values: list[float | None]) -> str:
    """`1.70 / 1.80 ×`; a dash where there is no reading."""
    return " / ".join("–" if v is None else f"{v:.3g}" for v in values) + " ×"


def denoising(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/denoise_dit.py`: plans alone, the step cache alone, both."""
    what = str(title(data)).removesuffix(", compiled by repeated blocks")
    sparse = [r for r in data["rows"] if not r["skipped_in_a_row"]]
    if sparse:
        plans = ", ".join(f"`{row['plan']}`" for row in sparse)
        yield f"{what}: {plans}", times([row["speedup"] for row in sparse])
        what = "the same"
    for row in data["rows"]:
        if row["skipped_in_a_row"]:
            plan = "a step cache" if row["plan"] == "dense" else f"a step cache and `{row['plan']}`"
            yield f"{what}: {plan}", times([row["speedup"]])
            what = "the same"


def short() -> str:
    """The main results in a sentence, for README's first lines."""
    wan, hunyuan, llama = (
        load(name) for name in ("denoise-wan-h100", "denoise-hunyuan-h100", "prefill-8b-h100")
    )

    def best(data: dict[str, Any], cached: bool) -> str:
        some = [r["speedup"] for r in data["rows"] if bool(r["skipped_in_a_row"]) == cached]
        return f"{max(some):.2g} ×" if some else "–"

    longest = max(llama["forced"], key=lambda row: row["tokens"])
    told = (
        f"Measured at full size, with random weights and plans of given densities "
        f"({machine(wan).partition(',')[0]}): a whole denoising of Wan2.1-1.3B {best(wan, False)} "
        f"as fast, {best(wan, True)} with a step cache, of HunyuanVideo "
        f"{best(hunyuan, False)}; the first token of Llama-3.1-8B behind "
        f"{longest['tokens']:,} tokens {longest['ratio_best_dense']:.2g} ×."
    )
    return textwrap.fill(told, 120)


def fidelity(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/video_pareto.py`: calibrated plans beside running fewer steps."""
    by_curve = {row["curve"]: row for row in data["rows"]}
    levels = [k for k in data["rows"][0] if k.startswith("× at ")]
    of = " / ".join(k.split()[2] for k in levels)
    what = f"Denoising of {data['model']}, calibrated plans at a PSNR of {of} dB"
    for name, told in (("mixture", what), ("fewer steps", "the same by fewer steps")):
        readings = [by_curve[name][level] for level in levels]
        yield f"{told}, predicted for Wan2.1-1.3B 480p", times(readings)


def attention_calls(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/dit_methods.py`: the methods that read about a fifth, each by itself."""
    for shape, rows in groupby(data["rows"], lambda row: row["shape"]):
        some = [r for r in rows if 0.15 < r["density"] < 0.22 and "+" not in r["method"]]
        low, high = (pick(r["gain"] for r in some) for pick in (min, max))
        methods = len({r["method"] for r in some})
        what = f"One attention call at {shape} shapes, order and estimate included, density .15–.22"
        yield f"{what}, {methods} methods", f"{low:.3g} to {high:.3g} ×"


def block_lists(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/kernels.py`: whole calls over lists of one shape, densities falling."""
    for name, some in groupby(data["results"], lambda row: row["name"]):
        rows = [r for r in some if r["unit"] == [128, 128] and r["wanted"] != "mixed"]
        if len(rows) > 1:
            densities = " / ".join(f"{r['density']:.2g}" for r in rows)
            gains = [r["times_dense"]["call"] for r in rows]
            yield f"Attention over given blocks, {name}, density {densities}", times(gains)


def first_token(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/prefill_8b.py`."""
    for row in data["forced"]:
        what = f"First token, {title(data)}, {row['tokens']:,} tokens, density {row['density']:.2g}"
        yield what, times([row["ratio_best_dense"]])


def mixture(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/mixture.py`: calibrated plans beside dense and beside the best single method."""
    rows = data["table"]
    budgets = " / ".join(f"{r['budget']:g}" for r in rows)
    what = f"Prefill of tiny-llama, {data['tokens']:,} tokens, {data['batch']} at once"
    dense = times([r["dense_ms"] / r["mixture_ms"] for r in rows])
    yield f"{what}, calibrated with a budget of {budgets}", dense
    yield "the same, over the best single method", times([r["ratio"] for r in rows])


def spent(seconds: float, runs: float, of: str) -> str:
    return f"{seconds:.0f} s with compiling kernels, {runs:.3g} {of} without"


def calibration(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/calibrate_dit.py`."""
    row = data["rows"][0]
    runs = spent(row["calibration_s"], row["dense_runs"], "dense runs")
    yield f"{title(data)}, {row['layers']} layers, {row['steps']} steps, without its check", runs


def calibration_8b(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/prefill_8b.py --calibrate`."""
    for row in data["calibrations"][:1]:
        cost = spent(row["seconds"], row["dense_prefills"], "dense prefills")
        yield f"Calibrating {title(data)}, {row['tokens']:,} tokens", cost


def patch_cost(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/overhead_dit.py`."""
    slower = " / ".join(f"{row['slower_percent']:+.2f}" for row in data["rows"])
    yield f"{title(data)}, all dense by plan, eager / compiled", f"{slower} % time"


def released(data: dict[str, Any]) -> Iterator[Line]:
    """`benchmarks/peers.py`: calls of the longest prompt at the captured mass of the release or,
    where that was alike by itself, at its settings; with the release's waits for its host, and
    without.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    release = data["rows"][0]
    for row in data["rows"]:
        if not row["like release"]:
            release = row
            continue
        work = release["device works, ms"] / row["device works, ms"]
        some = found.setdefault(release["code"], {})
        some[release["setting"]] = row | {"× its work": work}
        longest = max(r["tokens"] for r in some.values())
        found[release["code"]] = {k: r for k, r in some.items() if r["tokens"] == longest}
    for code, rows in found.items():
        (tokens, own), *_ = {(r["tokens"], r["code"]) for r in rows.values()}
        whole, work = (times([r[k] for r in rows.values()]) for k in ("× release", "× its work"))
        what = f"One attention call, {tokens:,} tokens, `{own}` beside released {code}"
        yield f"{what}: {'; '.join(rows)}", f"{whole} its speed, {work} by the device's work alone"


MAIN: dict[str, Callable[[dict[str, Any]], Iterator[Line]]] = {
    "denoise-wan-h100": denoising,
    "denoise-hunyuan-h100": denoising,
    "denoise-hunyuan-cached-h200": denoising,
    "video-pareto-h200": fidelity,
    "dit-methods-h200": attention_calls,
    "kernels-h200": block_lists,
    "peers-h200": released,
    "prefill-8b-h100": first_token,
    "mixture-16k-h200": mixture,
    "mixture-32k-h200": mixture,
    "mixture-8k-cpu": mixture,
    "calibrate-wan-h100": calibration,
    "calibrate-8b-h100": calibration_8b,
    "overhead-dit-h100": patch_cost,
}
"""The results that README tells of, in its order."""


def lines() -> str:
    """The table."""
    rows = ["| what | beside dense | on |", "|---|---|---|"]
    for stem, read in MAIN.items():
        data = load(stem)
        where = machine(data).partition(", torch")[0]
        rows += [f"| {what} | {reading} | {where} |" for what, reading in read(data)]
    return "\n".join(rows)
