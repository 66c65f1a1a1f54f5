"""Released code of other projects beside accelkit's version of the same method, in one process.

    python benchmarks/peers.py --peer flexprefill=/path/to/FlexPrefill \\
        --peer minference=/path/to/MInference --peer xattention=/path/to/x-attention \\
        --peer spargeattn=/path/to/SpargeAttn --out peers.json [--tokens 32768 131072]

A folder holds a checkout, its CUDA parts built in place. Both sides get the same calls: prefill
with sinks, lines, a band, a far diagonal and blocks of topics planted in it, or Wan's waves over a
grid. accelkit's method runs at the same settings and, where it then reads another share of the
pairs, at that density and at that captured mass. For each: milliseconds of the whole call
(estimate, selection, lists, kernel), of the choice alone, and of what the device works, without its
waits for the host, beside cuDNN's dense attention, in turns; density, captured softmax mass and
errors by some rows of every head. `own error` is against softmax in fp32 over the keys that the
side says it read: where it is not small, the keys were read back wrongly, and the side is named
under `failed`.
"""

from __future__ import annotations

import argparse
import json
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention.report import machine
from attention.timing import milliseconds
from dit_methods import call_of
from peer_calls import DEVICE, Judge, planted
from peer_releases import RELEASES, Keys, Side, commit, of_blocks
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from accelkit.calibration.timing import times_ms
from accelkit.kernels.index import BlockIndex, ceil_div
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import load
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention
from accelkit.patches.state import PatchState

Fields = dict[str, Any]
ALIKE = 0.01
"""Sides whose density and mass differ by less are not matched again."""
WRONG = 0.1
"""An own error that no arithmetic explains."""
NOTE = (
    "By `benchmarks/peers.py`: released code beside accelkit's version of the same method, same "
    "process, same planted data, bfloat16, 32 query and 8 KV heads of 128 (Wan: 12 heads, not "
    "causal). `like release` says at what accelkit's side was made equal. Density: computed pairs "
    "of all visible ones; mass: softmax mass on them; error: relative, of rows against dense fp32; "
    "own error: against fp32 over the keys read. `× release`: how many times as fast as the "
    "release. XAttention's release is its estimate and selection, with accelkit's kernel behind; "
    "SpargeAttn's computes in int8 and fp8, accelkit's in bfloat16."
)


@dataclass(frozen=True)
class Case:
    """A setting of a release, the same of accelkit's method, and the field that may be turned."""

    release: str
    setting: Fields
    method: str
    fields: Fields
    dial: str = "coverage"
    prefill: bool = True
    same: bool = True
    """Whether the settings mean the same; else the sides are only matched."""


CASES = (
    Case("flexprefill", {"gamma": 0.9}, "flex_prefill", {"coverage": 0.9}),
    Case("flexprefill", {"gamma": 0.95}, "flex_prefill", {"coverage": 0.95}),
    *(
        Case("minference", {"vertical": v, "slash": s}, "vertical_slash",
             {"vertical_columns": v, "slash_offsets": s}, "slash_offsets")
        for v, s in ((1000, 6096), (100, 800), (3500, 100))
    ),
    *(
        Case("xattention", {"stride": s, "threshold": 0.9}, "xattention",
             {"stride": s, "coverage": 0.9})
        for s in (8, 16)
    ),
    Case("spargeattn", {"simthreshd1": 0.6, "cdfthreshd": 0.98}, "sparge_attn", {}, prefill=False),
    *(
        Case("spargeattn", {"topk": share}, "sparge_attn", {"similarity": -0.1}, prefill=False,
             same=False)
        for share in (0.5, 0.2)
    ),
)  # fmt: skip


def own(call: AttentionCall, name: str, fields: Fields) -> Side:
    """accelkit's side."""
    policy = Policy(methods=(load(name)(**fields),))
    state = PatchState(Plan.model_construct(policies=(policy,), sites={"a": LayerPlan()}))
    groups, out = [HeadGroup(call.heads, policy, 0)], torch.empty_like(call.q)

    def run() -> Tensor:
        call.forget()
        if not attention.attend(call, groups, state, out):
            raise ValueError(f"{name} {fields}: runs dense")
        return out

    def choose() -> attention.Answer:
        call.forget()
        (found,) = attention.answer(call, policy) or (None,)
        if found is None or found.order is not None:
            raise ValueError(f"{name} {fields}: dense, or in an order of its own")
        return found

    def reads() -> Keys:
        pieces = choose().pieces

        def keys(head: int, rows: Tensor) -> Tensor:
            read = torch.zeros(len(rows), call.n_k, dtype=torch.bool, device=rows.device)
            for piece in pieces:
                assert isinstance(piece, BlockIndex)
                mask = piece.take((head,)).to_mask(ceil_div(call.n_k, piece.size[1]))[0]
                read |= of_blocks(mask, piece.size, call.n_k)(0, rows)
            return read

        return keys

    return Side(run, choose, reads)


def matched(judge: Judge, case: Case, which: int, goal: float) -> Fields:
    """accelkit's fields at which density (`which` 0) or mass (1) comes nearest to `goal`."""
    low, high = (0.05, 9.0) if case.dial == "coverage" else (4.61, math.log(judge.call.n_k))
    best: tuple[float, Fields] = (math.inf, case.fields)
    for _ in range(9):
        at = (low + high) / 2
        value = 1 - math.exp(-at) if case.dial == "coverage" else round(math.exp(at))
        fields = {**case.fields, case.dial: value}
        found = judge.chosen(own(judge.call, case.method, fields).reads())[which]
        best = min(best, (abs(found - goal), fields), key=lambda x: x[0])
        low, high = (low, at) if found >= goal else (at, high)
    return best[1]


def clock(work: dict[str, Callable[[], Any]], budget_ms: float) -> dict[str, float]:
    if DEVICE.type == "cuda":
        return milliseconds(work, budget_ms)
    return {name: min(times_ms(run, 1, 0, DEVICE)) for name, run in work.items()}


def busy_ms(run: Callable[[], Any]) -> float | None:
    """Milliseconds in which the device works on a call, its waits for the host left out."""
    if DEVICE.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in seen.key_averages()) / 1e3


def told(fields: Fields) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in fields.items()) or "defaults"


def measured(judge: Judge, case: Case, release: Any, budget_ms: float) -> list[Fields]:
    """Rows of one case: the release, then accelkit at its settings, density and mass."""
    call = judge.call
    theirs = release.side(call, **case.setting)
    keys = theirs.reads()
    goal = judge.chosen(keys)
    sides = [("", type(release).__name__, case.setting, theirs, keys, goal)]
    trials = [("settings", case.fields)] if case.same else []
    same = judge.chosen(own(call, case.method, case.fields).reads())
    for which, what in enumerate(("density", "mass")):
        if not case.same or abs(same[which] / goal[which] - 1) > ALIKE:
            trials.append((what, matched(judge, case, which, goal[which])))
    for what, fields in trials:
        mine = own(call, case.method, fields)
        keys = mine.reads()
        sides.append((what, f"accelkit {case.method}", fields, mine, keys, judge.chosen(keys)))

    def dense() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if DEVICE.type == "cuda" else SDPBackend.MATH):
            scaled_dot_product_attention(
                call.q, call.k, call.v, is_causal=call.causal, enable_gqa=True
            )

    calls = {str(i): side[3].run for i, side in enumerate(sides)}
    whole = clock({"dense": dense, **calls}, budget_ms)
    choices = {str(i): side[3].choose for i, side in enumerate(sides) if side[3].choose}
    choice = clock(choices, budget_ms / 4)
    rows = []
    for i, (what, code, fields, side, keys, (density, mass)) in enumerate(sides):
        error, own_error = judge.errors(keys, side.run())
        ms, release_ms, dense_ms = whole.get(str(i)), whole.get("0"), whole.get("dense")
        rows.append({
            "tokens": call.n_k, "causal": "yes" if call.causal else "no", "code": code,
            "setting": told(fields), "like release": what, "call, ms": ms,
            "choice, ms": choice.get(str(i)), "device works, ms": busy_ms(side.run),
            "cuDNN, ms": dense_ms,
            "× cuDNN": dense_ms / ms if ms and dense_ms else None,
            "× release": release_ms / ms if ms and release_ms and i else None,
            "density": density, "mass": mass, "error": error, "own error": own_error,
        })  # fmt: skip
    return rows


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--remark", action="append", default=[], metavar="NAME=TEXT")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="query and KV heads")
    parser.add_argument("--budget-ms", type=float, default=300.0, help="of timing a case")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    remarks = dict(text.split("=", 1) for text in args.remark)
    report: dict[str, Any] = {"title": "Released code of other projects", "note": NOTE}
    report |= (machine() if DEVICE.type == "cuda" else {"gpu": None}) | {"peers": {}}
    report |= {"failed": [], "rows": []}
    found: dict[str, Any] = {}
    for name, folder in (text.split("=", 1) for text in args.peer):
        about = {"commit": commit(Path(folder)), "remark": remarks.get(name)}
        report["peers"][name] = about | {"mended": RELEASES[name].mended}
        try:
            found[name] = RELEASES[name](Path(folder))
        except Exception as reason:
            traceback.print_exc()
            report["failed"].append(f"{name}: {type(reason).__name__}: {reason}")
    for tokens in (*args.tokens, None):
        some = [c for c in CASES if c.release in found and c.prefill is (tokens is not None)]
        judge = Judge(planted(tokens, *args.heads) if tokens else call_of("wan")) if some else None
        for case in some:
            try:
                rows = measured(judge, case, found[case.release], args.budget_ms)
            except Exception as reason:
                traceback.print_exc()
                why = f"{type(reason).__name__}: {str(reason)[:300]}"
                report["failed"].append(f"{case.release}, {told(case.setting)}, {tokens}: {why}")
                continue
            for row in rows:
                print(json.dumps(row), flush=True)
            report["rows"] += [row for row in rows if row["own error"] < WRONG]
            report["failed"] += [
                "{code}, {setting}, {tokens}: own error {own error:.2g}".format(**row)
                for row in rows
                if not row["own error"] < WRONG
            ]
            if args.out:
                args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


if __name__ == "__main__":
    main()
