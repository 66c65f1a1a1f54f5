"""A whole denoising of a full-size video transformer, dense against forced plans.

Random weights spread their attention, so a calibrated plan on them is dense; a forced plan keeps a
fixed density behind some dense steps and shows what the machinery reaches, order and estimate
included. Both sides run in one process, compiled by repeated blocks, the dense one first and once
more in the end; its attention is cuDNN's, without masks that hide nothing.

With f the share of self-attention in the dense denoising (its kernels ÷ the time of the same run,
as the profiler sees them in the compiled pipeline), w the share of dense steps and δ the density,
the speed-up of kernels that are 85 % as efficient as dense ones is

    1 / (1 − f + f · (w + (1 − w) · δ / 0.85)).

A step cache leaves out steps by a forced rhythm, since random weights say nothing about which may
be left out; it runs alone and together with the first plan.

    python benchmarks/denoise_dit.py --model wan --steps 20 --cache --out results.json
    python benchmarks/denoise_dit.py --model hunyuan --steps 5 --repeat 1 --look 1
    python benchmarks/denoise_dit.py --model hunyuan --steps 5 --repeat 1 --cache only
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import accelkit
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.shots import Shot
from accelkit.calibration.denoise.video import Settings
from accelkit.calibration.results import environment
from accelkit.patches.adapters import facts, sites
from accelkit.patches.method import load
from accelkit.patches.methods.mag_cache import MagCache
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule

EFFICIENCY = 0.85
DENSE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def wan(layers: Sequence[int]) -> tuple[Any, Settings, dict[str, Any]]:
    """The public configuration of Wan2.1-T2V-1.3B, 480 × 832, 81 frames: 32,760 tokens."""
    denoiser = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=(*layers, 30)[0],
        cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(shift=3.0), denoiser)
    text = {"prompt_embeds": torch.randn(1, 512, 4096), "guidance_scale": 1.0}
    return pipe, Settings(480, 832, 81), text


def hunyuan(layers: Sequence[int]) -> tuple[Any, Settings, dict[str, Any]]:
    """HunyuanVideo: 720 × 1280, 129 frames, 118,800 tokens and 256 of text."""
    double, single = layers or (20, 40)
    denoiser = HunyuanVideoTransformer3DModel(
        num_layers=double, num_single_layers=single, num_refiner_layers=1
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(None, None, denoiser, None, scheduler, None, None)
    text = {
        "prompt_embeds": torch.randn(1, 256, 4096),
        "pooled_prompt_embeds": torch.randn(1, 768),
        "prompt_attention_mask": torch.ones(1, 256),
    }
    return pipe, Settings(720, 1280, 129), text


MODELS = {"wan": wan, "hunyuan": hunyuan}
TOKENS = {"wan": 32760, "hunyuan": 119056}
SHAPES = {
    "wan": "Wan2.1-1.3B shapes (480p, 81 frames)",
    "hunyuan": "HunyuanVideo shapes (720p, 129 frames)",
}
NOTE = (
    "By `benchmarks/denoise_dit.py`: a forced plan, dense runs cuDNN; on both sides the median of "
    "the timed runs that `runs` names. Bound: 1 / (1 − f + f (w + (1 − w) δ / 0.85)) with the "
    "share f of self-attention, the share w of dense steps and the density δ. f is the time of "
    "the self-attention kernels of a short dense run over the time of that run, as the profiler "
    "sees both. Neither side has HunyuanVideo's mask over the text, which hides nothing here. "
    "Rows with a step cache leave out steps behind the first fifth by a forced rhythm of MagCache; "
    "`calls_left` is the share of attention calls that it leaves. "
    "`dense_again` is the dense side once more behind all others: how far the clock drifted."
)


def unmasked(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention without masks: the text fills its places here, so the mask over text that
    HunyuanVideo passes hides nothing, but would make dense attention half as slow again.
    """

    def function(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **rest: Any
    ) -> Tensor:
        return attend(query, key, value, **rest)

    return function


def built(name: str, layers: Sequence[int], device: str) -> tuple[Any, Settings, Shot]:
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            pipe, size, text = MODELS[name](layers)
        finally:
            torch.set_default_dtype(before)
    pipe.transformer.eval()
    return pipe, size, Shot(name, text, 0)


def forced(pipe: Any, policy: Policy, dense_share: float, cache: Any = None) -> Plan:
    """Every head of every site runs `policy` behind the dense share of the steps."""
    fingerprint, heads = facts(pipe)
    rule = {
        s.path: (Rule(phase="denoise", steps=(dense_share, 1.0), policies=(1,) * heads[s.path]),)
        for s in sites(pipe)
    }
    layers = {path: LayerPlan(rules=r) for path, r in rule.items()}
    if cache is not None:
        layers["transformer"] = LayerPlan(block=cache)
    return Plan(fingerprint=fingerprint, policies=(Policy(), policy), sites=layers)


@contextmanager
def compiled(pipe: Any, wanted: bool):
    """Repeated blocks compiled while open."""
    if wanted:
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    try:
        yield
    finally:
        for module in pipe.transformer.modules():
            module._compiled_call_impl = None


def timed(
    pipe: Any,
    size: Settings,
    shot: Shot,
    repeat: int,
    opened: Callable[[], Any],
    compile: bool,
    warm: int,
    look: Callable[[Any, Settings, Shot], dict[str, Any]] = lambda *_: {},
) -> dict[str, Any]:
    """Seconds of each denoising, after one of `warm` steps to compile and warm up; then what
    `look` sees in one more.
    """
    begin = time.perf_counter()
    short = replace(size, num_inference_steps=min(warm, size.num_inference_steps))
    with opened() as handle, sdpa_kernel(DENSE, set_priority=True), compiled(pipe, compile):
        video.run(pipe, short, shot)
        if report := getattr(handle, "reset_report", None):
            report()
        start = time.perf_counter()
        takes = [video.run(pipe, size, shot) for _ in range(repeat)]
        finite = bool(torch.isfinite(takes[-1].latents).all())
        found = look(pipe, size, shot)
    report = getattr(handle, "report", None)
    counts = report().as_dict() if report else {}
    return {
        "seconds": statistics.median(t.ends[-1] for t in takes),
        "runs": [round(t.ends[-1], 4) for t in takes],
        "warm_up": round(start - begin, 1),
        "finite": finite,
        **found,
        **{k: counts[k] for k in ("calls", "sparse_calls", "dense") if k in counts},
    }


ATTENTION = ("sdpa", "flash", "fmha")
"""Names that dense attention kernels contain."""


def attention_share(steps: int, pipe: Any, size: Settings, shot: Shot) -> dict[str, Any]:
    """Share of self-attention kernels in a run of `steps` steps. Those of cross-attention and of
    a text refiner are more than ten times as short.
    """
    size = replace(size, num_inference_steps=min(steps, size.num_inference_steps))
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds = video.run(pipe, size, shot).ends[-1]
    ms = [
        e.time_range.elapsed_us() / 1e3
        for e in seen.events()
        if e.device_type == DeviceType.CUDA and any(name in e.name for name in ATTENTION)
    ]
    long = [t for t in ms if t > max(ms) / 2]
    return {
        "attention_calls": len(long),
        "attention_ms": statistics.median(long),
        "profiled_seconds": seconds,
        "attention_share": sum(long) / 1e3 / seconds,
    }


def density(pipe: Any, plan: Plan, size: Settings, shot: Shot) -> float:
    """Computed ÷ visible pairs of the sparse calls, on a short run."""
    with accelkit.patch(pipe, plan) as handle, handle.measuring():
        video.run(pipe, size, shot)
    found = [s.density for s in handle.report().sites.values() if s.density is not None]
    return statistics.fmean(found)


def policy_of(text: str) -> Policy:
    """`name:field=value,…`; values are JSON."""
    name, _, rest = text.partition(":")
    pairs = [pair.split("=") for pair in rest.split(",") if pair]
    return Policy(methods=(load(name)(**{k: json.loads(v) for k, v in pairs}),))


class Study:
    """A pipeline, its dense run, and the rows that were found beside it, written as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.begin = args, time.perf_counter()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipe, size, self.shot = built(args.model, args.layers, device)
        self.size = replace(size, num_inference_steps=args.steps)
        beside = ", with a step cache" * (args.cache == "only")
        depth = " dual and ".join(map(str, args.layers)) + " single" * (len(args.layers) > 1)
        title = f"Whole denoising at {SHAPES[args.model]}, {depth or 'all'} layers, random weights"
        title += beside
        self.found: dict[str, Any] = {
            "title": title + ", compiled by repeated blocks" * (not args.eager),
            "note": NOTE,
            "model": args.model, "tokens": TOKENS[args.model], "layers": len(sites(self.pipe)),
            "of_layers": args.layers or "all",
            "steps": args.steps,
            "compiled": not args.eager,
            "environment": environment(torch.device(device)), "rows": [],
        }  # fmt: skip

    def save(self, told: str) -> None:
        print(told, flush=True)
        if self.args.out:
            self.args.out.write_text(json.dumps(self.found, indent=1))

    def late(self) -> bool:
        return time.perf_counter() - self.begin > self.args.seconds

    def run(self, plan: Plan | None, warm: int = 2, **look: Any) -> dict[str, Any]:
        """`warm` 2: behind a dense step, a plan has a sparse one to compile."""
        gc.collect()
        opened = nullcontext if plan is None else lambda: accelkit.patch(self.pipe, plan)
        args = self.args
        return timed(
            self.pipe, self.size, self.shot, args.repeat, opened, not args.eager, warm, **look
        )

    def speedup(self, row: dict[str, Any]) -> float:
        """How many times faster than the dense run that came first."""
        return self.found["dense"]["seconds"] / row["seconds"]

    def dense(self) -> None:
        """What all others are divided by."""
        only = self.args.cache == "only"  # nothing is held against a bound
        look = {} if only else {"look": partial(attention_share, self.args.look)}
        dense = self.found["dense"] = self.run(None, warm=1, **look)
        told = f"{self.args.model}: dense {dense['seconds']:.3f} s"
        if not only:
            share = self.found["attention_share"] = dense["attention_share"]
            told += f", attention {dense['attention_ms']:.2f} ms a call, f = {share:.3f}"
        self.save(told)

    def sparse(self, name: str, policy: Policy, early: float) -> None:
        """A forced plan behind the share `early` of dense steps, beside its bound."""
        plan = forced(self.pipe, policy, early)
        mine, share = self.run(plan), self.found["attention_share"]
        kept = density(self.pipe, plan, replace(self.size, num_inference_steps=2), self.shot)
        bound = 1 / (1 - share + share * (early + (1 - early) * kept / EFFICIENCY))
        speedup = self.speedup(mine)
        row = {"plan": name, "skipped_in_a_row": 0, "dense_steps": early, "density": kept}
        row |= {**mine, "speedup": speedup}
        self.found["rows"].append({**row, "bound": bound, "of_bound": speedup / bound})
        self.save(
            f"  {name}: density {kept:.3f}, dense steps {early:.0%}: {mine['seconds']:.3f} s, "
            f"{speedup:.2f} × (bound {bound:.2f}, {speedup / bound:.0%})"
        )

    def overhead(self) -> None:
        """A plan that leaves everything dense."""
        row = self.run(forced(self.pipe, Policy(), 0.0))
        slower = 1 / self.speedup(row) - 1
        self.found["all_dense"] = {**row, "slower_by": slower}
        self.save(f"  all dense, patched: {slower:+.2%}")

    def cached(self, name: str, policy: Policy) -> None:
        """A step cache and a plan. Ratios of 1 leave out `skip` of `skip + 1` steps behind the
        first fifth.
        """
        args = self.args
        cache = MagCache(ratios=(1.0,) * args.steps, threshold=1.0, max_skip_steps=args.skip)
        early = args.dense_steps[0]
        # A plan's first sparse step comes behind the first ones that are left out.
        warm = args.skip + 2 if policy.methods else 1
        mine = self.run(forced(self.pipe, policy, early, cache), warm=warm)
        speedup = self.speedup(mine)
        row = {"plan": name, "skipped_in_a_row": args.skip, "dense_steps": early}
        row["calls_left"] = mine["calls"] / (self.found["layers"] * args.steps * args.repeat)
        self.found["rows"].append({**row, "density": None, **mine, "speedup": speedup})
        self.save(f"  {name} and a step cache: {mine['seconds']:.3f} s, {speedup:.2f} ×")

    def again(self) -> None:
        """The dense run once more: every row was divided by the first one."""
        row = self.run(None, warm=1)
        self.found["dense_again"] = row
        self.save(f"  dense again: {1 / self.speedup(row) - 1:+.2%}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(MODELS), default="wan")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=(), help="default: the model's own; "
        "hunyuan: dual and single ones",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dense-steps", type=float, nargs="+", default=[0.2])
    parser.add_argument(
        "--plans", nargs="+", default=["sparse_videogen:density=0.15"],
        help="methods with fields, such as ada_spa:sparsity=0.8",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--look", type=int, default=5, help="steps that the profiler sees")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--overhead", action="store_true", help="an all-dense plan as well")
    parser.add_argument(
        "--cache", nargs="?", const="too", choices=["too", "only"],
        help="a step cache as well, or that alone: no plan runs without it",
    )  # fmt: skip
    parser.add_argument("--skip", type=int, default=2, help="steps that the cache skips in a row")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after these")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = options()
    attend = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = unmasked(attend)
    study = Study(args)
    policies = {name: policy_of(name) for name in args.plans}
    first = args.plans[0]
    jobs: list[Callable[[], None]] = [
        partial(study.sparse, n, p, w) for n, p in policies.items() for w in args.dense_steps
    ]
    if args.cache == "only":
        jobs.clear()
    if args.overhead:
        jobs.append(study.overhead)
    if args.cache:
        for name, policy in {first: policies[first], "dense": Policy()}.items():
            jobs.append(partial(study.cached, name, policy))
    study.dense()
    for job in [*jobs, study.again]:
        if study.late():
            break
        job()


if __name__ == "__main__":
    main()
