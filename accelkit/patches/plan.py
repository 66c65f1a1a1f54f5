"""The plan: which policy every head of every site runs, when, and the evidence for it.

A plan is JSON that a person can read and diff (`accelkit_plan.json`); per-head tables lie beside it
in `accelkit_plan.safetensors`. Reading one needs neither torch nor the model's library.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from accelkit.errors import PlanError, UnknownMethodError
from accelkit.patches import plan_file
from accelkit.patches.method import (
    AttentionMethod,
    BlockMethod,
    CacheMethod,
    Method,
    Strict,
    TokenMethod,
    describe,
    load,
)

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.patches.call import Clock
    from accelkit.patches.plan_check import Problem


def _read_method(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError("a method needs a 'kind', the name of its file in patches/methods")
    try:
        cls = load(kind)
    except UnknownMethodError as error:
        raise ValueError(str(error)) from error
    return cls.model_validate(fields)


def _write_method(method: Method) -> dict[str, Any]:
    return {"kind": method.kind, **method.model_dump(mode="json")}


_read, _write = BeforeValidator(_read_method), PlainSerializer(_write_method)
AnyAttentionMethod = Annotated[AttentionMethod, _read, _write]
AnyTokenMethod = Annotated[TokenMethod, _read, _write]
AnyCacheMethod = Annotated[CacheMethod, _read, _write]
AnyBlockMethod = Annotated[BlockMethod, _read, _write]


class _Part(Strict):
    """A part of a plan."""


class Reuse(_Part):
    """Take the index that another site computed in this forward (`site=None`: this site, an earlier
    step).

    `heads[h]` is the anchor's query head whose lists head h of this layer reads; None: the head of
    the same number.
    """

    site: str | None = None
    heads: tuple[int, ...] | None = None


class Policy(_Part):
    """What some heads run: methods that answer different questions, or reuse; nothing of both is
    dense.
    """

    methods: tuple[AnyAttentionMethod, ...] = ()
    reuse: Reuse | None = None

    @property
    def dense(self) -> bool:
        return not self.methods and self.reuse is None

    @model_validator(mode="after")
    def _one_answer_each(self) -> Policy:
        answered: dict[str, str] = {"index": "reuse"} if self.reuse else {}
        for method in self.methods:
            for question in method.answers():
                if question in answered:
                    raise ValueError(
                        f"{answered[question]} and {method.kind} both answer {question!r}; "
                        "a policy takes one answer each"
                    )
                answered[question] = method.kind
        return self

    def label(self) -> str:
        """A short name for tables and pictures."""
        names = [m.kind for m in self.methods] + (["reuse"] if self.reuse else [])
        return "+".join(names) or "dense"


class Rule(_Part):
    """When a set of policies applies. `policies[h]` is a row of the plan's table for query head
    h, un-sharded; `steps` are shares of the denoising steps, the first included, the last not.
    """

    phase: Literal["prefill", "decode", "denoise"]
    min_tokens: int = Field(0, ge=0)
    steps: tuple[float, float] = (0.0, 1.0)
    branch: str | None = None
    policies: tuple[int, ...]

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= steps[0] < steps[1] <= 1:
            raise ValueError("expected shares of the steps that rise, such as [0.2, 1.0]")
        return steps

    def applies(self, tokens: int, clock: Clock) -> bool:
        done = clock.step / max(clock.total, 1)
        return (
            clock.phase == self.phase
            and tokens >= self.min_tokens
            and self.steps[0] <= done
            and (done < self.steps[1] or self.steps[1] >= 1.0)
            and self.branch in (None, clock.branch)
        )


class Schedule(_Part):
    """How often an index is made anew; `refresh_every` counts computed steps."""

    refresh_every: int = Field(1, ge=1)


class Evidence(_Part):
    """What calibration saw, per query head: relative L1 error of the head's output as executed,
    attention mass covered, computed ÷ visible pairs; and the site's milliseconds beside those of
    dense at `tokens` tokens.
    """

    tokens: int
    error: tuple[float, ...]
    recall: tuple[float, ...]
    density: tuple[float, ...]
    weight: tuple[float, ...] = ()
    ms: float
    dense_ms: float


def evidence_key(phase: str, steps: tuple[float, float]) -> str:
    """Name of what was seen of a phase in a share of its steps: "denoise 0.1-0.25"."""
    return phase if steps == (0.0, 1.0) else f"{phase} {steps[0]:g}-{steps[1]:g}"


class LayerPlan(_Part):
    """One site: rules (first match wins, no match is dense) and the methods around attention."""

    rules: tuple[Rule, ...] = ()
    schedule: Schedule = Schedule()
    tokens: AnyTokenMethod | None = None
    cache: AnyCacheMethod | None = None
    block: AnyBlockMethod | None = None
    evidence: dict[str, Evidence] = {}


class Component(_Part):
    """Size of one sub-model."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int


class Fingerprint(_Part):
    """The model that a plan was made for; `base_revision` is the hub's commit, where it came from
    there.
    """

    library: str = "transformers"
    class_name: str
    model_type: str
    base_id: str | None = None
    base_revision: str | None = None
    config_hash: str
    config: dict[str, Any] = {}
    components: dict[str, Component]


class Limits(_Part):
    """Where the plan was measured: dense below `min_length` tokens, one warning above
    `max_length`.
    """

    min_length: int = Field(0, ge=0)
    max_length: int | None = None
    grid: tuple[int, int, int] | None = None
    steps: int | None = None


class Budget(_Part):
    """The quality that may be spent: relative L1 error of the last hidden state at scored
    positions, worst task; of the final latents for a pipeline, worst prompt.
    """

    max_rel_error: float = Field(0.02, gt=0.0, lt=1.0)


class TablesFile(_Part):
    """The side tensors' file and its SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class HeadGroup:
    """Heads of a layer with the same policy; `policy_id` is its row in the plan's table."""

    heads: tuple[int, ...]
    policy: Policy
    policy_id: int


class Plan(_Part):
    """Everything that `patch` needs and everything that calibration learnt.

    `trim_last_layer`: in calls that ask for the logits of a few rows at the end (`generate` asks
    for the last one), the last layer is computed for these rows alone, dense, whatever the rules
    say of it. Nothing is lost by that; keys and values of all rows are still made.

    `dense_rows`: so many last rows of a prompt, among which the question is, read every key at
    every site; rules hold for the rows before them, which are read but not answered. A call that
    asks for the logits of more rows is dense from the first of these on. 0: rules hold for all
    rows, whatever is asked for.
    """

    schema_version: int = plan_file.SCHEMA_VERSION
    producer: dict[str, str | None] = {}
    fingerprint: Fingerprint
    calibration: dict[str, Any] = {}
    policies: tuple[Policy, ...]
    sites: dict[str, LayerPlan]
    limits: Limits = Limits()
    trim_last_layer: bool = False
    dense_rows: int = Field(0, ge=0)
    budget: Budget | None = None
    measured: dict[str, Any] = {}
    tables_file: TablesFile | None = None

    _tables: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _rows_exist(self) -> Plan:
        if self.dense_rows and not self.trim_last_layer:
            raise ValueError(
                f"dense_rows is {self.dense_rows} without trim_last_layer, which tells for which "
                "rows logits are asked; set both, or dense_rows to 0"
            )
        for path, layer in self.sites.items():
            for rule in layer.rules:
                for head, row in enumerate(rule.policies):
                    if not 0 <= row < len(self.policies):
                        raise ValueError(
                            f"sites[{path!r}], head {head}: policy {row} does not exist; "
                            f"the table has rows 0 … {len(self.policies) - 1}"
                        )
        return self

    def __repr__(self) -> str:
        """In short; `to_json` and `accelkit show` say all of it."""
        kinds = ", ".join(dict.fromkeys(policy.label() for policy in self.policies))
        return f"<Plan for {self.fingerprint.class_name}: {kinds} at {len(self.sites)} sites>"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        """Equal in what it says and in its side tensors, wherever those are stored."""
        return isinstance(other, Plan) and self._content() == other._content()

    def _content(self) -> tuple[str, str | None]:
        digest = plan_file.pack(self._tables)[1] if self._tables else None
        return self.model_copy(update={"tables_file": None}).to_json(), digest

    @property
    def tables(self) -> dict[str, Tensor]:
        """Side tensors by `<site>/<name>`; the `<name>` stands in a method's field."""
        return self._tables

    def with_tables(self, tables: Mapping[str, Tensor]) -> Plan:
        """The same plan with these side tensors."""
        plan = self.model_copy()
        plan._tables = dict(tables)
        return plan

    def groups(self, site: str, tokens: int, clock: Clock) -> tuple[HeadGroup, ...]:
        """Heads of `site` by policy for a call over `tokens` keys; empty: dense."""
        layer = self.sites.get(site)
        if layer is None or tokens < self.limits.min_length:
            return ()
        rule = next((r for r in layer.rules if r.applies(tokens, clock)), None)
        if rule is None or all(self.policies[row].dense for row in rule.policies):
            return ()
        heads: dict[int, list[int]] = {}
        for head, row in enumerate(rule.policies):
            heads.setdefault(row, []).append(head)
        return tuple(
            HeadGroup(tuple(h), self.policies[row], row) for row, h in sorted(heads.items())
        )

    def anchors(self) -> frozenset[str]:
        """Sites whose index another site reads."""
        reuses = (r for layer in self.sites.values() for r in self._reuses(layer))
        return frozenset(r.site for r in reuses if r.site is not None)

    def own_anchors(self) -> frozenset[str]:
        """Sites that read the index of an earlier step of theirs."""
        return frozenset(
            path
            for path, layer in self.sites.items()
            if any(r.site is None for r in self._reuses(layer))
        )

    def _reuses(self, layer: LayerPlan) -> list[Reuse]:
        rows = {row for rule in layer.rules for row in rule.policies}
        return [r for row in rows if (r := self.policies[row].reuse) is not None]

    def check(self, model: Any) -> list[Problem]:
        """Every problem of running this plan on `model`, each with its mend; empty when it fits.
        What is `fatal` among them makes `patch` refuse.
        """
        # The model's side of the comparison lies above the plan, so it is fetched when asked for.
        from accelkit.patches.adapters import adapter_for, facts
        from accelkit.patches.plan_check import compare

        return compare(self, *facts(model), adapter_for(model)[0].PHASES)

    def to_json(self) -> str:
        """Canonical text: sorted keys, two spaces, one newline at the end."""
        return (
            json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False)
            + "\n"
        )

    @staticmethod
    def from_json(text: str, *, where: str = "plan") -> Plan:
        """Parse and validate.

        Raises:
            PlanCorruptError: not JSON, or not an object.
            PlanVersionError: written by a newer schema.
            PlanError: a field is wrong; the message has its path.
        """
        try:
            return Plan.model_validate(plan_file.parse(text, where))
        except ValidationError as error:
            raise PlanError(f"{where}: {describe(error)}") from error

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
    ) -> Path:
        """Write the plan into `folder` and return the JSON's path.

        An older plan there stays intact until the new one is whole. With `push_to_hub` it is also
        uploaded to `repo_id`, by default the folder's name.

        Raises:
            PlanError: it cannot be written.
        """
        blob, plan = None, self
        if self._tables:
            blob, digest = plan_file.pack(self._tables)
            tables_file = TablesFile(file=plan_file.TABLES_FILE, sha256=digest)
            plan = self.model_copy(update={"tables_file": tables_file})
        path = plan_file.write(plan_file.as_path(folder, "folder"), plan.to_json(), blob)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).name)
        return path

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Plan:
        """Read a plan from a file, a folder or a hub repository.

        Raises:
            PlanError: nothing there, or a wrong field.
            PlanCorruptError: damaged text, side tensors missing or with a wrong hash.
            PlanVersionError: newer schema.
        """
        path, fetch = plan_file.find(
            name_or_path,
            subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        plan = Plan.from_json(plan_file.read(path), where=str(path))
        if plan.tables_file is None:
            return plan
        stored = plan.tables_file
        return plan.with_tables(plan_file.unpack(fetch(stored.file), stored.sha256))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload accelkit plan",
        create_pr: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the plan to a model repository of the hub; returns the commit's address.

        Raises:
            PlanError: the hub refused, or was not reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    create_pr=create_pr,
                )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise PlanError(
                f"{repo_id}: the plan was not uploaded ({error}); expected 'owner/name' and a "
                "token that may write there (`hf auth login`)"
            ) from error
