"""Without a GPU, Triton's interpreter stands in. The variable must be set before triton is
imported.
"""

from __future__ import annotations

import os

import pytest
import torch

os.environ["COLUMNS"] = "120"  # what commands print does not depend on the terminal

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
