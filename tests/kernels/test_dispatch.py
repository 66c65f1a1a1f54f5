"""Which backend serves a launch, and the way to other packages with stand-ins for them."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from accelkit.errors import KernelUnavailableError
from accelkit.kernels import dispatch, speeds
from accelkit.kernels._extern import fa4
from accelkit.kernels.dispatch import attend
from accelkit.kernels.index import ALL, BlockIndex
from accelkit.kernels.prepare import prepare

SIZE = (64, 64)


def tensors(n_q: int = 200, n_k: int = 200, dtype=torch.float16, d: int = 16) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (n_q, 4), (n_k, 2), (n_k, 2)
    return [torch.randn(2, n, h, d, generator=g).to(dtype).transpose(1, 2) for n, h in shapes]


def lists(n_q: int = 200, n_k: int = 200, heads: int = 4, size=SIZE) -> BlockIndex:
    g = torch.Generator().manual_seed(1)
    nq, nk = -(-n_q // size[0]), -(-n_k // size[1])
    index = BlockIndex.from_mask(torch.rand(1, heads, nq, nk, generator=g) < 0.5, size)
    count = index.count.clone()
    count[:, 1], count[:, 0, 0] = ALL, 0
    return BlockIndex(index.start, count, index.blocks, size)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package were installed on a card that it serves."""
    monkeypatch.setattr(fa4, "missing", lambda: None)
    monkeypatch.setattr(fa4, "_device", lambda device: None)


def test_a_wish_that_cannot_be_served_raises() -> None:
    q, k, v = tensors()
    with pytest.raises(KernelUnavailableError, match=r"'fa4' \(asked for\).*accelkit\[fa4\]"):
        attend(q, k, v, lists(), backend="fa4")
    with pytest.raises(KernelUnavailableError, match="'gluon'"):
        attend(q, k, v, lists(), backend="gluon")
    with pytest.raises(KernelUnavailableError, match=r"'torch'.*skip"):
        attend(q, k, v, lists(), backend="torch", skip=0.1)


def test_the_fastest_that_serves_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = SimpleNamespace(
        index=SimpleNamespace(size=(128, 128)),
        q=SimpleNamespace(device=torch.device("cuda")),
        qk="native",
    )
    known = {"a": 0.8, "b": 0.9}
    monkeypatch.setattr(speeds, "speed", lambda name, _: known.get(name))

    def choose(**refusals: str | None) -> dispatch.Choice:
        kernels = {name: lambda _, why=why: why for name, why in refusals.items()}
        monkeypatch.setattr(dispatch, "KERNELS", kernels)
        return dispatch.choose(launch)

    found = choose(triton=None, a=None, b=None)
    assert found == dispatch.Choice("b", "0.90 of dense speed (a 0.80)")
    found = choose(a=None, b="too old")
    assert found == dispatch.Choice("a", "0.80 of dense speed (b: too old)")
    assert choose(c=None, triton=None).backend == "triton"
    known["gluon"] = 0.89  # as fast as far as readings tell
    assert choose(b=None, gluon=None).backend == "gluon"
    known["gluon"] = 0.88
    assert choose(b=None, gluon=None).backend == "b"
    with pytest.warns(match="slow"):
        assert choose(triton="no keys", c="no").backend == "reference"


def test_slower_kernels_are_not_asked_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    launch = SimpleNamespace(q=SimpleNamespace(device=torch.device("cuda")), qk="native")
    monkeypatch.setattr(speeds, "speed", {"a": 0.8, "b": 0.9, "c": 1.0}.get)

    def say(name: str, why: str | None) -> dict:
        return {name: lambda _: asked.append(name) or why}

    monkeypatch.setattr(dispatch, "KERNELS", say("a", None) | say("b", None) | say("c", "no"))
    assert dispatch.choose(launch, briefly=True).backend == "b"
    assert asked == ["c", "b"]
    assert dispatch.choose(launch).backend == "b"
    assert asked[2:] == ["c", "b", "a"]


def test_shipped_speeds_are_readable() -> None:
    rows = json.loads(files("accelkit.kernels").joinpath("speeds.json").read_text())
    assert len(speeds.table()) == len(rows)
    assert all(
        key[0] in dispatch.KERNELS and 0 < value < 2 for key, value in speeds.table().items()
    )


def test_the_nearest_reading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    here = speeds.Kind("gluon", "H100", "9.0", 64, (64, 64), True, 32768)
    known = {
        here: 0.7,
        here._replace(head_dim=128): 0.9,
        here._replace(tokens=131072): 0.8,
        here._replace(gpu="H200"): 0.6,
        here._replace(gpu="H200", head_dim=128): 1.1,
    }
    monkeypatch.setattr(speeds, "table", lambda: known)
    speeds._nearest.cache_clear()
    assert speeds._nearest(here._replace(head_dim=80)) == 0.7
    assert speeds._nearest(here._replace(head_dim=120)) == 0.9
    assert speeds._nearest(here._replace(tokens=60000)) == 0.7
    assert speeds._nearest(here._replace(tokens=70000)) == 0.8
    assert speeds._nearest(here._replace(gpu="H200", head_dim=120)) == 1.1
    assert speeds._nearest(here._replace(gpu="another", head_dim=64, tokens=0)) in (0.6, 0.7)
    assert speeds._nearest(here._replace(causal=False)) is None
    assert speeds._nearest(here._replace(capability="8.0")) is None
    speeds._nearest.cache_clear()


REFUSED = {
    "dtype": ({"dtype": torch.float32}, {}, {}),
    "head sizes": ({"d": 136}, {}, {}),
    "units": ({}, {"size": (32, 32)}, {}),
    "not whole groups": ({}, {"heads": 2}, {"heads": (0, 2)}),
    "another order": ({}, {}, {"heads": (3, 2, 1, 0)}),
    "not known": ({}, {}, {"heads": torch.arange(4)}),
    "padding": ({}, {}, {"key_mask": torch.ones(2, 200, dtype=torch.bool)}),
    "rows": ({}, {}, {"rows": (0,)}),
    "skip": ({}, {}, {"skip": 0.1}),
    "last query": ({}, {}, {"q_start": 3}),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("reason", REFUSED)
def test_fa4_says_why_not(reason: str) -> None:
    shape, index, options = REFUSED[reason]
    launch = prepare(*tensors(**shape), lists(**index), **options)
    assert reason in (fa4.refusal(launch) or "")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flash-attn-4 in torch: full blocks without masks, mask blocks causal or up to the last
    key, exactly what the lists say.
    """
    names = ["mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "cu_total"]
    names += ["cu_offsets", "block_size"]
    sparse = namedtuple("BlockSparseTensorsTorch", names, defaults=[None] * 7)

    def forward(q, k, v, *, softmax_scale, mask_mod, block_sparse_tensors, out, lse) -> None:
        t = block_sparse_tensors
        (batch, n_q, heads, _), n_k, (bq, bk) = q.shape, k.shape[1], t.block_size
        assert t.mask_block_idx.shape[-1] <= -(-n_k // bk)
        rows, keys = torch.arange(n_q)[:, None], torch.arange(n_k)
        causal = keys <= rows + n_k - n_q
        for b in range(batch):
            for h in range(heads):
                seen = torch.zeros(n_q, n_k, dtype=torch.bool)
                for i in range(-(-n_q // bq)):
                    at = (b if t.full_block_cnt.shape[0] > 1 else 0, h, i)
                    mine = slice(i * bq, i * bq + bq)
                    for j in t.full_block_idx[at][: t.full_block_cnt[at]].tolist():
                        assert (j + 1) * bk <= n_k  # a full block has no mask for the ragged end
                        seen[mine, j * bk : j * bk + bk] = True
                    for j in t.mask_block_idx[at][: t.mask_block_cnt[at]].tolist():
                        part = slice(j * bk, j * bk + bk)
                        assert not seen[mine, part].any()
                        seen[mine, part] = causal[mine, part] if mask_mod else True
                kv = h // (heads // k.shape[2])
                s = (q[b, :, h].float() @ k[b, :, kv].float().T) * softmax_scale
                s = s.masked_fill(~seen, -math.inf)
                lse[b, h] = s.logsumexp(-1)
                p = torch.where(seen, (s - lse[b, h][:, None]).exp(), 0.0)
                out[b, :, h] = (p @ v[b, :, kv].float()).to(out.dtype)

    monkeypatch.setattr(fa4, "_package", lambda: (forward, sparse))
    monkeypatch.setattr(fa4, "_causal", lambda: "causal")


@pytest.mark.interpreter
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((200, 200), {}),
        ((130, 200), {"q_start": 70}),
        ((200, 150), {"causal": False}),
        ((200, 200), {"heads": (3, 0, 2, 1)}),
        ((200, 200), {"heads": (3, 2), "scale": 0.5}),
    ],
)
def test_fa4_gets_the_right_lists(lengths, options, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    stand_in(monkeypatch)
    q, k, v = tensors(*lengths)
    index = lists(*lengths, heads=len(options.get("heads", range(4))))

    def run(backend: str) -> tuple[Tensor, Tensor]:
        out = torch.full((2, lengths[0], 4, 16), math.nan, dtype=q.dtype).transpose(1, 2)
        lse = torch.full((2, 4, lengths[0]), math.nan)
        attend(q, k, v, index, out=out, lse=lse, backend=backend, **options)
        return out, lse

    want = run("reference")
    for _ in range(2):  # the second time from the lists that the index kept
        for got, expected in zip(run("fa4"), want, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3, equal_nan=True)
