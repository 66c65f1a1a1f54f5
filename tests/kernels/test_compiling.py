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


def test_seconds_add_up_and_listeners_stay() -> None:
    from accelkit.kernels._triton import compiling

    before = knobs.compilation.listener
    with compiling.clock() as outer:
        compiled(0.5)
        with compiling.clock() as inner:
            compiled(2.0)
        compiled(0.25)
        assert (outer(), inner()) == (2.75, 2.0)
    assert knobs.compilation.listener is before
    assert outer() == 2.75
