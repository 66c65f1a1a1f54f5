"""Step caches, sparse attention and blocks compiled one by one, all at once."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import accelkit
from accelkit.patches.adapters import sites
from accelkit.patches.methods.first_block_cache import FirstBlockCache
from accelkit.patches.methods.mag_cache import MagCache
from accelkit.patches.methods.taylor_seer import TaylorSeer
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import LayerPlan
from tests.tiny_pipes import NARROW, latents, tiny_pipe

pytestmark = pytest.mark.filterwarnings("error::accelkit.errors.DenseFallbackWarning")


def compiled(pipe) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    return counter


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("wan", FirstBlockCache(threshold=1e9)),
        ("hunyuan", FirstBlockCache(threshold=1e9)),
        ("wan", MagCache(ratios=(1.0,) * 6, max_skip_steps=2)),
        ("flux", MagCache(ratios=(1.0,) * 6, max_skip_steps=2)),
        ("wan", TaylorSeer(interval=3, lite=True)),
        ("wan", TaylorSeer(interval=3)),
    ],
    ids=str,
)
def test_step_caches_and_sparse_attention_and_compiled_blocks(family, cache):
    """Skipped steps stay skipped, and a graph knows nothing of steps."""
    pipe = tiny_pipe(family)
    full = len(sites(pipe)) * 6 * (1 if family in ("flux", "hunyuan") else 2)
    plan = plan_of(pipe, NARROW)
    whole = plan.model_copy(update={"sites": {**plan.sites, "transformer": LayerPlan(block=cache)}})
    with accelkit.patch(pipe, plan):
        without = compiled(pipe)
        latents(pipe, family, steps=2)
    for module in pipe.transformer.modules():
        module._compiled_call_impl = None
    with accelkit.patch(pipe, whole) as handle:
        eager = latents(pipe, family, steps=6)
        calls = handle.report().sparse_calls
        handle.reset_report()
        counter = compiled(pipe)
        found = latents(pipe, family, steps=6)
        graphs = counter.frame_count
        again = latents(pipe, family, steps=6)
        assert counter.frame_count == graphs  # nothing new in another generation
        pieces = cache.kind == "taylor_seer" and not cache.lite
        # Attention and feed-forward modules are cached there: each is graphs of their own.
        assert graphs > without.frame_count if pieces else graphs == without.frame_count
        report = handle.report()
        assert report.sparse_calls == 2 * calls and report.dense == {}
        assert 0 < calls < full
    torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again, eager, atol=1e-5, rtol=1e-4)
    assert not any("compile" in vars(m) for m in pipe.transformer.modules())
