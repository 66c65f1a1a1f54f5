"""Does a plan fit a model? Every problem at once, each with its mend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from accelkit.patches.plan import Component, Fingerprint, Plan


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


def compare(plan: Plan, model: Fingerprint, sites: Mapping[str, int]) -> list[Problem]:
    """Differences between a plan and a model, given the model's fingerprint and its sites with
    their query heads.
    """
    problems: list[Problem] = []
    made_for = plan.fingerprint
    again = "calibrate this model, or use the plan's own model"
    if (made_for.class_name, made_for.model_type) != (model.class_name, model.model_type):
        problems.append(
            Problem(
                "model",
                f"the plan is for {made_for.class_name} ({made_for.model_type}), "
                f"this is {model.class_name} ({model.model_type})",
                again,
            )
        )
    for name, component in made_for.components.items():
        here = model.components.get(name)
        if here is None:
            problems.append(Problem(name, "the model has no such component", again))
            continue
        for field in Component.model_fields:
            expected, found = getattr(component, field), getattr(here, field)
            if expected != found:
                problems.append(
                    Problem(name, f"{field}: the plan has {expected}, the model {found}", again)
                )
    order = {path: n for n, path in enumerate(sites)}
    for path, layer in plan.sites.items():
        if layer.block is not None and not layer.rules and path in model.components:
            continue  # a whole sub-model is rewired; it has no attention of its own
        if path not in sites:
            problems.append(Problem(path, "no such attention module in the model", again))
            continue
        for rule in layer.rules:
            if len(rule.policies) != sites[path]:
                problems.append(
                    Problem(
                        path,
                        f"{len(rule.policies)} heads in the plan, {sites[path]} in the model",
                        again,
                    )
                )
            for row in set(rule.policies):
                reuse = plan.policies[row].reuse
                if reuse is None or reuse.site is None:
                    continue
                if reuse.site not in order or order[reuse.site] >= order[path]:
                    problems.append(
                        Problem(
                            path,
                            f"reuses {reuse.site!r}, which does not run before it",
                            "anchors must be earlier sites of the same model",
                        )
                    )
                elif reuse.heads is not None and max(reuse.heads) >= sites[reuse.site]:
                    problems.append(
                        Problem(
                            path,
                            f"reuses head {max(reuse.heads)} of {reuse.site!r}, which has "
                            f"{sites[reuse.site]}",
                            "use head ids of the anchor",
                        )
                    )
    if not problems and made_for.config_hash != model.config_hash:
        keys = sorted(
            k
            for k in made_for.config.keys() | model.config.keys()
            if made_for.config.get(k) != model.config.get(k)
        )
        problems.append(
            Problem(
                "config",
                f"differs in {', '.join(keys) or 'unrecorded keys'}",
                "check with `accelkit eval --against dense`",
                fatal=False,
            )
        )
    return problems
