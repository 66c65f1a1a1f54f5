"""A tiny model, its tokenizer and a plan for it."""

from __future__ import annotations

import pytest
from tiny_cases import byte_tokenizer, probe_methods, tiny_model, tiny_plan


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def plan(model):
    with probe_methods():
        yield tiny_plan(model)
