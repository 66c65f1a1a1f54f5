"""A patched pipeline beside everything else that people do to pipelines, and what is refused."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention import AttentionModuleMixin
from peft import LoraConfig
from torch import nn
from torch.nn import functional

import accelkit
from accelkit.errors import (
    AlreadyPatchedError,
    DenseFallbackWarning,
    InvalidInputError,
    ParallelNotSupportedError,
    UnsupportedModelError,
)
from accelkit.patches.adapters import sdpa, sites, watch
from accelkit.patches.adapters.processors import keep_padding
from accelkit.patches.patch import plan_of
from tests.patches.conftest import attributes
from tests.tiny_pipes import NARROW, latents, tiny_pipe

pytestmark = pytest.mark.filterwarnings("error::accelkit.errors.DenseFallbackWarning")


@pytest.fixture
def wan():
    return tiny_pipe("wan")


@pytest.fixture
def sparse():
    """What the patched tiny Wan gives when nothing else is done to it."""
    pipe = tiny_pipe("wan")
    with accelkit.patch(pipe, NARROW):
        return latents(pipe, "wan", steps=3)


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloaded_weights(wan, sparse, offload):
    """On one device the hooks run all the same; weights lie on meta between sequential calls."""
    if offload == "sequential":
        cpu_offload(wan.transformer, execution_device=torch.device("cpu"))
    elif offload == "model":
        wan.enable_model_cpu_offload(device="cpu")
    else:
        wan.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        )
    latents(wan, "wan", steps=1)  # a first run adds the library's own registry
    before = attributes(wan.transformer)
    with accelkit.patch(wan, NARROW) as handle:
        assert torch.equal(latents(wan, "wan", steps=3), sparse)
        assert handle.report().sparse_calls == 12
    assert all(a.keys() == before[n].keys() for n, a in attributes(wan.transformer).items())


def test_lora(wan, sparse):
    """An adapter of zeros changes nothing, one of random numbers does; paths stay."""
    paths = [s.path for s in sites(wan)]
    wan.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    assert [s.path for s in sites(wan)] == paths
    with accelkit.patch(wan, NARROW):
        assert torch.equal(latents(wan, "wan", steps=3), sparse)
        for name, weight in wan.transformer.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight)
        assert not torch.equal(latents(wan, "wan", steps=3), sparse)


def test_first_block_cache_leaves_sites_out(wan):
    with accelkit.patch(wan, NARROW) as handle:
        wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
        latents(wan, "wan", steps=4)
        first, second = (handle.report().sites[s.path] for s in sites(wan))
        assert (first.sparse, second.sparse) == (8, 2)
        wan.transformer.disable_cache()


def test_attention_broadcast_is_no_dense_call(wan):
    """A skipped attention module is neither sparse nor dense, and nothing is told."""
    with accelkit.patch(wan, NARROW) as handle:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 2000),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: wan.current_timestep,
        )
        wan.transformer.enable_cache(config)
        latents(wan, "wan", steps=4)
        assert handle.report().dense == {}
        assert 0 < handle.report().sparse_calls < 16
        wan.transformer.disable_cache()


class Trained(nn.Module):
    """A processor with a weight of its own, as image adapters bring them."""

    def __init__(self, original) -> None:
        super().__init__()
        self.inner, self.gain = original, nn.Parameter(torch.ones(1))

    def __call__(self, attn, *args, **kwargs):
        return self.inner(attn, *args, **kwargs) * self.gain


def test_trained_processors_stay_dense(wan):
    module = wan.transformer.blocks[0].attn1
    trained = Trained(module.processor)
    module.set_processor(trained)
    assert [s.path for s in sites(wan)] == ["transformer.blocks.1.attn1"]
    with accelkit.patch(wan, NARROW) as handle:
        with pytest.warns(DenseFallbackWarning, match="trained attention processor"):
            latents(wan, "wan")
        assert handle.report().dense == {"trained attention processor": 4}
        assert handle.report().sparse_calls == 4
    assert module.processor is trained


def test_heads_wider_than_any_kernel_stay_dense():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=260, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    arguments = {"timestep": torch.tensor([5.0]), "encoder_hidden_states": torch.randn(1, 5, 16)}
    latent = torch.randn(1, 4, 3, 8, 8)
    with torch.no_grad():
        dense = model(latent, **arguments).sample
        with accelkit.patch(model, NARROW) as handle:
            with pytest.warns(DenseFallbackWarning, match="more than 256 channels"):
                assert torch.equal(model(latent, **arguments).sample, dense)
            assert handle.report().dense == {"heads of more than 256 channels": 1}


def test_other_masks_stay_dense(wan):
    """A mask over pairs of tokens is not padding."""
    attention = wan.transformer.blocks[0].attn1
    forward = attention.forward

    def masked(hidden_states, *args):
        n = hidden_states.shape[1]
        return forward(hidden_states, None, torch.ones(n, n, dtype=torch.bool).tril(), args[-1])

    attention.forward = masked
    dense = latents(wan, "wan")
    plan = plan_of(wan, NARROW)
    first = plan.model_copy(update={"sites": {"transformer.blocks.0.attn1": plan.sites[
        "transformer.blocks.0.attn1"]}})  # fmt: skip
    with accelkit.patch(wan, first) as handle:
        with pytest.warns(DenseFallbackWarning, match="other than padding"):
            assert torch.equal(latents(wan, "wan"), dense)
        assert handle.report().dense["attention mask other than padding"] == 4


def test_attention_backends(wan, sparse):
    """Backends inside SDPA are kept; others would pass the router by."""
    wan.transformer.set_attention_backend("_native_math")
    with accelkit.patch(wan, NARROW):
        torch.testing.assert_close(latents(wan, "wan", steps=3), sparse, atol=1e-5, rtol=1e-4)
    wan.transformer.set_attention_backend("flex")
    with pytest.raises(InvalidInputError, match=r"backend 'flex'.*set_attention_backend"):
        accelkit.patch(wan, NARROW)
    wan.transformer.set_attention_backend("native")
    with accelkit.patch(wan, NARROW) as handle:
        for module in wan.transformer.modules():
            if isinstance(module, AttentionModuleMixin):
                module.processor._attention_backend = "_accelkit_test"
        with pytest.warns(DenseFallbackWarning, match="does not pass through"), outside_sdpa():
            latents(wan, "wan", steps=1)
        assert len(handle.report().dense) == 1
        assert handle.report().sparse_calls == 0


@contextmanager
def outside_sdpa():
    """Attention of Wan by hand, as a foreign backend computes it."""
    from diffusers.models.transformers import transformer_wan

    def by_hand(query, key, value, **options):
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)

    original = transformer_wan.dispatch_attention_fn
    transformer_wan.dispatch_attention_fn = by_hand
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = original


def test_a_function_put_in_place_of_sdpa_stays_in_use(wan, monkeypatch):
    """Dense calls go to whatever stood there before; what is put there later stays."""
    torch_sdpa, lengths = functional.scaled_dot_product_attention, []

    def users(query, *args, **kwargs):
        lengths.append(query.shape[2])
        return torch_sdpa(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", users)
    plan = plan_of(wan, NARROW).model_copy(update={"sites": {}})
    with accelkit.patch(wan, plan):
        latents(wan, "wan", steps=1)
    assert lengths.count(192) == 2 * 4  # self- and cross-attention, two blocks, two branches
    assert functional.scaled_dot_product_attention is users
    with accelkit.patch(wan, plan):
        functional.scaled_dot_product_attention = torch_sdpa
    assert functional.scaled_dot_product_attention is torch_sdpa


def test_ring_attention_is_refused(wan):
    config = diffusers.ContextParallelConfig(ring_degree=2)
    parallel = type("Config", (), {"context_parallel_config": config})()
    for block in wan.transformer.blocks:
        block.attn1.processor._parallel_config = parallel
    with pytest.raises(ParallelNotSupportedError, match="ring"):
        accelkit.patch(wan, NARROW)
    assert not hasattr(wan.transformer.blocks[0].attn1, "accelkit_site")


def test_sharded_heads_are_refused(wan):
    attention = wan.transformer.blocks[0].attn1

    def one_rank(hidden_states, *args):
        q = hidden_states.unflatten(-1, (2, -1)).transpose(1, 2)[:, :1]
        return functional.scaled_dot_product_attention(q, q, q).flatten(1)

    attention.forward = one_rank
    with accelkit.patch(wan, NARROW):
        with pytest.raises(ParallelNotSupportedError, match="1 query heads here, 2 in the model"):
            latents(wan, "wan", steps=1)


def test_unknown_denoisers_are_refused():
    vae = tiny_pipe("wan").vae
    with pytest.raises(UnsupportedModelError, match="token layout of AutoencoderKLWan"):
        accelkit.patch(vae, NARROW)
    pipe = diffusers.DDIMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(4, 4), norm_num_groups=2,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ),
        diffusers.DDIMScheduler(),
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="DDIMPipeline: no denoiser found"):
        accelkit.patch(pipe, NARROW)


def test_two_handles(wan):
    """One denoiser takes one handle; two pipelines share the router and leave it together."""
    original = functional.scaled_dot_product_attention
    other = tiny_pipe("flux")
    with accelkit.patch(wan, NARROW) as first:
        with pytest.raises(AlreadyPatchedError):
            accelkit.patch(wan.transformer, NARROW)
        with accelkit.patch(other, NARROW) as second:
            latents(wan, "wan")
            latents(other, "flux")
        assert functional.scaled_dot_product_attention is not original
        latents(wan, "wan")
        assert (first.report().sparse_calls, second.report().sparse_calls) == (16, 6)
    assert functional.scaled_dot_product_attention is original


def test_two_threads(wan):
    """Each has its own open site."""
    other = tiny_pipe("flux")
    with accelkit.patch(wan, NARROW), accelkit.patch(other, NARROW) as second:
        jobs = [partial(latents, wan, "wan", steps=4), partial(latents, other, "flux", steps=6)]
        expected = [job() for job in jobs]
        second.reset_report()
        with ThreadPoolExecutor(2) as pool:
            found = [f.result() for f in [pool.submit(job) for job in jobs]]
        assert all(map(torch.equal, found, expected))
        assert second.report().sparse_calls == 18


def test_a_patched_pipeline_goes_when_nobody_needs_it():
    """And the router with the last of them."""
    original = functional.scaled_dot_product_attention
    pipe = tiny_pipe("hunyuan15")  # with a derived processor
    accelkit.patch(pipe, NARROW)
    latents(pipe, "hunyuan15", steps=1)
    seen = [weakref.ref(m) for m in (pipe.transformer, pipe.vae, pipe.text_encoder)]
    assert functional.scaled_dot_product_attention is not original
    del pipe
    gc.collect()
    assert [r() for r in seen] == [None] * 3
    assert functional.scaled_dot_product_attention is original


def test_a_copied_denoiser_outlives_the_handle(wan):
    dense, other = latents(wan, "wan"), tiny_pipe("flux")
    with accelkit.patch(wan, NARROW):
        copied = copy.deepcopy(wan.transformer)
    wan.transformer = copied
    assert torch.equal(latents(wan, "wan"), dense)
    with accelkit.patch(other, NARROW):  # the router is there again
        assert torch.equal(latents(wan, "wan"), dense)


def test_failing_half_way_leaves_no_trace(wan, monkeypatch):
    before = attributes(wan.transformer)
    router = functional.scaled_dot_product_attention
    connect = sdpa.connect
    calls = []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        connect(*args)

    monkeypatch.setattr(sdpa, "connect", second_fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        accelkit.patch(wan, NARROW)
    assert attributes(wan.transformer) == before
    assert {"step", "set_timesteps"}.isdisjoint(vars(wan.scheduler))
    assert functional.scaled_dot_product_attention is router


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_a_forward_closes_the_site(wan, sparse, error):
    """The text encoder, which runs next, must not find it open."""

    def fail(*_):
        raise error

    def attend_elsewhere(*_):
        functional.scaled_dot_product_attention(*torch.randn(3, 1, 3, 8, 16))

    with accelkit.patch(wan, NARROW) as handle:
        hook = wan.transformer.blocks[0].attn1.to_q.register_forward_pre_hook(fail)
        with pytest.raises(error):
            latents(wan, "wan")
        hook.remove()
        inside = wan.text_encoder.encoder.register_forward_pre_hook(attend_elsewhere)
        assert torch.equal(latents(wan, "wan", steps=3), sparse)
        inside.remove()
        assert handle.report().calls == 12


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_in_a_bare_denoiser_closes_the_site(wan, error):
    """Without a pipeline nobody knows which model runs next."""

    def fail(*_):
        raise error

    given = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 5, 16)
    with accelkit.patch(wan.transformer, NARROW) as handle:
        hook = wan.transformer.blocks[0].attn1.to_q.register_forward_pre_hook(fail)
        with pytest.raises(error), torch.no_grad():
            wan.transformer(given[0], timestep=torch.tensor([9.0]), encoder_hidden_states=given[1])
        hook.remove()
        functional.scaled_dot_product_attention(*torch.randn(3, 1, 3, 8, 16))
        assert handle.report().calls == 0


def test_positional_timestep_is_refused(wan):
    with accelkit.patch(wan, NARROW), pytest.raises(InvalidInputError, match="timestep="):
        wan.transformer(torch.randn(1, 16, 3, 16, 16), torch.tensor([1.0]), torch.randn(1, 5, 16))


def test_processors_without_a_spread_mask_are_not_derived(wan):
    with pytest.raises(UnsupportedModelError, match="self_attn_mask"):
        keep_padding(wan.transformer.blocks[0].attn1, ExitStack())


def test_no_square_mask_is_built_for_hunyuan_15():
    """The derived processor is still one of the original class and goes with the handle."""
    pipe = tiny_pipe("hunyuan15")
    module = pipe.transformer.transformer_blocks[0].attn
    original = module.processor
    shapes: list[torch.Size] = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            shapes.extend(t.shape for t in (out,) if isinstance(t, torch.Tensor))
            return out

    def square() -> list[torch.Size]:
        shapes.clear()
        with Shapes(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            latents(pipe, "hunyuan15", steps=1)
        return [s for s in shapes if len(s) == 4 and s[-1] == s[-2] > 700]

    assert square()
    with watch(pipe, lambda call: call.q.new_zeros(call.q.shape)):
        assert isinstance(module.processor, type(original))
        assert not square()
    assert module.processor is original
