"""What every method for diffusion keeps to, found by listing the folder: a new file is tested
unnamed.

Calls have no causality, tokens on a grid and text before or behind them. Methods that search or
measure in their first step are asked in the step after; what calibration would find, it finds on
the call itself.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import planted
import pytest
import torch

import accelkit
from accelkit.kernels import BlockIndex, select
from accelkit.patches.call import AttentionCall, Geometry, Site
from accelkit.patches.method import AttentionMethod, load, names
from accelkit.patches.plan import HeadGroup, LayerPlan, Plan, Policy
from accelkit.patches.sites import attention
from accelkit.patches.state import PatchState
from tests import tiny_pipes

DENOISERS = [n for n in names() if "denoise" in load(n).phases and "index" in load(n).answers()]
SMALL = {
    "free_swim": {"base": (4, 6)},
    "radial_attention": {"decay": 0.2, "block": 32},
    "window": {"window_tokens": 256},
    "sparge_attn": {"hilbert": True, "similarity": 0.3},
}
"""Defaults that are sizes of frames of thousands of tokens, or speak of the noise of real ones."""
ROWS = slice(3, None, 8)
"""Every eighth row stands for all."""


FEW = (8, 12, 12)
"""A grid on which all methods run sparse, if not always sparse enough to tell them from chance."""


@cache
def video(text_first: bool, grid: tuple[int, int, int]) -> AttentionCall:
    return planted.video(text_first, grid)


@cache
def dense(text_first: bool, grid: tuple[int, int, int]) -> torch.Tensor:
    return planted.dense(video(text_first, grid))


@cache
def lse(text_first: bool, grid: tuple[int, int, int]) -> torch.Tensor:
    call = video(text_first, grid)
    return (call.q @ call.k.transpose(-1, -2) * call.scale).logsumexp(-1)


@cache
def ready(
    name: str, text_first: bool = True, full: bool = False, grid: tuple[int, int, int] = FEW
) -> tuple[AttentionMethod, AttentionCall]:
    """A method as calibration would set it up, and a call in its second step."""
    call, cls = video(text_first, grid), load(name)
    method = cls.model_validate({**cls().model_dump(), **SMALL.get(name, {})})
    calibrator = method.calibrator(Site("a", 0))
    calibrator.see(call, dense(text_first, grid), lse(text_first, grid))
    if calibrator.tables():
        call = replace(call, tables=calibrator.tables())
        named = [
            f for f in cls.model_fields if isinstance(getattr(calibrator.settings()[0], f), str)
        ]
        tables = {f: getattr(calibrator.settings()[0], f) for f in named}
        method = method.model_copy(update=tables)
    if full:
        method = method.model_copy(update=cls.full)
    return method, planted.later(method, call)


@pytest.fixture(params=[True, False], ids=["text first", "text last"])
def text_first(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("name", DENOISERS)
def test_full_budget_is_dense(name: str, text_first: bool):
    method, call = ready(name, text_first, full=True)
    expected, answer = dense(text_first, FEW), planted.ask(method, call)
    out = expected if answer is None else attention.compute(answer).out
    torch.testing.assert_close(out, expected, atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("name", DENOISERS)
def test_lists(name: str, text_first: bool):
    """No key twice, no row empty, text rows and columns dense."""
    method, call = ready(name, text_first)
    found = planted.select(method, call, ROWS)
    assert (found.pairs <= 1).all(), "a key is listed twice"
    assert found.seen.any(-1).all(), "a row without a key"
    (text,) = (s for s in call.geometry.spans if s.kind == "text")
    rows = torch.arange(call.n_q)[ROWS]
    of_text = (rows >= text.start) & (rows < text.stop)
    assert of_text.any() and found.seen[:, :, of_text].all(), "a text row is not dense"
    assert found.seen[..., text.start : text.stop].all(), "a text column is not dense"


@pytest.mark.parametrize("name", DENOISERS)
def test_same_call_same_answer(name: str):
    method, _ = ready(name)
    first, second = (planted.ask(method, ready.__wrapped__(name)[1]) for _ in range(2))
    assert first is not None and second is not None
    for a, b in zip(first.pieces, second.pieces, strict=True):
        assert isinstance(a, BlockIndex) and isinstance(b, BlockIndex)
        for field in ("start", "count", "blocks"):
            assert torch.equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("name", DENOISERS)
def test_finds_what_was_planted(name: str, text_first: bool):
    """A random selection of density d has recall d; density is the work, mean keys included."""
    method, call = ready(name, text_first, grid=planted.GRID)
    found = planted.select(method, call, ROWS)
    density = float(select.density(found.pieces, found.call).mean())
    recall = planted.recall(found, planted.probabilities(call, ROWS))
    assert density < 0.7, f"density {density:.2f}"
    assert recall >= density + 0.2, f"recall {recall:.2f} at density {density:.2f}"


@pytest.mark.parametrize("name", DENOISERS)
def test_some_heads_only(name: str):
    """A head group gets what its heads get in the whole call."""
    method, call = ready(name)
    whole = planted.select(method, call, ROWS)
    some = call.take((3, 1))
    if call.memory:
        fresh = replace(call, clock=replace(call.clock, step=call.clock.step - 1))
        some = planted.later(method, fresh.take((3, 1)))
    found = planted.select(method, some, ROWS)
    if not getattr(method, "adaptive", False):  # shares a budget among the heads of the group
        assert torch.equal(found.seen, whole.seen[:, [3, 1]])


@pytest.mark.parametrize("name", DENOISERS)
def test_batch_is_two_single_calls(name: str):
    method, call = ready(name)
    both = {x: torch.cat([getattr(call, x), getattr(call, x).roll(7, 2)]) for x in "qkv"}
    fresh = replace(call, clock=replace(call.clock, step=call.clock.step - 1))
    together = planted.select(method, planted.later(method, replace(fresh, **both)), ROWS)
    for b in range(2):
        one = replace(fresh, **{x: t[b : b + 1] for x, t in both.items()})
        alone = planted.select(method, planted.later(method, one), ROWS)
        if not getattr(method, "adaptive", False):  # budgets of heads are shared by the batch
            assert torch.equal(alone.seen[0], together.seen[b if together.seen.shape[0] > 1 else 0])


@pytest.mark.parametrize("name", DENOISERS)
def test_without_a_grid_or_in_a_chunk_nothing_breaks(name: str):
    """Static and grid methods stay dense; the others go without one."""
    method, call = ready(name)
    bare = replace(call, geometry=Geometry(), memory={}, _shared={})
    answer = planted.ask(method, bare)
    assert answer is None or answer.order is None
    chunk = replace(call, q=call.q[:, :, -512:], memory={}, _shared={})
    answer = planted.ask(method, chunk)
    if answer is not None:
        assert attention.compute(answer).out.isfinite().all()


@pytest.mark.parametrize("name", DENOISERS)
def test_groups_are_as_good_as_one(name: str):
    """Heads in two groups, through the shared launch, give what each gives alone; and again when
    static lists come from the state.
    """
    method, call = ready(name)
    if getattr(method, "adaptive", False):  # shares a budget among the heads of a group
        return
    policy = Policy(methods=(method,))
    shares = (((0, 2), policy), ((3,), policy), ((1,), Policy()))
    groups = [HeadGroup(heads, p, i) for i, (heads, p) in enumerate(shares)]
    state = PatchState(Plan.model_construct(policies=(), sites={call.site.path: LayerPlan()}))
    memory: dict = {}
    for step in (10, 11):
        now = replace(call, clock=replace(call.clock, step=step), memory=memory, _shared={})
        out = torch.full_like(call.q, float("nan"))
        assert attention.attend(now, groups, state, out)
    answer = planted.ask(method, call)
    assert answer is not None
    expected = attention.compute(answer).out
    expected[:, 1] = dense(True, FEW)[:, 1]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return tiny_pipes.wan_denoiser().eval()


def denoise(model: torch.nn.Module) -> torch.Tensor:
    """Two steps over 6 × 14 × 14 tokens."""
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 6, 28, 28, generator=g), torch.randn(1, 4, 16, generator=g)
    for t in (900, 600):
        step = {"timestep": torch.tensor([t]), "encoder_hidden_states": text}
        x = x - 0.3 * model(hidden_states=x, **step, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", [n for n in DENOISERS if n != "paro_attention"])
@torch.inference_mode()
def test_runs_in_a_tiny_wan_and_leaves_it(name: str, denoiser: torch.nn.Module):
    """Without its tables PAROAttention has nothing to run."""
    method = load(name).model_validate({**load(name)().model_dump(), **SMALL.get(name, {})})
    plain = denoise(denoiser)
    with accelkit.patch(denoiser, method) as handle:
        found = denoise(denoiser)
        assert handle.report().sparse_calls == 4
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
    assert torch.equal(denoise(denoiser), plain)
