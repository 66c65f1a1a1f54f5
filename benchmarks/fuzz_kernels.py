"""Random calls of `attend` against an fp64 reference, on every backend that serves them.

    python benchmarks/fuzz_kernels.py --calls 5000 --seed 0 --workers 8

A family fixes what a kernel is compiled for (dtype, head sizes and numbers, layout, unit, masks);
the calls of a family differ in lengths, batch, lists and values, and run in one process. Outputs
are poisoned before each call, and each call must give the same bits twice. Every call has its own
seed, printed with a failure: `--only SEED:FAMILY` runs that one again.

Calls in 8 bits are judged in two steps (`attention.rounding`): each operand lies within half a step
of what it stands for, and the result is that of fp64 on these very operands, within what sums and
the rounding of P allow there.

Runs on several cards, with seeds of their own, are joined: `--merge a.json b.json --out all.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from attention.report import machine
from attention.rounding import Limits, limits, misrounded
from torch import Tensor

from accelkit.errors import KernelUnavailableError
from accelkit.kernels import pyramid
from accelkit.kernels.dispatch import BACKENDS, attend
from accelkit.kernels.index import ALL, BlockIndex, Partial, ceil_div
from accelkit.kernels.prepare import prepare
from accelkit.kernels.quantize import dequantize, quantize, rounding_of

UNITS = (
    (128, 128), (128, 64), (64, 128), (64, 64), (256, 128), (32, 32), (48, 16), (16, 16), (20, 32),
    (128, 1), (32, 1), (300, 1),
)  # fmt: skip
HEAD_SIZES = (16, 40, 64, 80, 96, 128, 256)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 3e-5}
"""‖out − ref‖ / ‖ref‖ that rounding of inputs, probabilities and output explains."""
LOW_BITS = {"native": 1.5e-2, "fp8": 5e-2}
"""The same for calls in 8 bits by the precision of P·V, against fp64 on the rounded operands."""
POISON = float("nan")
NOBODY = "no backend"
"""What serves a call that every backend refuses, and which tells nothing."""


@dataclass(frozen=True)
class Family:
    """What a kernel is compiled for."""

    dtype: torch.dtype
    head_size: int
    value_size: int
    size: tuple[int, int]
    causal: bool
    group: int
    kv_heads: int
    traits: frozenset[str]
    qk: str = "native"
    pv: str = "native"

    @property
    def kind(self) -> str:
        """What sets its kernels apart, to count them by."""
        if self.qk != "native":
            return f" {self.qk}/{self.pv} d{self.head_size}"
        names = [t for t in ("skip", "levels", "bias") if t in self.traits]
        return " ".join(["", *(["keys"] if self.size[1] == 1 else []), *names])

    @staticmethod
    def draw(seed: int, device: str) -> Family:
        r = random.Random(seed)
        half = [torch.float16, *([torch.bfloat16] * 2 if device == "cuda" else [])]
        if r.random() < 0.15:
            return Family._in_eight_bits(r, half, device)
        size, width = r.choice(UNITS), r.choice(HEAD_SIZES[: 7 if device == "cuda" else 4])
        options = ("padding", "positions", "bias", "rows", "given", "contiguous")
        traits = {t for t in options if r.random() < 0.2}
        causal, dtype = r.random() < 0.6, r.choice([*half, torch.float32])
        if size[1] > 1 and r.random() < 0.15:
            traits.add("skip")
        elif size[1] > 1 and r.random() < 0.15:
            traits, causal = traits & {"rows", "given", "contiguous"} | {"levels"}, False
        if device == "cuda" and r.random() < 0.4:  # what Hopper's own kernels serve
            width, dtype = r.choice([64, 128]), r.choice(half)
            size = r.choice([(128, 128), (128, 64), (256, 128)] if size[1] > 1 else [(128, 1)])
            traits -= {"padding", "positions"}
        values = width if r.random() < 0.8 else r.choice(HEAD_SIZES[:4])
        group, kv_heads = r.choice([1, 1, 2, 3, 4]), r.choice([1, 2, 3])
        return Family(dtype, width, values, size, causal, group, kv_heads, frozenset(traits))

    @staticmethod
    def _in_eight_bits(r: random.Random, half: list[torch.dtype], device: str) -> Family:
        width = r.choice([64, 128, 128])
        options = {"given": 0.3, "contiguous": 0.3, "rows": 0.2, "padding": 0.1, "bias": 0.1}
        return Family(
            r.choice(half),
            width,
            width,
            r.choice([(128, 128), (128, 64), (64, 64), (256, 128)]),
            r.random() < 0.6,
            r.choice([1, 2, 4]),
            r.choice([1, 2]),
            frozenset(t for t, share in options.items() if r.random() < share),
            qk=r.choice(["int8", "fp8"]),
            # The interpreter's cast to fp8 loses carries: there P keeps 16 bits.
            pv=r.choice(["native", "fp8"] if device == "cuda" else ["native"]),
        )


class Dice:
    """Chance of one call: Python's for what it is like, torch's for what tensors hold."""

    def __init__(self, seed: int, device: str) -> None:
        self.r, self.device = random.Random(seed), device
        self.g = torch.Generator(device=device).manual_seed(seed)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.g, device=self.device)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.g, device=self.device)


def draw(
    family: Family, seed: int, device: str, longest: int
) -> tuple[list[Tensor], BlockIndex, dict]:
    """Tensors, index and options of one call."""
    dice = Dice(seed, device)
    r, heads = dice.r, family.group * family.kv_heads
    tensors, past = _tensors(dice, family, longest)
    options: dict[str, Any] = {"causal": family.causal, "q_start": past if family.causal else 0}
    if family.qk != "native":
        options |= {"qk": family.qk, "pv": family.pv, "smooth_k": r.random() < 0.5}
    chosen = list(range(heads))
    if r.random() < 0.4:
        r.shuffle(chosen)
        if r.random() < 0.5:
            chosen = chosen[: r.randint(1, heads)]
        options["heads"] = tuple(chosen)
    batch, n_q, n_k = len(tensors[0]), tensors[0].shape[2], tensors[1].shape[2]
    index = _lists(dice, family, (r.choice([1, batch]), len(chosen)), n_q, n_k)
    if "padding" in family.traits:
        length = torch.tensor([r.randint(0, n_k) for _ in range(batch)], device=device)
        key = torch.arange(n_k, device=device)
        left = r.random() < 0.5
        options["key_mask"] = key >= length[:, None] if left else key < length[:, None]
    if "positions" in family.traits:
        order = dice.uniform(1, len(chosen), n_k).argsort(-1).int()
        holes = dice.uniform(1, len(chosen), n_k) < 0.05
        options["k_pos"] = torch.where(holes, -1, order)
        rows = torch.arange(n_q, device=device).int().view(1, 1, -1) + options["q_start"]
        options["q_pos"] = rows.flip(-1)
    if "rows" in family.traits:
        options["rows"] = tuple(sorted(r.sample(range(index.rows), r.randint(1, index.rows))))
    if "skip" in family.traits:
        options["skip"] = 1e-9  # so small that the reference need not skip
    if r.random() < 0.3:
        options["scale"] = 0.3 * family.head_size**-0.5
    return tensors, index, options


def _tensors(dice: Dice, family: Family, longest: int) -> tuple[list[Tensor], int]:
    """q, k and v, and the keys before the first row of a causal call."""
    r = dice.r
    n_q = max(1, int(longest ** r.random()))
    past = r.choice([0, 0, r.randrange(longest // 2 + 1)])
    n_k = n_q + past if family.causal else max(1, int(longest ** r.random()))
    batch, kv_heads = r.choice([1, 1, 2, 3]), family.kv_heads
    q = dice.normal(batch, n_q, family.group * kv_heads, family.head_size)
    k = dice.normal(batch, n_k, kv_heads, family.head_size)
    v = dice.normal(batch, n_k, kv_heads, family.value_size)
    kind = r.choice(["random", "random", "sinks", "sharp", "repeated"])
    if kind == "sinks":  # logits of 30 and more at the first keys
        direction = torch.nn.functional.normalize(dice.normal(family.head_size), dim=0)
        q += 6 * direction
        k[:, : min(4, n_k)] += 6 * direction * family.head_size**0.5
    elif kind == "sharp":
        q *= 8
    elif kind == "repeated":
        k = k[:, :1].expand_as(k)
    tensors = [t.to(family.dtype).transpose(1, 2) for t in (q, k, v)]
    if "contiguous" in family.traits:
        tensors = [t.contiguous() for t in tensors]
    return tensors, past


def _lists(dice: Dice, family: Family, lead: tuple[int, int], n_q: int, n_k: int) -> BlockIndex:
    """Lists `[*lead, query tiles]`."""
    r, (bq, bk), levels = dice.r, family.size, "levels" in family.traits
    nk = pyramid.firsts(n_k, bk)[-1] if levels else ceil_div(n_k, bk)
    shape = (*lead, ceil_div(n_q, bq))
    mask = dice.uniform(*shape, nk) < r.choice([0.0, 0.02, 0.1, 0.3, 0.7, 1.0])
    index = BlockIndex.from_mask(mask, family.size)
    if r.random() < 0.5:  # some rows read everything, some nothing
        kinds, count = dice.uniform(*shape), index.count.clone()
        count[(kinds < 0.2) & (not levels)] = ALL
        count[kinds > 0.85] = 0
        index = replace(index, count=count)
    elif nk > 1 and "skip" not in family.traits:  # another visiting order
        turned = (dice.uniform(*shape, nk) + 2.0 * ~mask).argsort(-1).int()
        index = replace(index, blocks=turned.flatten())
    if "bias" in family.traits:
        bias = dice.uniform(1, lead[1], n_k) if r.random() < 0.7 else 0.7
        index = replace(index, bias=bias)
    return replace(index, pyramid=levels)


@dataclass(frozen=True)
class Rows:
    """A batch entry and head of a call in fp64: logits (−inf where hidden), probabilities and LSE
    of its rows, and what it multiplies.
    """

    batch: int
    slot: int
    kv_head: int
    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    p: Tensor
    lse: Tensor


def rows_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    options: dict[str, Any],
    pairs: Sequence[tuple[int, int]],
) -> Iterator[Rows]:
    """The definition, written once more: dense masks and fp64, a batch entry and head at a time.
    `pairs` are the heads of q and of k for each head of the call.
    """
    (n_q, n_k), (bq, bk) = (q.shape[2], k.shape[2]), index.size
    blocks = index.to_mask(ceil_div(n_k, bk))
    row = torch.arange(n_q, device=q.device).view(1, 1, -1) + options["q_start"]
    key = torch.arange(n_k, device=q.device).view(1, 1, -1)
    row, key = options.get("q_pos", row), options.get("k_pos", key)
    real = options.get("key_mask", torch.ones(q.shape[0], n_k, dtype=torch.bool, device=q.device))
    bias = index.bias
    if not isinstance(bias, Tensor):
        bias = torch.full((1, 1, n_k), bias, dtype=torch.float64, device=q.device)
    scale = options.get("scale", q.shape[3] ** -0.5)
    for b in range(q.shape[0]):
        for slot, (hq, hk) in enumerate(pairs):

            def mine(t: Tensor, b: int = b, slot: int = slot) -> Tensor:
                return t[b if t.shape[0] > 1 else 0, slot if t.shape[1] > 1 else 0]

            listed = mine(blocks).repeat_interleave(bq, 0)[:n_q].repeat_interleave(bk, 1)[:, :n_k]
            seen = listed & real[b] & (mine(key) >= 0) & (mine(row) >= 0)[:, None]
            if options["causal"]:
                seen &= mine(key) <= mine(row)[:, None]
            own = (q[b, hq].double(), k[b, hk].double(), v[b, hk].double())
            s = own[0] @ own[1].T * scale + mine(bias)
            s = s.masked_fill(~seen, -float("inf"))
            lse = s.logsumexp(-1)
            p = (s - lse.masked_fill(lse == -float("inf"), 0.0)[:, None]).exp()
            yield Rows(b, slot, hk, *own, s, p, lse)


def exact(
    tensors: list[Tensor], index: BlockIndex, options: dict[str, Any]
) -> tuple[Partial, Limits | None, str | None]:
    """The result in fp64; of a call in 8 bits that of its own rounded operands, how far a kernel
    may be from it, and what is wrong with the operands.
    """
    q, k, v = tensors
    if index.pyramid:
        k, v, index = pyramid.lower(k, v, index)
    heads, group = options.get("heads", range(q.shape[1])), q.shape[1] // k.shape[1]
    shape = (q.shape[0], len(list(heads)), q.shape[2])
    outs, sums, allowed = [], [], []
    if options.get("qk", "native") == "native":
        for rows in rows_of(q, k, v, index, options, [(h, h // group) for h in heads]):
            outs.append(rows.p @ rows.v)
            sums.append(rows.lse)
        return (
            Partial(torch.stack(outs).view(*shape, -1), torch.stack(sums).view(shape)),
            None,
            None,
        )
    launch = prepare(q, k, v, index, **options)
    ops = quantize(launch.q, launch.k, launch.v, rounding_of(launch))
    pairs = [(slot, h // group) for slot, h in enumerate(heads)]
    for rows in rows_of(*dequantize(ops), index, options, pairs):
        out, lse = rows.p @ rows.v, rows.lse
        if ops.v_mean is not None:
            out = out + rows.p.sum(-1, keepdim=True) * ops.v_mean[rows.batch, rows.kv_head]
        if ops.shift is not None:
            lse = lse + ops.shift[rows.batch, rows.slot]
        outs.append(out)
        sums.append(lse)
        allowed.append(limits(rows, out, ops, launch))
    want = Partial(torch.stack(outs).view(*shape, -1), torch.stack(sums).view(shape))
    most = Limits(
        torch.stack([near.out for near in allowed]).view_as(want.out),
        torch.stack([near.lse for near in allowed]).view_as(want.lse),
    )
    return want, most, misrounded(launch, ops)


def compare(
    family: Family, got: Partial, want: Partial, most: Limits | None, touched: Tensor
) -> str | None:
    """What is wrong with a result, or None. `touched` `[B, H, N]` are rows that the call owns."""
    empty = want.lse == -float("inf")
    own, none = touched & ~empty, touched & empty
    if not bool(got.out[own].isfinite().all() and got.lse[own].isfinite().all()):
        return "not finite"
    if bool((got.out[none] != 0).any() or (got.lse[none] != -float("inf")).any()):
        return "rows without keys are not zero and −inf"
    if not bool(own.any()):
        return None
    error = (got.out[own].double() - want.out[own]).norm() / want.out[own].norm().clamp(min=1e-6)
    if float(error) > (TOLERANCE[family.dtype] if most is None else LOW_BITS[family.pv]):
        return f"relative error {float(error):.2e}"
    gap = (got.lse[own] - want.lse[own]).abs()
    share = float(
        (gap / (2e-4 * (1 + want.lse[own].abs()) if most is None else most.lse[own])).max()
    )
    if share > 1:
        return f"LSE off by {float(gap.max()):.2e}, {share:.1f} times what it may be"
    if most is None:
        return None
    share = float(((got.out[own].double() - want.out[own]).abs() / most.out[own]).max())
    return f"output off by {share:.1f} times what it may be" if share > 1 else None


def run(family: Family, seed: int, device: str, longest: int) -> tuple[list[str], list[str]]:
    """Backends that served the call, and what each of them did wrong."""
    (q, k, v), index, options = draw(family, seed, device, longest)
    want, most, problem = exact([q, k, v], index, options)
    touched = torch.ones(want.lse.shape, dtype=torch.bool, device=device)
    heads = list(options.get("heads", range(q.shape[1])))
    if "rows" in options:
        row = torch.arange(q.shape[2], device=device) // family.size[0]
        touched &= torch.isin(row, torch.tensor(options["rows"], device=device))
    served, wrong = [], [] if problem is None else [problem]
    for backend in BACKENDS:
        if backend in ("torch", "reference") and device != "cpu":
            continue

        def call(backend: str = backend) -> Partial:
            given: dict[str, Tensor] = {}
            if "given" in family.traits:
                shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
                out = torch.full(shape, POISON, dtype=q.dtype, device=device)
                given["out"] = out.transpose(1, 2)
                given["lse"] = torch.full(q.shape[:3], POISON, device=device)
            return attend(q, k, v, index, backend=backend, **options, **given)

        try:
            found, again = call(), call()
        except KernelUnavailableError:
            continue
        served.append(backend)
        if not all(
            torch.equal(one.nan_to_num(nan=7.0), two.nan_to_num(nan=7.0))
            for one, two in ((found.out, again.out), (found.lse, again.lse))
        ):
            wrong.append(f"{backend}: other bits the second time")
        if "given" in family.traits:
            others = torch.ones(found.lse.shape, dtype=torch.bool, device=device)
            others[:, heads] = ~touched
            if not bool(found.lse[others].isnan().all() and found.out[others].isnan().all()):
                wrong.append(f"{backend}: wrote where it should not")
            found = Partial(found.out[:, heads], found.lse[:, heads])
        problem = compare(family, found, want, most, touched)
        if problem is not None:
            wrong.append(f"{backend}: {problem}")
    return served, wrong


@dataclass
class Tally:
    """What became of some calls."""

    calls: int = 0
    failed: list[str] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.calls += other.calls
        self.failed += other.failed
        self.served += other.served


def run_family(job: tuple[int, list[int], str, int, float]) -> Tally:
    """All calls of one family, until the time is over."""
    family_seed, seeds, device, longest, until = job
    family, tally = Family.draw(family_seed, device), Tally()
    for seed in seeds:
        if time.time() > until:
            break
        try:
            served, wrong = run(family, seed, device, longest)
        except Exception as error:  # a call that dies must not hide the others
            served, wrong = [], [f"{type(error).__name__}: {error}"[:300]]
        tally.calls += 1
        by = served or ([] if wrong else [NOBODY])
        tally.served.update(f"{name}{family.kind}" for name in by)
        if wrong:
            tally.failed.append(f"{seed}:{family_seed} {family}\n    " + "; ".join(wrong))
            print(tally.failed[-1], flush=True)
    return tally


def report(args: argparse.Namespace, tally: Tally, seconds: float) -> dict[str, Any]:
    """A run as results are kept."""
    about = {key: value for key, value in machine().items() if key != "dtype"}
    row = {
        "gpu": about["gpu"], "seed": args.seed, "families": args.families, "longest": args.longest,
        "calls": tally.calls, "failed": len(tally.failed), "seconds": seconds,
        "failures": tally.failed, "served": dict(sorted(tally.served.items())),
    }  # fmt: skip
    title = "Random calls of every kernel against fp64 (`benchmarks/fuzz_kernels.py`)"
    return {"title": title, **about, "note": served_by(tally.served), "rows": [row]}


def merge(paths: list[Path]) -> dict[str, Any]:
    """One report of several runs."""
    parts = [json.loads(path.read_text("utf-8")) for path in paths]
    rows = [row for part in parts for row in part["rows"]]
    served = sum((Counter(row["served"]) for row in rows), Counter())
    return parts[0] | {"note": served_by(served), "rows": rows}


def served_by(served: Counter[str]) -> str:
    counts = ", ".join(f"{name} {n}" for name, n in sorted(served.items()))
    return f"Calls by backend and what sets their kernels apart: {counts}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--families", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--workers", type=int, default=1, help="processes, for kernels to compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="SEED:FAMILY of one call")
    parser.add_argument("--kind", default="", help="families of this kind, such as int8 or levels")
    parser.add_argument("--out", type=Path, help="JSON of what was run")
    parser.add_argument("--merge", type=Path, nargs="+", help="reports to join, nothing is run")
    args = parser.parse_args()
    if args.merge:
        args.out.write_text(json.dumps(merge(args.merge), indent=1) + "\n")
        return 0
    begin, jobs = time.time(), {}
    if args.only:
        seed, family_seed = map(int, args.only.split(":"))
        jobs[family_seed] = [seed]
    else:
        seeds = (s for s in count(args.seed) if args.kind in Family.draw(s, args.device).kind)
        families = list(islice(seeds, args.families))
        for i in range(args.calls):
            jobs.setdefault(families[i % len(families)], []).append(args.seed + i)
    rest = (args.device, args.longest, begin + args.seconds)
    work = [(family_seed, seeds, *rest) for family_seed, seeds in jobs.items()]
    tally = Tally()
    if args.workers > 1:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            for part in pool.imap_unordered(run_family, work):
                tally.add(part)
    else:
        for job in work:
            tally.add(run_family(job))
    served = ", ".join(f"{name} {n}" for name, n in sorted(tally.served.items()))
    print(f"{tally.calls} of {sum(map(len, jobs.values()))} calls, {len(tally.failed)} failed")
    print(f"served by {served}; {time.time() - begin:.0f} s")
    if args.out:
        args.out.write_text(json.dumps(report(args, tally, time.time() - begin), indent=1) + "\n")
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
