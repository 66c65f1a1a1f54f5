"""Step caches, planned together with sparsity: what each setting saves and what it costs.

A technique's dial is bisected on whole runs at the small geometry, with nothing else changed; every
setting that was run and held the budget may be chosen later, beside what attention spends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from accelkit.calibration import video
from accelkit.calibration.candidates import between, stored
from accelkit.calibration.denoise_look import bucket_of, place_of
from accelkit.calibration.denoise_weights import Small
from accelkit.calibration.measure import Run
from accelkit.calibration.quality import relative
from accelkit.errors import AccelkitError, UnsupportedModelError
from accelkit.patches import method as registry
from accelkit.patches.adapters import watch
from accelkit.patches.call import AttentionCall
from accelkit.patches.method import BlockMethod, Method, load

RUNS = 3
"""Most settings of a technique that are run."""
AIM = 0.5
"""Share of the budget that bisection aims at: attention wants some of it as well."""


@dataclass(frozen=True)
class Cached:
    """A step cache (None: none), its error on the final latents, and the share of each place's
    calls that it leaves.
    """

    method: BlockMethod | None
    error: float
    left: Mapping[str, float]

    def share(self, bucket: int) -> float:
        """Share of the work of a bucket's steps that is left."""
        mine = [v for place, v in self.left.items() if bucket_of(place) == bucket]
        return sum(mine) / len(mine)


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
    return issubclass(cls, BlockMethod) and "denoise" in cls.phases


def options(
    run: Run, small: Small, caches: Sequence[BlockMethod], allowed: float
) -> tuple[list[Cached], dict[str, str]]:
    """None at all, and every setting of a technique that held the budget alone; and why others
    were refused.
    """
    found = [Cached(None, 0.0, dict.fromkeys(small.seen.places, 1.0))]
    refused: dict[str, str] = {}
    for cache in caches:
        if run.late(0.75, f"step cache {cache.kind}"):
            break
        try:
            found += _bisected(run, small, _fitted(run, small, cache), allowed)
        except AccelkitError as error:
            refused[cache.kind] = str(error)
    # Only what no other beats in both error and work; and none at all, which comes first.
    work = {id(c): sum(n * c.left[p] for p, n in small.seen.calls.items()) for c in found}
    best = [
        c
        for c in found
        if c.method is None
        or not any(o.error <= c.error and work[id(o)] < work[id(c)] for o in found)
    ]
    return best, refused


def _bisected(run: Run, small: Small, cache: BlockMethod, allowed: float) -> list[Cached]:
    """Settings by bisection for the sparsest within the aim; those within the budget are kept."""
    assert cache.dial is not None
    field = cache.dial.field
    values: list[Any] = list(cache.dial.values)
    low, high = 0, len(values) - 1
    tried: dict[Any, Cached] = {}
    while len(tried) < RUNS:
        middle = (low + high) // 2
        value = values[middle]
        if value in tried:
            break
        one = tried[value] = _run(run, small, cache.model_copy(update={field: value}))
        if one.error <= AIM * allowed:
            high = max(middle - 1, 0)
        else:
            low = min(middle + 1, len(values) - 1)
    good = [v for v in tried if tried[v].error <= AIM * allowed]
    bad = [v for v in tried if tried[v].error > AIM * allowed]
    if good and bad and len(tried) < RUNS:
        value = between(good[-1], bad[-1])
        if value not in tried:
            tried[value] = _run(run, small, cache.model_copy(update={field: value}))
    return [c for c in tried.values() if c.error <= allowed and min(c.left.values()) < 1]


def _run(run: Run, small: Small, cache: BlockMethod) -> Cached:
    """A whole run with this cache alone."""

    def work() -> dict[str, Any]:
        calls: dict[str, int] = Counter()

        def count(call: AttentionCall) -> None:
            calls[place_of(call.site.path, small.bucket(call.clock.step, small.seen.total))] += 1

        with watch(run.model, count), ExitStack() as undo:
            for root in small.roots.values():
                cache.rewire(root, undo)
            take = video.run(run.model, small.seen.settings, small.shot)
        left = {p: calls.get(p, 0) / n for p, n in small.seen.calls.items()}
        return {"error": relative(take.latents, small.whole[0]), "left": left}

    run.tell(f"step cache {cache.kind}")
    settings = {k: v for k, v in stored(cache).items() if k not in ("kind", "ratios")}
    key = f"cache/{cache.kind}/" + ",".join(f"{k}={v}" for k, v in settings.items())
    found = run.journal.unit(key, work)
    return Cached(cache, found["error"], found["left"])


def _fitted(run: Run, small: Small, cache: BlockMethod) -> BlockMethod:
    """The cache with the numbers of this model that it needs.

    Raises:
        UnsupportedModelError: they cannot be measured on it.
    """
    if "ratios" not in type(cache).model_fields:
        return cache
    run.tell("sizes of residuals")
    ratios = run.journal.unit("cache/ratios", lambda: small.whole[1])
    if not ratios:
        raise UnsupportedModelError(
            f"{', '.join(small.roots)}: the sizes of residuals cannot be measured; that needs one "
            "denoiser whose blocks the library knows"
        )
    return cache.model_copy(update={"ratios": tuple(ratios)})
