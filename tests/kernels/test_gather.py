"""Attention over single keys: CPU path and Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from attention_cases import check_call, random_index, tensors

from accelkit.errors import UnsupportedConfigurationError
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import BlockIndex

LENGTHS = [(200, 200, 0), (70, 200, 130)]
OPTIONS = ["plain", "key_mask", "positions", "rows", "bias"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("bq", [64, 32, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_cpu_path_against_reference(option, bq, causal, lengths) -> None:
    check_call("torch", 2, (4, 2), lengths, 32, (bq, 1), causal, option)


@pytest.mark.interpreter
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("bq", "lengths", "causal", "dtype"),
    [(64, (70, 70, 0), True, torch.float16), (24, (40, 90, 50), True, torch.float32)],
)
def test_triton_against_reference(option, bq, lengths, causal, dtype) -> None:
    check_call("triton", 1, (2, 1), lengths, 32, (bq, 1), causal, option, dtype)


@pytest.mark.interpreter
def test_triton_single_tokens() -> None:
    check_call("triton", 1, (2, 1), (9, 60, 51), 16, (1, 1), True, "plain")


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_blocks_and_their_keys_agree(backend) -> None:
    """The keys of some blocks, listed one by one, are those blocks."""
    q, k, v = tensors(1, 2, 1, 64, 64, 32)
    blocks = random_index(1, 2, 64, 64, (32, 16))
    keys = BlockIndex.from_mask(blocks.to_mask(4).repeat_interleave(16, -1), (32, 1))
    got, want = (attend(q, k, v, index, backend=backend) for index in (keys, blocks))
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-5, rtol=1e-5)


def test_long_stripes() -> None:
    check_call("torch", 1, (2, 1), (2500, 2500, 0), 32, (2048, 1), True, "plain")


def test_skip_is_refused() -> None:
    q, k, v = tensors(1, 2, 1, 64, 64, 32)
    with pytest.raises(UnsupportedConfigurationError, match="single keys"):
        attend(q, k, v, random_index(1, 2, 64, 64, (32, 1)), skip=0.1)
