"""Which backend serves a launch, and why: the one place that decides."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from accelkit.errors import (
    AccelkitWarning,
    InvalidInputError,
    KernelUnavailableError,
    UnsupportedConfigurationError,
)
from accelkit.kernels import block_sparse, cpu, pyramid, speeds
from accelkit.kernels.index import BlockIndex, Partial
from accelkit.kernels.launch import Launch
from accelkit.kernels.prepare import prepare

BACKENDS = ("triton", "gluon", "fa4", "torch", "reference")
OWN = ("triton", "gluon")
"""Our own kernels; the one made for a device behind the portable one."""
EVEN = 1.02
"""Kernels whose speeds differ by less than this are as fast as each other, as far as readings tell:
our own goes first, which takes the host less.
"""


@dataclass(frozen=True)
class Choice:
    """The backend that serves a launch and the reason, as a person would say it."""

    backend: str
    reason: str


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_start: int = 0,
    heads: Sequence[int] | Tensor | None = None,
    kv_of_head: Sequence[int] | Tensor | None = None,
    key_mask: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    rows: Sequence[int] | Tensor | None = None,
    skip: float | Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    qk: str = "native",
    pv: str = "native",
    smooth_k: bool = False,
    backend: str | None = None,
) -> Partial:
    """Attention of some query heads over the keys that `index` lists. Inference only; nothing is
    differentiated.

    Args:
        q: `[B, Hq, Nq, D]`; k: `[B, Hkv, Nk, D]`; v: `[B, Hkv, Nk, Dv]`; any strides, never
            expanded to the query heads.
        index: rows for the call's heads, no key twice in a row. `size[1] == 1` means single keys.
            Entries outside the keys or past the causal edge are ignored, `ALL` rows read every
            visible block in ascending order.
        scale: factor of the logits; `D ** -0.5` by default.
        causal: key `j` is visible to row `i` if `j <= q_start + i`, or `k_pos[j] <= q_pos[i]` where
            positions are given.
        heads: ids of the query heads (a sequence, or an integer tensor); all by default.
        kv_of_head: KV head of each of `heads`; equal groups by default.
        key_mask: bool `[B, Nk]`, true for real keys, in the order in which k lies.
        q_pos, k_pos: int32 `[B|1, H|1, N]`, absolute positions where rows or keys were permuted; −1
            is a hole.
        rows: query tiles to compute; all others stay untouched (zeros and −inf where this call
            allocates).
        skip: λ in 0 … 1, one number or `[len(heads)]`: a tile is dropped when in every row its
            maximum stays more than `−ln λ` under the running one. Tiles are the index units as far
            as they have at most 128 × 128 tokens; the Triton kernel cuts larger ones, and the
            Hopper kernel lets each 64 rows of a tile decide alone.
        out, lse: `[B, Hq, Nq, Dv]` with unit last stride and fp32 `[B, Hq, Nq]`: results go to
            `out[:, heads[j]]` and `lse[:, heads[j]]`. Without them `[B, len(heads), …]` is
            allocated, in the order of `heads`.
        qk, pv: precision of the two products, "native", "int8" (qk only) or "fp8" (pv only beside
            an 8-bit qk); operands are quantised inside (`kernels.quantize`). smooth_k: round keys
            after taking their mean from them.
        backend: one of `BACKENDS`, or None: what the device does best. The environment variable
            `ACCELKIT_KERNEL` replaces None. A wish is served or refused, never bent.

    Returns:
        `Partial(out, lse)`: natural-log LSE; rows without a visible key give zeros and −inf.

    Raises:
        InvalidInputError: an argument does not fit the others.
        UnsupportedConfigurationError: no backend runs this combination.
        KernelUnavailableError: the backend that was asked for cannot serve the call.
    """
    if index.pyramid:
        if causal or k_pos is not None or key_mask is not None:
            raise UnsupportedConfigurationError(
                "attend: mean keys have no position; a pyramid needs a call without "
                "causality, k_pos and key_mask"
            )
        k, v, index = pyramid.lower(k, v, index)
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "q_start": q_start, "heads": heads,
        "kv_of_head": kv_of_head, "key_mask": key_mask, "q_pos": q_pos, "k_pos": k_pos,
        "rows": rows, "skip": skip, "qk": qk, "pv": pv, "smooth_k": smooth_k,
    }  # fmt: skip
    if torch.compiler.is_compiling():
        return _traced(q, k, v, index, out, lse, backend=backend, **options)
    with torch.no_grad():
        launch = prepare(q, k, v, index, out=out, lse=lse, **options)
        choice = choose(launch, backend, briefly=True)
        if launch.q.numel() and launch.heads and (launch.rows is None or launch.rows.numel()):
            _run(launch, choice.backend)
        if not isinstance(launch.bias, Tensor) and launch.bias and choice.backend != "reference":
            _shift(launch)
    return Partial(launch.out, launch.lse)


def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    out: Tensor | None,
    lse: Tensor | None,
    **options: Any,
) -> Partial:
    """`attend` inside a graph that is being compiled: an operator, copied to where it belongs."""
    from accelkit.kernels import ops

    found = Partial(*ops.call(q, k, v, index, **options))
    if out is None:
        return found
    rows, heads = options["rows"], options["heads"]
    if rows is not None:
        raise UnsupportedConfigurationError(
            "attend: rows together with out is not compiled; leave out to attend"
        )
    at = slice(None) if heads is None else heads
    out[:, at] = found.out
    if lse is None:
        lse = found.lse.new_full(out.shape[:3], float("-inf"))
    lse[:, at] = found.lse
    return Partial(out, lse)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    backend: str | None = None,
    **options: Any,
) -> Choice:
    """Which backend `attend` would take for the same arguments, and why. Computes nothing."""
    return choose(prepare(q, k, v, index, **options), backend)


def choose(launch: Launch, backend: str | None = None, briefly: bool = False) -> Choice:
    """Pick the backend; an explicit wish is served or raises `KernelUnavailableError` with the
    reason. `briefly`: without looking at slower ones than the one that is taken.
    """
    wish, source = backend, "asked for"
    if wish is None:
        wish, source = os.environ.get("ACCELKIT_KERNEL") or "auto", "set by ACCELKIT_KERNEL"
    if wish not in (*BACKENDS, "auto"):
        raise InvalidInputError(
            f"attend: backend {wish!r} ({source}) is unknown, expected one of {BACKENDS}"
        )
    if wish == "auto":
        return _best(launch, briefly)
    refused = cpu.refusal if wish == "torch" else KERNELS.get(wish)
    if refused is not None and (refusal := refused(launch)):
        raise KernelUnavailableError(
            f"attend: backend {wish!r} ({source}) cannot serve this call: {refusal}"
        )
    return Choice(wish, source)


def _best(launch: Launch, briefly: bool) -> Choice:
    """What the device does best."""
    if launch.q.device.type == "cpu":
        refusal = cpu.refusal(launch)
        return (
            Choice("reference", refusal) if refusal else Choice("torch", "tensors are on the CPU")
        )
    if launch.qk != "native":
        if refusal := triton_refusal(launch):
            raise KernelUnavailableError(
                f"attend: no kernel runs qk={launch.qk!r}, pv={launch.pv!r} here: {refusal}"
            )
        return Choice("triton", f"8-bit products on {launch.q.device}")
    known = {name: speeds.speed(name, launch) for name in KERNELS}

    def rank(name: str) -> tuple[float, int]:
        even = EVEN if name in OWN else 1.0
        return (known[name] or 0.0) * even, OWN.index(name) if name in OWN else -1

    best, notes, refusals = None, [], dict[str, str]()
    for name in sorted(KERNELS, key=rank, reverse=True):
        if refusal := KERNELS[name](launch):
            refusals[name] = refusal
        elif best is None:
            best = name
            if briefly:
                break
        elif known[name]:
            notes.append(f"{name} {known[name]:.2f}")
    if best is None:
        _tell(f"attention runs the torch reference, which is slow: {refusals['triton']}")
        return Choice("reference", refusals["triton"])
    about = (
        f"{known[best]:.2f} of dense speed" if known[best] else f"tensors are on {launch.q.device}"
    )
    notes += [f"{name}: {why}" for name, why in refusals.items()]
    return Choice(best, f"{about} ({'; '.join(notes)})" if notes else about)


def triton_refusal(launch: Launch) -> str | None:
    """Why the Triton kernels cannot serve a launch, or None."""
    reason = triton_missing(launch.q.device)
    if reason is None:
        if launch.qk != "native":
            from accelkit.kernels._triton import eight_bit as kernel
        elif launch.index.size[1] == 1:
            from accelkit.kernels._triton import gather as kernel
        else:
            from accelkit.kernels._triton import block_sparse as kernel
        reason = kernel.refusal(launch)
    return reason


def gluon_refusal(launch: Launch) -> str | None:
    """Why the warp-specialised kernel cannot serve a launch, or None."""
    if reason := triton_missing(launch.q.device) or _low_bits(launch):
        return reason
    if launch.index.size[1] == 1:
        from accelkit.kernels._triton import gluon_gather as kernel
    else:
        from accelkit.kernels._triton import gluon_block_sparse as kernel
    return kernel.refusal(launch)


def fa4_refusal(launch: Launch) -> str | None:
    """Why flash-attn-4 cannot serve a launch, or None."""
    from accelkit.kernels._extern import fa4

    return _low_bits(launch) or fa4.refusal(launch)


def _low_bits(launch: Launch) -> str | None:
    return "it has no 8-bit products; backend 'triton' has" if launch.qk != "native" else None


KERNELS: dict[str, Callable[[Launch], str | None]] = {
    "triton": triton_refusal,
    "gluon": gluon_refusal,
    "fa4": fa4_refusal,
}


def triton_missing(device: torch.device) -> str | None:
    """Why Triton cannot run on a device at all, or None. Under TRITON_INTERPRET=1 it runs on the
    CPU, for tests.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or (
        device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    ):
        return None
    return f"it needs a CUDA device and the tensors are on {device}"


def fast_device(t: Tensor) -> bool:
    """Whether small helper operations on this tensor should run as Triton kernels."""
    return (
        t.is_cuda
        and os.environ.get("ACCELKIT_KERNEL", "auto") in ("auto", "", *KERNELS)
        and not triton_missing(t.device)
    )


def _run(launch: Launch, backend: str) -> None:
    if backend == "reference":
        block_sparse.reference(launch)
    elif backend == "torch":
        cpu.attend_listed(launch)
    elif launch.qk != "native":
        from accelkit.kernels._triton.eight_bit import eight_bit

        eight_bit(launch)
    elif launch.index.size[1] == 1:
        if backend == "gluon":
            from accelkit.kernels._triton.gluon_gather import gather
        else:
            from accelkit.kernels._triton.gather import gather
        gather(launch)
    elif backend == "fa4":
        from accelkit.kernels._extern import fa4

        fa4.block_sparse(launch)
    elif backend == "gluon":
        from accelkit.kernels._triton import gluon_block_sparse

        gluon_block_sparse.block_sparse(launch)
    else:
        from accelkit.kernels._triton.block_sparse import block_sparse as kernel

        kernel(launch)


def _shift(launch: Launch) -> None:
    """A bias on the whole piece leaves the output as it is and moves the LSE of the rows just
    written.
    """
    heads = launch.out_heads.long()
    if launch.rows is None:
        launch.lse[:, heads] += launch.bias
        return
    bq = launch.index.size[0]
    rows = (
        (launch.rows[:, None] * bq + torch.arange(bq, device=launch.q.device))
        .flatten()
        .clamp(max=launch.n_q - 1)
    )
    written = torch.zeros(launch.n_q, dtype=torch.float32, device=launch.q.device).index_fill_(
        0, rows, launch.bias
    )
    launch.lse[:, heads] += written


@lru_cache(maxsize=64)
def _tell(message: str) -> None:
    """Say it once for each message."""
    warnings.warn(message, AccelkitWarning, stacklevel=4)
