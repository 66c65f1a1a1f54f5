"""How long this process compiles kernels, as Triton tells it, and how threads share the work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from threading import Lock
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

FIRST = "lower"
"""Module whose kernels run before all others wherever lists are run."""
_notes: list[Callable[[float], None]] = []
"""What tells the open clocks of time since some moment."""


@contextmanager
def clock(cached: bool = True) -> Iterator[Callable[[], float]]:
    """Gives a function that says for how many seconds something was compiled since it was opened;
    kernels that were compiled at once count once. Without `cached` kernels that lay in Triton's
    cache do not count, which are looked up, read and put on the device in no time but not in none.
    """
    spans: list[tuple[float, float]] = []  # apart, ascending
    before, load = knobs.compilation.listener, CompiledKernel._init_handles
    compile_now = JITFunction._do_compile

    def note(begin: float) -> None:
        end = time.monotonic()
        with lock:
            while spans and spans[-1][1] > begin:
                begin = min(begin, spans.pop()[0])
            spans.append((begin, end))

    def hear(**compiled: Any) -> None:
        if cached or not compiled["cache_hit"]:
            note(time.monotonic() - compiled["times"].total / 1e6)
        if before is not None:
            before(**compiled)

    def loaded(kernel: CompiledKernel) -> None:
        begin, new = time.monotonic(), kernel.module is None
        load(kernel)
        if new:
            note(begin)

    def compiled(self: Any, *arguments: Any) -> Any:
        begin = time.monotonic()
        try:
            return compile_now(self, *arguments)
        finally:
            note(begin)

    lock = Lock()
    knobs.compilation.listener = hear
    if cached:
        CompiledKernel._init_handles = loaded
        JITFunction._do_compile = compiled
        _notes.append(note)
    try:
        yield lambda: sum(end - begin for begin, end in spans)
    finally:
        knobs.compilation.listener = before
        CompiledKernel._init_handles = load
        JITFunction._do_compile = compile_now
        if cached:
            _notes.remove(note)


def count(begin: float) -> None:
    """Let the open clocks, those with what is cached, count the time since `begin`."""
    for note in _notes:
        note(begin)


@contextmanager
def once() -> Iterator[None]:
    """While it is open, threads that want the same kernel compile it once. Triton lets each compile
    its own, which takes as many processors as there are threads.
    """
    _settle()
    compile_now = JITFunction._do_compile
    locks: dict[Any, Lock] = defaultdict(Lock)

    def shared(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        with guard:
            lock = locks[id(self), key, device]
        with lock:
            known = self.device_caches[device][0].get(key)
            if known is not None:
                return known
            return compile_now(self, key, signature, device, *rest)

    guard = Lock()
    JITFunction._do_compile = shared
    try:
        yield
    finally:
        JITFunction._do_compile = compile_now


def _settle() -> None:
    """Hash every kernel in one order. Triton 3.6 gives a kernel another key when functions that it
    calls were hashed before it, so that threads would leave in the cache what no process finds.
    """
    package = __package__ or ""
    names = {m.name for m in iter_modules(import_module(package).__path__)}
    for name in (FIRST, *sorted(names - {FIRST})):
        try:
            module = import_module(f"{package}.{name}")
        except (ImportError, AttributeError):  # this Triton lacks what it is made of
            continue
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                _ = kernel.cache_key
