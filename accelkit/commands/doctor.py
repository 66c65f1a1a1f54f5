"""`accelkit doctor`: what this machine can run."""

from __future__ import annotations

from accelkit import console
from accelkit.console import AsJson, Talk


def doctor(as_json: AsJson = False, talk: Talk = None) -> None:
    """Show versions, GPUs, which kernels would serve and why, and environment variables."""
    console.verbosity(talk)
    from accelkit.doctor import examine, render

    found = examine()
    console.emit(found, as_json, *([] if as_json else [render(found)]))
