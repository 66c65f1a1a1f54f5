"""Profile the attention kernels with Nsight Compute and keep the counters that name a limiter.

    python benchmarks/profile_kernels.py --out profiles.json [--only "full 0.5;strided 8"]

Runs itself once a case under `ncu` (which must be on the path and allowed to read counters), at the
clocks that the GPU has, and reads the counters from ncu's CSV.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention.peers import dense_paths
from attention.shapes import FULL, LLM, LONG, Shape, random_call, random_mask, stripes

from accelkit.kernels import scores
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex, plain_inputs

BLOCK = (128, 128)
SECTIONS = (
    "SpeedOfLight", "WarpStateStats", "SchedulerStats", "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Chart",
)  # fmt: skip
COUNTERS = {
    "ms": ("gpu__time_duration.sum", 1e-6),
    "clock_GHz": ("gpc__cycles_elapsed.avg.per_second", 1e-9),
    "tensor_%": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", 1.0),
    "exp_%": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", 1.0),
    "alu_%": ("sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active", 1.0),
    "fma_%": ("sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active", 1.0),
    "issued_a_cycle": ("sm__inst_issued.avg.per_cycle_active", 1.0),
    "L2_%": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "L2_hit_%": ("lts__t_sector_hit_rate.pct", 1.0),
    "L2_fabric_%": ("lts__t_sectors_srcunit_ltcfabric.sum.pct_of_peak_sustained_elapsed", 1.0),
    "L2_to_SM_GB": ("l1tex__m_xbar2l1tex_read_bytes.sum", 1e-9),
    "L2_to_SM_TB/s": ("l1tex__m_xbar2l1tex_read_bytes.sum.per_second", 1e-12),
    "DRAM_TB/s": ("dram__bytes.sum.per_second", 1e-12),
}
"""By name: ncu's counter in base units, and the factor to the name's own."""

STALL = "smsp__average_warps_issue_stalled_"


def _listed(density: float, backend: str) -> Callable[[], object]:
    q, k, v = random_call(FULL, "cuda", torch.bfloat16)
    index = BlockIndex.from_mask(random_mask(FULL, BLOCK, density, "cuda"), BLOCK)
    return lambda: attend(q, k, v, index, causal=False, backend=backend)


def _dense() -> Callable[[], object]:
    return dense_paths(FULL, *random_call(FULL, "cuda", torch.bfloat16))["cudnn"]


def _skip(weak_of_four: int) -> Callable[[], object]:
    q, k, v = random_call(FULL, "cuda", torch.bfloat16)
    weak = torch.arange(FULL.tokens, device="cuda") // 128 % 4 >= 4 - weak_of_four
    q[..., 0] = 4.0
    k[..., 0] = torch.where(weak, -5.0 * FULL.head_size**0.5, 0.0).to(k.dtype)
    index = BlockIndex.dense(FULL.heads, FULL.tokens // 128, BLOCK, q.device)
    return lambda: attend(q, k, v, index, causal=False, skip=1e-3, backend="gluon")


def _strided(qk: str) -> Callable[[], object]:
    q, k, v = random_call(LONG, "cuda", torch.bfloat16)
    call = plain_inputs(q, k, v, causal=True)
    return lambda: scores.strided(call, 8, BLOCK, qk)


def _rounded(qk: str, shape: Shape) -> Callable[[], object]:
    q, k, v = random_call(shape, "cuda", torch.bfloat16)
    index = BlockIndex.dense(shape.heads, shape.tokens // 128, BLOCK, q.device)
    return lambda: attend(q, k, v, index, causal=shape.causal, qk=qk, pv="fp8", smooth_k=True)


def _gather(backend: str) -> Callable[[], object]:
    call, index, _ = stripes(LLM, 1024)
    return lambda: attend(*call, index, backend=backend)


CASES: dict[str, tuple[str, Callable[[], Callable[[], object]]]] = {
    "skip 75 %": ("skipping", lambda: _skip(3)),
    "skip 0 %": ("skipping", lambda: _skip(0)),
    "full 0.5": ("block_sparse", lambda: _listed(0.5, "gluon")),
    "full 0.05": ("block_sparse", lambda: _listed(0.05, "gluon")),
    "gather, triton": ("_gather", lambda: _gather("triton")),
    "gather, gluon": ("key_gather", lambda: _gather("gluon")),
    "cudnn": (".*", _dense),
    "strided 8": ("_strided", lambda: _strided("native")),
    "strided 8, int8": ("_strided", lambda: _strided("int8")),
    "8 bits": ("_eight_bit", lambda: _rounded("fp8", FULL)),
    "8 bits, int8": ("_eight_bit", lambda: _rounded("int8", FULL)),
    "8 bits, causal": ("_eight_bit", lambda: _rounded("fp8", LLM)),
    "8 bits, int8, causal": ("_eight_bit", lambda: _rounded("int8", LLM)),
}
"""By name: the kernel that is meant, and what prepares its launch."""


def run(case: str) -> None:
    """Launch a case twice, the second time for the profiler."""
    torch.manual_seed(0)
    work = CASES[case][1]()
    work()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    work()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profile(case: str, raw: Path | None) -> dict[str, Any]:
    """The counters of a case's first matching launch."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--launch-count", "1"]
    command += ["--kernel-name", f"regex:{CASES[case][0]}"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, __file__, "--run", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if raw is not None:
        raw.mkdir(exist_ok=True)
        (raw / f"{re.sub('[^a-z0-9.]+', '_', case)}.csv").write_text(done.stdout)
    begin = done.stdout.find('"ID"')
    if done.returncode or begin < 0:
        raise SystemExit(f"ncu gave nothing for {case}:\n{(done.stdout + done.stderr)[-2000:]}")
    rows = list(csv.DictReader(io.StringIO(done.stdout[begin:])))
    return counters(rows[-1])


def counters(row: dict[str, str]) -> dict[str, Any]:
    """What a row of ncu's CSV says of the counters that are kept, and the greatest stalls."""

    def number(text: str) -> float:
        return float(text.replace(",", ""))

    found: dict[str, Any] = {
        name: round(number(row[counter]) * factor, 3)
        for name, (counter, factor) in COUNTERS.items()
        if row.get(counter)
    }
    stalls = {
        name.removeprefix(STALL).split("_per_issue")[0]: number(value)
        for name, value in row.items()
        if name.startswith(STALL) and "per_issue_active" in name and value
    }
    found["stalled_warps_per_issue"] = dict(sorted(stalls.items(), key=lambda s: -s[1])[:5])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=f"some of {'; '.join(CASES)}".replace("%", "%%"))
    parser.add_argument("--raw", type=Path, help="keep ncu's own tables there")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run)
        return
    import triton

    report: dict[str, Any] = {
        "title": "Counters of the kernels",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": torch.cuda.get_device_name(),
        "note": f"Full: {FULL.name}; causal and gather: "
        f"{LLM.name}; strided: the first launch of {LONG.name}. "
        "By `benchmarks/profile_kernels.py`.",
        "results": [],
    }
    for case in args.only.split(";") if args.only else CASES:
        report["results"].append({"case": case} | profile(case, args.raw))
        print(json.dumps(report["results"][-1]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
