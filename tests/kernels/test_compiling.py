"""The clock of compilation listens to Triton, lets others listen, and goes; threads share work."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

knobs = pytest.importorskip("triton").knobs


def compiled(seconds: float, hit: bool = False) -> None:
    """What Triton says after it has compiled a kernel."""
    times = SimpleNamespace(total=round(1e6 * seconds))
    knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=hit)


@pytest.fixture
def now(monkeypatch):
    """A moment to be set."""
    from accelkit.kernels._triton import compiling

    moment = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(compiling.time, "monotonic", lambda: moment.seconds)
    return moment


def test_seconds_add_up_and_listeners_stay(now) -> None:
    from accelkit.kernels._triton import compiling

    before = knobs.compilation.listener
    with compiling.clock() as outer:
        compiled(0.5)
        with compiling.clock() as inner:
            now.seconds += 2.0
            compiled(2.0)
        now.seconds += 1.0
        compiled(0.25)
        assert (outer(), inner()) == (2.75, 2.0)
    assert knobs.compilation.listener is before
    assert outer() == 2.75


def test_what_a_process_does_once_counts_the_first_time(now, monkeypatch) -> None:
    from accelkit.calibration import session
    from accelkit.kernels._triton import compiling

    monkeypatch.setattr(session, "_known", set())
    monkeypatch.setattr(session.time, "monotonic", lambda: now.seconds)
    with compiling.clock() as spent, compiling.clock(cached=False) as anew:
        for again in (False, True):
            with session.first_use("libraries") as new:
                assert new == (not again)
                now.seconds += 2.0
                compiled(0.5)  # within them
            now.seconds += 1.0
        assert spent() == 2.0 + 0.5  # the second time the kernel alone
        assert anew() == 0.5 + 0.5


def test_kernels_compiled_at_once_count_once(now) -> None:
    from accelkit.kernels._triton import compiling

    with compiling.clock() as spent:
        compiled(1.0)  # 99 … 100
        now.seconds += 1.0
        compiled(0.5)  # 100.5 … 101
        assert spent() == 1.5
        now.seconds += 1.0
        compiled(1.75)  # 100.25 … 102 joins the second
        assert spent() == 2.75
        compiled(4.0)  # 98 … 102 holds all of them
        assert spent() == 4.0


def test_threads_compile_a_kernel_once(monkeypatch) -> None:
    from accelkit.kernels._triton import compiling

    class Kernel:
        def __init__(self) -> None:
            self.device_caches = {0: ({},)}

    compiled: list[str] = []

    def compile_now(kernel, key, signature, device):
        time.sleep(0.05)
        compiled.append(key)
        kernel.device_caches[device][0][key] = f"code of {key}"
        return f"code of {key}"

    monkeypatch.setattr(compiling.JITFunction, "_do_compile", compile_now)
    kernel = Kernel()
    with compiling.once(), ThreadPoolExecutor(4) as pool:
        wanted = pool.map(
            lambda key: compiling.JITFunction._do_compile(kernel, key, None, 0), "aabba"
        )
        assert list(wanted) == [f"code of {key}" for key in "aabba"]
    assert sorted(compiled) == ["a", "b"]
    assert compiling.JITFunction._do_compile is compile_now


def test_kernels_in_the_cache_do_not_count_when_told_so(now) -> None:
    from accelkit.kernels._triton import compiling

    with compiling.clock() as every, compiling.clock(cached=False) as new:
        compiled(2.0, hit=True)
        assert (every(), new()) == (2.0, 0.0)
        now.seconds += 3.0
        compiled(1.0)
        assert (every(), new()) == (3.0, 1.0)


def test_putting_kernels_on_the_device_counts_with_reading_them(now, monkeypatch) -> None:
    from accelkit.kernels._triton import compiling

    def load(kernel) -> None:
        if kernel.module is None:
            now.seconds += 0.5
            kernel.module = "on the device"

    monkeypatch.setattr(compiling.CompiledKernel, "_init_handles", load)
    kernel = SimpleNamespace(module=None)
    with compiling.clock() as every, compiling.clock(cached=False) as new:
        for _ in range(3):  # every launch asks
            compiling.CompiledKernel._init_handles(kernel)
            now.seconds += 1.0
        assert (every(), new()) == (0.5, 0.0)
    assert compiling.CompiledKernel._init_handles is load
