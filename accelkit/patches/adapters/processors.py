"""The one thing that a processor does before attention and that cannot be left to it: some spread
their padding mask over all pairs of tokens, N² bytes in every block.

Such a processor is derived from its own source without those lines, so that its padding mask
`[B, N]` reaches attention as it is. It stays an instance of the original class. Its dense calls
leave the padding out instead of masking it, and equal the original's up to rounding.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from contextlib import ExitStack
from functools import cache
from typing import Any

from torch import nn

from accelkit.errors import UnsupportedModelError

SPREAD = "self_attn_mask"
"""What the names of spread masks begin with."""


def keep_padding(module: nn.Module, undo: ExitStack) -> None:
    """Let the processor of an attention module pass its padding mask on."""
    before = module.processor
    after: Any = object.__new__(_derived(type(before)))
    vars(after).update(vars(before))
    module.processor = after
    undo.callback(setattr, module, "processor", before)


class _Drop(ast.NodeTransformer):
    """Removes the assignments that spread a mask."""

    dropped = 0

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | None:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if any(name.startswith(SPREAD) for name in names):
            self.dropped += 1
            return None
        return node


@cache
def _derived(cls: type) -> type:
    function = cls.__call__
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError as error:
        raise UnsupportedModelError(
            f"{cls.__name__}: its source is not at hand, so its N×N mask cannot be avoided"
        ) from error
    drop = _Drop()
    tree = drop.visit(ast.parse(textwrap.dedent("".join(lines))))
    if not drop.dropped:
        raise UnsupportedModelError(
            f"{cls.__name__}: expected assignments to {SPREAD!r} in its __call__, found none; "
            "use the diffusers release that accelkit was tested with"
        )
    ast.increment_lineno(tree, first - 1)
    made: dict[str, Any] = {}
    code = compile(tree, inspect.getsourcefile(function) or "<processor>", "exec")
    exec(code, vars(sys.modules[cls.__module__]), made)
    return type(f"Accelkit{cls.__name__}", (cls,), {"__call__": made["__call__"]})
