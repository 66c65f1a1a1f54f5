"""What a patch costs a video denoiser before it saves anything: router, hooks and clock installed
and counted, every head of every site dense by plan, against the denoiser as it comes.

The Wan2.1-1.3B configuration with random bf16 weights and fewer layers, at 480p and 81 frames:
32,760 tokens. Both sides run in one process in turn, eager and compiled by repeated blocks.

    python benchmarks/overhead_dit.py --layers 6 --out results.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import accelkit
from accelkit.calibration.results import environment
from accelkit.patches.adapters import facts
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule

HEADS = 12


def wan(layers: int, device: str) -> WanTransformer3DModel:
    """The public configuration of Wan2.1-1.3B but for its 30 layers."""
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=128,
            ffn_dim=8960,
            num_layers=layers,
        )
    return model.to(torch.bfloat16).eval()


def all_dense(model: WanTransformer3DModel) -> Plan:
    """A plan that looks at every call and leaves it dense."""
    fingerprint, sites = facts(model)
    layer = LayerPlan(rules=(Rule(phase="denoise", policies=(0,) * HEADS),))
    return Plan(fingerprint=fingerprint, policies=(Policy(),), sites=dict.fromkeys(sites, layer))


def timed(run: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each of `times` runs, by device events."""
    spent = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        spent.append(begin.elapsed_time(end))
    return spent


def measure(
    model: WanTransformer3DModel, inputs: dict[str, Tensor], compiled: bool, rounds: int, times: int
) -> dict[str, object]:
    """Both sides in turn, `rounds` times; each round compiles anew where asked to."""
    plan, ms = all_dense(model), {"unpatched": [], "patched": []}
    outputs, graphs, calls = {}, {}, 0
    for _ in range(rounds):
        for side in ms:
            with ExitStack() as undo:
                handle = (
                    undo.enter_context(accelkit.patch(model, plan)) if "un" not in side else None
                )
                if compiled:
                    torch._dynamo.reset()
                    counter = CompileCounterWithBackend("inductor")
                    model.compile_repeated_blocks(backend=counter, fullgraph=True)
                outputs[side] = model(**inputs).sample
                timed(lambda: model(**inputs), 2)
                ms[side] += timed(lambda: model(**inputs), times)
                if compiled:
                    graphs[side] = counter.frame_count
                    for block in model.blocks:
                        block._compiled_call_impl = None
                if handle is not None:
                    calls = handle.report().calls
    middle = {side: statistics.median(v) for side, v in ms.items()}
    return {
        "compiled": compiled,
        "ms": middle,
        "slower_percent": 100 * (middle["patched"] / middle["unpatched"] - 1),
        "spread_percent": {
            side: 100 * (max(v) - min(v)) / statistics.median(v) for side, v in ms.items()
        },
        "equal": torch.equal(outputs["unpatched"], outputs["patched"]),
        "graphs": graphs,
        "calls_counted_per_round": calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="tokens by axis")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=6, help="forwards a round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    frames, rows, columns = options.grid
    model = wan(options.layers, options.device)
    like = {"device": options.device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns, **like),
        "timestep": torch.tensor([900.0], **like),
        "encoder_hidden_states": torch.randn(1, 512, 4096, **like),
    }
    result = {
        "environment": environment(torch.device(options.device)),
        "model": f"WanTransformer3DModel, Wan2.1-1.3B but {options.layers} layers, random weights",
        "tokens": frames * rows * columns,
        "runs": [],
    }
    with torch.no_grad():
        for compiled in (False, True):
            rounds = 2 if compiled else options.rounds
            run = measure(model, inputs, compiled, rounds, options.times)
            result["runs"].append(run)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
            print(
                f"{'repeated blocks' if compiled else 'eager':>16}  "
                f"unpatched {run['ms']['unpatched']:.2f} ms  "
                f"patched {run['ms']['patched']:.2f} ms  "
                f"{run['slower_percent']:+.2f} %  equal {run['equal']}  graphs {run['graphs']}"
            )


if __name__ == "__main__":
    main()
