"""Progress as a person sees it."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from accelkit.calibration.journal import Journal
from accelkit.calibration.session import Bar, Run


@pytest.fixture(autouse=True)
def _nobody_asked_for_silence(monkeypatch) -> None:
    monkeypatch.delenv("ACCELKIT_PROGRESS", raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, wanted: bool = True) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with Bar(wanted) as bar:
        bar.expect(4)
        for stage in ("measuring", "screening", "measuring"):
            bar.tell(stage)
    return stream.getvalue()


def test_a_terminal_has_a_bar_with_the_time_that_is_left(monkeypatch) -> None:
    last = shown(monkeypatch, Terminal()).split("\r")[-1]
    assert last.startswith("measuring")
    assert "75%" in last
    assert re.search(r"\d\d:\d\d so far, at most \d\d:\d\d left", last), last


def test_a_stage_is_named_as_it_begins(monkeypatch) -> None:
    """The first one, too, which may take a minute."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar(True) as bar:
        bar.expect(9)
        bar.tell("timing kernels")
        assert "timing kernels" in sys.stderr.getvalue()


def test_a_log_has_each_stage_once(monkeypatch) -> None:
    assert shown(monkeypatch, io.StringIO()) == "measuring\nscreening\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_silence_is_kept(monkeypatch, stream) -> None:
    assert shown(monkeypatch, stream(), wanted=False) == ""
    monkeypatch.setenv("ACCELKIT_PROGRESS", "0")
    assert shown(monkeypatch, stream()) == ""


@pytest.mark.parametrize(
    ("spent", "share", "seconds", "late"),
    [(50, 0.9, 0, False), (91, 0.9, 0, True), (50, 0.9, 49, False), (50, 0.9, 51, True)],
)
def test_what_would_not_end_in_time_is_not_begun(monkeypatch, spent, share, seconds, late) -> None:
    run = Run(None, None, (), {}, Journal(None, {}, False), None, print, deadline=100.0, begun=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(time, "monotonic", lambda: float(spent))
    assert run.late(share, "it", seconds) is late
    assert run.skipped == ["it"] * late
