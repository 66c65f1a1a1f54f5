"""Patched denoisers under `torch.compile`, whole and by repeated blocks: one graph, and eager's
numbers.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import accelkit
from accelkit.errors import InvalidInputError
from accelkit.patches.method import load
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import LayerPlan
from tests.tiny_pipes import NARROW, PIPES, latents, tiny_pipe

pytestmark = pytest.mark.filterwarnings("error::accelkit.errors.DenseFallbackWarning")


@pytest.fixture
def wan():
    return tiny_pipe("wan")


@contextmanager
def counted_graphs(pipe, family: str, how: str):
    """Compile the denoiser with a counter for its backend."""
    torch._dynamo.reset()
    counter, model = CompileCounter(), pipe.transformer
    options = {"backend": counter, "fullgraph": True}
    if how == "module":
        pipe.transformer = torch.compile(model, **options)
    elif how == "in place":
        model.compile(**options)
    else:
        model.compile_repeated_blocks(**options)
    try:
        yield counter
    finally:
        pipe.transformer = model
        for module in model.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


BY_BLOCKS = ("wan", "wan22", "hunyuan", "hunyuan15", "ltx", "flux", "qwen_image")
"""Families whose classes name repeated blocks."""
WHOLE = [family for family in PIPES if family != "hunyuan15"]  # that one branches on its data


@pytest.mark.parametrize(
    ("family", "how"),
    [("wan", "module"), ("wan", "in place"), ("flux", "in place")]
    + [(f, "in place") for f in WHOLE if f not in BY_BLOCKS]
    + [(f, "repeated blocks") for f in BY_BLOCKS],
)
def test_as_many_graphs_as_without_a_patch_and_equal_to_eager(family, how):
    pipe, graphs = tiny_pipe(family), 1  # a whole denoiser is one
    if how == "repeated blocks":
        with counted_graphs(pipe, family, how) as counter:
            latents(pipe, family)
            graphs = counter.frame_count
    prompts = ("a red ball", "the cube falls")
    with accelkit.patch(pipe, NARROW) as handle:
        eager = [latents(pipe, family, p, steps=3) for p in prompts]
        expected = handle.report()
        handle.reset_report()
        with counted_graphs(pipe, family, how) as counter:
            again = [latents(pipe, family, p, steps=3) for p in prompts]
            assert counter.frame_count == graphs
        assert handle.report() == expected
        assert expected.dense == {}
    for compiled, wanted in zip(again, eager, strict=True):
        torch.testing.assert_close(compiled, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["module", "in place", "repeated blocks"])
def test_one_graph_serves_all_blocks(wan, how):
    with accelkit.patch(wan, NARROW), counted_graphs(wan, "wan", how) as counter:
        latents(wan, "wan")
        assert counter.frame_count == 1


CACHES = {
    "first_block_cache": {"threshold": 100.0},
    "taylor_seer": {"interval": 3, "first_steps": 1},
    "mag_cache": {"ratios": (1.0,) * 6, "threshold": 10.0},
}


@pytest.mark.parametrize("cache", CACHES)
def test_step_caches_beside_compiled_blocks(wan, cache):
    """The library's own hooks break the graph, also inside of attention modules (TaylorSeer); what
    is computed stays the same, and a site is closed before cross-attention.
    """
    plan = plan_of(wan, NARROW)
    block = LayerPlan(block=load(cache)(**CACHES[cache]))
    plan = plan.model_copy(update={"sites": {**plan.sites, "transformer": block}})
    with accelkit.patch(wan, plan) as handle:
        eager, expected = latents(wan, "wan", steps=6), handle.report()
        assert 0 < expected.sparse_calls < 2 * 2 * 6
        handle.reset_report()
        wan.transformer.compile_repeated_blocks(backend="eager")
        again = latents(wan, "wan", steps=6)
        assert handle.report() == expected
    torch.testing.assert_close(again, eager, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_another_plan_needs_no_new_graph(wan):
    """What a plan says is no part of the graph, nor is the step."""
    plan = plan_of(wan, NARROW)
    rules = {p: x.rules[0].model_copy(update={"steps": (0.5, 1.0)}) for p, x in plan.sites.items()}
    late = plan.model_copy(
        update={
            "sites": {p: x.model_copy(update={"rules": (rules[p],)}) for p, x in plan.sites.items()}
        }
    )
    with accelkit.patch(wan, late) as handle, counted_graphs(wan, "wan", "repeated blocks") as n:
        latents(wan, "wan", steps=4)
        assert n.frame_count == 1
        assert handle.report().sparse_calls == handle.report().dense["no policy"] == 8


def test_compiled_denoisers_are_refused(wan):
    model = wan.transformer
    for how in ("module", "in place", "repeated blocks"):
        with (
            counted_graphs(wan, "wan", how),
            pytest.raises(InvalidInputError, match="compile afterwards"),
        ):
            accelkit.patch(wan, NARROW)
    accelkit.patch(model, NARROW).remove()


@pytest.mark.parametrize("padded", [False, True])
def test_the_op_keeps_its_contract(padded):
    model = tiny_pipe("hunyuan").transformer
    mask = (torch.arange(204) < 196).view(1, 1, 1, -1) if padded else None
    with torch.no_grad(), accelkit.patch(model, NARROW):
        q, k, v = (torch.randn(1, 204, 2, 16).transpose(1, 2) for _ in range(3))
        site = model.transformer_blocks[0].attn.accelkit_site
        seen = [torch.randn(1, 4, 3, 16, 16), torch.tensor([900.0])]
        op = torch.ops.accelkit.sdpa.default
        torch.library.opcheck(op, (q, k, v, mask, 0.25, site, seen, [], 0))
        assert torch.Tag.cudagraph_unsafe in op.tags, "a replayed graph would not look at the step"
