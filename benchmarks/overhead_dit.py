"""What a patch costs a video denoiser before it saves anything: router, hooks and clock installed
and counted, every head of every site dense by plan, against the pipeline as it comes.

The Wan2.1-1.3B configuration with random bf16 weights, at 480p and 81 frames: 32,760 tokens. Two
pipelines share their weights, one is patched, and both denoise in one process, eager and compiled
by repeated blocks. For the other one the router is taken out. Each round runs unpatched, patched,
patched, unpatched, so that a drift of the clocks cancels out; the two patched runs of a round tell
what two equal runs differ by. One step of each side is also looked at kernel by kernel.

    python benchmarks/overhead_dit.py --out results.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import accelkit
from accelkit.calibration.results import environment
from accelkit.calibration.timing import host_ms, times_ms
from accelkit.patches.adapters import facts
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule

HEADS = 12


def wan(layers: int) -> WanPipeline:
    """Wan2.1-1.3B but for its 30 layers, text encoder and VAE; its text comes as embeddings."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=128,
            ffn_dim=8960,
            cross_attn_norm=True,
            num_layers=layers,
        )
    return around(model.to(torch.bfloat16).eval())


def around(model: WanTransformer3DModel) -> WanPipeline:
    """A pipeline of its own around a denoiser."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def twin(pipe: WanPipeline) -> WanPipeline:
    """Another pipeline over the same weights."""
    shared = {id(p): p for p in pipe.transformer.parameters()}
    return around(copy.deepcopy(pipe.transformer, shared))


def all_dense(pipe: WanPipeline) -> Plan:
    """A plan that looks at every call and leaves it dense."""
    fingerprint, sites = facts(pipe)
    layer = LayerPlan(rules=(Rule(phase="denoise", policies=(0,) * HEADS),))
    return Plan(fingerprint=fingerprint, policies=(Policy(),), sites=dict.fromkeys(sites, layer))


ROUND = ("unpatched", "patched", "patched", "unpatched")


class Sides:
    """Two pipelines over the same weights, one of them patched, and the attention function that
    each finds in its place.
    """

    def __init__(self, pipe: WanPipeline, inputs: dict[str, Any], undo: ExitStack) -> None:
        self.inputs = inputs
        self.pipes = {"unpatched": pipe, "patched": twin(pipe)}
        before = nn.functional.scaled_dot_product_attention
        plan = all_dense(self.pipes["patched"])
        self.handle = undo.enter_context(accelkit.patch(self.pipes["patched"], plan))
        self.functions = {
            "unpatched": before,
            "patched": nn.functional.scaled_dot_product_attention,
        }
        undo.callback(self.turn, "patched")  # what the handle expects to find

    def turn(self, side: str) -> None:
        nn.functional.scaled_dot_product_attention = self.functions[side]

    def run(self, side: str, **changed: Any) -> Tensor:
        self.turn(side)
        return self.pipes[side](**{**self.inputs, **changed}, return_dict=False)[0]


def milliseconds(run: Callable[[], Any]) -> tuple[float, float]:
    """On the device, and until the host has issued everything."""
    host: list[float] = []
    (on_device,) = times_ms(lambda: host.append(host_ms(run)), 1, 0, torch.device("cuda"))
    return on_device, host[0]


def kernels(run: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of each kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    found = {}
    for e in seen.key_averages():
        if e.self_device_time_total:
            found[e.key] = (e.count, e.self_device_time_total / 1e3)
    return found


def apart(unpatched: list[float], patched: list[float]) -> dict[str, object]:
    """How much slower the patched runs of each round were, in percent, and by how much the two
    equal ones differ; both lists hold two runs a round.
    """
    before, after = (list(zip(v[::2], v[1::2], strict=True)) for v in (unpatched, patched))
    slower = [100 * (sum(p) / sum(u) - 1) for u, p in zip(before, after, strict=True)]
    return {
        "slower_percent": statistics.median(slower),
        "slower_percent_of_rounds": slower,
        "percent_between_equal_runs": statistics.median(100 * abs(p / q - 1) for p, q in after),
    }


def measure(
    pipe: WanPipeline, inputs: dict[str, Any], compiled: bool, rounds: int
) -> dict[str, object]:
    """Milliseconds a step of both pipelines, in turn."""
    steps = inputs["num_inference_steps"]
    ms: dict[str, list[float]] = {side: [] for side in ROUND}
    host: dict[str, list[float]] = {side: [] for side in ROUND}
    counters = {side: CompileCounterWithBackend("inductor") for side in ms}
    with ExitStack() as undo:
        sides = Sides(pipe, inputs, undo)
        torch._dynamo.reset()
        for side, counter in counters.items():
            if compiled:
                model = sides.pipes[side].transformer
                model.compile_repeated_blocks(backend=counter, fullgraph=True)
        outputs = {side: sides.run(side, num_inference_steps=2) for side in ms}
        for _ in range(rounds):
            for side in ROUND:
                on_device, on_host = milliseconds(lambda side=side: sides.run(side))
                ms[side].append(on_device / steps)
                host[side].append(on_host / steps)
        work = {s: kernels(lambda s=s: sides.run(s, num_inference_steps=1)) for s in ms}
        calls = sides.handle.report().calls
    for block in pipe.transformer.blocks:
        block._compiled_call_impl = None
    names = {n for side in work.values() for n in side}
    none = (0, 0.0)
    return {
        "compiled": compiled,
        "ms_a_step": {side: statistics.median(v) for side, v in ms.items()},
        "host_ms_a_step": {side: statistics.median(v) for side, v in host.items()},
        **apart(ms["unpatched"], ms["patched"]),
        "kernel_ms": {side: sum(t for _, t in found.values()) for side, found in work.items()},
        "kernel_launches": {
            side: sum(n for n, _ in found.values()) for side, found in work.items()
        },
        "kernels_launched_more_or_less_often": {
            name[:120]: {side: found.get(name, none) for side, found in work.items()}
            for name in sorted(names)
            if len({found.get(name, none)[0] for found in work.values()}) > 1
        },
        # Inductor picks the shape of a reduction by timing it, so compiled runs may round apart.
        "equal": torch.equal(outputs["unpatched"], outputs["patched"]),
        "relative_difference": float(
            (outputs["patched"] - outputs["unpatched"]).abs().sum()
            / outputs["unpatched"].abs().sum()
        ),
        "graphs": {side: c.frame_count for side, c in counters.items()},
        "calls_counted": calls,
    }


def told(run: dict[str, Any]) -> str:
    """One line about a run."""
    sides = [
        f"{side} {run['ms_a_step'][side]:.2f} ms a step (host {run['host_ms_a_step'][side]:.1f}, "
        f"{run['kernel_launches'][side]} kernels {run['kernel_ms'][side]:.2f})"
        for side in run["ms_a_step"]
    ]
    return (
        f"{'  '.join(sides)}  {run['slower_percent']:+.2f} % (two equal runs "
        f"{run['percent_between_equal_runs']:.2f} %)  equal {run['equal']}  graphs {run['graphs']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="tokens by axis")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of one denoising")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    frames, rows, columns = options.grid
    pipe = wan(options.layers)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {
        "height": 16 * rows,
        "width": 16 * columns,
        "num_frames": 4 * frames - 3,
        "latents": torch.randn(1, 16, frames, 2 * rows, 2 * columns, device="cuda"),
        "prompt_embeds": torch.randn(1, 512, 4096, **like),
        "guidance_scale": 1.0,
        "num_inference_steps": options.steps,
        "output_type": "latent",
    }
    result = {
        "environment": environment(torch.device("cuda")),
        "model": f"WanPipeline, Wan2.1-1.3B, {options.layers} layers, random weights, bf16",
        "tokens": frames * rows * columns,
        "steps": options.steps,
        "rows": [],
    }
    for compiled in (False, True):
        run = measure(pipe, inputs, compiled, options.rounds)
        result["rows"].append(run)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{'repeated blocks' if compiled else 'eager':>16}: {told(run)}", flush=True)


if __name__ == "__main__":
    main()
