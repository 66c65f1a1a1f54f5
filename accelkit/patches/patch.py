"""`patch(model, plan)`: every edit is made together with its undo, and undone bit for bit."""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from accelkit.errors import (
    AlreadyPatchedError,
    DenseFallbackWarning,
    InvalidInputError,
    NothingPatchedError,
    PlanMismatchError,
    PlanTransferWarning,
    UnsupportedConfigurationError,
)
from accelkit.patches.adapters import adapter_for, facts, parts, sites
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import UNSERVED, BlockMethod, Method, kind_of, names
from accelkit.patches.plan import LayerPlan, Plan, Policy, Rule
from accelkit.patches.plan_check import NO_SITE
from accelkit.patches.plan_file import FILE
from accelkit.patches.sites.attention import attend
from accelkit.patches.state import PatchState, SiteCount

log = logging.getLogger("accelkit")
HANDLE = "accelkit_handle"
"""Where a patched model keeps its handle, so that both go when nobody needs the model any more."""
TRIMMED = "kept rows only"
"""Reason of dense calls of a trimmed last layer."""
ANY_ROW = "every row may be asked for"
"""Reason of dense calls of a plan for calls that ask for the last rows."""
LAST_ROWS = "dense last rows only"
"""Reason of dense calls so short that no other rows are there."""
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_EXPECTED = ("decode", "no policy")
"""Reasons for dense calls that nobody needs to be warned about."""


@dataclass(frozen=True)
class Report:
    """What a patched model did: calls, sparse calls, reasons for dense ones and densities by
    site.
    """

    sites: dict[str, SiteCount]

    @property
    def calls(self) -> int:
        return sum(s.calls for s in self.sites.values())

    @property
    def sparse_calls(self) -> int:
        return sum(s.sparse for s in self.sites.values())

    @property
    def trimmed_calls(self) -> int:
        """Dense calls of the last layer for the rows alone whose logits were asked for."""
        return self.dense.get(TRIMMED, 0)

    @property
    def dense(self) -> dict[str, int]:
        """Dense calls by reason."""
        total: dict[str, int] = {}
        for site in self.sites.values():
            for reason, n in site.dense.items():
                total[reason] = total.get(reason, 0) + n
        return total

    @property
    def density(self) -> float | None:
        """Mean computed ÷ visible pairs over all sites and heads, dense sites counted as 1, a
        trimmed last layer as what it computed; None if not measured.
        """
        measured = [(s.density, s) for s in self.sites.values() if s.density is not None]
        if not measured:
            return None
        dense = sum(n for s in self.sites.values() for r, n in s.dense.items() if r != "decode")
        sparse = sum(s.sparse for _, s in measured)
        computed = sum(d * s.sparse for d, s in measured if d is not None) + dense
        return (computed - sum(s.left_out for s in self.sites.values())) / (sparse + dense)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "calls": self.calls,
            "sparse_calls": self.sparse_calls,
            "dense": self.dense,
            "density": self.density,
            "sites": {
                path: {
                    "calls": s.calls,
                    "sparse": s.sparse,
                    "dense": dict(s.dense),
                    "density": s.density,
                }
                for path, s in self.sites.items()
            },
        }


class PatchHandle:
    """A patched model's plan, memory and way back. Also a context manager."""

    def __init__(self, plan: Plan, model: Any) -> None:
        self.plan = plan
        self._model = weakref.ref(model)
        self.state = PatchState(plan)
        self.phases = frozenset(r.phase for s in plan.sites.values() for r in s.rules)
        self.enabled = os.environ.get("ACCELKIT_DISABLE", "0") in ("", "0")
        self._undo = ExitStack()
        self._rewired = ExitStack()
        self._warned: set[str] = set()

    def run(self, call: AttentionCall) -> Tensor | None:
        """One call of the model's attention, `[B, Nq, Hq, Dv]`; None: dense, counted with its
        reason.
        """
        state, path = self.state, call.site.path
        if not self.enabled:
            return self._dense(path, "disabled")
        place = (call.site.order, call.ordinal)
        if place <= state.last_place:
            # An empty cache begins a language model's generation; diffusion says so by `begin`.
            first = call.clock.phase != "denoise" and call.q_start == 0
            state.begin_generation() if first else state.begin_forward()
        state.last_place = place
        groups = self.plan.groups(path, call.n_k, call.clock)
        if not groups:
            short = call.n_k < self.plan.limits.min_length
            return self._dense(path, "shorter than the minimum length" if short else "no policy")
        body = call.n_q - self._dense_tail(call)
        if body <= 0:
            return self._dense(path, LAST_ROWS if call.asked else self._any_row())
        self._compare(call)
        memory = state.memory.setdefault((path, call.ordinal, call.clock.branch), {})
        call = replace(call, memory=memory, tables=state.tables_of(path, call.q.device))
        out = call.q.new_empty(call.q.shape[0], call.n_q, call.q.shape[1], call.v.shape[3])
        if not attend(call, groups, state, out.transpose(1, 2), body):
            return self._dense(path, "every head chose dense")
        state.count(path)
        return out

    def _dense_tail(self, call: AttentionCall) -> int:
        """Last rows of a call that run dense whatever the rules say."""
        rows = self.plan.dense_rows
        return (max(rows, call.asked) if call.asked else call.n_q) if rows else 0

    def _any_row(self) -> str:
        """Warn that a call is none that the plan was made for, and say why it is dense."""
        message = (
            f"attention runs dense: {ANY_ROW} (no logits_to_keep, a model without its head, "
            "compiled code), and the plan holds its budget for the last rows; calibrate with "
            "every_row for such calls"
        )
        self._warn(ANY_ROW, message, DenseFallbackWarning)
        return ANY_ROW

    def _dense(self, site: str, reason: str) -> None:
        self.state.count(site, reason)

    @property
    def trims_last(self) -> bool:
        """Whether the plan trims the last layer."""
        return self.plan.trim_last_layer

    def trims(self, tokens: int) -> bool:
        """Whether it does so in a forward over `tokens` tokens."""
        return self.trims_last and self.enabled and tokens >= self.plan.limits.min_length

    def trimmed(self, site: str, left_out: float) -> None:
        """The adapter left out `left_out` of a call's visible pairs and ran the rest dense."""
        self.state.count(site, TRIMMED, left_out)

    def skipped(self, site: str, reason: str) -> None:
        """The adapter ran `site` dense by itself."""
        self.state.count(site, reason)
        if reason not in _EXPECTED or reason in self.phases:
            self._warn(reason, f"attention runs dense: {reason}", DenseFallbackWarning)

    def _compare(self, call: AttentionCall) -> None:
        """Warn, once a kind, where a call lies outside what the plan was measured on."""
        limits, grid, clock = self.plan.limits, call.geometry.grid, call.clock
        if limits.max_length is not None and call.n_k > limits.max_length:
            self._warn(
                "length", f"{call.n_k} tokens: the plan was calibrated up to {limits.max_length}"
            )
        if limits.grid is not None and grid not in (None, limits.grid):
            self._warn(
                "grid",
                f"tokens lie {grid} (frames, rows, columns), the plan was calibrated at "
                f"{limits.grid}; its lists are made for this grid, its quality was not measured "
                "here",
            )
        if clock.phase == "denoise" and 1 < clock.total < (limits.steps or 0):
            self._warn(
                "steps",
                f"{clock.total} steps, the plan was calibrated with {limits.steps}; its rules go "
                "by the share of the steps done",
            )

    def _warn(self, kind: str, message: str, category: type[Warning] = PlanTransferWarning) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, category, stacklevel=3)

    def rewire(self) -> None:
        """Apply the plan's structural changes to the model's blocks."""
        whole = parts(self._model())
        with ExitStack() as undo:
            for path, layer in self.plan.sites.items():
                if layer.block is not None:
                    layer.block.rewire(whole[path], undo)
            self._rewired = undo.pop_all()

    @property
    def installed(self) -> bool:
        """Whether the model still runs the plan."""
        model = self._model()
        return model is not None and vars(model).get(HANDLE) is self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Dense while open; the patch stays installed."""
        before, self.enabled = self.enabled, False
        self._rewired.close()
        try:
            yield
        finally:
            self.enabled = before
            if before and self.installed:
                self.rewire()

    def reset(self) -> None:
        """Forget the current generation."""
        self.state.begin_generation()

    def remove(self) -> None:
        """The model is bit for bit what it was; safe to call twice."""
        self._rewired.close()
        self._undo.close()
        self.state.begin_generation()

    @contextmanager
    def measuring(self) -> Iterator[PatchHandle]:
        """Record densities while open; costs a device read per call, so it is off otherwise."""
        self.state.measure_density = True
        try:
            yield self
        finally:
            self.state.measure_density = False

    def report(self) -> Report:
        """Counts and measured densities since patching or `reset_report`, as they are now."""
        return Report(deepcopy(self.state.counts))

    def reset_report(self) -> None:
        """Start counting anew."""
        self.state.counts.clear()

    def __enter__(self) -> PatchHandle:
        if not self.installed:
            raise InvalidInputError("this handle was removed; patch the model again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __reduce__(self) -> Any:
        return type(None), ()  # it stays behind when a model is copied or pickled


def patch(
    model: Any,
    plan: Plan | str | os.PathLike[str] | Method | Sequence[Method] | Policy,
    *,
    strict: bool = True,
) -> PatchHandle:
    """Make `model` run `plan`, in place, and return the handle that undoes it.

    `model` is a language model of transformers, or a pipeline or denoiser of diffusers. A file,
    folder or hub id is read with `Plan.from_pretrained`. A bare method, or several that answer
    different questions, is a plan with one row for every head. With `strict=False` differences of
    model class only warn.

    Raises:
        AlreadyPatchedError: the model carries another plan (an equal one is a no-op).
        PlanMismatchError: the plan does not fit; the message lists the first five problems.
        PlanError: no plan there, or one that cannot be read.
        NothingPatchedError: no site of the plan is in the model.
        UnsupportedModelError: no adapter knows the model.
        InvalidInputError: a compiled model, or something that is neither plan nor method.

    Example:
    >>> with accelkit.patch(model, accelkit.method("flex_prefill")(coverage=0.9)):
    ...     model.generate(**inputs)
    """
    adapter, bare = adapter_for(model)
    if isinstance(plan, os.PathLike) or (isinstance(plan, str) and plan not in names()):
        plan = Plan.from_pretrained(plan)
    elif not isinstance(plan, Plan):
        plan = plan_of(model, plan)
    if present := _handles(model):
        # A part that was patched by itself has nobody to tell it of the whole.
        if vars(bare).get(HANDLE) is not None and present[0].plan == plan:
            log.info("the model runs this plan already")
            return present[0]
        raise AlreadyPatchedError(
            f"{type(bare).__name__} already runs a plan with {len(present[0].plan.policies)} "
            "policies; call its handle's remove() or accelkit.unpatch(model) first"
        )
    _refuse_misfits(plan, model, strict)
    if not any(layer.rules or layer.block for layer in plan.sites.values()):
        log.info("the plan is dense everywhere")
    handle = PatchHandle(plan, bare)
    with ExitStack() as undo:
        adapter.connect(bare, handle, undo)
        if handle.enabled:
            handle.rewire()
        for part in parts(bare).values():
            vars(part)[HANDLE] = handle
            undo.callback(vars(part).pop, HANDLE, None)
        handle._undo = undo.pop_all()
    return handle


def unpatch(model: Any) -> None:
    """Undo `patch` as a whole. `model` may be what was patched, a part of it (`pipe.transformer`)
    or what it is a part of; one that is not patched is left alone.
    """
    for handle in _handles(model):
        handle.remove()


def handle_of(model: Any) -> PatchHandle | None:
    """The handle of a patched model."""
    return next(iter(_handles(model)), None)


def _handles(model: Any) -> list[PatchHandle]:
    """The handles of a model and its parts, each once, its own first."""
    found = (vars(part).get(HANDLE) for part in parts(model).values())
    return list(dict.fromkeys(handle for handle in found if handle is not None))


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Dense for this block; the patch stays installed.

    Raises:
        InvalidInputError: the model is not patched.
    """
    handles = _handles(model)
    if not handles:
        raise InvalidInputError("the model is not patched; nothing to disable")
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle.paused())
        yield


def plan_of(model: Any, what: str | Method | Sequence[Method] | Policy) -> Plan:
    """A plan that runs the same methods in every head of every site, from the first token on; a
    block method among them changes every denoiser.
    """
    methods: tuple[Any, ...]
    if isinstance(what, Policy):
        policy, methods, block = what, what.methods, None
    else:
        alone = isinstance(what, str) or not isinstance(what, Sequence)
        methods = (what,) if alone else tuple(what)
        if not methods:
            raise InvalidInputError("no method: give a plan, or at least one method")
        for method in methods:
            _refuse_idle(method)
        blocks = [m for m in methods if isinstance(m, BlockMethod)]
        if len(blocks) > 1:
            kinds = " and ".join(m.kind for m in blocks)
            raise InvalidInputError(f"{kinds} both change the denoiser; a plan takes one of them")
        block = next(iter(blocks), None)
        policy = Policy(methods=tuple(m for m in methods if m is not block))
    fingerprint, heads = facts(model)
    places = sites(model)
    if not places:
        why = f"none of its {len(heads)} attention modules sees the whole prompt (sliding windows)"
        raise NothingPatchedError(
            f"{fingerprint.class_name}: {why if heads else 'no attention module found'}; there is "
            "nothing to make sparse"
        )
    # A method may serve phases that the model's adapter does not open; those stay dense.
    served = set(adapter_for(model)[0].PHASES)
    phases = served.intersection(*(m.phases for m in methods))
    if not phases:
        kinds = ", ".join(m.kind for m in methods)
        raise InvalidInputError(
            f"{kinds}: no common phase among those that can be patched here ({', '.join(served)})"
        )
    apart = {} if block is None else block.branches(policy.methods)
    policies = (policy, *(Policy(methods=tuple(methods)) for methods in apart.values()))
    branches = (*enumerate(apart, 1), (0, None))
    layers = {
        site.path: LayerPlan(
            rules=tuple(
                Rule(phase=p, branch=branch, policies=(row,) * heads[site.path])
                for p in sorted(phases)
                for row, branch in branches
            )
        )
        for site in places
    }
    if block is not None:
        layers |= {root: LayerPlan(block=block) for root in fingerprint.components}
    return Plan(fingerprint=fingerprint, policies=policies, sites=layers)


def _refuse_idle(method: Any) -> None:
    if isinstance(method, type) and issubclass(method, Method):
        method = kind_of(method)
    if isinstance(method, str) and method in names():
        raise InvalidInputError(
            f"{method!r} is a method without its numbers; give "
            f'accelkit.method("{method}")(), with those that shall differ in the brackets'
        )
    if not isinstance(method, Method):
        raise InvalidInputError(
            f"{method!r:.80} is neither a plan nor a method; give a plan, its path, or a method "
            'with its numbers such as accelkit.method("window")(window_tokens=2048)'
        )
    if idle := method.answers() & UNSERVED:
        raise UnsupportedConfigurationError(
            f"{type(method).__name__}: nothing asks a method to {' or '.join(sorted(idle))} yet"
        )


def from_pretrained(name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a model or pipeline, a folder or a hub repository that also holds a plan, and return it
    patched. `kwargs` go to the `from_pretrained` of its library; what they say of the hub holds for
    the plan as well.

    Raises:
        PlanError: there is no plan.
        InvalidInputError: there is no model beside it.
    """
    plan = Plan.from_pretrained(name_or_path, **{k: v for k, v in kwargs.items() if k in _HUB})
    model: Any
    try:
        if plan.fingerprint.library == "diffusers":
            from diffusers import DiffusionPipeline

            model = DiffusionPipeline.from_pretrained(name_or_path, **kwargs)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs).eval()
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{name_or_path}: a plan, but no model of {plan.fingerprint.library} that opens "
            f"({error}); load the model yourself and give `patch` this path"
        ) from error
    patch(model, plan)
    return model


def save_pretrained(model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write a patched model's folder with its plan beside the config, and return the plan's path;
    `from_pretrained` opens it patched. Raises `InvalidInputError` for a model that is not patched.
    """
    handle = handle_of(model)
    if handle is None:
        raise InvalidInputError(f"the model is not patched; there is no plan to write as {FILE}")
    model.save_pretrained(folder)
    return handle.plan.save_pretrained(folder)


def _refuse_misfits(plan: Plan, model: Any, strict: bool) -> None:
    problems = plan.check(model)
    fatal = [p for p in problems if p.fatal and (strict or p.where != "model")]
    if fatal and len(fatal) == len(plan.sites) and all(p.what == NO_SITE for p in fatal):
        raise NothingPatchedError(
            f"none of the plan's {len(fatal)} sites is in the model; {fatal[0].mend}"
        )
    if fatal:
        shown = "\n  ".join(str(p) for p in fatal[:5])
        more = f"\n  and {len(fatal) - 5} more" if len(fatal) > 5 else ""
        raise PlanMismatchError(f"the plan does not fit this model:\n  {shown}{more}")
    for problem in problems:
        warnings.warn(str(problem), PlanTransferWarning, stacklevel=3)
