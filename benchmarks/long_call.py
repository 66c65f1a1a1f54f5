"""One causal attention call of up to a million tokens: what a method adds in memory and time.

32 query heads and 8 KV heads of 128, random bf16 data in which one of twenty blocks of 128 keys is
loud, for each KV head its own. For each method: the most memory that the call takes beside its
inputs and its output, milliseconds of the whole call (estimate, selection, lists, kernel), and the
error of some rows against softmax in fp32 over the keys that their lists name. Dense attention is
cuDNN's.

    python benchmarks/long_call.py --tokens 131072 1048576 --out long-call.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attention.peers import cudnn
from attention.report import machine
from dit_methods import expected
from torch import Tensor

from accelkit.calibration.timing import device_ms
from accelkit.kernels import select
from accelkit.kernels.index import BlockIndex, equal_groups
from accelkit.patches.call import AttentionCall, Site
from accelkit.patches.method import load
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention
from accelkit.patches.state import PatchState

SETTINGS: dict[str, dict[str, Any]] = {
    "window": {"window_tokens": 8192},
    "flash_prefill": {"alpha": 0.2},
    "xattention": {"coverage": 0.7},
    "sparge_attn": {"coverage": 0.7, "similarity": -0.1},
    "vertical_slash": {},
    "anchor_attention": {},
}
NOTE = (
    "By `benchmarks/long_call.py`: one causal call, 32 query heads and 8 KV heads of 128, random "
    "bfloat16 data in which one of twenty blocks of keys is loud. `added, GiB` is the most memory "
    "taken beside the call's inputs and its output; `one mask, GiB` is what a boolean of all heads "
    "and pairs of 128-blocks would take, its scores in fp32 four times as much. `error` is that of "
    "24 rows against softmax in fp32 over the keys of their lists, `call of dense` the whole "
    "call's time over that of cuDNN's dense attention in the same process."
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 6


def call_of(tokens: int, heads: int = 32, kv_heads: int = 8, d: int = 128) -> AttentionCall:
    """Random data; a loud key has e^4.5 times the weight of another."""
    make = {"device": DEVICE, "dtype": torch.bfloat16}
    q = torch.randn(1, heads, tokens, d, **make) + 0.5
    k, v = (torch.randn(1, kv_heads, tokens, d, **make) for _ in range(2))
    loud = torch.rand(1, kv_heads, tokens // 128, 1, device=DEVICE) < 0.05
    k += (9.0 / d**0.5) * loud.repeat_interleave(128, 2)
    ids, kv = tuple(range(heads)), equal_groups(heads, kv_heads)
    return AttentionCall(q, k, v, d**-0.5, True, 0, None, ids, kv, site=Site("a", 0))


def error(call: AttentionCall, policy: Policy, out: Tensor) -> tuple[float, float] | None:
    """Greatest relative error of some rows of one group of heads, and its density; None where a
    method gives anything but lists of blocks.
    """
    heads = tuple(h for h, kv in zip(call.heads, call.kv_heads, strict=True) if kv == 0)
    (found,) = attention.answer(call.take(heads), policy) or (None,)
    pieces = () if found is None else found.pieces
    if len(pieces) != 1 or not isinstance(pieces[0], BlockIndex) or found.order is not None:
        return None
    at = torch.linspace(0, call.n_q - 1, ROWS, device=DEVICE).long()
    worst = 0.0
    for slot, head in enumerate(heads):
        want = expected(found, slot, at)
        wrong = (out[0, head, at].float() - want).norm(dim=-1) / want.norm(dim=-1)
        worst = max(worst, float(wrong.max()))
    return worst, float(select.density(pieces, found.call).mean())


def measured(call: AttentionCall, name: str, dense_ms: float | None) -> dict[str, Any]:
    """Memory, time and error of one method."""
    policy = Policy(methods=(load(name)(**SETTINGS[name]),))
    state = PatchState(Plan.model_construct(policies=(policy,), sites={"a": LayerPlan()}))
    groups, out = [HeadGroup(call.heads, policy, 0)], torch.full_like(call.q, torch.nan)

    def run() -> None:
        call.forget()
        attention.attend(call, groups, state, out)

    run()
    call.forget()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    added = torch.cuda.max_memory_allocated() - before
    call.forget()
    ms = median(device_ms(run, 3))
    call.forget()
    checked = error(call, policy, out)
    row = {"method": name, "tokens": call.n_q, "call, ms": round(ms, 2)}
    row["call of dense"] = round(ms / dense_ms, 4) if dense_ms else None
    row["added, GiB"] = round(added / 2**30, 3)
    row["one mask, GiB"] = round(len(call.heads) * (call.n_q / 128) ** 2 / 2**30, 3)
    row["error"], row["density"] = (round(x, 5) for x in checked) if checked else (None, None)
    row["finite"] = bool(torch.isfinite(out).all())
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[131_072, 1_048_576])
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    report = {"title": "One call of up to a million tokens", "note": NOTE, **machine()}
    for tokens in args.tokens:
        torch.manual_seed(0)
        call = call_of(tokens)
        dense = partial(cudnn, call.q, call.k, call.v, True)
        dense_ms = median(device_ms(dense, 1, warmup=1))  # cuDNN plans a shape once
        for name in args.methods:
            rows.append(measured(call, name, dense_ms))
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
