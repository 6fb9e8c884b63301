"""The tiny tokenizer and model of the tests of the plug-in."""

import datasets
import numpy as np
import pytest
from tests.hf.conftest import make_classifier, tokenizer
from transformers import PreTrainedTokenizerBase, Trainer

from factorformer.tasks.data import Columns, encode

__all__ = ["make_classifier", "sentences", "tokenizer"]

IMPORTED = (Trainer,)
"""What most tests import sooner or later."""


def sentences(rows: int = 48) -> datasets.Dataset:
    """Texts of one to six words, which the two classes take from different halves of the vocabulary."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, rows)
    words = [30 * label + generator.integers(0, 30, generator.integers(1, 7)) for label in labels]
    return datasets.Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in words], "label": labels})


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    return encode(tokenizer, sentences(), Columns(("text",)))
