"""Does a plan fit a model? Every problem at once, each with its mend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from accelkit.patches.method import UNSERVED
from accelkit.patches.plan import Component, Fingerprint, Plan, Reuse


@dataclass(frozen=True)
class Problem:
    """One reason why a plan does not fit a model, and what to do. A `fatal` one makes `patch`
    refuse.
    """

    where: str
    what: str
    mend: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.mend}"


AGAIN = "calibrate this model, or use the plan's own model"
NO_SITE = "no such attention module in the model"


def compare(
    plan: Plan, model: Fingerprint, sites: Mapping[str, int], phases: Sequence[str] = ()
) -> list[Problem]:
    """Differences between a plan and a model, given the model's fingerprint, its sites with their
    query heads and the phases that can be patched there.
    """
    problems = [*_sizes(plan.fingerprint, model)]
    place = {path: n for n, path in enumerate(sites)}
    for path, layer in plan.sites.items():
        for slot in ("tokens", "cache", "block"):
            method = getattr(layer, slot)
            if method is not None and (idle := method.answers() & UNSERVED):
                what = f"nothing asks {method.kind} to {' or '.join(sorted(idle))} yet"
                problems.append(Problem(path, what, f"take {slot!r} out of this site"))
        block = layer.block
        if block is not None and phases and not set(block.phases).intersection(phases):
            what = f"{block.kind} acts in {' and '.join(block.phases)}, not here"
            problems.append(Problem(path, what, "take 'block' out of this site"))
        if block is not None and not layer.rules and path in model.components:
            continue  # a whole sub-model is rewired; it has no attention of its own
        if path not in sites:
            problems.append(Problem(path, NO_SITE, AGAIN))
            continue
        for rule in layer.rules:
            heads = len(rule.policies)
            if heads != sites[path]:
                what = f"{heads} heads in the plan, {sites[path]} in the model"
                problems.append(Problem(path, what, AGAIN))
            for row in set(rule.policies):
                reuse = plan.policies[row].reuse
                if reuse is not None:
                    problems += _anchor(path, heads, reuse, place, sites)
    return problems or [
        *_config(plan.fingerprint, model),
        *_revision(plan.fingerprint, model),
        *_idle(plan, phases),
    ]


def _sizes(made_for: Fingerprint, model: Fingerprint) -> Iterator[Problem]:
    """Another class, or other sizes of a sub-model."""
    if (made_for.class_name, made_for.model_type) != (model.class_name, model.model_type):
        what = (
            f"the plan is for {made_for.class_name} ({made_for.model_type}), "
            f"this is {model.class_name} ({model.model_type})"
        )
        yield Problem("model", what, AGAIN)
    for name, component in made_for.components.items():
        here = model.components.get(name)
        if here is None:
            yield Problem(name, "the model has no such component", AGAIN)
            continue
        for field in Component.model_fields:
            expected, found = getattr(component, field), getattr(here, field)
            if expected != found:
                what = f"{field}: the plan has {expected}, the model {found}"
                yield Problem(name, what, AGAIN)


def _anchor(
    path: str, heads: int, reuse: Reuse, place: Mapping[str, int], sites: Mapping[str, int]
) -> Iterator[Problem]:
    """An anchor that comes too late, or a map of heads that does not fit."""
    anchor = reuse.site or path
    if reuse.site is not None and place.get(anchor, len(place)) >= place[path]:
        mend = "anchors must be earlier sites of the same model"
        yield Problem(path, f"reuses {anchor!r}, which does not run before it", mend)
    elif reuse.heads is not None and max(reuse.heads, default=0) >= sites[anchor]:
        what = f"reuses head {max(reuse.heads)} of {anchor!r}, which has {sites[anchor]}"
        yield Problem(path, what, "use head ids of the anchor")
    if reuse.heads is not None and len(reuse.heads) != heads:
        what = f"reuses {anchor!r} by a map of {len(reuse.heads)} heads, the site has {heads}"
        yield Problem(path, what, "name the anchor's head for every head")


COMPARE = "check with `accelkit eval --against dense`"


def _config(made_for: Fingerprint, model: Fingerprint) -> Iterator[Problem]:
    """Another config of equal sizes need not matter."""
    if made_for.config_hash == model.config_hash:
        return
    before, now = made_for.config, model.config
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    what = f"differs in {', '.join(keys) or 'unrecorded keys'}"
    yield Problem("config", what, COMPARE, fatal=False)


def _idle(plan: Plan, phases: Sequence[str]) -> Iterator[Problem]:
    """Rules of phases that stay dense whatever a plan says."""
    wanted = {rule.phase for layer in plan.sites.values() for rule in layer.rules}
    for phase in sorted(wanted.difference(phases)) if phases else ():
        what = f"{phase} runs dense: only {' and '.join(phases)} can be patched here"
        yield Problem("rules", what, f"take the rules for {phase} out", fatal=False)


def _revision(made_for: Fingerprint, model: Fingerprint) -> Iterator[Problem]:
    """Other weights of the same name; a folder has no revision to compare."""
    before, now = made_for.base_revision, model.base_revision
    if made_for.base_id == model.base_id and before and now and before != now:
        what = f"the plan was made with revision {before[:12]}, this is {now[:12]}"
        yield Problem(model.base_id or "model", what, COMPARE, fatal=False)
