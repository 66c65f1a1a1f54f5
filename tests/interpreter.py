"""Triton's interpreter, in less time.

It looks its whole language over in every call of a device function, for members to replace by its
own: a third of what a kernel takes there. Nothing is left to replace after the first call from a
module in a launch.
"""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """Replace the members of Triton's language once a launch and module."""
    from triton.runtime import interpreter

    patch, launch = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    done: set[int] = set()
    if patch is None:
        return  # another Triton: slower, no less right

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None  # whoever puts things back is the launch, which comes first
        done.add(module)
        return patch(function)

    def anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = anew
