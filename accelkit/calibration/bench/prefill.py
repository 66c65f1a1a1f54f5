"""Prefill speed in one process: patched, against the user's own path and the best dense path
present (`accelkit bench`).

Dense variants run on the unpatched model, in turns with the patched one, so that a drifting clock
and other programs meet both sides. A plan computes more of one prompt than of another, so every
turn has a prompt of its own kind. Choosing a better dense kernel is never
counted as sparsity: both ratios are always given."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from accelkit.calibration.bench.served import heads_by_policy, serves
from accelkit.calibration.candidates import chosen_methods
from accelkit.calibration.capture import forward, prefill
from accelkit.calibration.data import chosen_lengths
from accelkit.calibration.evaluation import tasks
from accelkit.calibration.evaluation.evaluate import FIRST_SEED, need_sparse
from accelkit.calibration.fit import fit
from accelkit.calibration.timing import times_ms
from accelkit.errors import GateFailedError, InvalidInputError, NothingPatchedError
from accelkit.kernels.cost import CostTable
from accelkit.patches.adapters import facts, sites, trimmable
from accelkit.patches.call import Clock
from accelkit.patches.patch import patch
from accelkit.patches.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger("accelkit")
KINDS = ("text", "needle", "multi_key", "variables", "common_words")
"""Prompts of the turns, one after the other."""
WORST = 8
"""Predictions that `bench --fit` shows, of those that lay farthest off."""
_SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs; `error` says why a path could not run."""

    ms: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.ms) if self.ms else None


@dataclass(frozen=True)
class Measurement:
    """Prefill of `batch` prompts of `length` tokens. `paths` holds the dense paths by name, "own"
    among them."""

    length: int
    batch: int
    prompt: str
    paths: dict[str, Timing]
    sparse: Timing
    density: float | None
    sparse_calls: int
    calls: int
    dense_reasons: dict[str, int]

    @property
    def best_dense(self) -> str:
        """Name of the fastest dense path."""
        return min(
            (n for n, t in self.paths.items() if t.ms), key=lambda n: self.paths[n].median or 0
        )

    def ratio(self, path: str) -> float | None:
        """How many times faster than a dense path the patched model is."""
        dense, sparse = self.paths[path].median, self.sparse.median
        return dense / sparse if dense and sparse else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; milliseconds and tokens."""
        return asdict(self) | {
            "median_ms": {n: t.median for n, t in self.paths.items()}
            | {"sparse": self.sparse.median},
            "best_dense": self.best_dense,
            "speedup_vs_own": self.ratio("own"),
            "speedup_vs_best_dense": self.ratio(self.best_dense),
        }


def bench(
    model: Any,
    plan: Plan,
    tokenizer: Any = None,
    *,
    lengths: Sequence[int],
    batch: int = 1,
    repeat: int = 5,
    warmup: int = 1,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Median prefill times at lengths in tokens. Prompts are built-in tasks of several kinds, or
    random tokens without a tokenizer; `repeat` turns time each path once.

    Raises:
        NothingPatchedError: no call ran sparse, or no length reaches the plan's least one; with
            others, shorter ones are left out.

    Example:
        >>> for m in bench(model, plan, tokenizer, lengths=(8192, 32768)):
        ...     print(m.length, m.ratio("own"), m.ratio(m.best_dense))
    """
    if min(repeat, batch, *lengths) < 1:
        raise InvalidInputError("--repeat, --batch and --lengths must be at least 1")
    tasks.need_positions(model, max(lengths))
    least = plan.limits.min_length
    if short := [n for n in lengths if n < least]:
        told = f"{', '.join(map(str, short))} tokens: the plan begins at {least} and runs dense"
        if len(short) == len(lengths):
            raise NothingPatchedError(f"nothing would run sparse: {told}; take longer prompts")
        log.warning("%s; left out", told)
    return [
        _measured(model, plan, tokenizer, length, batch, repeat, warmup, seed, progress or _quiet)
        for length in lengths
        if length >= least
    ]


def _quiet(step: str) -> None:
    pass


def _measured(
    model: Any,
    plan: Plan,
    tokenizer: Any,
    length: int,
    batch: int,
    repeat: int,
    warmup: int,
    seed: int,
    progress: Callable[[str], None],
) -> Measurement:
    """All paths at one length, in turns."""
    times: dict[str, Timing] = {name: Timing() for name in dense_paths(model)}
    sparse: list[float] = []
    densities, kinds = [], []
    for turn in range(repeat):
        ids, kind = prompt(model, tokenizer, length, batch, seed, KINDS[turn % len(KINDS)])
        kinds.append(kind)
        run = partial(prefill, model, ids)
        for name, before in times.items():
            progress(f"{length} tokens: {name}")
            if before.error is None:
                found = _time_path(model, name, run, 1, 0 if turn else warmup)
                times[name] = Timing(before.ms + found.ms, found.error)
        progress(f"{length} tokens: sparse")
        with patch(model, plan) as handle:
            # Lists from geometry are made once in a patch's life, before the timed run.
            with handle.measuring():
                run()
            need_sparse(handle, length)
            report = handle.report().as_dict()
            densities.append(report["density"])
            sparse += times_ms(run, 1, 0 if turn else warmup, ids.device)
    return Measurement(
        length, batch, ", ".join(dict.fromkeys(kinds)), times, Timing(tuple(sparse)),
        statistics.mean(densities), report["sparse_calls"], report["calls"], report["dense"],
    )  # fmt: skip


def dense_paths(model: Any) -> dict[str, str]:
    """Dense paths worth timing here and what each is; "own" is what the model runs unpatched."""
    own = model.config._attn_implementation
    paths = {"own": f"{own}, as the model was loaded"}
    if model.device.type != "cuda":
        return paths if own == "sdpa" else paths | {"sdpa": "torch's scaled_dot_product_attention"}
    return paths | dict.fromkeys(_SDPA, "torch's scaled_dot_product_attention, this backend alone")


@contextmanager
def using(model: Any, path: str) -> Iterator[None]:
    """While open, the unpatched model runs the dense path of this name."""
    if path == "own":
        yield
        return
    before = model.config._attn_implementation
    if before != "sdpa":
        model.set_attn_implementation("sdpa")
    try:
        if path in _SDPA:
            with sdpa_kernel([_SDPA[path]]):
                yield
        else:
            yield
    finally:
        if before != "sdpa":
            model.set_attn_implementation(before)


def prompt(
    model: Any, tokenizer: Any, length: int, batch: int, seed: int, task: str
) -> tuple[Tensor, str]:
    """Token ids `[batch, length]` on the model's device, and what they are."""
    if tokenizer is not None and length >= tasks.MIN_LENGTH:
        try:
            made = [
                tasks.make(task, length, FIRST_SEED + seed + i, tokenizer=tokenizer)
                for i in range(batch)
            ]
            ids = torch.stack([torch.from_numpy(s.ids).long() for s in made])
            return ids.to(model.device), f"{task} task"
        except ValueError:
            pass  # no prompt of this length with this tokenizer; random tokens have any length
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (batch, length), generator=generator
    )
    return ids.to(model.device), "random tokens"


def preview(model: Any, plan: Plan, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """What would run at each length, without running it: heads by policy, and the backend with its
    reason."""
    component = next(iter(plan.fingerprint.components.values()))
    served = serves(component, model.dtype, model.device, causal=True)
    return [
        {"length": n, "heads": heads_by_policy(model, plan, n, Clock("prefill")), **served}
        for n in lengths
    ]


def bound(model: Any, lengths: Sequence[int] | None, repeat: int = 2) -> list[dict[str, Any]]:
    """Attention's share of prefill at each length, and how much faster it would be if attention,
    and a last layer that can be trimmed, cost nothing. Random tokens stand for a prompt. Raises
    `NothingPatchedError` for a model without attention that could run sparse.
    """
    fingerprint, _ = facts(model)
    component = fingerprint.components["text"]
    count = len(sites(model))
    if not count:
        raise NothingPatchedError(f"{type(model).__name__}: no attention that could run sparse")
    shape = fit.Shape(component.q_heads, component.kv_heads, component.head_dim, count)
    # A last layer that is trimmed leaves the others' share of what is not attention.
    layers = component.layers
    others = 1 - 1 / layers if trimmable(model) else 1.0
    rows = []
    for n in chosen_lengths(lengths, model):
        ids = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, n)
        whole = fit.clock(partial(forward, model, ids), repeat, model.device)
        call = fit.random_call(shape, model.dtype, model.device, n)
        attention = count * fit.dense_ms(call, lambda run: fit.clock(run, repeat, model.device))
        share = min(attention / whole, 1.0)
        rows.append(
            {
                "tokens": n,
                "prefill_ms": round(whole, 3),
                "attention_ms": round(attention, 3),
                "attention_share": round(share, 4),
                "most_speedup": round(1 / max(others * (1 - share), 1e-3), 2),
            }
        )
    return rows


def fit_costs(
    model: Any,
    lengths: Sequence[int],
    step: Callable[[str], None] | None = None,
    expect: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The cost table of this device for layers like the model's and prompts up to the longest;
    `step` and `expect` as `fit` calls them.
    """
    fingerprint, heads = facts(model)
    size = next(iter(fingerprint.components.values()))
    shape = fit.Shape(size.q_heads, size.kv_heads, size.head_dim, len(heads))
    return fit.fit(
        shape, model.dtype, model.device, max(lengths), chosen_methods(None),
        step=step, expect=expect,
    ).to_dict()  # fmt: skip


def cost_rows(costs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A cost table as titled rows."""
    lengths = [{"tokens": n, "dense_ms": ms} for n, ms in costs["dense"]]
    kernels = [{"unit": unit, **k} for unit, k in costs["kernels"].items()]
    checks = [{**vars(c), "error": c.error} for c in CostTable.from_dict(costs).worst(WORST)]
    methods = [
        {
            "method": m,
            **{f"ms at {n}": ms for n, ms in c["points"]},
            **{t: p[-1][1] for t, p in c["terms"].items()},
            "share": c["share"],
            "error": c["error"],
        }
        for m, c in costs["methods"].items()
    ]
    refused = [{"method": m, "why": why} for m, why in costs["refused"].items()]
    return {
        "Dense attention of a layer": lengths,
        "Kernels: ms a launch, a row, a million pairs; error of the fit": kernels,
        **({"Worst predictions of what the fit did not see": checks} if checks else {}),
        "Methods: ms of a layer beside its kernels, its terms at the longest": methods,
        **({"Too slow here": refused} if refused else {}),
    }


def gate(results: Sequence[Measurement], least: float) -> None:
    """Raise `GateFailedError` if a length is not `least` times as fast as the best dense path."""
    for m in results:
        found = m.ratio(m.best_dense)
        if found is not None and found < least:
            raise GateFailedError(
                f"{m.length} tokens: {found:.2f} times as fast as {m.best_dense!r}, "
                f"wanted {least:g}; "
                "take longer prompts or calibrate with a larger budget"
            )


def table(results: Sequence[Measurement]) -> Table:
    """What a person reads."""
    from rich.table import Table

    grid = Table(title="Prefill, median milliseconds", title_justify="left")
    names = list(dict.fromkeys(n for m in results for n in m.paths))
    for head in ("length", "batch", *names, "sparse", "density", "× own", "× best dense"):
        grid.add_column(head, justify="right")
    for m in results:
        cells = [_ms(m.paths.get(n, Timing())) for n in names]
        vs_own, vs_best = m.ratio("own"), m.ratio(m.best_dense)
        grid.add_row(
            str(m.length),
            str(m.batch),
            *cells,
            _ms(m.sparse),
            "–" if m.density is None else f"{m.density:.1%}",
            "–" if vs_own is None else f"{vs_own:.2f}",
            "–" if vs_best is None else f"{vs_best:.2f} ({m.best_dense})",
        )
    return grid


def _ms(timing: Timing) -> str:
    return "cannot run" if timing.median is None else f"{timing.median:.2f}"


def _time_path(model: Any, name: str, run: Callable[[], Any], repeat: int, warmup: int) -> Timing:
    with using(model, name):
        try:
            return Timing(times_ms(run, repeat, warmup, model.device))
        except (RuntimeError, ValueError, ImportError) as error:
            if name == "own":
                raise
            if type(error).__name__ == "OutOfMemoryError":
                torch.cuda.empty_cache()
            return Timing(error=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
