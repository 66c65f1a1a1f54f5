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
sys.path[:0] = [str(ROOT), str(DOCS)]  # mkdocs loads this file by its path alone

import headlines  # noqa: E402
import measurements  # noqa: E402
from measurements import cell  # noqa: E402

SCHEMA = ROOT / "accelkit" / "plan.schema.json"
README = ROOT / "README.md"
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
    """The command line's own help, as typer writes it, exit codes and environment variables."""
    from accelkit import doctor, errors

    command = [sys.executable, "-m", "typer", "accelkit.cli", "utils", "docs", "--name", "accelkit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    codes = ["| exit code | error |", "|---|---|"]
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.AccelkitError):
            codes.append(f"| {error.exit_code} | `{name}`: {cell(inspect.getdoc(error) or '')} |")
    variables = ["| environment variable | meaning |", "|---|---|"]
    variables += [f"| `{name}` | {cell(text)} |" for name, text in doctor.VARIABLES.items()]
    parts = ["# Command line", done.stdout.partition("\n")[2].strip(), "\n".join(codes)]
    return "\n\n".join([*parts, "\n".join(variables)]) + "\n"


def readme() -> str:
    """README with its marked parts renewed."""
    parts = {
        "methods": lambda: methods_table("accelkit/patches/methods/{}.py"),
        "benchmarks": headlines.lines,
        "headline": headlines.short,
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
    return {SCHEMA: schema(), README: readme(), DOCS / "benchmarks.md": measurements.page()}


def on_pre_build(config: Any) -> None:
    """mkdocs calls this before every build."""
    main([])


def main(arguments: list[str]) -> int:
    """Write, or with `--check` compare."""
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
