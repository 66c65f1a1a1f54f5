"""One query row a head over a long cache, by lists cut in parts, beside dense attention.

`decode` is called as a decode step would call it, with new lists each time, and once more from a
CUDA graph, which leaves out what the host takes. Random bf16 data, 32 query heads, 8 KV heads of
128.

    python benchmarks/decode.py --out benchmarks/results/decode-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attention.report import machine
from torch.nn.functional import scaled_dot_product_attention

from accelkit.calibration.timing import times_ms
from accelkit.kernels.decode import _splits, decode
from accelkit.kernels.index import BlockIndex

BLOCK = 64
RUNS = 50
DENSITIES = (1.0, 0.25, 0.1, 0.02)


def milliseconds(work: Callable[[], Any]) -> float:
    """Median of some runs, each with the host's part, as the one call of a step has it."""
    return median(times_ms(work, RUNS, 5, torch.device("cuda")))


def replayed(work: Callable[[], Any]) -> float:
    """The same from a CUDA graph of one run."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return milliseconds(graph.replay)


def rows(tokens: int) -> list[dict[str, Any]]:
    """Readings at one length of the cache."""
    q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=q.dtype) for _ in range(2))
    dense = lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    dense_ms, dense_graph_ms = milliseconds(dense), replayed(dense)
    found = []
    for density in DENSITIES:
        mask = torch.rand(1, 8, 1, tokens // BLOCK, device="cuda") < density
        kept = BlockIndex.from_mask(mask, (1, BLOCK))

        def step(kept: BlockIndex = kept, splits: int | None = None) -> Any:
            lists = BlockIndex(kept.start, kept.count, kept.blocks, kept.size)
            return decode(q, k, v, lists, splits=splits)

        row = {
            "cache, tokens": tokens,
            "density": density,
            "parts": _splits(k, 1),
            "dense, ms": dense_ms,
            "step, ms": milliseconds(step),
            "dense from a graph, ms": dense_graph_ms,
            "step from a graph, ms": replayed(step),
        }
        found.append({name: round(x, 4) for name, x in row.items()})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    options = parser.parse_args()
    found = {"title": "A decode step over block lists, 32/8 heads of 128", **machine(), "rows": []}
    for tokens in options.tokens:
        found["rows"] += rows(tokens)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
