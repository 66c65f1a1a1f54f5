"""Every method for diffusion on one attention call of real size, against dense attention.

    python benchmarks/dit_methods.py --output dit_methods.json [--shapes cogvideox wan hunyuan]

Queries and keys are waves over the grid, as rotary positions make them, with noise: four kinds of
heads (own frame, own place in time, around, own row). Each method runs at a setting near the
density asked for. For each: milliseconds of the whole call (order, estimate, select, kernel, order
back), what of it the device spends on attention, on orders and on the rest (estimate, selection,
lists), beside cuDNN's dense attention, which is timed before and after, and the error of sampled
rows against softmax in fp32 over exactly the keys that the method chose. `host_ms` is what the host
needs to issue the call. With `--fused`, `fused_ms` is the attention of methods with an order where
the kernel gathers keys and values by itself, key by key: to be compared with the kernel over blocks
and the order of a call.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import triton
from attention.peers import cudnn
from torch.profiler import ProfilerActivity, profile

from accelkit.calibration.timing import device_ms, host_ms
from accelkit.kernels import attend, pyramid, select
from accelkit.kernels.index import BlockIndex
from accelkit.patches.call import AttentionCall, Clock, Geometry, Site, Span
from accelkit.patches.method import load
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention
from accelkit.patches.state import PatchState

SHAPES = {
    "cogvideox": ((13, 30, 45), 226, 48, 64),
    "wan": ((21, 30, 52), 0, 12, 128),
    "hunyuan": ((33, 45, 80), 256, 24, 128),
}
SETTINGS: dict[str, list[dict]] = {
    "gna": [{"window": (1.0, 0.4, 0.4)}, {"window": (1.0, 0.4, 0.4), "whole_tiles": True}, {}],
    "sliding_tile": [{"window": (1.0, 0.4, 0.3)}],
    "free_swim": [{"base": (11, 20)}],
    "radial_attention": [{"decay": 0.1, "whole_frames": 0}],
    "sparse_vdit": [{"mode": "diagonal"}, {"mode": "multi_diagonal"}, {"mode": "stripe"}],
    "sparse_videogen": [{"density": 0.15}],
    "re_ttention": [{"window": 0.03125}, {"window": 0.2}],
    "paro_attention": [{"density": 0.2}],
    "ada_spa": [{}, {"block": 64}],
    "vmoba": [{"coverage": 0.3}, {"coverage": 0.26, "key_block": 128}],
    "psa": [
        {"block": 128},
        {"block": 128, "every": 4},
        {"ends": (0.05, 0.12, 0.21, 0.54), "block": 128},
        {"block": 256},
        {"ends": (0.06, 0.15, 0.26, 0.6), "block": 256},
    ],
    "sparge_attn": [
        {"hilbert": True, "similarity": -0.1, "coverage": 0.995},
        {"hilbert": True, "similarity": -0.1, "coverage": 0.99, "key_block": 128},
        {"hilbert": True, "similarity": -0.1, "coverage": 0.993},
        {"hilbert": True, "similarity": -0.1, "coverage": 0.9975},
        {"similarity": -0.1, "coverage": 0.995},
    ],
    "flash_prefill": [{"alpha": 0.02}],
    "xattention": [{"coverage": 0.95}],
    "window": [{"window_tokens": 3500}],
    "sage_attention": [{}],
    "gna+sage_attention": [{"window": (1.0, 0.4, 0.4)}],
    "re_ttention+sage_attention": [{"window": 0.2}],
}


TITLE = "Methods for diffusion, one attention call"
NOTE = (
    "By `benchmarks/dit_methods.py`: queries and keys are waves over the grid with noise, "
    "bfloat16. The whole call is order, estimate, selection, kernel and the order back, kernels "
    "as dispatch chooses them; kernel, order and estimate are what the device spends on each. "
    "Static patterns are made once for a geometry. A search step runs dense and renews what later "
    "steps read. Dense attention is timed before and after each method. Shapes: wan is 32,760 "
    "tokens, 12 heads of 128; hunyuan 119,056 tokens, 24 heads of 128. Errors are against "
    "fp32 over the keys that the method chose (Re-ttention: against dense)."
)


def call_of(shape: str) -> AttentionCall:
    grid, text, heads, d = SHAPES[shape]
    g = torch.Generator("cuda").manual_seed(0)
    n = math.prod(grid) + text
    root, freqs = d**0.5, d // 8
    places = torch.cartesian_prod(*(torch.arange(x) for x in grid)).cuda()
    wave = torch.logspace(-1.6, 0.2, freqs).cuda()
    nats = torch.tensor([(9.0, 9, 9), (0, 12, 12), (7, 9, 9), (7, 14, 2)]).cuda()
    nats = nats[torch.arange(heads) % 4]
    tensors = []
    for _ in range(2):
        x = 0.1 * root**0.5 * torch.randn(1, n, heads, d, generator=g, device="cuda")
        for axis in range(3):
            angle = places[:, axis, None] * wave
            both = torch.cat([angle.cos(), angle.sin()], -1)[:, None]
            at = slice(2 * freqs * axis, 2 * freqs * (axis + 1))
            size = (nats[:, axis] * root / freqs).sqrt()[:, None]
            x[0, text:, :, at] += both * size
        tensors.append(x.bfloat16().transpose(1, 2))
    v = torch.randn(1, n, heads, d, generator=g, device="cuda", dtype=torch.bfloat16)
    spans = (Span("text", 0, text), Span("video", text, n))
    ids = tuple(range(heads))
    return AttentionCall(
        *tensors, v.transpose(1, 2), 1 / root, False, 0, None, ids, ids,
        clock=Clock("denoise", 10, 50), geometry=Geometry(spans, grid), site=Site("a", 2),
    )  # fmt: skip


DENSE_REPEATS = 2
"""Readings of dense attention between two methods: clocks drift under load."""


def dense_lse(call: AttentionCall) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, scale=call.scale
    )[1]


def time_ms(run, repeats: int = 7) -> float:
    """Median milliseconds on the device, without the host."""
    return median(device_ms(run, repeats, warmup=1))


ATTENTION = ("block_sparse", "skipping", "_gather", "_eight_bit", "flash", "_merge")
"""Names that attention kernels contain; torch's own gathers are called `at::native::…`."""
ORDERS = ("_move",)


def parts_ms(run, repeats: int = 3) -> dict[str, float]:
    """Milliseconds that the kernels of a call take by part, and how many there are."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    parts = dict.fromkeys(("kernel_ms", "order_ms", "estimate_ms", "launches"), 0.0)
    for e in seen.key_averages():
        if not (ms := e.self_device_time_total / 1e3 / repeats):
            continue
        own = "at::" not in e.key
        part = "kernel_ms" if own and any(n in e.key for n in ATTENTION) else "estimate_ms"
        part = "order_ms" if own and any(n in e.key for n in ORDERS) else part
        parts[part] += ms
        parts["launches"] += e.count / repeats
        if LIST_KERNELS:
            print(f"      {ms:8.4f} ms {e.count / repeats:5.1f} {part} {e.key[:110]}")
    return parts


LIST_KERNELS = False


def at_step(call: AttentionCall, step: int, memory: dict) -> AttentionCall:
    return replace(call, clock=Clock("denoise", step, 50), memory=memory, _shared={})


def expected(a: attention.Answer, head: int, rows: torch.Tensor) -> torch.Tensor:
    """Rows (of the kernel) of one head, in fp32 over the keys of all pieces."""
    logits, values = [], []
    for piece in a.pieces:
        assert isinstance(piece, BlockIndex)
        k, v, index = a.call.k, a.call.v, piece
        if piece.pyramid:
            k, v, index = pyramid.lower(k, v, piece)
        bias = torch.zeros(1, 1, k.shape[2], device=k.device) + index.bias
        if a.call.k_pos is not None:
            bias = bias.masked_fill(a.call.k_pos < 0, -math.inf)
        keys = k[0, int(a.call.kv_of_head[head])].float()
        s = a.call.q[0, a.call.heads[head], rows].float() @ keys.T
        s = s * a.call.scale * a.execution.sharpen
        s = s + bias[0, head if bias.shape[1] > 1 else 0]
        bq, bk = index.size
        for i, row in enumerate(rows.tolist()):
            start = int(index.start[0, head, row // bq])
            count = int(index.count[0, head, row // bq])
            on = torch.zeros(-(-k.shape[2] // bk), dtype=torch.bool, device=k.device)
            on[index.blocks[start : start + count].long()] = True
            on |= count < 0  # a dense row
            seen = on.repeat_interleave(bk)[: k.shape[2]]
            if a.call.causal:
                seen[a.call.q_start + row + 1 :] = False
            s[i] = s[i].masked_fill(~seen, -math.inf)
        logits.append(s)
        values.append(v[0, int(a.call.kv_of_head[head])].float())
    return torch.cat(logits, -1).softmax(-1) @ torch.cat(values)


def error(a: attention.Answer, out: torch.Tensor, dense: torch.Tensor) -> float:
    """Greatest relative error of sampled rows of three heads."""
    worst = 0.0
    n = out.shape[2]
    for head in {0, len(a.call.heads) // 2, len(a.call.heads) - 1}:
        rows = torch.tensor([0, 300, n // 3, n // 2 + 1, n - 200, n - 1], device="cuda")
        at = rows
        if a.order is not None:
            table = a.order.q_table[a.order.row[..., head].long().flatten()[0]]
            at = torch.stack([(table == r).nonzero().flatten()[0] for r in rows])
        want = dense[0, head, rows].float() if a.finishers else expected(a, head, at)
        got = out[0, head, rows].float()
        worst = max(worst, float((got - want).norm() / want.norm()))
    return worst


def fused_ms(a: attention.Answer, call: AttentionCall) -> float | None:
    """Milliseconds where no key is moved: lists of single keys name the tokens of each block."""
    (piece,) = a.pieces
    if a.order is None or a.order.k_table is None or piece.pyramid:
        return None
    (bq, bk), keys = piece.size, a.order.k_table
    mask, ids, counts = piece.to_mask(-(-a.call.n_k // bk))[0], [], []
    for head, listed in enumerate(mask):
        row, place = listed.repeat_interleave(bk, -1)[:, : a.call.n_k].nonzero(as_tuple=True)
        token = keys[int(a.order.row.flatten()[head]) if len(keys) > 1 else 0][place]
        ids.append(token[token >= 0])
        counts.append(torch.bincount(row[token >= 0], minlength=len(listed)))
    count = torch.stack(counts)[None]
    start = count.flatten().cumsum(0).view_as(count) - count
    index = BlockIndex(start, count.int(), torch.cat(ids).int(), (bq, 1))
    run = lambda: attend(a.call.q, call.k, call.v, index, causal=False)  # noqa: E731
    torch.testing.assert_close(
        run().out, attention.compute(replace(a, order=None, finishers=())).out, atol=0.03, rtol=0.03
    )
    return time_ms(run, 3)


def measure(
    call: AttentionCall, name: str, fields: dict, dense: torch.Tensor, fused: bool = False
) -> dict:
    name, *others = name.split("+")
    method = load(name)(**fields)
    if name == "paro_attention":
        calibrator = method.calibrator(call.site)
        calibrator.see(call, dense, dense_lse(call))
        call = replace(call, tables=calibrator.tables())
        method = method.model_copy(update={"axes": "paro_axes", "blocks": "paro_blocks"})
    policy, memory = Policy(methods=(method, *(load(o)() for o in others))), {}
    groups = [HeadGroup(call.heads, policy, 0)]
    state = PatchState(Plan.model_construct(policies=(policy,), sites={"a": LayerPlan()}))
    out = torch.empty_like(call.v)
    assert attention.attend(at_step(call, 10, memory), groups, state, out)
    search_ms = None
    if memory and name in ("ada_spa", "re_ttention"):
        search_ms = time_ms(lambda: attention.attend(at_step(call, 10, {}), groups, state, out), 3)
        out.fill_(float("nan"))
    now = lambda: at_step(call, 11, memory)  # noqa: E731
    assert attention.attend(now(), groups, state, out)
    (a,) = attention.answer(now(), policy)
    row = {"method": "+".join((name, *others)), **fields, "error": error(a, out, dense)}
    row["density"] = float(select.density(a.pieces, a.call).mean())
    row["recall_of_output"] = 1 - float(
        (out.float() - dense.float()).abs().sum() / dense.float().abs().sum()
    )
    row["call_ms"] = time_ms(lambda: attention.attend(now(), groups, state, out))
    row |= parts_ms(lambda: attention.attend(now(), groups, state, out))
    row["host_ms"] = host_ms(lambda: attention.attend(now(), groups, state, out))
    torch.cuda.synchronize()
    row["search_ms"] = search_ms
    if fused:
        row["fused_ms"] = fused_ms(a, call)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["wan", "cogvideox"], choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=list(SETTINGS))
    parser.add_argument("--list-kernels", action="store_true", help="of every call, with their ms")
    parser.add_argument("--fused", action="store_true", help="time kernels that gather as well")
    args = parser.parse_args()
    global LIST_KERNELS
    LIST_KERNELS = args.list_kernels
    rows, failed = [], []
    for shape in args.shapes:
        call = call_of(shape)
        run_dense = partial(cudnn, call.q, call.k, call.v, False)
        after, dense = time_ms(run_dense), run_dense()
        print(f"{shape}: {call.n_k} tokens, {len(call.heads)} heads, dense {after:.2f} ms")
        for name in args.methods:
            for fields in SETTINGS[name]:
                try:
                    with torch.inference_mode():
                        row = measure(call, name, fields, dense, args.fused)
                except Exception as reason:
                    traceback.print_exc(file=sys.stderr)
                    print(f"  {name} {fields}: {type(reason).__name__}: {str(reason)[:90]}")
                    failed.append(f"{name} {fields} at {shape}")
                    continue
                before, after = after, time_ms(run_dense, DENSE_REPEATS)
                dense_ms = (before + after) / 2
                row |= {"shape": shape, "dense_ms": dense_ms, "gain": dense_ms / row["call_ms"]}
                row["dense_drift"] = after / before - 1
                rows.append(row)
                print(
                    f"  {name[:18]:18s} d {row['density']:.3f} call {row['call_ms']:6.2f} dense "
                    f"{dense_ms:6.2f} kernel {row['kernel_ms']:6.2f} order {row['order_ms']:5.2f} "
                    f"estimate {row['estimate_ms']:5.2f} host {row['host_ms']:5.2f} launches "
                    f"{row['launches']:.0f} gain {row['gain']:4.2f} err {row['error']:.4f} "
                    f"agree {row['recall_of_output']:.3f} "
                    + (f"search {row['search_ms']:.1f} " if row["search_ms"] else "")
                    + (f"fused {row['fused_ms']:.2f}" if row.get("fused_ms") else "")
                )
                made = {
                    "title": TITLE, "gpu": torch.cuda.get_device_name(),
                    "torch": torch.__version__, "triton": triton.__version__, "note": NOTE,
                    "rows": rows,
                }  # fmt: skip
                args.output.write_text(json.dumps(made, indent=1))
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
