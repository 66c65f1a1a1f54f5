"""Random calls of `attend` against an fp64 reference, on every backend that serves them.

    python benchmarks/fuzz_kernels.py --calls 5000 --seed 0 --workers 8

A family fixes what a kernel is compiled for (dtype, head sizes and numbers, layout, unit, masks);
the calls of a family differ in lengths, batch, lists and values, and run in one process. Outputs
are poisoned before each call, and each call must give the same bits twice. Calls in 8 bits are
compared with the reference that rounds as they do. Every call has its own seed, printed with a
failure: `--only SEED:FAMILY` runs that one again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accelkit.errors import KernelUnavailableError
from accelkit.kernels.dispatch import BACKENDS, attend
from accelkit.kernels.index import ALL, BlockIndex, Partial, ceil_div

UNITS = (
    (128, 128), (128, 64), (64, 128), (64, 64), (256, 128), (32, 32), (48, 16), (16, 16), (20, 32),
    (128, 1), (32, 1), (300, 1),
)  # fmt: skip
HEAD_SIZES = (16, 40, 64, 80, 96, 128, 256)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 3e-5}
"""‖out − ref‖ / ‖ref‖ that rounding of inputs, probabilities and output explains."""
LOW_BITS = {"native": 1.5e-2, "fp8": 5e-2}
"""The same for calls in 8 bits by the precision of P·V, against the reference: kernels round P
relative to the maximum so far, and sums in another order move values over the edge of a step."""
POISON = float("nan")


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

    @staticmethod
    def draw(seed: int, device: str) -> Family:
        r = random.Random(seed)
        half = [torch.float16, *([torch.bfloat16] * 2 if device == "cuda" else [])]
        if device == "cuda" and r.random() < 0.15:
            return Family._in_eight_bits(r)
        size, width = r.choice(UNITS), r.choice(HEAD_SIZES[: 7 if device == "cuda" else 4])
        options = ("padding", "positions", "bias", "rows", "given", "contiguous")
        traits = {t for t in options if r.random() < 0.2}
        if size[1] > 1 and r.random() < 0.15:
            traits.add("skip")
        return Family(
            r.choice([*half, torch.float32]),
            width,
            width if r.random() < 0.8 else r.choice(HEAD_SIZES[:4]),
            size,
            r.random() < 0.6,
            r.choice([1, 1, 2, 3, 4]),
            r.choice([1, 2, 3]),
            frozenset(traits),
        )

    @staticmethod
    def _in_eight_bits(r: random.Random) -> Family:
        width = r.choice([64, 128])
        return Family(
            torch.bfloat16,
            width,
            width,
            r.choice([(128, 128), (128, 64), (64, 64), (256, 128)]),
            r.random() < 0.6,
            r.choice([1, 2, 4]),
            r.choice([1, 2]),
            frozenset(t for t in ("given", "contiguous") if r.random() < 0.3),
            qk=r.choice(["int8", "fp8"]),
            pv=r.choice(["native", "fp8"]),
        )


def draw(
    family: Family, seed: int, device: str, longest: int
) -> tuple[list[Tensor], BlockIndex, dict]:
    """Tensors, index and options of one call."""
    r, g = random.Random(seed), torch.Generator(device=device).manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=g, device=device)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    bq, bk = family.size
    n_q = max(1, int(longest ** r.random()))
    past = r.choice([0, 0, r.randrange(longest // 2 + 1)])
    n_k = n_q + past if family.causal else max(1, int(longest ** r.random()))
    batch, kv_heads, heads = r.choice([1, 1, 2, 3]), family.kv_heads, family.group * family.kv_heads
    q = normal(batch, n_q, heads, family.head_size)
    k = normal(batch, n_k, kv_heads, family.head_size)
    v = normal(batch, n_k, kv_heads, family.value_size)
    kind = r.choice(["random", "random", "sinks", "sharp", "repeated"])
    if kind == "sinks":  # logits of 30 and more at the first keys
        direction = torch.nn.functional.normalize(normal(family.head_size), dim=0)
        q += 6 * direction
        k[:, : min(4, n_k)] += 6 * direction * family.head_size**0.5
    elif kind == "sharp":
        q *= 8
    elif kind == "repeated":
        k = k[:, :1].expand_as(k)
    tensors = [t.to(family.dtype).transpose(1, 2) for t in (q, k, v)]
    if "contiguous" in family.traits:
        tensors = [t.contiguous() for t in tensors]

    options: dict[str, Any] = {"causal": family.causal, "q_start": past if family.causal else 0}
    if family.qk != "native":
        options |= {"qk": family.qk, "pv": family.pv, "smooth_k": r.random() < 0.5}
    chosen = list(range(heads))
    if r.random() < 0.4:
        r.shuffle(chosen)
        if r.random() < 0.5:
            chosen = chosen[: r.randint(1, heads)]
        options["heads"] = tuple(chosen)
    nq, nk = ceil_div(n_q, bq), ceil_div(n_k, bk)
    shape = (r.choice([1, batch]), len(chosen), nq)
    mask = uniform(*shape, nk) < r.choice([0.0, 0.02, 0.1, 0.3, 0.7, 1.0])
    index = BlockIndex.from_mask(mask, family.size)
    if r.random() < 0.5:  # some rows read everything, some nothing
        kinds, count = uniform(*shape), index.count.clone()
        count[kinds < 0.2] = ALL
        count[kinds > 0.85] = 0
        index = BlockIndex(index.start, count, index.blocks, family.size)
    elif nk > 1 and "skip" not in family.traits:  # another visiting order
        width = mask.shape[-1]
        turned = (uniform(*shape, width) + 2.0 * ~mask).argsort(-1).int()
        index = BlockIndex(index.start, index.count, turned.flatten(), family.size)
    if "bias" in family.traits:
        index = BlockIndex(
            index.start, index.count, index.blocks, family.size,
            bias=uniform(1, len(chosen), n_k) if r.random() < 0.7 else 0.7,
        )  # fmt: skip
    if "padding" in family.traits:
        length = torch.tensor([r.randint(0, n_k) for _ in range(batch)], device=device)
        key = torch.arange(n_k, device=device)
        left = r.random() < 0.5
        options["key_mask"] = key >= length[:, None] if left else key < length[:, None]
    if "positions" in family.traits:
        order = uniform(1, len(chosen), n_k).argsort(-1).int()
        options["k_pos"] = torch.where(uniform(1, len(chosen), n_k) < 0.05, -1, order)
        rows = torch.arange(n_q, device=device).int().view(1, 1, -1) + options["q_start"]
        options["q_pos"] = rows.flip(-1)
    if "rows" in family.traits:
        options["rows"] = tuple(sorted(r.sample(range(nq), r.randint(1, nq))))
    if "skip" in family.traits:
        options["skip"] = 1e-9  # so small that the reference need not skip
    if r.random() < 0.3:
        options["scale"] = 0.3 * family.head_size**-0.5
    return tensors, index, options


def exact(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, options: dict[str, Any]) -> Partial:
    """The definition, written once more: dense masks and fp64, a batch entry and head at a time."""
    heads = options.get("heads", range(q.shape[1]))
    (n_q, n_k), (bq, bk), group = (q.shape[2], k.shape[2]), index.size, q.shape[1] // k.shape[1]
    blocks = index.to_mask(ceil_div(n_k, bk))
    row = torch.arange(n_q, device=q.device).view(1, 1, -1) + options["q_start"]
    key = torch.arange(n_k, device=q.device).view(1, 1, -1)
    row, key = options.get("q_pos", row), options.get("k_pos", key)
    real = options.get("key_mask", torch.ones(q.shape[0], n_k, dtype=torch.bool, device=q.device))
    bias = index.bias
    if not isinstance(bias, Tensor):
        bias = torch.full((1, 1, n_k), bias, dtype=torch.float64, device=q.device)
    scale = options.get("scale", q.shape[3] ** -0.5)
    outs, sums = [], []
    for b in range(q.shape[0]):
        for slot, h in enumerate(heads):

            def mine(t: Tensor, b: int = b, slot: int = slot) -> Tensor:
                return t[b if t.shape[0] > 1 else 0, slot if t.shape[1] > 1 else 0]

            listed = mine(blocks).repeat_interleave(bq, 0)[:n_q].repeat_interleave(bk, 1)[:, :n_k]
            seen = listed & real[b] & (mine(key) >= 0) & (mine(row) >= 0)[:, None]
            if options["causal"]:
                seen &= mine(key) <= mine(row)[:, None]
            s = q[b, h].double() @ k[b, h // group].double().T * scale + mine(bias)
            s = s.masked_fill(~seen, -float("inf"))
            lse = s.logsumexp(-1)
            p = (s - lse.masked_fill(lse == -float("inf"), 0.0)[:, None]).exp()
            outs.append(p @ v[b, h // group].double())
            sums.append(lse)
    shape = (q.shape[0], len(list(heads)), n_q)
    return Partial(torch.stack(outs).view(*shape, -1), torch.stack(sums).view(shape))


def compare(family: Family, got: Partial, want: Partial, touched: Tensor) -> str | None:
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
    low = family.qk != "native"
    if float(error) > (LOW_BITS[family.pv] if low else TOLERANCE[family.dtype]):
        return f"relative error {float(error):.2e}"
    gap = ((got.lse[own] - want.lse[own]).abs() / (1 + want.lse[own].abs())).max()
    return f"LSE off by {float(gap):.2e}" if float(gap) > (2e-2 if low else 2e-4) else None


def run(family: Family, seed: int, device: str, longest: int) -> tuple[list[str], list[str]]:
    """Backends that served the call, and what each of them did wrong."""
    (q, k, v), index, options = draw(family, seed, device, longest)
    if family.qk == "native":
        want = exact(q, k, v, index, options)
    else:
        want = attend(q, k, v, index, backend="reference", **options)
    touched = torch.ones(want.lse.shape, dtype=torch.bool, device=device)
    heads = list(options.get("heads", range(q.shape[1])))
    if "rows" in options:
        row = torch.arange(q.shape[2], device=device) // family.size[0]
        touched &= torch.isin(row, torch.tensor(options["rows"], device=device))
    served, wrong = [], []
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
        problem = compare(family, found, want, touched)
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
        low = "" if family.qk == "native" else f" {family.qk}/{family.pv}"
        tally.calls += 1
        tally.served.update(name + low for name in served)
        if wrong:
            tally.failed.append(f"{seed}:{family_seed} {family}\n    " + "; ".join(wrong))
            print(tally.failed[-1], flush=True)
    return tally


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
    args = parser.parse_args()
    begin, jobs = time.time(), {}
    if args.only:
        seed, family_seed = map(int, args.only.split(":"))
        jobs[family_seed] = [seed]
    else:
        for i in range(args.calls):
            jobs.setdefault(args.seed + i % args.families, []).append(args.seed + i)
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
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
