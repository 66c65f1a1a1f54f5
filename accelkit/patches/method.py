"""A method answers questions about an attention call; the house does the work.

The fields of a method are its hyper-parameters with the paper's defaults, units in their names.
Nothing here imports torch when it is loaded: plans are read, and methods listed, on machines that
have none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from accelkit.errors import InvalidInputError, UnknownMethodError

if TYPE_CHECKING:
    from torch import Tensor

    from accelkit.kernels.index import BlockIndex, Partial
    from accelkit.patches.call import AttentionCall, BlockCall, Phase, Site, TokenStream

    Pieces = BlockIndex | Partial | tuple[BlockIndex | Partial, ...]

Precision = Literal["native", "int8", "fp8"]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Order:
    """Token ids in kernel order. Fewer ids than tokens: only these; −1: a hole (clusters begin on
    block edges).

    `q_table` and `k_table` are int32 `[K, n]`, the few distinct orders; `row` (`[H]` or `[B, H]`)
    says which of them a head uses. `None` leaves that side as it comes. Causal masks use original
    positions. `whole` says that every token comes exactly once and there is no hole: then a call
    that is not causal needs no positions at all, and runs like one in token order. `whole_keys`
    says so of the keys, and that queries leave no token out but may have holes.
    """

    q_table: Tensor | None
    k_table: Tensor | None
    row: Tensor
    whole: bool = False
    whole_keys: bool = False


@dataclass(frozen=True)
class Execution:
    """With which arithmetic: precisions, smoothing, softmax skip and sharper logits.

    `sharpen` multiplies all logits, besides the model's own scale. `skip` is λ (a number or fp32
    `[H]`): a tile whose row maxima all stay `ln λ` under the running ones is dropped.
    """

    qk: Precision = "native"
    pv: Precision = "native"
    smooth_k: bool = False
    skip: float | Tensor | None = None
    sharpen: float = 1.0


@dataclass(frozen=True)
class Kept:
    """Surviving positions `[B, n]` of a token stream and, when tokens were merged, their
    weights.
    """

    positions: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class Dial:
    """The one field that trades quality for speed, and the values worth trying, from sparsest to
    densest.
    """

    field: str
    values: tuple[float, ...]


_BRANCH = re.compile(r"constrained-\w+|str|int|float|bool|none|(literal|tuple)\[.*\]")
"""What pydantic adds to the path of a field that takes one of several types."""


def describe(error: ValidationError, most: int = 5) -> str:
    """A pydantic error in a line: `path: message (found …)`; types of one field joined by "or"."""
    told: dict[str, list[str]] = {}
    for item in error.errors():
        path, found = item["loc"], item.get("input")
        whole = isinstance(found, Mapping | tuple | list)
        if not whole and len(path) > 1 and _BRANCH.fullmatch(str(path[-1])):
            path = path[:-1]
        place = ".".join(map(str, path))
        after = "" if whole else f" (found {found!r:.80})"
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        told.setdefault(f"{place}: {{}}{after}" if place else "{}", []).append(message)
    lines = [form.replace("{}", " or ".join(m), 1) for form, m in told.items()]
    more = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {more} more" if more > 0 else "")


class Strict(BaseModel):
    """Data that does not change, and says which fields it has when it is given others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, *given: Any, **fields: Any) -> None:
        if given:
            known = ", ".join(type(self).model_fields) or "none"
            raise InvalidInputError(
                f"{type(self).__name__}({given[0]!r:.80}): fields are given by name; "
                f"known are: {known}"
            )
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidInputError(f"{type(self).__name__}: {describe(error)}") from error

    # Parts of a file are read past it, so that an error there keeps its whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields:
            raise InvalidInputError(
                f"{type(self).__name__}.{name} does not change; make another one: "
                f"model_copy(update={{{name!r}: …}})"
            )
        super().__setattr__(name, value)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        given = value if isinstance(value, Mapping) else {}
        if strange := [repr(name) for name in given if name not in cls.model_fields]:
            known = ", ".join(cls.model_fields) or "none"
            raise ValueError(f"unknown field {', '.join(strange)}; known are: {known}")
        return value


class Method(Strict):
    """Base of all methods: frozen hyper-parameters. A class lives alone in a file of
    `patches/methods/`.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    phases: ClassVar[tuple[Phase, ...]] = ("prefill",)
    """When the method can run."""
    dial: ClassVar[Dial | None] = None
    """The field that calibration turns."""
    full: ClassVar[dict[str, Any]] = {}
    """Values of the fields at which a method reads every key: what its tests hold against dense."""

    @property
    def kind(self) -> str:
        """The name under which `load` finds the class: its file's name, or `package:name` for
        other packages.
        """
        return kind_of(type(self))

    def calibrator(self, site: Site) -> Calibrator:
        """What calibration should try at `site`; the default walks the dial."""
        return Calibrator(self)

    @classmethod
    @cache
    def answers(cls) -> frozenset[str]:
        """The questions that this class answers itself."""
        asked = (
            "order",
            "index",
            "execution",
            "finish",
            "emit",
            "keep",
            "compress",
            "run",
            "rewire",
        )
        bases = (AttentionMethod, TokenMethod, CacheMethod, BlockMethod, Method)
        return frozenset(
            q
            for q in asked
            if any(q in vars(c) for c in cls.__mro__ if c not in bases and issubclass(c, Method))
        )


class Calibrator:
    """Watches dense calls of one site and names the settings worth measuring."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def tables(self) -> dict[str, Tensor]:
        """Side tensors of the site that the settings name, one row for each query head."""
        return {}

    def see(self, call: AttentionCall, out: Tensor, lse: Tensor) -> None:
        """One dense call with its output `[B, H, Nq, D]` and log-sum-exp `[B, H, Nq]`."""

    def settings(self) -> tuple[Method, ...]:
        """Methods to measure, from sparsest to densest."""
        dial = self.method.dial
        if dial is None:
            return (self.method,)
        return tuple(self.method.model_copy(update={dial.field: v}) for v in dial.values)


class AttentionMethod(Method):
    """Answers up to four questions about an attention call; an unanswered one keeps what dense
    attention does.

    A `static` method's index follows from the call's geometry alone: it is made once per shape and
    kept.
    """

    static: ClassVar[bool] = False

    def order(self, call: AttentionCall) -> Order | None:
        """In which order the tokens are laid out before blocking. None: as they come."""
        return None

    def index(self, call: AttentionCall) -> Pieces | None:
        """Which keys each query tile reads; sees q and k in kernel order. None: dense (short
        prompt, …).
        """
        return None

    def execution(self, call: AttentionCall) -> Execution | None:
        """With which arithmetic."""
        return None

    def finish(
        self, call: AttentionCall, out: Tensor, lse: Tensor, parts: tuple[Partial, ...]
    ) -> Tensor:
        """What happens to the output `[B, H, Nq, D]` afterwards."""
        return out

    def renewed(self, steps: int) -> float:
        """Share of `steps` denoising steps that run dense to renew what the others live on."""
        return 0.0

    def emit(self, call: AttentionCall, lse: Tensor | None) -> Pieces | None:
        """An index to store for other layers or steps, not to run: a dense anchor."""
        return None


class TokenMethod(Method):
    """Drops or merges tokens before a block."""

    def keep(self, stream: TokenStream) -> Kept | None:
        """Surviving positions. None: all."""
        return None


class CacheMethod(Method):
    """Rewrites what a layer remembers."""

    def compress(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """New stored keys, values and their positions. None: unchanged."""
        return None


class BlockMethod(Method):
    """Skips, repeats, thins out or fuses blocks and FFNs."""

    def run(self, call: BlockCall, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Around a block or its FFN."""
        return forward(call.hidden)

    def branches(self, methods: Sequence[Method]) -> Mapping[str, Sequence[Method]]:
        """The guidance branches that this method adds to the model's own, and what the attention
        methods beside it run there.
        """
        return {}

    def variants(self) -> Sequence[BlockMethod]:
        """Settings that are worth turning the dial of, each apart."""
        return (self,)

    def rewire(self, model: Any, undo: Any) -> None:
        """A structural change; every edit pushes its reverse onto `undo` (an `ExitStack`)."""


UNSERVED = frozenset({"keep", "compress", "run"})
"""Questions that nothing asks yet: token streams, caches and single blocks have no runner."""
_FOLDER = "accelkit.patches.methods"
_GROUP = "accelkit.methods"


def kind_of(cls: type[Method]) -> str:
    """The `kind` of a method class; classes from other packages are `package:name`."""
    folder, _, name = cls.__module__.rpartition(".")
    if folder == _FOLDER:
        return name
    for point in entry_points(group=_GROUP):
        module, _, attribute = point.value.partition(":")
        if module == cls.__module__ and attribute == cls.__qualname__:
            return f"{module.partition('.')[0]}:{point.name}"
    return f"{cls.__module__}:{cls.__qualname__}"


@cache
def names() -> tuple[str, ...]:
    """All methods at hand: the files of the folder, then the entry points of other packages."""
    folder = import_module(_FOLDER)
    own = sorted(m.name for m in iter_modules(folder.__path__) if not m.name.startswith("_"))
    other = sorted(
        f"{p.value.partition('.')[0].partition(':')[0]}:{p.name}"
        for p in entry_points(group=_GROUP)
    )
    return (*own, *other)


def load(name: str) -> type[Method]:
    """The class of a method by name: `load("flex_prefill")`, or `load("package:name")` for another
    package.

    Raises:
        UnknownMethodError: nothing of that name; the message lists what there is.
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"{name!r:.80} is no method's name; expected one of `methods()`")
    return _load(name)


@cache
def _load(name: str) -> type[Method]:
    package, _, point = name.partition(":")
    if point:
        for entry in entry_points(group=_GROUP):
            if entry.name == point and entry.value.startswith(package):
                return entry.load()
        raise UnknownMethodError(
            f"method {name!r}: no installed package offers it; install {package!r}"
        )
    if name not in names():
        bare = {n.replace("_", ""): n for n in names()}
        near = get_close_matches(name.lower().replace("_", "").replace("-", ""), bare, 1)
        meant = f" (did you mean {bare[near[0]]!r}?)" if near else ""
        raise UnknownMethodError(f"unknown method {name!r}{meant}; known are: {', '.join(names())}")
    module = import_module(f"{_FOLDER}.{name}")
    own = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Method) and c.__module__ == module.__name__
    ]
    if len(own) != 1:
        found = [c.__name__ for c in own]
        raise UnknownMethodError(f"{module.__file__}: expected one method class, found {found}")
    return own[0]
