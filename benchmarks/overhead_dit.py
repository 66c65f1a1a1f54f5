"""What a patch costs a video denoiser before it saves anything: router, hooks and clock installed
and counted, every head of every site dense by plan, against the pipeline as it comes.

The Wan2.1-1.3B configuration with random bf16 weights and fewer layers, at 480p and 81 frames:
32,760 tokens. Two pipelines share their weights, one is patched, and both denoise in turn in one
process, eager and compiled by repeated blocks. For the other one the router is taken out.

    python benchmarks/overhead_dit.py --layers 6 --out results.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import accelkit
from accelkit.calibration.results import environment
from accelkit.patches.adapters import facts
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule

HEADS = 12


def wan(layers: int, device: str) -> WanPipeline:
    """Wan2.1-1.3B but for its 30 layers, text encoder and VAE; its text comes as embeddings."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=128,
            ffn_dim=8960,
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


def measure(
    pipe: WanPipeline, inputs: dict[str, Tensor], compiled: bool, rounds: int
) -> dict[str, object]:
    """Milliseconds a step of both pipelines, in turn."""
    pipes = {"unpatched": pipe, "patched": twin(pipe)}
    attention = {"unpatched": nn.functional.scaled_dot_product_attention}
    ms: dict[str, list[float]] = {side: [] for side in pipes}
    outputs, counters = {}, {side: CompileCounterWithBackend("inductor") for side in pipes}
    with accelkit.patch(pipes["patched"], all_dense(pipes["patched"])) as handle:
        attention["patched"] = nn.functional.scaled_dot_product_attention
        torch._dynamo.reset()
        for one_round in range(rounds + 1):
            for side in sorted(pipes, reverse=bool(one_round % 2)):
                nn.functional.scaled_dot_product_attention = attention[side]
                model = pipes[side].transformer
                if compiled and one_round == 0:
                    model.compile_repeated_blocks(backend=counters[side], fullgraph=True)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                begin.record()
                outputs[side] = pipes[side](**inputs, return_dict=False)[0]
                end.record()
                torch.cuda.synchronize()
                if one_round:
                    ms[side].append(begin.elapsed_time(end) / inputs["num_inference_steps"])
        nn.functional.scaled_dot_product_attention = attention["patched"]
        calls = handle.report().calls
    for block in pipe.transformer.blocks:
        block._compiled_call_impl = None
    ratios = [p / u for p, u in zip(ms["patched"], ms["unpatched"], strict=True)]
    return {
        "compiled": compiled,
        "ms_a_step": {side: statistics.median(v) for side, v in ms.items()},
        "slower_percent": 100 * (statistics.median(ratios) - 1),
        "slower_percent_of_rounds": [100 * (r - 1) for r in ratios],
        # Inductor picks the shape of a reduction by timing it, so compiled runs may round apart.
        "equal": torch.equal(outputs["unpatched"], outputs["patched"]),
        "relative_difference": float(
            (outputs["patched"] - outputs["unpatched"]).abs().sum()
            / outputs["unpatched"].abs().sum()
        ),
        "graphs": {side: c.frame_count for side, c in counters.items()},
        "calls_counted": calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="tokens by axis")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="of one denoising")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    frames, rows, columns = options.grid
    pipe = wan(options.layers, options.device)
    like = {"device": options.device, "dtype": torch.bfloat16}
    inputs = {
        "height": 16 * rows,
        "width": 16 * columns,
        "num_frames": 4 * frames - 3,
        "latents": torch.randn(1, 16, frames, 2 * rows, 2 * columns, device=options.device),
        "prompt_embeds": torch.randn(1, 512, 4096, **like),
        "guidance_scale": 1.0,
        "num_inference_steps": options.steps,
        "output_type": "latent",
    }
    result = {
        "environment": environment(torch.device(options.device)),
        "model": f"WanPipeline, Wan2.1-1.3B but {options.layers} layers, random weights, bf16",
        "tokens": frames * rows * columns,
        "steps": options.steps,
        "runs": [],
    }
    for compiled in (False, True):
        run = measure(pipe, inputs, compiled, options.rounds)
        result["runs"].append(run)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(
            f"{'repeated blocks' if compiled else 'eager':>16}  a step: "
            f"unpatched {run['ms_a_step']['unpatched']:.2f} ms  "
            f"patched {run['ms_a_step']['patched']:.2f} ms  "
            f"{run['slower_percent']:+.2f} %  equal {run['equal']}  graphs {run['graphs']}"
        )


if __name__ == "__main__":
    main()
