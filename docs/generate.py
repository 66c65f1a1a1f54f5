#!/usr/bin/env python3
"""What the code knows, the documentation copies: schema, methods, command line, measurements.

    python docs/generate.py            write accelkit/plan.schema.json, README's marked parts, pages
    python docs/generate.py --check    write nothing; exit 1 if the schema or README is out of date

Pages made here and kept out of git: docs/methods/*.md and docs/cli.md. mkdocs runs the script as a
hook, so a site is never built from old pages.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCHEMA = ROOT / "accelkit" / "plan.schema.json"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
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
    "(`benchmarks/mixture.py`). All sides answered the same held-out prompts, and were timed in "
    "turns in one process. Budgets that are no round number are the errors of single settings that "
    "no mixture had beaten before. Settings that are faster than every mixture of no larger error "
    "are under `losses` in the file, and beside every setting stands why calibration refuses its "
    "method, where it does."
)
CALIBRATION = (
    "One calibration of random weights, whose attention is spread: what it finds there is small, "
    "what it costs is not affected (`benchmarks/prefill_8b.py --calibrate`)."
)
KERNEL_COLUMNS = ("triton", "gluon", "fa4", "flex")
SHORT = 6
"""Rows of a table in README."""
DETAILS = (
    "calibrate-8b-h200", "cudnn-frontend", "dit-methods-h100", "eight-bit-forms", "kernel-variants",
    "kernels-flex", "kernels-h100", "profiles", "video-target",
)  # fmt: skip
"""Beginnings of the names of results that README leaves to docs/benchmarks.md."""
MARK = re.compile(r"(<!-- generated:(\w+) -->\n).*?(<!-- /generated -->)", re.S)


def schema() -> str:
    """JSON Schema of `accelkit_plan.json`, from the pydantic model that reads and writes it."""
    from accelkit.patches.plan import Plan

    whole = Plan.model_json_schema(mode="serialization")
    anything = {"additionalProperties": True, "type": "object"}
    method = {"$ref": "#/$defs/Method"}

    def name_methods(node: Any) -> Any:
        if isinstance(node, list):
            return [name_methods(part) for part in node]
        if isinstance(node, dict):
            return method if node == anything else {k: name_methods(v) for k, v in node.items()}
        return node

    for part in ("Policy", "LayerPlan"):
        whole["$defs"][part] = name_methods(whole["$defs"][part])
    whole["$defs"]["Method"] = {
        "title": "Method",
        "description": "A method by its kind, as `accelkit methods` lists it, and its numbers.",
        "type": "object",
        "properties": {"kind": {"type": "string", "title": "Kind"}},
        "required": ["kind"],
        "additionalProperties": True,
    }
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "accelkit plan"}
    return json.dumps(head | {k: v for k, v in whole.items() if k != "title"}, indent=1) + "\n"


def method_classes() -> list[Any]:
    """The classes of the methods folder, without those that other installed packages add."""
    from accelkit.patches.method import load, names

    return [load(name) for name in names() if ":" not in name]


def story(cls: Any) -> tuple[str, str]:
    """First paragraph and the rest of a method's docstring: its module's, or the class's own."""
    text = import_module(cls.__module__).__doc__ or cls.__doc__ or ""
    first, _, rest = inspect.cleandoc(text).partition("\n\n")
    return " ".join(first.split()), rest


def cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def method_page(cls: Any) -> str:
    """One method: its story, what it answers, its fields."""
    from accelkit.doctor import explain

    first, rest = story(cls)
    name = cls.__module__.rpartition(".")[2]
    out = [f"# {cls.__name__}", first]
    facts = [f"`accelkit.method({name!r})`"]
    facts += ["phases: " + ", ".join(cls.phases), "answers: " + ", ".join(sorted(cls.answers()))]
    if cls.dial:
        values = ", ".join(f"{v:g}" for v in cls.dial.values)
        facts.append(f"calibration tries `{cls.dial.field}` = {values}")
    out.append("\n".join(f"- {f}" for f in facts))
    if rest:
        out.append(rest)
    if fields := explain(name)["fields"]:
        told = any(field["meaning"] for field in fields)
        rows = ["| field | values | default |" + " |" * told, "|---|---|---|" + "---|" * told]
        for field in fields:
            row = f"| `{field['field']}` | {cell(field['values'])} | `{field['default']!r}` |"
            rows.append(row + f" {cell(field['meaning'])} |" * told)
        out.append("\n".join(rows))
    return "\n\n".join(out) + "\n"


def methods_table(link: str) -> str:
    """All methods, a line each."""
    rows = ["| method | what it does | answers | phases |", "|---|---|---|---|"]
    for cls in method_classes():
        name = cls.__module__.rpartition(".")[2]
        answers = ", ".join(sorted(cls.answers()))
        title = f"[`{name}`]({link.format(name)})" if link else f"`{name}`"
        rows.append(f"| {title} | {cell(story(cls)[0])} | {answers} | {', '.join(cls.phases)} |")
    return "\n".join(rows)


def cli_page() -> str:
    """The command line's own help, as typer writes it."""
    command = [sys.executable, "-m", "typer", "accelkit.cli", "utils", "docs", "--name", "accelkit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return "# Command line\n\n" + done.stdout.partition("\n")[2].strip() + "\n"


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return cell("" if value is None else value)


# A result is what the scripts in benchmarks/ write or `accelkit bench --json` prints; a `title` and
# a `note` may be added by hand.
def results() -> list[tuple[Path, dict[str, Any]]]:
    """The shipped measurements, in the order of their names."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text("utf-8"))
        found.append((path, {**data[0], "results": data} if isinstance(data, list) else data))
    return found


def table(rows: list[dict[str, Any]], most: int | None = None) -> str:
    """Rows with the same keys as a Markdown table; of more than `most` the first ones."""
    keys = [k for k in rows[0] if not isinstance(rows[0][k], dict | list)]
    lines = ["| " + " | ".join(k.replace("_", " ") for k in keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(number(r.get(k)) for k in keys) + " |" for r in rows[:most]]
    if rest := len(rows[most:]) if most is not None else 0:
        lines += ["", f"{rest} more in [docs/benchmarks.md](docs/benchmarks.md)."]
    return "\n".join(lines)


def rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Table rows of a result, whichever script wrote it."""
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
    return data.get("title") or data.get("model")


def benchmarks(most: int | None = None) -> str:
    """Shipped results with the machine they were measured on: all, or the main ones in tables of
    `most` rows.
    """
    parts = []
    for path, data in results():
        if most and path.stem.startswith(DETAILS):
            continue
        parts.append(
            f"**{title(data) or path.stem}**: {machine(data)} (`benchmarks/results/{path.name}`)"
        )
        rows = rows_of(data)
        parts.append(table(rows, most))
        if data.get("parts"):
            parts += [KERNELS, table([part_row(row) for row in data["parts"]])]
        for key, text in (("forced", FORCED), ("singles", MIXTURE), ("calibrations", CALIBRATION)):
            if key in data:
                parts.append(text)
        if data.get("note"):
            parts.append(data["note"])
    return "\n\n".join(parts) or "No measurement is shipped yet."


def readme() -> str:
    """README with its marked parts renewed."""
    parts = {
        "methods": lambda: methods_table("accelkit/patches/methods/{}.py"),
        "benchmarks": lambda: benchmarks(SHORT),
    }
    text = README.read_text("utf-8")
    return MARK.sub(lambda m: m[1] + parts[m[2]]() + "\n" + m[3], text)


def pages() -> dict[Path, str]:
    """The pages that exist only for the site."""
    made = {
        DOCS / "methods" / "index.md": "# Methods\n\n" + methods_table("{}.md") + "\n",
        DOCS / "cli.md": cli_page(),
    }
    for cls in method_classes():
        made[DOCS / "methods" / f"{cls.__module__.rpartition('.')[2]}.md"] = method_page(cls)
    return made


def kept() -> dict[Path, str]:
    """The generated files that are kept in git."""
    page = f"# Measurements\n\n{benchmarks()}\n"
    return {SCHEMA: schema(), README: readme(), DOCS / "benchmarks.md": page}


def on_pre_build(config: Any) -> None:
    """mkdocs calls this before every build."""
    main([])


def main(arguments: list[str]) -> int:
    """Write, or with `--check` compare."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if "--check" in arguments:
        old = [p for p, text in kept().items() if not p.exists() or p.read_text("utf-8") != text]
        for path in old:
            print(f"{path.relative_to(ROOT)} is out of date; run `make generate`")
        return 1 if old else 0
    for path, text in (kept() | pages()).items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text("utf-8") != text:  # mkdocs serve watches the folder
            path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
