"""Time to first token of a full-size Llama-3.1-8B configuration, dense against a forced plan.

Random weights spread their attention, so a calibrated plan on them is dense; the forced plan keeps
a fixed share of the blocks and shows what the machinery reaches, estimate and selection included.
Both sides run in one process on the same prompts; the dense side uses transformers' own SDPA path
and, separately, the cuDNN kernel.

    python benchmarks/prefill_8b.py --lengths 32768 131072 --density 0.1 --out results.json
    python benchmarks/prefill_8b.py --calibrate 32768 --out calibration.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import accelkit
from accelkit import kernels
from accelkit.calibration.results import environment
from accelkit.calibration.timing import times_ms
from accelkit.kernels.dispatch import explain
from accelkit.patches.method import AttentionMethod


class FixedShare(AttentionMethod):
    """The blocks of each row with the largest row-by-mean-key scores, a fixed share of them."""

    share: float = 0.1
    block: int = 128

    def index(self, call):
        size = (self.block, self.block)
        score = kernels.scores.rows_by_block_mean(call, size)
        mask = kernels.select.force(kernels.select.top_k(score, self.share), call, size)
        return kernels.select.compact(mask, size)


def llama_8b(device: str) -> LlamaForCausalLM:
    """The public configuration of Llama-3.1-8B with random bf16 weights."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        rope_theta=500000.0, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def planted_prompt(length: int, vocabulary: int, device: str) -> torch.Tensor:
    """Random tokens with a sink token in front and a needle repeated at eight places."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, vocabulary, (1, length), generator=generator)
    ids[0, 0] = 1
    needle = torch.randint(10, 1000, (32,), generator=generator)
    for n in range(8):
        start = (2 * n + 1) * length // 17
        ids[0, start : start + len(needle)] = needle
    return ids.to(device)


def first_token_ms(model: LlamaForCausalLM, ids: torch.Tensor, repeat: int) -> tuple[float, ...]:
    """Milliseconds of prefill up to the first token's logits."""
    run = lambda: model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()  # noqa: E731
    return times_ms(run, repeat, 1, model.device)


def kernel_of(model: LlamaForCausalLM, length: int, block: int) -> str:
    """The backend that dispatch chooses for the model's prefill over blocks."""
    c = model.config
    q, kv = (
        torch.empty(1, n, length, c.head_dim, device="cuda", dtype=model.dtype)
        for n in (c.num_attention_heads, c.num_key_value_heads)
    )
    tiles = -(-length // block)
    index = kernels.BlockIndex.dense(c.num_attention_heads, tiles, (block, block), q.device)
    return explain(q, kv, kv, index).backend


def forced(args: argparse.Namespace, model: LlamaForCausalLM) -> Iterator[dict]:
    """Dense and forced-plan times at every length."""
    method = FixedShare(share=args.density)
    for length in args.lengths:
        torch.cuda.reset_peak_memory_stats()
        ids = planted_prompt(length, model.config.vocab_size, "cuda")
        own = first_token_ms(model, ids, args.repeat)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            cudnn = first_token_ms(model, ids, args.repeat)
        with accelkit.patch(model, method) as handle:
            sparse = first_token_ms(model, ids, args.repeat)
            with handle.measuring():
                first_token_ms(model, ids, 0)
            density = handle.report().density
        again = first_token_ms(model, ids, 1)
        median = statistics.median
        best = min(median(own), median(cudnn))
        yield {
            "tokens": length,
            "dense_own_ms": median(own),
            "dense_cudnn_ms": median(cudnn),
            "dense_after_ms": median(again),
            "sparse_ms": median(sparse),
            "density": density,
            "kernel": kernel_of(model, length, method.block),
            "ratio_own": median(own) / median(sparse),
            "ratio_cudnn": median(cudnn) / median(sparse),
            "ratio_best_dense": best / median(sparse),
            "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
        }


def calibrations(args: argparse.Namespace, model: LlamaForCausalLM) -> Iterator[dict]:
    """A calibration with each preset."""
    for preset in args.presets:
        yield calibrated(args.calibrate, model, preset)


def calibrated(length: int, model: LlamaForCausalLM, preset: str) -> dict:
    """Seconds and memory of a whole calibration at `length` tokens; without the compilation of
    kernels it takes `dense_prefills`, `search_prefills` of them for the search itself.
    """
    prompts = [planted_prompt(length, model.config.vocab_size, "cuda") for _ in range(2)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    plan = accelkit.calibrate(model, prompts, budget=0.02, lengths=[length], preset=preset)
    about = plan.calibration
    return {
        "tokens": length,
        "preset": preset,
        "seconds": time.perf_counter() - start,
        "dense_prefills": about["dense_prefills"],
        "search_prefills": about["search_prefills"],
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
        "dense_ms": about["dense_prefill_ms"],
        "peak_over_dense": about["peak_bytes"] / about["dense_peak_bytes"],
        "seconds_by_stage": about["seconds"],
        "measured": plan.measured,
        "policies": [p.label() for p in plan.policies],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--presets", nargs="*", default=["balanced", "careful"])
    parser.add_argument("--calibrate", type=int, default=0, help="tokens; 0: forced plans only")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with torch.no_grad():
        model = llama_8b("cuda")
        result: dict = {
            "model": "Llama-3.1-8B configuration, random bf16 weights",
            "environment": environment(torch.device("cuda")),
        }
        what = "calibrations" if args.calibrate else "forced"
        result[what] = []
        runs = calibrations(args, model) if args.calibrate else forced(args, model)
        for row in runs:
            result[what].append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
