"""One router over `scaled_dot_product_attention`, for libraries that end there whatever they do
before.

Hooks on the attention modules open and close a site; without an open one the call goes on as it
would have. In a graph that is being compiled, everything that depends on the plan happens inside
one custom op, which is opaque to `torch.compile`: hooks, router and op are the same objects for all
sites, and what differs between sites reaches the op as tensors of equal shape, so repeated blocks
share one graph. Otherwise the router calls the same function itself.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.errors import ParallelNotSupportedError
from accelkit.kernels.index import equal_groups
from accelkit.patches.adapters import Runner
from accelkit.patches.adapters.clock import DenoiseClock
from accelkit.patches.adapters.geometry import Family, Layout, Root, geometry
from accelkit.patches.call import AttentionCall, Site

ATTRIBUTE = "accelkit_site"
ROOT = "accelkit_root"
WIDEST = 256
"""Channels of the widest head that a kernel takes."""


@dataclass
class _Open:
    """The number of an open site, what its denoiser was given, and how many calls there were."""

    site: Tensor | None = None
    root: Root | None = None
    calls: int = 0


class _Here(threading.local):
    """What is open in this thread. An object of its own: what compiled code writes on a
    `threading.local` itself is lost.
    """

    def __init__(self) -> None:
        self.now = _Open()


@dataclass
class Connection:
    """One connected pipeline or denoiser and what its running forward has in common."""

    runner: Runner
    clock: DenoiseClock
    component: str = ""
    last: tuple[int, int] = (-1, -1)
    layout: Layout = (0, 0, 0, 0)
    layouts: dict[Hashable, tuple[Sequence[Tensor], Layout]] = field(default_factory=dict)
    real: dict[Hashable, int | None] = field(default_factory=dict)

    def arrive(
        self, door: Door, ordinal: int, tensors: Sequence[Tensor], told: Sequence[int]
    ) -> None:
        """A call at `door`; a forward begins where the running order falls or another denoiser
        takes over.
        """
        place = (door.site.order, ordinal)
        if place <= self.last or door.site.component != self.component:
            self.clock.forward(tensors[1])
            self.layout = self._layout(door, tensors, told)
            self.real.clear()
        self.component, self.last = door.site.component, place

    def _layout(self, door: Door, tensors: Sequence[Tensor], told: Sequence[int]) -> Layout:
        """The layout of a forward; ids are read from the device once for each tensor of them."""
        ids = tensors[2:]
        key = (door.family, tensors[0].shape, *told, *(t.data_ptr() for t in ids))
        if key not in self.layouts:
            if len(self.layouts) == 16:
                self.layouts.clear()
            # The tensors are kept so that no other one comes to lie where they lie.
            self.layouts[key] = (ids, door.family.layout(tensors, told, door.patch))
        return self.layouts[key][1]

    def real_keys(self, mask: Tensor) -> int | None:
        """How many keys a padding mask `[B, N]` leaves, if they come first in every sequence.

        It is read once a forward: all sites of the known families have the same padding then, even
        where each makes its mask anew.
        """
        if mask.shape not in self.real:
            n = int(mask[0].sum())
            first = torch.arange(mask.shape[1], device=mask.device) < n
            self.real[mask.shape] = n if bool((mask == first).all()) else None
        return self.real[mask.shape]


@dataclass(frozen=True)
class Door:
    """One connected attention module; `reason` says why it stays dense, `missed` why a forward of
    it came and went without a call (None: for a reason that is none of ours).
    """

    site: Site
    heads: int
    family: Family
    patch: tuple[int, int, int]
    to: Connection
    missed: Callable[[nn.Module], str | None]
    reason: str | None = None


_HERE = _Here()
# Doors live as long as the undo of their edits, which belongs to the model.
_DOORS: weakref.WeakValueDictionary[int, Door] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)
_ORIGINAL: Callable[..., Tensor] = nn.functional.scaled_dot_product_attention
_USERS = 0


def connect(module: nn.Module, door: Door, root: Root, undo: ExitStack) -> None:
    """Open `door` around every forward of `module`."""
    number = next(_NUMBERS)
    _DOORS[number] = door
    undo.callback(_forget, number, door)
    # An attribute and no buffer: it stays on the CPU wherever the module's weights go.
    setattr(module, ATTRIBUTE, torch.tensor(number))
    undo.callback(delattr, module, ATTRIBUTE)
    setattr(module, ROOT, root)
    undo.callback(delattr, module, ROOT)
    undo.callback(module.register_forward_pre_hook(_open).remove)
    undo.callback(module.register_forward_hook(_close).remove)


def _forget(number: int, door: Door) -> None:
    _DOORS.pop(number, None)
    here = _HERE.now
    if here.site is not None and int(here.site) == number:
        here.site = None  # an interrupt left it open


def route(link: Connection, undo: ExitStack) -> None:
    """Let the router stand in for the function until `undo`, or until `link` is gone with its
    model.
    """
    global _ORIGINAL, _USERS
    if _USERS == 0:
        _ORIGINAL = nn.functional.scaled_dot_product_attention
        nn.functional.scaled_dot_product_attention = _router
    _USERS += 1
    gone = weakref.finalize(link, _unroute)
    gone.atexit = False
    undo.callback(gone)


def _unroute() -> None:
    global _USERS
    _USERS -= 1
    # Whoever replaced the function after us keeps it; the router then only passes calls on.
    if _USERS == 0 and nn.functional.scaled_dot_product_attention is _router:
        nn.functional.scaled_dot_product_attention = _ORIGINAL


def follow(root: nn.Module, given: Root, undo: ExitStack) -> None:
    """Keep what every forward of a denoiser is given."""
    setattr(root, ROOT, given)
    undo.callback(delattr, root, ROOT)
    undo.callback(root.register_forward_pre_hook(_enter, with_kwargs=True).remove)
    # Even after an exception, so that no later call of another model finds a site open.
    undo.callback(root.register_forward_hook(_leave, always_call=True).remove)
    # What `nn.Module.__call__` calls; bound, so that a deep copy gets its own.
    root._call_impl = MethodType(_whole, root)  # type: ignore[method-assign]
    undo.callback(delattr, root, "_call_impl")


def _whole(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A forward of a denoiser that closes the site whatever ends it. Ctrl-C is no `Exception`, and
    torch then skips even the hooks that it always calls.
    """
    try:
        return nn.Module._call_impl(root, *args, **kwargs)
    except BaseException:
        _HERE.now.site = None
        raise


def _enter(root: nn.Module, args: Any, kwargs: Any) -> None:
    getattr(root, ROOT).receive(args, kwargs)


def _leave(root: nn.Module, args: Any, output: Any) -> None:
    _HERE.now.site = None
    getattr(root, ROOT).forget()


def _open(module: nn.Module, args: Any) -> None:
    here = _HERE.now
    here.site, here.root, here.calls = getattr(module, ATTRIBUTE), getattr(module, ROOT), 0


def _close(module: nn.Module, args: Any, output: Any) -> None:
    here = _HERE.now
    if here.calls == 0 and not torch.compiler.is_compiling():
        door = _DOORS.get(int(getattr(module, ATTRIBUTE)))  # copies outlive the handle
        if door is not None and (reason := door.missed(module)) is not None:
            door.to.runner.skipped(door.site.path, reason)
    here.site = None


def _router(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    here = _HERE.now
    site, root = here.site, here.root
    if site is not None and root is not None and root.tensors:
        ordinal = here.calls
        here.calls = ordinal + 1
        reason = _dense_reason(query, key, value, dropout_p, is_causal)
        if reason is None:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            given = (query, key, value, attn_mask, scale, site, root.tensors, root.told, ordinal)
            if torch.compiler.is_compiling():
                return torch.ops.accelkit.sdpa(*given).transpose(1, 2)
            return _attend(*given)
        if not torch.compiler.is_compiling() and (door := _DOORS.get(int(site))) is not None:
            door.to.runner.skipped(door.site.path, reason)
    return _ORIGINAL(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _dense_reason(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool
) -> str | None:
    """Why a call cannot be served, as far as arguments tell."""
    if query.shape[-1] > WIDEST:
        return f"heads of more than {WIDEST} channels"
    if dropout:
        return "dropout"
    if is_causal:
        return "causal attention"
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    if torch.is_grad_enabled() and wanted:
        return "gradients are enabled"
    return None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    site: Tensor,
    tensors: Sequence[Tensor],
    told: Sequence[int],
    ordinal: int,
) -> Tensor:
    """One attention call of an open site: `[B, Hq, Nq, Dv]` from q `[B, Hq, Nq, D]` and k, v
    `[B, Hkv, Nk, D]`, dense as before where the plan says nothing.
    """
    door = _DOORS.get(int(site))
    if door is None:  # a copy of a model that is not patched any more
        return _dense(query, key, value, mask, scale)
    door.to.arrive(door, ordinal, tensors, told)
    heads, n_q = query.shape[1], query.shape[2]
    if heads != door.heads:
        raise ParallelNotSupportedError(
            f"{door.site.path}: {heads} query heads here, {door.heads} in the model; context and "
            "tensor parallel execution are not supported, run the denoiser on one device"
        )
    if mask is not None and not _pads(mask, query, key):
        door.to.runner.skipped(door.site.path, "attention mask other than padding")
        return _dense(query, key, value, mask, scale)
    key_mask, real = None, n_q
    cut = query, key, value
    if mask is not None:
        key_mask = mask[:, 0, 0].expand(query.shape[0], -1)
        first = door.to.real_keys(key_mask)
        if first is not None:
            # Padding at the end: neither these keys nor the queries beside them mean anything.
            key_mask, real = None, first
            cut = query[:, :, :real], key[:, :, :real], value[:, :, :real]
    out = None
    if door.reason is not None:
        door.to.runner.skipped(door.site.path, door.reason)
    else:
        out = door.to.runner.run(_call(door, *cut, key_mask, scale, ordinal))
    if out is not None:
        out = out.transpose(1, 2)
    elif door.family.square:
        out = _dense(*cut, mask if key_mask is not None else None, scale)
    else:
        return _dense(query, key, value, mask, scale)
    return nn.functional.pad(out, (0, 0, 0, n_q - real)) if real < n_q else out


# What runs is decided anew in every call; a replayed CUDA graph would repeat the first decision.
@torch.library.custom_op(
    "accelkit::sdpa",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
    schema=torch.library.infer_schema(_attend, mutates_args=()),
)
def _sdpa(*given: Any) -> Tensor:
    """`_attend` as an operator, with its output laid out `[B, Nq, Hq, Dv]`."""
    return _attend(*given).transpose(1, 2).contiguous()


@_sdpa.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _call(
    door: Door,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    ordinal: int,
) -> AttentionCall:
    heads = query.shape[1]
    return AttentionCall(
        q=query,
        k=key,
        v=value,
        scale=scale,
        causal=False,
        q_start=0,
        key_mask=key_mask,
        heads=tuple(range(heads)),
        kv_heads=equal_groups(heads, key.shape[1]),
        site=door.site,
        clock=door.to.clock.now(),
        geometry=geometry(door.family, door.to.layout, key.shape[2]),
        ordinal=ordinal,
    )


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What ran before, `[B, Hq, Nq, Dv]`."""
    gqa = query.shape[1] != key.shape[1]
    return _ORIGINAL(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _pads(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask only hides keys, the same for every head and query of a sequence."""
    return (
        mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[1:] == (1, 1, key.shape[2])
        and query.shape[2] == key.shape[2]
    )
