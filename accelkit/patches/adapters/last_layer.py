"""The last decoder layer, only for the rows whose logits are asked for.

Nobody reads what the last layer makes of other rows: the norm and the head behind it work row by
row. Of those rows only keys and values are needed, for the cache. So in a call with
`logits_to_keep` (`generate` asks for the last row) the layer's queries, attention, output
projection and feed-forward network are computed for the rows from the first kept one on, and the
rows before it pass the layer by: they keep the layer's input. Exact, up to the order of sums.

Each part is trimmed by itself and puts zeros where rows were left out, so shapes stay as they were
and any subset of the parts may be trimmed. In compiled code nothing is.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from accelkit.patches.adapters import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_PARTS = ("q_proj", "o_proj")
"""Children of an attention module that work row by row and whose output nobody but the row reads.
Keys and values are not among them."""
LAYER_PARTS = ("mlp",)
"""The same of a decoder layer."""
MOST = 8
"""Trimming needs fewer kept rows than one in this many: others run what the plan says."""
TELLING = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Options that show the rows of the last layer to the caller."""


class Trim(threading.local):
    """How many rows at the end of the prompt the running forward of one model keeps.

    `due` is what the model with its head was asked for, `asked` the same in the forward under way
    in its base model, `rows` as far as the last layer is trimmed to them and `total` all rows; 0:
    every row. A forward that is broken off leaves them behind, the next one starts anew, also
    without the head.
    """

    due: int = 0
    asked: int = 0
    rows: int = 0
    total: int = 0
    open: nn.Module | None = None
    """The part that runs on the kept rows right now."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def note(self, model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the model with its head: note the rows whose logits are asked for."""
        if not torch.compiler.is_compiling():
            self.due = 0 if args[1:] else kept_rows(model, _prompt(args, kwargs), kwargs)

    def begin(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the base model: what was asked for holds for this forward."""
        if torch.compiler.is_compiling():
            return
        prompt = _prompt(args, kwargs)
        self.asked = self.rows = self.due
        self.due, self.open = 0, None
        self.total = 0 if prompt is None else prompt.shape[1]
        if not 0 < MOST * self.rows < self.total:
            self.rows = 0
            return
        past = kwargs.get("past_key_values")
        seen = 0 if past is None else int(past.get_seq_length())
        if not self.runner.trims(seen + self.total):
            self.rows = 0

    def end(self, module: nn.Module, args: Any, out: Any) -> None:
        """Hook of both: what was asked for is done."""
        if not torch.compiler.is_compiling():
            self.asked = self.rows = self.due = 0

    def asked_of(self, rows: int) -> int:
        """Rows of a call over `rows` rows from the first one whose logits are asked for to the end;
        0: all of them, or nobody knows.
        """
        return min(self.asked, rows) if rows == self.total else 0

    def left_out(self, rows: int) -> int:
        """How many rows at the beginning of `rows` the layer leaves out."""
        if torch.compiler.is_compiling() or not self.rows or rows != self.total:
            return 0
        return rows - self.rows

    def cut(self, part: nn.Module, args: Any) -> Any:
        """Pre-hook of a part: only the kept rows of `[B, N, C]`."""
        alone = len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim == 3
        first = self.left_out(args[0].shape[1]) if alone else 0
        if not first:
            return None
        self.open = part
        return (args[0][:, first:].contiguous(),)  # as the layer would hand them over

    def put(self, part: nn.Module, args: Any, out: Any) -> Any:
        """Hook of a part: its rows behind zeros."""
        if torch.compiler.is_compiling() or self.open is not part:
            return None
        self.open, first = None, self.total - self.rows
        if isinstance(out, tuple):
            return (pad(out[0], (0, 0, first, 0)), *out[1:])
        return pad(out, (0, 0, first, 0))


class Hook:
    """A function as a hook; a copied or pickled module keeps one that does nothing."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    return None


def trimmed_layer(model: PreTrainedModel, path: str) -> tuple[nn.Module, nn.Module] | None:
    """Base model and last decoder layer, `path` being its attention. None: the model's head does
    not sit right on such a layer, or cannot be told which rows are asked for.
    """
    prefix = model.base_model_prefix
    around = path.rpartition(".")[0]  # model.layers.7
    layers = around.rpartition(".")[0]
    asks = "logits_to_keep" in inspect.signature(model.forward).parameters
    if not asks or not prefix or layers.rpartition(".")[0] != prefix:
        return None
    layer = model.get_submodule(around)
    *_, last = model.get_submodule(layers).children()
    return (model.get_submodule(prefix), layer) if layer is last else None


def connect(model: PreTrainedModel, path: str, runner: Runner, undo: ExitStack) -> Trim | None:
    """Set the hooks that trim the last layer, whose attention is at `path`; every hook pushes its
    removal onto `undo`. None, and no hook: the model cannot be trimmed.
    """
    found = trimmed_layer(model, path)
    if found is None:
        return None
    base, layer = found
    trim, attention = Trim(runner), model.get_submodule(path)
    parts = [getattr(attention, name, None) for name in ATTENTION_PARTS]
    parts += [getattr(layer, name, None) for name in LAYER_PARTS]

    def keep(handle: Any) -> None:
        undo.callback(handle.remove)

    keep(model.register_forward_pre_hook(Hook(trim.note), with_kwargs=True))
    keep(base.register_forward_pre_hook(Hook(trim.begin), with_kwargs=True))
    keep(base.register_forward_hook(Hook(trim.end)))
    keep(model.register_forward_hook(Hook(trim.end)))
    for part in parts:
        if isinstance(part, nn.Module):
            keep(part.register_forward_pre_hook(Hook(trim.cut)))
            keep(part.register_forward_hook(Hook(trim.put)))
    return trim


def kept_rows(model: PreTrainedModel, prompt: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Rows from the first one whose logits are asked for to the end; 0: all of them."""
    keep = kwargs.get("logits_to_keep", 0)
    shown = any(kwargs.get(k) or getattr(model.config, k, False) for k in TELLING)
    if prompt is None or shown or model.training or kwargs.get("labels") is not None:
        return 0
    if isinstance(keep, int):
        return max(keep, 0)
    whole = isinstance(keep, Tensor) and keep.numel() and not keep.dtype.is_floating_point
    if not whole or keep.dtype == torch.bool or int(keep.min()) < 0:
        return 0
    return max(prompt.shape[1] - int(keep.min()), 0)


def _prompt(args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    found = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if found is None else found
