"""The floor plan, held by reading imports: cli → commands → calibration → patches → kernels, never
upwards.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "accelkit"
FILES = sorted(PACKAGE.rglob("*.py"))
METHOD_FILES = sorted((PACKAGE / "patches" / "methods").glob("[!_]*.py"))

ANYWHERE = {"errors"}  # knows nothing and may be known by everything
FLOORS = {
    "kernels": 0,
    "patches": 1,
    "calibration": 2,
    "console": 3,
    "doctor": 3,
    "commands": 4,
    "cli": 5,
    "__main__": 6,
}

# Inside patches, from the bottom: a file imports its own room and those before it.
ROOMS = {
    "call": 0,
    "state": 1,
    "method": 1,
    "parts": 2,
    "methods": 3,
    "plan_file": 3,
    "plan": 4,
    "plan_check": 5,
    "sites": 5,
    "adapters": 6,
    "patch": 7,
}
# Inside calibration, from the bottom; prefill and denoise share what stands above them and do not
# know each other. Rooms of one number do not import one another.
CALIBRATION_ROOMS = {
    "timing": 0,
    "memory": 0,
    "results": 0,
    "journal": 0,
    "capture": 0,
    "profile": 0,
    "search": 0,
    "show": 0,
    "session": 1,
    "evaluation": 1,
    "candidates": 1,
    "data": 2,
    "fit": 2,
    "refine": 2,
    "assemble": 2,
    "stages": 3,
    "prefill": 4,
    "denoise": 4,
    "opening": 5,
    "bench": 5,
    "compare": 5,
    "calibrate": 6,
}
EXCEPTIONS = {
    # `Plan.check(model)` needs the model's side of the comparison, inside the function.
    ("accelkit.patches.plan", "accelkit.patches.adapters"),
    ("accelkit.patches.plan", "accelkit.patches.plan_check"),
    # The registry knows its folder's name.
    ("accelkit.patches.method", "accelkit.patches.methods"),
    # `state` keeps one memory for each policy of a plan; types only.
    ("accelkit.patches.state", "accelkit.patches.plan"),
}

MODEL_LIBRARIES = {"transformers", "diffusers"}
LOADERS = ("accelkit.calibration", "accelkit.doctor", "accelkit.patches.patch")
METHOD_MAY_IMPORT = (
    "accelkit.errors",
    "accelkit.kernels",
    "accelkit.patches.call",
    "accelkit.patches.method",
    "accelkit.patches.parts",
)
METHOD_LIBRARIES = {"torch", "pydantic", "numpy"}


@dataclass(frozen=True)
class Import:
    """One imported name: where, what, and whether it happens when the module loads."""

    source: str
    target: str
    line: int
    lazy: bool
    typing: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(f): f for f in FILES}


def resolve(name: str) -> str:
    """`accelkit.patches.plan.Plan` → `accelkit.patches.plan`; names of other packages stay."""
    parts = name.split(".")
    while parts[0] == "accelkit" and len(parts) > 1 and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def named(node: ast.AST, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        stem = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{stem}.{alias.name}" for alias in node.names]
    if (  # import_module("accelkit.patches.adapters.transformers")
        isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        return [str(node.args[0].value)]
    return []


def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[tuple[ast.AST, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield part, inside, True
                yield from walk(part, inside, True)
            for part in child.orelse:
                yield part, inside, typing
                yield from walk(part, inside, typing)
            continue
        yield child, inside, typing
        yield from walk(child, inside, typing)


@cache
def imports() -> tuple[Import, ...]:
    found = []
    for source, path in MODULES.items():
        package = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
        for node, lazy, typing in walk(ast.parse(path.read_text("utf-8")), False, False):
            for name in named(node, package):
                line = getattr(node, "lineno", 0)
                found.append(Import(source, resolve(name), line, lazy, typing))
    return tuple(found)


def under(module: str, *folders: str) -> bool:
    return any(module == f or module.startswith(f + ".") for f in folders)


def excepted(edge: Import) -> bool:
    if edge.lazy or edge.typing:
        return any(under(edge.source, s) and under(edge.target, t) for s, t in EXCEPTIONS)
    return False


def report(edges: list[Import], rule: str) -> None:
    assert not edges, rule + ":\n  " + "\n  ".join(map(str, edges))


def test_every_file_has_a_floor():
    tops = {m.split(".")[1] for m in MODULES if "." in m}
    strangers = sorted(tops - FLOORS.keys() - ANYWHERE)
    assert not strangers, f"no floor for {strangers}: add them to FLOORS, and to the floor plan"


def test_nothing_imports_upwards():
    def floor(module: str) -> int | None:
        parts = module.split(".")
        return FLOORS.get(parts[1]) if parts[0] == "accelkit" and len(parts) > 1 else None

    wrong = []
    for edge in imports():
        below, above = floor(edge.source), floor(edge.target)
        if edge.target == "accelkit" and edge.source != "accelkit":
            above = None  # the bare package: only its version may be asked for
        if below is not None and above is not None and above > below:
            wrong.append(edge)
        if edge.source.partition(".")[2] in ANYWHERE and under(edge.target, "accelkit"):
            wrong.append(edge)
    report(wrong, "a floor imports only the floors below it")


def test_rooms_of_patches():
    def room(module: str) -> int | None:
        parts = module.split(".")
        inside = parts[:2] == ["accelkit", "patches"] and len(parts) > 2
        return ROOMS[parts[2]] if inside else None

    known = {m.split(".")[2] for m in MODULES if m.startswith("accelkit.patches.")}
    assert known <= ROOMS.keys(), f"no room for {sorted(known - ROOMS.keys())} inside patches"
    wrong = []
    for edge in imports():
        source, target = room(edge.source), room(edge.target)
        if source is None or target is None or excepted(edge):
            continue
        if target > source:
            wrong.append(edge)
    report(wrong, "inside patches: patch → adapters → sites → plan → method → call")


def test_rooms_of_calibration():
    def room(module: str) -> str | None:
        parts = module.split(".")
        return parts[2] if parts[:2] == ["accelkit", "calibration"] and len(parts) > 2 else None

    known = {room(m) for m in MODULES} - {None}
    strangers = sorted(known ^ CALIBRATION_ROOMS.keys())
    assert not strangers, f"rooms and folders of calibration differ: {strangers}"
    wrong = []
    for edge in imports():
        source, target = room(edge.source), room(edge.target)
        if source is None or target is None or source == target:
            continue
        if CALIBRATION_ROOMS[target] >= CALIBRATION_ROOMS[source]:
            wrong.append(edge)
    report(
        wrong,
        "inside calibration: calibrate → bench → prefill, denoise → stages → … → timing",
    )


def test_methods_know_little():
    wrong = []
    for edge in imports():
        if not under(edge.source, "accelkit.patches.methods") or edge.target == edge.source:
            continue
        top = edge.target.partition(".")[0]
        own = under(edge.target, *METHOD_MAY_IMPORT)
        if not own and top not in METHOD_LIBRARIES | sys.stdlib_module_names:
            wrong.append(edge)
    report(wrong, f"a method file imports {', '.join(METHOD_MAY_IMPORT)} and nothing else of ours")


def test_model_libraries_stay_with_their_adapters():
    wrong = []
    for edge in imports():
        library = edge.target.partition(".")[0]
        if library not in MODEL_LIBRARIES or edge.typing:
            continue
        home = edge.source == f"accelkit.patches.adapters.{library}"
        loader = edge.lazy and under(edge.source, *LOADERS, "accelkit.patches.adapters")
        if not home and not loader:
            wrong.append(edge)
    report(wrong, "transformers and diffusers: in their adapter, or lazily where models are loaded")


def test_triton_stays_in_its_folder():
    wrong = [
        edge
        for edge in imports()
        if edge.target.partition(".")[0] == "triton"
        and not under(edge.source, "accelkit.kernels._triton")
        and not edge.typing
    ]
    report(wrong, "triton is imported in kernels/_triton only")


def test_fast_kernels_are_imported_lazily():
    inside = ("accelkit.kernels._triton", "accelkit.kernels._extern")
    wrong = [
        edge
        for edge in imports()
        if under(edge.target, *inside)
        and not under(edge.source, *inside)
        and not (edge.lazy or edge.typing)
    ]
    report(wrong, "kernels/_triton and _extern load on first use")


def test_no_circles():
    """Between modules, at load time; a package's `__init__` counts as itself."""
    graph: dict[str, set[str]] = {m: set() for m in MODULES}
    for edge in imports():
        if edge.target in graph and edge.target != edge.source and not edge.lazy | edge.typing:
            graph[edge.source].add(edge.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail("circle: " + " → ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_files_stay_short():
    written = [f for d in ("accelkit", "benchmarks", "docs", "examples", "tests")
               for f in (ROOT / d).rglob("*.py")]  # fmt: skip
    long = {str(f.relative_to(ROOT)): lines(f) for f in written if lines(f) > 500}
    assert not long, f"over 500 lines, what would a stranger split off? {long}"
    methods = {f.name: lines(f) for f in METHOD_FILES if lines(f) > 200}
    assert not methods, f"over 200 lines, does it read like the paper's method section? {methods}"
    examples = {f.name: lines(f) for f in (ROOT / "examples").glob("*.py") if lines(f) >= 60}
    assert not examples, f"examples stay under 60 lines: {examples}"


def test_public_names_have_docstrings():
    """Modules, classes and functions; a function of one statement may speak for itself."""
    bare = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text("utf-8"))
        if tree.body and not ast.get_docstring(tree):
            bare.append(module)
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None and (
                isinstance(node, ast.ClassDef) or len(node.body) > 1
            ):
                bare.append(f"{module}.{node.name} (line {node.lineno})")
    assert not bare, "no docstring:\n  " + "\n  ".join(bare)


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_plans_and_methods_wakes_no_torch():
    """Each method loads, and a plan validates, in a process where torch cannot be imported."""
    out = run("""
import sys
for name in ("torch", "transformers", "diffusers", "triton"):
    sys.modules[name] = None
import accelkit
accelkit.Plan.from_json
broken = []
for name in accelkit.methods():
    try:
        accelkit.method(name)()
    except ImportError as error:
        broken.append(f"{name}: {error}")
print("\\n".join(broken))
""")
    assert not out, f"methods that import torch when they load (use TYPE_CHECKING):\n{out}"


def test_imports_are_light():
    """`patch` brings torch but neither a model library nor triton, and no GPU wakes."""
    out = run("""
import sys
import accelkit
accelkit.patch, accelkit.calibrate, accelkit.Plan
woken = {"transformers", "diffusers", "triton", "matplotlib", "datasets"} & sys.modules.keys()
import torch
print(sorted(woken), torch.cuda.is_initialized())
""")
    assert out == "[] False", f"importing accelkit woke {out}"


def test_command_line_answers_without_torch():
    heavy = [
        edge
        for edge in imports()
        if under(edge.source, "accelkit.cli", "accelkit.commands", "accelkit.console")
        and (
            edge.target.partition(".")[0] in {"torch", "numpy", *MODEL_LIBRARIES}
            or under(edge.target, "accelkit.calibration", "accelkit.patches", "accelkit.kernels")
        )
        and not (edge.lazy or edge.typing)
    ]
    report(heavy, "the command line imports heavy libraries inside its commands")
