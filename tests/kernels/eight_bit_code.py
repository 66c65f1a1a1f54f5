"""Compiles 8-bit kernels for Hopper on any machine and says what the machine code is like: one JSON
line. Run as a script, apart from the interpreter that other tests use.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import mangle_type

from accelkit.kernels._triton import eight_bit, gluon_eight_bit
from accelkit.kernels.quantize import DTYPE

FLOATS = ("LSE", "Q_SCALE", "K_SCALE", "V_SCALE", "V_MEAN", "SHIFT", "BIAS")


def compiled(kernel: Any, source: type, fixed: dict[str, Any], described: dict[str, Any], warps):
    """The kernel with constants and descriptors as given and all else as `run` passes it."""
    names, attrs = kernel.arg_names, {}
    fixed = {k: v for k, v in fixed.items() if k in names}
    signature = {}
    for at, name in enumerate(names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name in described:
            signature[name] = mangle_type(described[name])
        elif name == "factor":
            signature[name] = "fp32"
        elif name.isupper():
            kind = "bf16" if name == "OUT" else "i64" if name == "TILES" else "i32"
            signature[name] = "*fp32" if name in FLOATS else f"*{kind}"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or name in ("s_ob", "s_oh", "s_on"):
            attrs[(at,)] = [["tt.divisibility", 16]]
    constants = {(names.index(k),): v for k, v in fixed.items()}
    return triton.compile(
        source(kernel, signature, constexprs=constants, attrs=attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


def case(form: str, qk: str, pv: str, d: int, causal: bool) -> Any:
    """One kernel at units (128, 128)."""
    tile = eight_bit.choose_tile((128, 128), d)
    gluon, pv8 = form == "gluon", pv == "fp8"
    bm, bn = (64, 128) if gluon else (tile.bm, tile.bn)
    boxes = {"Q": (bm, d), "K": (bn, d), "V": (d, bn) if pv8 else (bn, d)}
    forms = {"Q": DTYPE[qk], "K": DTYPE[qk], "V": DTYPE["fp8"] if pv8 else torch.bfloat16}
    describe = gluon_eight_bit.describe if gluon else eight_bit.describe
    name = (lambda n: f"{n.lower()}_desc") if gluon else (lambda n: n)
    described = {
        name(n): describe(torch.empty((1, 1, 256, 256), dtype=forms[n]), boxes[n]) for n in boxes
    }
    fixed = {
        "BQ": 128, "BK": 128, "BM": bm, "BN": bn, "PER_ROW": tile.per_row, "D": d, "PV8": pv8,
        "DTYPE": tl.bfloat16, "CAUSAL": causal, "HAS_Q_POS": False, "HAS_K_POS": False,
        "HAS_BIAS": False, "EXTRA_MASKED": False, "SMOOTH": True, "s_ln": 1,
        "STAGES": gluon_eight_bit.stages(pv8) if gluon else tile.stages,
    }  # fmt: skip
    if gluon:
        return compiled(gluon_eight_bit._eight_bit, GluonASTSource, fixed, described, 4)
    return compiled(eight_bit._eight_bit, ASTSource, fixed, described, tile.warps)


def loose(ir: str) -> int:
    """Products of P that are not awaited at once: its registers may be written anew under them."""
    lines = ir.splitlines()
    started = (
        (line.split("=")[0].strip(), after)
        for line, after in pairwise(lines)
        if "warp_group_dot " in line and "isAsync = true" in line and "dot_op" in line
    )
    return sum(f"warp_group_dot_wait {name}" not in after for name, after in started)


def unheld(ir: str) -> int:
    """Products of P whose wait does not hold P, the integers beside the product: its registers may
    be written anew while the product reads them.
    """
    count, started = 0, None
    for line in ir.splitlines():
        if "warp_group_dot " in line and "dot_op" in line:
            count += started is not None
            started = line.split("=")[0].strip()
        elif started and re.search(rf"warp_group_dot_wait {started}\b", line):
            count += not re.search(r"tensor<\d+x\d+xi\d+", line)
            started = None
    return count + (started is not None)


def report(kernel: Any) -> dict[str, Any]:
    """Registers, stack, shared memory and counts of what matters in the machine code."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        code = subprocess.run([tool, "-sass", file.name], **run).stdout
        usage = subprocess.run([tool, "-res-usage", file.name], **run).stdout
    count = {n: len(re.findall(rf"\b{n}", code)) for n in ("QGMMA", "IGMMA", "HGMMA", "LDL", "STL")}
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "waits": code.count("WARPGROUP.DEPBAR"),
        "loose": loose(kernel.asm["ttgir"]),
        "unheld": unheld(kernel.asm["ttgir"]),
        **count,
    }


if __name__ == "__main__":
    print(json.dumps([report(case(*c)) for c in json.loads(sys.argv[1])]))
