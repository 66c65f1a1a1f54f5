"""Step caches, planned together with sparsity: what each setting saves and what it costs.

The dial of each variant of a technique is bisected on whole runs at the small geometry, with
nothing else changed; every setting that was run may be chosen later, beside what attention spends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from accelkit.calibration.candidates import between as halfway
from accelkit.calibration.candidates import stored
from accelkit.calibration.denoise import video
from accelkit.calibration.denoise.look import bucket_of, place_of
from accelkit.calibration.denoise.weights import Small
from accelkit.calibration.evaluation.quality import relative
from accelkit.calibration.session import Run
from accelkit.errors import AccelkitError, UnsupportedModelError
from accelkit.patches import method as registry
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import BlockMethod, Method, load

OWN = {"ratios": "sizes of residuals", "schedules": "what steps change"}
"""Fields of step caches that hold numbers of the model, and words for them."""
RUNS = 8
"""Most settings of a variant that are run."""
ALIKE = 1.15
"""Errors at the small geometry that differ by less than this factor do not tell which one is less
at the whole one.
"""


@dataclass(frozen=True)
class Cached:
    """A step cache (None: none), its error on the final latents, the share of each place's calls
    that it leaves, and the seconds of the run that told so.
    """

    method: BlockMethod | None
    error: float
    left: Mapping[str, float]
    seconds: float = 0.0

    def share(self, bucket: int) -> float:
        """Share of the work of a bucket's steps that is left."""
        mine = [v for place, v in self.left.items() if bucket_of(place) == bucket]
        return sum(mine) / len(mine)

    def work(self, calls: Mapping[str, int]) -> float:
        """Share of the work of a whole run that is left, by the calls of each place."""
        return sum(n * self.left[p] for p, n in calls.items()) / sum(calls.values())


def chosen_caches(methods: Sequence[Any] | None) -> tuple[list[BlockMethod], list[Any] | None]:
    """The step caches among the wished-for methods, and the rest; None is every one at hand."""
    if methods is None:
        all_of_them = [load(n)() for n in registry.names() if _is_cache(load(n))]
        return all_of_them, None  # type: ignore[return-value]
    made: list[Any] = [load(m) if isinstance(m, str) else m for m in methods]
    caches = [m for m in made if _is_cache(m if isinstance(m, type) else type(m))]
    rest = [m for m in made if m not in caches]
    return [m() if isinstance(m, type) else m for m in caches], rest


def _is_cache(cls: type[Method]) -> bool:
    """Whether a class skips steps; a block method without a dial changes what is drawn."""
    return issubclass(cls, BlockMethod) and "denoise" in cls.phases and cls.dial is not None


def options(
    run: Run, small: Small, caches: Sequence[BlockMethod], aim: float, afford: float
) -> tuple[list[Cached], dict[str, str]]:
    """None at all, and the settings around an error of `aim` that skip something; and why others
    were refused. No run begins behind `afford` seconds of runs.
    """
    found = [Cached(None, 0.0, dict.fromkeys(small.seen.places, 1.0))]
    tried: list[list[BlockMethod]] = []
    refused: dict[str, str] = {}
    # What knows most of the model comes first.
    knowing = sorted(caches, key=lambda c: [k not in type(c).model_fields for k in reversed(OWN)])
    for cache in knowing:
        try:
            tried.append([*_fitted(run, small, cache).variants()])
        except AccelkitError as error:
            refused[cache.kind] = str(error)
    # In turns: the first variant of every technique, then their second ones, while it is worth it;
    # one that has found the least work within the aim goes on.
    turns = [[v for v in turn if v is not None] for turn in zip_longest(*tried)]
    calls = small.seen.calls
    for variants in turns:
        searches = [(v, _bisected(run, small, v, aim)) for v in variants]
        while searches and sum(c.seconds for c in found) < afford:
            variant, search = searches.pop(0)
            if run.late(0.75, f"step cache {variant.kind}"):
                continue
            try:
                one = next(search, None)
            except AccelkitError as error:
                refused[variant.kind] = str(error)
                continue
            if one is not None:
                found.append(one)
                best = min((c for c in found if c.error <= aim), key=lambda c: c.work(calls))
                searches.insert(0 if one is best else len(searches), (variant, search))
    return _front(found, [c.kind for c in knowing], small), refused


def _front(found: list[Cached], kinds: Sequence[str], small: Small) -> list[Cached]:
    """None at all, which comes first, and what no other beats in both error and work. Of what is
    alike in both, that of the first of `kinds` is kept.
    """
    calls, half = small.seen.calls, 0.5 / small.seen.total
    some = [c for c in found if c.method is not None and min(c.left.values()) < 1]

    def alike(one: Cached, other: Cached) -> bool:
        more = one.work(calls) - other.work(calls)
        return one.error <= ALIKE * other.error and more <= half

    rank = {id(c): kinds.index(c.method.kind) for c in some if c.method is not None}
    some = [c for c in some if not any(rank[id(o)] < rank[id(c)] and alike(o, c) for o in some)]
    return found[:1] + [
        c
        for c in some
        if not any(o.error <= c.error and o.work(calls) < c.work(calls) for o in some)
    ]


def _bisected(run: Run, small: Small, cache: BlockMethod, aim: float) -> Iterator[Cached]:
    """By bisection the sparsest setting whose error is at most `aim`, between the dial's values as
    well; what is left of the runs goes to denser ones, for attention wants some of the error too.
    """
    assert cache.dial is not None
    found: dict[float, Cached] = {}
    while len(found) < RUNS:
        value = _next(cache.dial.values, found, aim, small)
        if value is None:
            return
        found[value] = _run(run, small, cache.model_copy(update={cache.dial.field: value}))
        yield found[value]


def _next(
    values: Sequence[float], found: Mapping[float, Cached], aim: float, small: Small
) -> float | None:
    """The value of a dial to try next: between the densest one that failed and the sparsest one
    that held, then among the denser ones; None if what is left would skip the same steps.
    """
    calls, step = small.seen.calls, 1 / small.seen.total
    dense = values[-1] > values[0]  # whether larger ones are denser
    line = sorted({*values, *found}, reverse=not dense)
    held = next((n for n, v in enumerate(line) if v in found and found[v].error <= aim), len(line))
    failed = max((n for n in range(held) if line[n] in found), default=-1)
    if between := line[failed + 1 : held]:
        return between[len(between) // 2] if held < len(line) or failed < 0 else between[-1]
    # The first gap, then those behind it.
    tried = [v for v in line[max(failed, 0) :] if v in found]
    for a, b in pairwise(tried):
        if found[b].work(calls) - found[a].work(calls) > 1.5 * step:
            untried = line[line.index(a) + 1 : line.index(b)]
            value = untried[len(untried) // 2] if untried else halfway(a, b)
            if value not in found:
                return value
    return next((v for v in line[held:] if v not in found), None)


def _run(run: Run, small: Small, cache: BlockMethod) -> Cached:
    """A whole run with this cache alone; the mean error of its results."""

    def work() -> dict[str, Any]:
        calls: dict[str, int] = Counter()

        def count(call: AttentionCall) -> None:
            calls[place_of(call.site.path, small.bucket(call.clock.step, small.seen.total))] += 1

        with watch(run.model, count), ExitStack() as undo:
            for root in small.roots.values():
                cache.rewire(root, undo)
            take = video.run(run.model, small.seen.settings, small.shots[0])
        # Some denoisers take the results of a batch one by one: counted beside a run of as many.
        left = {p: calls.get(p, 0) / n for p, n in small.whole.calls.items()}
        errors = [relative(f, t) for f, t in zip(take.latents, small.whole.latents, strict=True)]
        # The mean: how readily one of them tips over into another picture tells of others.
        return {"error": float(np.mean(errors)), "left": left, "seconds": take.ends[-1]}

    run.tell(f"step cache {cache.kind}")
    settings = {k: v for k, v in stored(cache).items() if k not in ("kind", *OWN)}
    key = f"cache/{cache.kind}/" + ",".join(f"{k}={v}" for k, v in settings.items())
    found = run.journal.unit(key, work)
    return Cached(cache, found["error"], found["left"], found["seconds"])


def _fitted(run: Run, small: Small, cache: BlockMethod) -> BlockMethod:
    """The cache with the numbers of this model that it needs.

    Raises:
        UnsupportedModelError: they cannot be measured on it.
    """
    for name, words in OWN.items():
        if name not in type(cache).model_fields:
            continue
        run.tell(words)
        found = run.journal.unit(f"cache/{name}", partial(small.own, name))
        if not found:
            raise UnsupportedModelError(
                f"{', '.join(small.roots)}: {words} cannot be measured; that needs one denoiser "
                "whose blocks the library knows, and a scheduler that only weighs its outputs"
            )
        own = tuple(tuple(v) if isinstance(v, list) else v for v in found)
        cache = cache.model_copy(update={name: own})
    return cache
