"""The tiny tokenizer and model of the tests of the plug-in."""

from tests.hf.conftest import make_classifier, tokenizer

__all__ = ["make_classifier", "tokenizer"]
