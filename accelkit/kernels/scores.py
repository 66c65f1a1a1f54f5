"""Estimators: cheap importance scores for the selectors.

Each takes the `Inputs` of a call first and honours its heads, GQA, `scale`, causality, `q_start`,
padding and permuted positions. Scores are fp32 and deterministic. Block estimates are −inf where
nothing is visible; exact masses are 0 there. The torch code is the reference; on CUDA the hot ones
run as Triton kernels of `_triton/scores.py`.
"""

from accelkit.kernels.scores_blocks import block_mass, rows_by_block_mean, sampled_max, strided
from accelkit.kernels.scores_keys import (
    Probe,
    anchor_max,
    masked_rows,
    pooled_probe,
    probe,
    stripes,
    tile_top_k,
)
from accelkit.kernels.scores_pooled import (
    pool,
    pool_keys,
    pool_queries,
    pool_runs,
    pooled,
    pooled_alike,
    self_similarity,
)

__all__ = [
    "Probe",
    "anchor_max",
    "block_mass",
    "masked_rows",
    "pool",
    "pool_keys",
    "pool_queries",
    "pool_runs",
    "pooled",
    "pooled_alike",
    "pooled_probe",
    "probe",
    "rows_by_block_mean",
    "sampled_max",
    "self_similarity",
    "strided",
    "stripes",
    "tile_top_k",
]
