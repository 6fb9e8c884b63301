"""The tiny tokenizer and model of the tests of the plug-in."""

import gc

import pytest
from tests.hf.conftest import make_classifier, tokenizer
from transformers import Trainer

__all__ = ["make_classifier", "tokenizer"]

IMPORTED = (Trainer,)  # what most tests import sooner or later


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_stays() -> None:
    """Garbage is collected before and after each training: without a look at all that was imported, this is quick."""
    gc.collect()
    gc.freeze()
