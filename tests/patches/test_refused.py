"""Methods that cannot act on a model are refused by name, before anything is patched."""

from __future__ import annotations

import pytest
from tiny_cases import tiny_model

import accelkit
from accelkit.errors import InvalidInputError, UnsupportedConfigurationError
from accelkit.patches.method import BlockMethod, CacheMethod, TokenMethod
from accelkit.patches.patch import handle_of


class Thinning(TokenMethod):
    def keep(self, stream):
        return None


class Shrinking(CacheMethod):
    def compress(self, call):
        return None


class Skipping(BlockMethod):
    def run(self, call, forward):
        return call.hidden


@pytest.mark.parametrize(
    ("method", "words"), [(Thinning, "keep"), (Shrinking, "compress"), (Skipping, "run")]
)
def test_what_nothing_asks_yet(method, words):
    model = tiny_model()
    with pytest.raises(UnsupportedConfigurationError, match=f"{method.__name__}: .* to {words}"):
        accelkit.patch(model, method())
    assert handle_of(model) is None


@pytest.mark.parametrize("name", ["mag_cache", "gna"])
def test_methods_of_denoisers_and_language_models(name):
    model = tiny_model()
    with pytest.raises(InvalidInputError, match=f"{name}: no common phase .*prefill"):
        accelkit.patch(model, accelkit.method(name)())
    assert handle_of(model) is None


def test_two_answers_to_one_question_and_none_at_all():
    model, window, other = tiny_model(), accelkit.method("window"), accelkit.method("xattention")
    with pytest.raises(InvalidInputError, match=r"window and xattention both answer 'index'"):
        accelkit.patch(model, [window(), other()])
    with pytest.raises(InvalidInputError, match="no method"):
        accelkit.patch(model, [])
    assert handle_of(model) is None
