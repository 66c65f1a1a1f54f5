"""The clock of compilation listens to Triton, lets others listen, and goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

knobs = pytest.importorskip("triton").knobs


def compiled(seconds: float) -> None:
    """What Triton says after it has compiled a kernel."""
    times = SimpleNamespace(total=round(1e6 * seconds))
    knobs.compilation.listener(
        src=None, metadata={}, metadata_group={}, times=times, cache_hit=False
    )


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
