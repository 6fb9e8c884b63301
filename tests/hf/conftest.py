"""A tiny tokenizer, and a tiny model that reads what it writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="session")
def tokenizer() -> tf.PreTrainedTokenizerBase:
    """One token for each of the words w0 to w59."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def make_classifier() -> Callable[..., tf.PreTrainedModel]:
    """Build a tiny BERT classifier without dropout; `labels=1` is regression."""

    def make(labels: int = 2, dropout: float = 0.0) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        config = tf.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=len(SPECIAL) + len(WORDS),
            max_position_embeddings=40,
            num_labels=labels,
            initializer_range=0.2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        return tf.BertForSequenceClassification(config).eval()

    return make
