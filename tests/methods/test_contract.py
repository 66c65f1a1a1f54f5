"""What every method keeps to, found by listing the folder: a new file is tested unnamed.

`full` on a class is its densest meaning, `dial` its way from sparse to dense. Methods that choose
keys are asked for their lists on noise, on padded and chunked calls, and on input whose attention
mass lies in known places.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import planted
import pytest
import torch
from tiny_cases import tiny_model
from transformers import LlamaForCausalLM

import accelkit
from accelkit.kernels import BlockIndex
from accelkit.patches import methods
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import AttentionMethod, Method, load
from accelkit.patches.plan import Component, Fingerprint, LayerPlan, Plan, Policy
from accelkit.patches.sites.attention import compute

NAMES = sorted(f.stem for f in Path(methods.__path__[0]).glob("[!_]*.py"))
SELECTORS = [
    name
    for name in NAMES
    if issubclass(load(name), AttentionMethod)
    and "prefill" in load(name).phases
    and "index" in load(name).answers()
]


def takes_table(name: str) -> bool:
    """Whether the dial may be one number for each head."""
    cls = load(name)
    return cls.dial is not None and "str" in str(cls.model_fields[cls.dial.field].annotation)


STATIC = [name for name in SELECTORS if load(name).static]
N = 2300
"""Long enough for every default to run sparse, and a multiple of no block."""


def full(name: str) -> AttentionMethod:
    """The method at its densest."""
    cls = load(name)
    assert cls.full, f"{name}: say with which fields it reads every key, `full`"
    return cls.model_validate({**cls().model_dump(), **cls.full})


def run(method: AttentionMethod, call: AttentionCall) -> torch.Tensor:
    answer = planted.ask(method, call)
    return planted.dense(call) if answer is None else compute(answer).out


def dense(call: AttentionCall) -> torch.Tensor:
    return call.once("dense", lambda: planted.dense(call))


@cache
def random_call(n: int = N, start: int = 0, batch: int = 1) -> AttentionCall:
    """Noise; with `start`, the chunk of rows from there on."""
    q, k, v = planted.noise(n, batch=batch)
    return planted.make_call(q[:, :, start:], k, v, q_start=start)


@cache
def padded_call(pad: int, garbage: float = 1.0) -> AttentionCall:
    """Two sequences, the second with `pad` tokens of garbage on its left."""
    q, k, v = planted.noise(N, batch=2)
    for i, x in enumerate((q, k, v)):
        g = torch.Generator().manual_seed(7 + i)
        x[1, :, :pad] = garbage * torch.randn(x[1, :, :pad].shape, generator=g)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, :pad] = False
    return planted.make_call(q, k, v, key_mask=mask)


def check_lists(found: planted.Selected) -> None:
    """Nothing visible empty, nothing twice, nothing that nobody sees."""
    visible = found.visible.expand_as(found.pairs)
    assert ((found.pairs * visible) <= 1).all(), "a key is listed twice"
    empty = visible.any(-1) & ~found.seen.any(-1)
    assert not empty.any(), f"rows without a key: {empty.nonzero()[:3].tolist()}"
    call, place = found.call, found.call.k_pos
    if place is not None:
        at = place.clamp(min=0).long()[:, :, None].expand(*visible.shape[:3], -1)
        visible = visible.gather(-1, at) & (place >= 0)[:, :, None]
    for piece in found.pieces:
        (bq, bk), (nq, nk) = piece.size, call.tiles(piece.size)
        short = (0, nk * bk - visible.shape[-1], 0, nq * bq - visible.shape[-2])
        tile = torch.nn.functional.pad(visible, short).unflatten(-1, (nk, bk)).any(-1)
        tile = tile.unflatten(2, (nq, bq)).any(3)
        for b in range(visible.shape[0]):
            wasted = (planted.listed(piece, call, b, nk) > 0) & ~tile[b]
            assert not wasted.any(), f"listed but seen by no row: {wasted.nonzero()[:3].tolist()}"


@pytest.mark.parametrize("name", NAMES)
def test_defaults_survive_json(name: str):
    method = load(name)()
    assert type(method).model_validate_json(method.model_dump_json()) == method
    fingerprint = Fingerprint(
        class_name="LlamaForCausalLM",
        model_type="llama",
        config_hash="0",
        components={"text": Component(layers=1, q_heads=4, kv_heads=2, head_dim=16)},
    )
    policies, layer = (Policy(),), {}
    if isinstance(method, AttentionMethod):
        policies = (Policy(methods=(method,)),)
    for slot in ("tokens", "cache", "block"):
        base = {"tokens": "TokenMethod", "cache": "CacheMethod", "block": "BlockMethod"}[slot]
        if base in [c.__name__ for c in type(method).__mro__]:
            layer[slot] = method
    sites = {"model.layers.0.self_attn": LayerPlan(**layer)}
    plan = Plan(fingerprint=fingerprint, policies=policies, sites=sites)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", NAMES)
def test_fields_say_what_they_are(name: str):
    mute = [field for field, about in load(name).model_fields.items() if not about.description]
    assert not mute, f"no line below {mute}; `accelkit methods {name}` prints it"


@pytest.mark.parametrize("name", NAMES)
def test_dial_turns_a_field(name: str):
    cls = load(name)
    if cls.dial is None:
        return
    assert cls.dial.field in cls.model_fields
    assert 1 < len(cls.dial.values) <= 8
    rising = sorted(cls.dial.values)
    assert list(cls.dial.values) in (rising, rising[::-1]), "sparsest to densest, one way"
    for value in cls.dial.values:
        cls.model_validate({cls.dial.field: value})


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_valid(name: str):
    method: Method = load(name)()
    for setting in method.calibrator(accelkit.patches.call.Site("a", 0)).settings():
        assert type(method).model_validate(setting.model_dump()) == setting


@pytest.mark.parametrize("name", SELECTORS)
def test_full_budget_is_dense(name: str):
    for call in (random_call(), padded_call(200), random_call(start=2048)):
        out = run(full(name), call)
        torch.testing.assert_close(out, dense(call), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", SELECTORS)
def test_lists_on_noise(name: str):
    check_lists(planted.select(load(name)(), random_call()))


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("start", [1000, 2048])
def test_lists_of_a_chunk(name: str, start: int):
    """Rows of a chunk see the cached keys before it; a method that cannot say which stays dense."""
    call = random_call(start=start)
    if planted.ask(load(name)(), call) is not None:
        check_lists(planted.select(load(name)(), call))


@pytest.mark.parametrize("name", STATIC)
def test_static_chunk_is_part_of_the_whole(name: str):
    method = load(name)()
    whole, chunk = planted.select(method, random_call()), random_call(start=1024)
    assert torch.equal(planted.select(method, chunk).seen, whole.seen[:, :, 1024:])


@pytest.mark.parametrize("name", SELECTORS)
def test_left_padding(name: str):
    method = load(name)()
    some = planted.select(method, padded_call(200))
    check_lists(some)
    other = planted.select(method, padded_call(200, garbage=50.0))
    assert torch.equal(some.seen, other.seen), "what stands in the padding decides"


@pytest.mark.parametrize("name", SELECTORS)
def test_same_call_same_answer(name: str):
    method = load(name)()
    first, second = (planted.ask(method, replace(random_call(), _shared={})) for _ in range(2))
    assert first is not None and second is not None
    for a, b in zip(first.pieces, second.pieces, strict=True):
        assert type(a) is type(b)
        fields = ("start", "count", "blocks") if isinstance(a, BlockIndex) else ("out", "lse")
        for field in fields:
            assert torch.equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("name", SELECTORS)
def test_batch_is_two_single_calls(name: str):
    method, both = load(name)(), random_call(batch=2)
    together = planted.select(method, both)
    for b in range(2):
        one = planted.make_call(both.q[b : b + 1], both.k[b : b + 1], both.v[b : b + 1])
        alone = planted.select(method, one)
        assert torch.equal(alone.seen[0], together.seen[b])


@pytest.mark.parametrize("name", SELECTORS)
def test_some_heads_only(name: str):
    """A head group gets the lists that its heads get in the whole call."""
    method, call = load(name)(), random_call()
    whole = planted.select(method, call)
    some = planted.select(method, call.take((3, 1)))
    if name != "kascade":  # pools over the group's own heads
        assert torch.equal(some.seen, whole.seen[:, [3, 1]])
    check_lists(some)


@pytest.mark.parametrize("name", [n for n in SELECTORS if takes_table(n)])
def test_a_number_for_each_head(name: str):
    """A dial read from a side tensor gives each head what the plain number gives."""
    dial, call = load(name).dial, random_call()
    values = [dial.values[0], dial.values[-1]] * 2
    tables = {"per_head": torch.tensor(values)}
    found = planted.select(
        load(name)(**{dial.field: "per_head"}), replace(call, tables=tables, _shared={})
    )
    for value in set(values):
        heads = [h for h in range(4) if values[h] == value]
        alone = planted.select(load(name)(**{dial.field: value}), call)
        assert torch.equal(found.seen[:, heads], alone.seen[:, heads])


@pytest.mark.parametrize("name", SELECTORS)
def test_short_prompts_stay_dense(name: str):
    assert planted.ask(load(name)(), random_call(96)) is None


@pytest.fixture(scope="module")
def rich() -> tuple[AttentionCall, torch.Tensor]:
    call = planted.planted(4096)
    return call, planted.probabilities(call, ROWS)


@pytest.fixture(scope="module")
def local() -> tuple[AttentionCall, torch.Tensor]:
    call = planted.planted(4096, everywhere=False)
    return call, planted.probabilities(call, ROWS)


ROWS = slice(3, None, 8)
"""Every eighth row stands for all."""


@pytest.mark.parametrize("name", SELECTORS)
def test_finds_what_was_planted(name: str, request: pytest.FixtureRequest):
    """At its defaults a method leaves work out, and knows better than chance which: a random
    selection of density d has recall d. Static patterns get input of the kind they are made for.
    """
    cls = load(name)
    call, p = request.getfixturevalue("local" if cls.static else "rich")
    found = planted.select(cls(), replace(call, _shared={}), ROWS)
    density, recall = found.density, planted.recall(found, p)
    assert density < 0.7, f"density {density:.2f}"
    assert recall >= density + 0.2, f"recall {recall:.2f} at density {density:.2f}"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (1, N), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(llama: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return llama(ids).logits


@pytest.mark.parametrize("name", SELECTORS)
@torch.inference_mode()
def test_runs_in_a_llama_and_leaves_it(
    name: str, llama: LlamaForCausalLM, ids: torch.Tensor, plain: torch.Tensor
):
    with accelkit.patch(llama, load(name)()) as handle:
        logits = llama(ids).logits
        assert handle.report().sparse_calls == 2
    assert logits.isfinite().all()
    assert not torch.equal(logits, plain)
    assert torch.equal(llama(ids).logits, plain)
