"""The whole flow for language models on one page: measure, choose, check, and choose again until
the check holds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from accelkit.calibration import assemble, memory, stages
from accelkit.calibration import data as prompts
from accelkit.calibration.assemble import SiteData
from accelkit.calibration.candidates import Family, chosen_methods
from accelkit.calibration.capture import prefill
from accelkit.calibration.evaluation import quality
from accelkit.calibration.evaluation.tasks import MIN_LENGTH
from accelkit.calibration.fit import fit
from accelkit.calibration.journal import Journal
from accelkit.calibration.prefill import last_rows, measure, prices, uniform
from accelkit.calibration.prefill.check import whole_check
from accelkit.calibration.prefill.finalists import listed, with_full_rows, worse
from accelkit.calibration.prefill.measure import PRESETS, PROBE_TOKENS
from accelkit.calibration.prefill.plan import Known, refined
from accelkit.calibration.session import (
    Bar,
    Preset,
    Run,
    Stopwatch,
    as_budget,
    by_stage,
    calm,
    checked_limit,
    compile_clock,
    digest,
    first_use,
    need_preset,
    need_unpatched,
    producer,
    version,
    weights_digest,
)
from accelkit.calibration.timing import times_ms
from accelkit.errors import NothingPatchedError
from accelkit.kernels.cost import CostTable
from accelkit.patches.adapters import adapter_for, facts, sites, trimmable
from accelkit.patches.method import Method
from accelkit.patches.plan import Budget, Fingerprint, Plan

STAGES: dict[str, str | tuple[str, ...]] = {
    "fit": "fit", "screening": "screen/", "measuring": "measure/", "weighing": "weight/",
    "finalists": "final/", "planning": "planning/", "checking": ("check/", "blame/"),
    "timing": "speed/",
}  # fmt: skip
"""Stages whose seconds a plan holds, by the beginning of their units' keys; compiling is apart."""
SEARCH = ("screening", "measuring", "weighing", "finalists", "planning")
"""Stages that are the search itself, beside fit, end-to-end check and timing."""
MOST_MEMORY = 1.25
"""Peak memory on a GPU ÷ that of a dense prefill of the longest prompts."""
SCREEN_TOKENS = 4096
"""Length of the prompt on which methods are screened: half of the longest up to here, else a
quarter of it.
"""


def calibrate(
    model: Any,
    data: Any = None,
    *,
    tokenizer: Any = None,
    budget: float | Budget | None = None,
    lengths: Sequence[int] | None = None,
    methods: Sequence[str | Method | type[Method]] | None = None,
    preset: str = "balanced",
    batch: int = 1,
    every_row: bool = False,
    seed: int = 0,
    time_limit: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Plan:
    """What `accelkit.calibrate` does for a language model; its arguments are explained there."""
    bare = adapter_for(model)[1]
    begun = time.monotonic()
    budget = as_budget(0.02 if budget is None else budget)
    need_preset(preset, PRESETS)
    time_limit = checked_limit(time_limit)
    fingerprint, heads = facts(model)
    places = sites(model)
    if not places:
        raise NothingPatchedError(f"{type(bare).__name__}: no attention that could run sparse")
    trimmed = None if every_row else trimmable(bare)
    if any(s.path != trimmed for s in places):
        places = tuple(s for s in places if s.path != trimmed)
    else:
        trimmed = None  # the only layer
    need_unpatched(model, "model")
    lengths = prompts.chosen_lengths(lengths, bare)
    with calm(), compile_clock() as compiled, Bar(progress) as bar:
        with first_use("methods"):
            tried = chosen_methods(methods)
        generates = trimmed is not None
        inputs = prompts.gather(data, tokenizer, lengths, preset, seed, every_row=not generates)
        prompts.need_known(inputs, bare)
        # Short enough to be cheap, long enough that methods have something to leave out.
        short = max(MIN_LENGTH, inputs.longest // 4, min(inputs.longest // 2, SCREEN_TOKENS))
        screen_on = prompts.screening(inputs, tokenizer, short, seed)
        dense_rows = last_rows.dense_rows(inputs) if generates else 0
        settings = {
            "accelkit": version(),
            "model": f"{fingerprint.class_name} {fingerprint.config_hash}",
            "weights": weights_digest([bare]),
            "device": str(bare.device),
            "dtype": str(bare.dtype),
            "prompts": digest(
                [s.ids.tobytes() for s in (*inputs.measure, *inputs.check, screen_on)]
            ),
            "methods": [f"{m.kind} {m.model_dump_json()}" for m in tried],
            "preset": preset,
            "batch": batch,
            "trimmed": trimmed,
            "dense_rows": dense_rows,
            "seed": seed,
        }
        with closing(Journal(journal, settings, resume, compiled)) as book:
            watch = Stopwatch(book, begun)
            bar.expect(_units(len(places), inputs, PRESETS[preset]))
            run = Run(
                bare,
                bare.device,
                places,
                heads,
                book,
                PRESETS[preset],
                bar.tell,
                batch,
                time_limit,
                begun,
                trimmed=trimmed,
                dense_rows=dense_rows,
            )
            try:
                was = bare.training
                bare.eval()
                plan = _plan(run, inputs, screen_on, tried, fingerprint, budget, seed, tokenizer)
            finally:
                bare.train(was)
            took = watch.read(budget)
    seconds = by_stage(book, STAGES) | took
    prefill_s = plan.calibration["dense_prefill_ms"] / 1e3
    about = {
        "data": inputs.about,
        "prompts": [f"{s.task}@{len(s.ids)}" for s in inputs.measure],
        "checked_on": [f"{s.task}@{len(s.ids)}" for s in inputs.check],
        "lengths": sorted({len(s.ids) for s in inputs.measure}),
        "seed": seed,
        "preset": preset,
        "batch": batch,
        "methods": [m.kind for m in tried],
        "skipped": run.skipped,
        "dense_prefills": round((took["whole"] - took["compiling"]) / prefill_s, 1),
        "search_prefills": round(sum(seconds[s] for s in SEARCH) / prefill_s, 1),
        "seconds": seconds,
    }
    update = {"calibration": about | plan.calibration, "producer": producer("transformers")}
    done = plan.model_copy(update=update)
    return done.with_tables(plan.tables)


def _plan(
    run: Run,
    inputs: prompts.Inputs,
    screen_on: prompts.Sample,
    methods: Sequence[Any],
    fingerprint: Fingerprint,
    budget: Budget,
    seed: int,
    tokenizer: Any,
) -> Plan:
    """Measure, then search and check in turns."""
    component = fingerprint.components["text"]
    shape = fit.Shape(
        component.q_heads, component.kv_heads, component.head_dim, len(run.sites), run.batch
    )
    tokens = inputs.longest
    dense = run.journal.unit("dense", lambda: _dense_prefill(run, inputs))
    run.dense_s = dense["dense_prefill_ms"] / 1e3
    memory.restart(run.device)
    if run.device.type == "cuda":
        run.most_bytes = int(MOST_MEMORY * dense["dense_peak_bytes"])
    room = memory.room(run.device, run.most_bytes)
    late = partial(run.late, 1.0, seconds=whole_check(run, 2 * inputs.check))
    tried = [] if late("what methods cost") else methods
    costs = stages.fitted(run, shape, run.model.dtype, tokens, tried, room)
    memory.give_back(run.device)
    heads = {s.path: run.heads[s.path] for s in run.sites}
    if late("screening and measuring"):
        ruled = run.ruled(tokens)
        known = Known(costs, assemble.nothing(heads, costs, ruled), ruled)
    else:
        probes = _probes(inputs, tokenizer, run.preset.weigh, seed)
        known = _measured(run, inputs, screen_on, methods, costs, budget, heads, probes)
    memory.give_back(run.device)
    plan = refined(run, inputs, fingerprint, budget, known)
    about = {
        "refused": dict(costs.refused),
        "fit_error": round(costs.error(), 4),
        "lists_on_prompts": dict(known.costs.on_prompts),
        **dense,
        "dense_prefill_ms": least_dense(run.journal, dense["dense_prefill_ms"], tokens),
        "peak_bytes": run.journal.unit("peak", lambda: memory.peak(run.device)),
    }
    done = plan.model_copy(update={"calibration": {**plan.calibration, **about}})
    return done.with_tables(plan.tables)


def _measured(
    run: Run,
    inputs: prompts.Inputs,
    screen_on: prompts.Sample,
    methods: Sequence[Any],
    costs: CostTable,
    budget: Budget,
    heads: Mapping[str, int],
    probes: Sequence[prompts.Sample],
) -> Known:
    tokens, brief = run.ruled(inputs.longest), run.ruled(len(screen_on.ids))
    epsilon = budget.max_rel_error
    able = [m for m in methods if m.kind in costs.methods]
    dear = measure.dear(run, costs, tokens)
    screen = measure.screened(run, screen_on, able, costs, dear)
    costs = prices.on_prompts(costs, [unit["on_prompt"] for unit in screen.values()])
    with run.planning("what to measure"):
        kept = {
            path: stages.kept(record, costs, tokens, brief, run.preset.families)
            for path, record in screen.items()
        }
    shows = [measure.probe_of(run, p) for p in probes]
    # Half as many tokens at a time as a prefill has.
    copies = run.batch * inputs.longest // (2 * max(len(p.ids) for p in probes))
    exact = run.model.dtype == torch.float32
    by_probe = stages.probed(run, heads, shows, lambda place: quality.faintest, copies, exact)
    weights = [stages.worst(heads, _alike(s, probes, by_probe)) for s in inputs.measure]

    def data(families: Mapping[str, Sequence[Family]], units: Sequence[Any]) -> list[SiteData]:
        both = zip(inputs.measure, units, strict=False)
        rows = [(run.ruled(len(s.ids)), unit) for s, unit in both]
        return assemble.site_data(list(heads), families, screen, rows, brief, weights, costs)

    def narrow(families: dict[str, list[Family]], unit: Any) -> dict[str, list[Family]]:
        with run.planning("what to measure further"):
            return assemble.wanted(data(families, [unit]), families, epsilon)

    families, units = measure.measured(run, inputs.measure, screen, kept, narrow)
    with run.planning("tables"):
        found = data(families, units)
    if not run.late(0.75, "full rows of finalists"):
        prefix, first = f"final/{epsilon}/", inputs.measure[0]
        found = with_full_rows(run, prefix, first, found, epsilon, weights[0], costs, tokens)

    def further(
        prefix: str, sample: prompts.Sample, found: Sequence[SiteData], epsilon: float
    ) -> list[SiteData]:
        unit = measure.further(run, sample, prefix, screen, families, kept)
        own = stages.worst(heads, _alike(sample, probes, by_probe))
        found = worse(found, listed(found, families, unit), own)
        prefix = f"{prefix}final/"  # what lists cost is known by now
        return with_full_rows(run, prefix, sample, found, epsilon, own, costs, tokens, False)

    seen = partial(uniform.screened, screen, stages.worst(heads, by_probe), costs, brief)
    return Known(costs, found, brief, seen, further)


def _dense_prefill(run: Run, inputs: prompts.Inputs) -> dict[str, Any]:
    """Milliseconds and peak memory of what the search is compared with: the longest prompts, up to
    the first token and with the cache that `generate` fills.
    """
    ids = np.repeat(inputs.measure[0].ids[None].astype(np.int64), run.batch, 0)
    work = partial(prefill, run.model, torch.from_numpy(ids).to(run.device))
    with first_use(("prefill", type(run.model), run.device, run.model.dtype, ids.shape)) as new:
        if new and run.device.type == "cuda":
            work()
            quality.synchronise(run.device)
    memory.restart(run.device)
    if run.device.type == "cuda":
        ms = fit.clock(work, 1, run.device, rested=False)
    else:  # long; where a plan is timed, dense prefills are once more
        (ms,) = times_ms(work, 1, 0, run.device)
    return {"dense_prefill_ms": round(ms, 3), "dense_peak_bytes": memory.peak(run.device)}


def least_dense(book: Journal, first: float, tokens: int) -> float:
    """Milliseconds of a dense prefill of so many tokens: the first reading, or a lesser one beside
    which a plan was timed. What disturbs a reading only adds to it, and the count of dense prefills
    that a calibration took would look smaller than it is.
    """
    timed = [book[k] for k in book.units if k.startswith(STAGES["timing"])]
    return min([first, *(round(t["dense_ms"], 3) for t in timed if t["tokens"] == tokens)])


def _probes(
    inputs: prompts.Inputs, tokenizer: Any, names: Sequence[str], seed: int
) -> list[prompts.Sample]:
    """Short prompts for the weights: of the built-in tasks, or the ends of the user's own."""
    if inputs.about.startswith("built-in"):
        n = min(PROBE_TOKENS, inputs.longest)
        return [
            prompts.made(t, n, 200 + seed * 1000 + i, False, tokenizer) for i, t in enumerate(names)
        ]
    some = inputs.measure[: len(names)]
    return [prompts.Sample(s.task, s.ids[-PROBE_TOKENS:], ()) for s in some]


def _alike(
    sample: prompts.Sample,
    probes: Sequence[prompts.Sample],
    found: Sequence[dict[str, list[float]]],
) -> Sequence[dict[str, list[float]]]:
    """What was found on the probes of a sample's kind, tasks with answers or text; on all of them
    where there is none.
    """
    alike = [
        f for p, f in zip(probes, found, strict=True) if bool(p.answers) == bool(sample.answers)
    ]
    return alike or found


def _units(places: int, inputs: prompts.Inputs, preset: Preset) -> int:
    """The most units of work: the fit, each site by stage and prompt, and every check."""
    by_site = places * (2 + len(inputs.measure) + len(preset.weigh))
    return 2 + by_site + preset.rounds * len(inputs.check) + 1
