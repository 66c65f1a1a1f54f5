"""FreeSwim's dual path: which passes run, what the windowed one is told, what stays behind."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_pipes import latents, tiny_pipe
from torch._dynamo.testing import CompileCounterWithBackend

import accelkit
from accelkit.errors import InvalidInputError, UnsupportedModelError
from accelkit.patches.methods.free_swim import FreeSwim
from accelkit.patches.methods.free_swim_twin import FreeSwimTwin
from accelkit.patches.patch import plan_of
from accelkit.patches.plan import Plan

WINDOW = FreeSwim(base=(4, 4), block=16)
FULL = WINDOW.model_copy(update={"windowed": False})
ALONE, GUIDED = {"guidance_scale": 1.0}, {"guidance_scale": 3.0}


@pytest.fixture
def pipe():
    return tiny_pipe("wan")


def crossed(pipe):
    """The output projections of cross-attention."""
    return [block.attn2.to_out[0] for block in pipe.transformer.blocks]


def forward_of(pipe):
    """What the denoiser is given in the first forward of a generation."""
    given = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    latents(pipe, "wan")
    hook.remove()
    return given[0]


@torch.no_grad()
def test_the_full_pass_speaks_through_cross_attention(pipe):
    """Both passes by hand: the inputs of the projections of one put in front of those of the
    other.
    """
    given, told = forward_of(pipe), {}
    with accelkit.patch(pipe, FULL):
        hooks = [
            m.register_forward_pre_hook(lambda m, args: told.update({m: args[0]}))
            for m in crossed(pipe)
        ]
        pipe.transformer(**given)
        [h.remove() for h in hooks]
    with accelkit.patch(pipe, WINDOW):
        alone = pipe.transformer(**given)[0]
        hooks = [m.register_forward_pre_hook(lambda m, _: (told[m],)) for m in crossed(pipe)]
        expected = pipe.transformer(**given)[0]
        [h.remove() for h in hooks]
    with accelkit.patch(pipe, [WINDOW, FreeSwimTwin()]):
        found = pipe.transformer(**given)[0]
    assert torch.equal(found, expected)
    assert not torch.equal(found, alone)


@pytest.mark.parametrize("options", [ALONE, GUIDED], ids=["one branch", "guided"])
def test_passes(pipe, options):
    """A full pass at one of two steps and none behind the third; the unconditional one is alone."""
    passes, step = [0] * 6, [0]
    pipe.transformer.blocks[0].register_forward_hook(
        lambda *_: passes.__setitem__(step[0], passes[step[0]] + 1)
    )

    def ended(*_):
        step[0] += 1
        return {}

    options = {**options, "callback_on_step_end": ended}
    plan = plan_of(pipe, [WINDOW, FreeSwimTwin(every=2, until_step=3)])
    with accelkit.patch(pipe, Plan.from_json(plan.to_json())) as handle, handle.measuring():
        for _ in range(2):  # the second generation counts anew
            passes[:], step[0] = [0] * 6, 0
            latents(pipe, "wan", steps=6, **options)
            more = options["guidance_scale"] > 1
            assert passes == [2 + more, 1 + more, 2 + more, 1 + more, 1 + more, 1 + more]
    for site in handle.report().sites.values():
        assert site.calls == site.sparse == 2 * sum(passes)
        assert site.density < 1


def test_read_until_the_next_full_pass(pipe):
    """Another period is another video; with one full pass at every step nothing is read again."""
    dense = latents(pipe, "wan", steps=4)
    videos = []
    for every in (1, 2):
        with accelkit.patch(pipe, [WINDOW, FreeSwimTwin(every=every)]):
            videos.append(latents(pipe, "wan", steps=4))
    assert not torch.equal(*videos)
    assert all(torch.isfinite(v).all() and not torch.equal(v, dense) for v in videos)


def test_without_a_window_both_passes_are_one(pipe):
    """At the training size nothing is left out: what is read is what would have been computed."""
    dense = latents(pipe, "wan", steps=3)
    with accelkit.patch(pipe, [FreeSwim(), FreeSwimTwin(every=1)]):
        assert torch.equal(latents(pipe, "wan", steps=3), dense)


def test_compiled_blocks_share_a_graph_for_both_passes(pipe):
    """As many graphs as without a patch, and the numbers of blocks that are not compiled."""
    counters = []

    @contextmanager
    def compiled():
        torch._dynamo.reset()
        counters.append(CompileCounterWithBackend("aot_eager"))
        pipe.transformer.compile_repeated_blocks(backend=counters[-1], fullgraph=True)
        yield
        for module in pipe.transformer.modules():
            module._compiled_call_impl = None

    with compiled():
        latents(pipe, "wan", steps=2)
    with accelkit.patch(pipe, [WINDOW, FreeSwimTwin(every=2, until_step=3)]):
        eager = latents(pipe, "wan", steps=5, **GUIDED)
        with compiled():
            found = [latents(pipe, "wan", steps=5, **GUIDED) for _ in range(2)]
    assert counters[1].frame_count == counters[0].frame_count > 0
    for again in found:
        torch.testing.assert_close(again, eager, atol=1e-5, rtol=1e-4)


def test_compiled_as_a_whole_both_passes_run_all_the_same(pipe):
    with accelkit.patch(pipe, [WINDOW, FreeSwimTwin()]):
        eager = latents(pipe, "wan", steps=3)
        torch._dynamo.reset()
        pipe.transformer.compile(backend="eager")
        again = latents(pipe, "wan", steps=3)
    torch.testing.assert_close(again, eager, atol=1e-5, rtol=1e-4)


def test_nothing_stays_behind(pipe):
    dense = latents(pipe, "wan")
    before = {n: dict(vars(m)) for n, m in pipe.transformer.named_modules()}
    with accelkit.patch(pipe, [WINDOW, FreeSwimTwin()]):
        with accelkit.disabled(pipe):
            assert torch.equal(latents(pipe, "wan"), dense)
        assert not torch.equal(latents(pipe, "wan"), dense)
    for n, m in pipe.transformer.named_modules():
        assert vars(m).keys() == before[n].keys(), n
        assert not m._forward_pre_hooks, n
    assert torch.equal(latents(pipe, "wan"), dense)


def test_models_without_cross_attention_are_refused():
    with pytest.raises(UnsupportedModelError, match="attn2"):
        accelkit.patch(tiny_pipe("hunyuan"), [WINDOW, FreeSwimTwin()])


def test_calibration_does_not_choose_it(pipe):
    with pytest.raises(InvalidInputError, match="free_swim_twin"):
        accelkit.calibrate(pipe, ["a red ball"], steps=2, methods=["free_swim_twin"])
