"""Without a GPU, Triton's interpreter stands in. The variable must be set before triton is
imported.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from interpreter import patch_language_once

os.environ["COLUMNS"] = "120"  # what commands print does not depend on the terminal

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    patch_language_once()


@pytest.fixture(scope="module")
def probes() -> Iterator[None]:
    """Plans may name the methods of tests/probe_methods."""
    from tiny_cases import probe_methods

    with probe_methods():
        yield


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what is imported stays; it need not be looked over again and again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Examples run for minutes: begun last, one of them would be waited for alone.
    items.sort(key=lambda item: "test_examples.py" not in item.nodeid)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
