"""transformers: the attention interface and the mask interface are the only doors used.

Each previous implementation ("sdpa", "eager", …) gets one name of ours, `accelkit-over-<previous>`,
registered in both interfaces, so that dense calls and masks go back to exactly what ran before.
Everything that depends on the plan happens in one function, an operator to `torch.compile`.

Our mask function tells the attention function what it needs through the number of dimensions:
    None: first prefill · 1: no padding, queries at the end of the keys · 2: bool key mask, likewise
    · 4, or a `_Foreign`: any other mask, which only the previous implementation understands.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from accelkit.errors import NothingPatchedError, ParallelNotSupportedError, UnsupportedModelError
from accelkit.kernels.index import equal_groups
from accelkit.patches.adapters import Runner, last_layer
from accelkit.patches.call import AttentionCall, Clock, Geometry, Site
from accelkit.patches.plan import Component, Fingerprint

PHASES = ("prefill",)
"""Phases whose calls are opened to methods; all others run what ran before."""
MOST_MASKED = 1 << 24
"""Entries of a mask at a time where many rows of the last layer are kept: attention without a mask
takes no memory to speak of, and that with one several bytes an entry.
"""
NAME = "accelkit-over-"
ATTRIBUTE = "accelkit_site"
VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
# Arguments of the attention function that change what is computed; accelkit's kernels do not know
# them.
MEANINGFUL = (
    "softcap", "s_aux", "position_bias", "sliding_window", "cache", "head_mask", "cu_seq_lens_q",
)  # fmt: skip


@dataclass(frozen=True)
class _Door:
    """One connected attention module."""

    module: weakref.ref[nn.Module]
    site: Site
    runner: Runner
    previous: Callable[..., Any]
    trim: last_layer.Trim | None = None
    last: bool = False


@dataclass(frozen=True)
class _Foreign:
    """What a previous mask function says about a mask that is none of ours and no tensor of four
    dimensions: nothing at all (packed sequences of varlen kernels), a `BlockMask`, …
    """

    mask: Any


# Doors live as long as the undo of their edits, which belongs to the model.
_DOORS: weakref.WeakValueDictionary[int, _Door] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)


def attention_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Path, module and, where it must stay dense, the reason, of every causal attention module
    in running order.
    """
    classes: set[type] = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            recorded = (part._can_record_outputs or {}).get("attentions")
            many = recorded if isinstance(recorded, list | tuple) else [recorded]
            found = {getattr(r, "target_class", r) for r in many if r is not None}
            classes |= {c for c in found if isinstance(c, type)}
    for path, module in model.named_modules():
        known = type(module) in classes and hasattr(module, "layer_idx")
        if not known or not getattr(module, "is_causal", False):
            continue
        yield path, module, "sliding window" if _slides(module) else None


def _slides(module: nn.Module) -> bool:
    """Whether a layer sees a window only: by itself, by its kind, or as its whole model does."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window is not None
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None:
        return kinds[module.layer_idx] != "full_attention"
    return getattr(module.config, "sliding_window", None) is not None


def sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The sites that may run sparse."""
    found = attention_modules(model)
    return tuple(
        Site(path, order) for order, (path, _, reason) in enumerate(found) if reason is None
    )


def parts(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The model under "", and those inside it, such as the one without a head."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}


def trimmable(model: PreTrainedModel) -> str | None:
    """Path of the attention of the last layer, if that can be trimmed."""
    *_, (path, _, _) = attention_modules(model)
    return None if last_layer.trimmed_layer(model, path) is None else path


def facts(model: PreTrainedModel) -> tuple[Fingerprint, dict[str, int]]:
    """Fingerprint and the query heads of every site."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    plain = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
    # A model that was built from a config has no name there before it is saved.
    plain["architectures"] = [type(model).__name__]
    plain = json.loads(json.dumps(plain, sort_keys=True, default=str))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    fingerprint = Fingerprint(
        class_name=type(model).__name__,
        model_type=model.config.model_type,
        base_id=model.config._name_or_path or None,
        base_revision=getattr(model.config, "_commit_hash", None),
        config_hash=f"sha256:{digest}",
        config=plain,
        components={
            "text": Component(
                layers=config.num_hidden_layers,
                q_heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
            )
        },
    )
    return fingerprint, {path: heads for path, _, _ in attention_modules(model)}


def connect(model: PreTrainedModel, runner: Runner, undo: ExitStack) -> None:
    """Route the model's attention to `runner`; every edit pushes its reverse onto `undo`.

    Raises:
        UnsupportedModelError: the class does not use the attention interface.
        NothingPatchedError: the model has no causal self-attention.
    """
    modules = list(attention_modules(model))
    if not modules:
        raise NothingPatchedError(
            f"{type(model).__name__}: no causal self-attention module found; nothing to patch"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not read its attention function from transformers' "
            "AttentionInterface; use a newer modelling class of this model"
        )
    # The configs of text parts, with what they used before.
    configs = {id(module.config): module.config for _, module, _ in modules}
    for config in configs.values():
        before = config._attn_implementation or "eager"
        _register(before)
        undo.callback(_restore, config, config._attn_implementation)
        config._attn_implementation_internal = _ours(before)
    watch = partial(_passed_by, tuple(configs.values()), tuple(p for p, _, _ in modules), runner)
    undo.callback(model.register_forward_pre_hook(last_layer.Hook(watch)).remove)
    last = modules[-1][0]
    trim = last_layer.connect(model, last, runner, undo) if runner.trims_last else None
    for order, (path, module, reason) in enumerate(modules):
        if hasattr(module, ATTRIBUTE):
            raise RuntimeError(f"{path} is connected already")
        number = next(_NUMBERS)
        site = Site(path, order)
        door = _DOORS[number] = _Door(
            weakref.ref(module),
            site,
            runner,
            _implementation(module),
            trim,
            path == last,
        )
        undo.callback(_forget, number, door)
        if reason is None:
            setattr(module, ATTRIBUTE, number)
            undo.callback(delattr, module, ATTRIBUTE)


def _runs_here(config: Any) -> bool:
    """Whether calls of a model with this config come here."""
    return str(config._attn_implementation).startswith(NAME)


def _restore(config: Any, before: str | None) -> None:
    """What a config said before, unless somebody has said otherwise since."""
    if _runs_here(config):
        config._attn_implementation_internal = before


def _passed_by(
    configs: Sequence[Any], paths: Sequence[str], runner: Runner, model: nn.Module, args: Any
) -> None:
    """Say so where a model's attention was set anew since, so that no call comes here."""
    if torch.compiler.is_compiling():
        return
    if not any(map(_runs_here, configs)):
        for path in paths:
            runner.skipped(path, "the attention implementation was set after patching")


def _forget(number: int, door: _Door) -> None:
    _DOORS.pop(number, None)


def _ours(before: str) -> str:
    """Our name over a previous implementation; transformers refuses names that hold "flash"."""
    return NAME + before.replace("flash", "fl-ash")


def _theirs(name: str) -> str:
    """The previous implementation under one of our names."""
    return name.removeprefix(NAME).replace("fl-ash", "flash")


def _implementation(module: nn.Module) -> Callable[..., Any]:
    """What the module called before: a registered function or the eager one of its own file."""
    before = _theirs(module.config._attn_implementation)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)


def _register(before: str) -> None:
    name = _ours(before)
    if name not in ALL_ATTENTION_FUNCTIONS._global_mapping:
        AttentionInterface.register(name, _forward)
        previous = ALL_MASK_ATTENTION_FUNCTIONS[before]
        AttentionMaskInterface.register(name, partial(_mask, previous))


def _mask(previous: Callable[..., Any], **kwargs: Any) -> Any:
    """Our mask: see the module's docstring for what the dimensions say."""
    q_length, kv_length = kwargs["q_length"], kwargs["kv_length"]
    offset, padding = kwargs.get("q_offset", 0), kwargs.get("attention_mask")
    plain = (
        kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        and kwargs.get("local_size") is None
        and kwargs.get("kv_offset", 0) == 0
        and kwargs.get("allow_is_causal_skip", True)
        and isinstance(offset, int)
        and (padding is None or padding.ndim == 2)
    )
    if q_length == 1:
        return previous(**kwargs)
    if not plain:
        return _foreign(previous(**kwargs))
    if padding is not None and padding.shape[1] > kv_length:
        padding = padding[:, :kv_length]
    if padding is not None and not torch.compiler.is_compiling() and bool(padding.all()):
        padding = None
    if padding is None and offset == 0:
        return None
    if offset + q_length != kv_length:
        return _foreign(previous(**kwargs))
    if padding is None:
        return torch.empty(1, dtype=torch.bool, device=kwargs["device"])
    if padding.shape[1] < kv_length:
        padding = nn.functional.pad(padding, (0, kv_length - padding.shape[1]), value=False)
    return padding.to(torch.bool)


def _foreign(mask: Any) -> Any:
    return mask if isinstance(mask, Tensor) and mask.ndim == 4 else _Foreign(mask)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: the plan's where it may help, otherwise what ran before."""
    number = getattr(module, ATTRIBUTE, None)
    if not torch.compiler.is_compiling() and number not in _DOORS:
        number = None  # a copy of a model that is not patched any more
    reason = _dense_reason(query, key, value, attention_mask, dropout, kwargs)
    if number is not None and not torch.compiler.is_compiling():
        kept = _kept_rows(_DOORS[number], query, key, value, attention_mask, scaling, kwargs)
        if kept is not None:
            return kept, None
    if number is not None and reason is None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        # Outside of graphs an operator would only cost its host.
        attend = torch.ops.accelkit.attention if torch.compiler.is_compiling() else _attend
        return attend(query, key, value, attention_mask, scale, number), None
    if number is not None:
        _skipped(number, reason or "")
    attention_mask = _full_mask(module, query, key, attention_mask)
    previous = _implementation(module)
    return previous(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


def _kept_rows(
    door: _Door,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The last layer's attention for the rows that somebody reads, dense, behind zeros. None: all
    rows are needed, or the call is none that rows can be cut from.
    """
    rows = query.shape[2]
    first = 0 if door.trim is None or not door.last else door.trim.left_out(rows)
    module = door.module()
    if not first or module is None:
        return None
    before = key.shape[2] - rows
    full = isinstance(mask, Tensor) and mask.ndim == 4
    if _dense_reason(query, key, value, None if full else mask, 0.0, kwargs) is not None:
        return None
    if mask is None:
        # An empty static cache is longer than the prompt; the kept rows are at the prompt's end.
        key, value, before = key[:, :, :rows], value[:, :, :rows], 0
        mask = torch.empty(1, dtype=torch.bool, device=query.device)
    visible, left_out = (n * before + n * (n + 1) / 2 for n in (rows, first))
    door.runner.trimmed(door.site.path, left_out / visible)
    step = max(1, MOST_MASKED // (query.shape[0] * key.shape[2]))
    parts = []
    for start in range(first, rows, step):
        stop = min(start + step, rows)
        some, end = query[:, :, start:stop], before + stop  # keys up to the last of these rows
        k, v = key[:, :, :end], value[:, :, :end]
        own = _full_mask(module, some, k, _mask_of(mask, rows, start, stop, end))
        out, _ = door.previous(module, some, k, v, own, scaling=scaling, dropout=0.0, **kwargs)
        parts.append(out)
    return nn.functional.pad(torch.cat(parts, 1), (0, 0, 0, 0, first, 0))


def _mask_of(mask: Tensor, rows: int, start: int, stop: int, end: int) -> Tensor:
    """The mask of some of `rows` rows over the keys before `end`."""
    if mask.ndim == 4:
        mask = mask[:, :, start:stop] if mask.shape[2] == rows else mask
    return mask[..., :end] if mask.ndim in (2, 4) else mask


@torch.compiler.assume_constant_result
def _skipped(number: int, reason: str) -> bool:
    """Count a dense call; in compiled code once, while it is traced."""
    door = _DOORS[number]
    door.runner.skipped(door.site.path, reason)
    return True


def _dense_reason(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why a call cannot be served, as far as shapes and arguments tell."""
    if query.shape[2] == 1:
        return "decode"
    if isinstance(mask, _Foreign) or (mask is not None and mask.ndim == 4):
        return "attention mask other than causal"
    if dropout:
        return "dropout"
    for name in MEANINGFUL:
        if kwargs.get(name) is not None:
            return name.replace("_", " ")
    if kwargs.get("is_causal") is False:
        return "not causal"
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    if torch.is_grad_enabled() and wanted:
        return "gradients are enabled"
    return None


def _full_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> Any:
    """The mask that the previous implementation would have been given for this call."""
    if isinstance(mask, _Foreign):
        return mask.mask
    if mask is not None and not isinstance(mask, Tensor):  # one step of decoding
        return mask
    if query.shape[2] == 1 if mask is None else mask.ndim == 4:
        return mask
    config = module.config
    previous = ALL_MASK_ATTENTION_FUNCTIONS[_theirs(config._attn_implementation)]
    return previous(
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=key.shape[2],
        # A static cache has room behind a first prompt.
        q_offset=0 if mask is None else key.shape[2] - query.shape[2],
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=mask if mask is not None and mask.ndim == 2 else None,
        allow_is_causal_skip=True,
        dtype=query.dtype,
        config=config,
        use_vmap=False,
        device=query.device,
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, number: int
) -> Tensor:
    """One attention call of a connected module: `[B, Nq, Hq, Dv]` from q `[B, Hq, Nq, D]` and
    unexpanded k, v.
    """
    door = _DOORS[number]
    n_q, heads = query.shape[2], query.shape[1]
    full_key, full_value = key, value
    if mask is None:
        # An empty static cache is longer than the prompt; only its first keys are real.
        key, value = key[:, :, :n_q], value[:, :, :n_q]
    module = door.module()
    assert module is not None
    expected = module.config.num_attention_heads
    if heads != expected:
        raise ParallelNotSupportedError(
            f"{door.site.path}: {heads} query heads here, {expected} in the config; tensor "
            "parallel execution is not supported, load the model on one device or with device_map"
        )
    q_start = 0 if mask is None else key.shape[2] - n_q
    call = AttentionCall(
        q=query,
        k=key,
        v=value,
        scale=scale,
        causal=True,
        q_start=q_start,
        key_mask=mask if mask is not None and mask.ndim == 2 else None,
        heads=tuple(range(heads)),
        kv_heads=equal_groups(heads, key.shape[1]),
        site=door.site,
        clock=Clock("prefill"),
        geometry=Geometry(),
        asked=0 if door.trim is None else door.trim.asked_of(n_q),
    )
    out = door.runner.run(call)
    if out is not None:
        return out
    mask = _full_mask(module, query, full_key, mask)
    out, _ = door.previous(module, query, full_key, full_value, mask, scaling=scale, dropout=0.0)
    return out


# What runs is decided anew in every call; a replayed CUDA graph would repeat the first decision.
@torch.library.custom_op(
    "accelkit::attention",
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),
    schema=torch.library.infer_schema(_attend, mutates_args=()),
)
def _attention(*given: Any) -> Tensor:
    """`_attend` as an operator, which may not hand out its inputs' memory."""
    return _attend(*given).contiguous()


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
