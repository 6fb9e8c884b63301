"""Vocabularies without what a text does not use: it reads as before, and everything else can still be read."""

from __future__ import annotations

import random
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from factorformer.errors import ModelError
from factorformer.tasks.data import Columns, count_tokens, encode
from factorformer.tasks.vocabulary import trim_model, trimmed_tokenizer, used_tokens

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def corpus(seed: int) -> list[str]:
    draw, syllables = random.Random(seed), ["ka", "lo", "mi", "tu", "re", "zan", "pol", "qui", "ther", "x"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(400)]


@pytest.fixture(scope="module", params=["WordPiece", "BPE", "byte-level BPE", "Unigram"])
def tokenizer(request: pytest.FixtureRequest) -> tf.PreTrainedTokenizerBase:
    kind, texts = request.param, corpus(0)
    options = {"special_tokens": SPECIAL, "vocab_size": 400}
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer, trainer = pre_tokenizers.Whitespace(), trainers.WordPieceTrainer(**options)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder, trainer = decoders.Metaspace(), trainers.UnigramTrainer(**options, unk_token="[UNK]")
    elif kind == "BPE":
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        made.pre_tokenizer, trainer = pre_tokenizers.Whitespace(), trainers.BpeTrainer(**options)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**{**options, "vocab_size": 600}, initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    numbers = [("[CLS]", made.token_to_id("[CLS]")), ("[SEP]", made.token_to_id("[SEP]"))]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=numbers)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def counted(tokenizer: tf.PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    rows = encode(tokenizer, datasets.Dataset.from_dict({"text": texts}), Columns(("text",)))
    return count_tokens([rows], len(tokenizer))


def test_a_text_reads_as_before(tokenizer: tf.PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = corpus(0)[:40]
    kept = used_tokens(tokenizer, counted(tokenizer, texts))
    assert len(kept) < len(tokenizer)
    small = trimmed_tokenizer(tokenizer, kept)
    assert len(small) == len(kept)
    small.save_pretrained(tmp_path)
    for again in (small, tf.AutoTokenizer.from_pretrained(tmp_path)):
        before, after = tokenizer(texts)["input_ids"], again(texts)["input_ids"]
        assert [[int(kept[number]) for number in row] for row in after] == before
        assert again.decode(after[0], skip_special_tokens=True) == tokenizer.decode(before[0], skip_special_tokens=True)
        for name in ("pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id"):
            assert int(kept[getattr(again, name)]) == getattr(tokenizer, name), name
    # What the text does not use is spelled.
    others = corpus(1)
    assert all(small.unk_token_id not in row for row in small(others)["input_ids"])
    assert sum(map(len, small(others)["input_ids"])) > sum(map(len, tokenizer(others)["input_ids"]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_computes_as_before(tokenizer: tf.PreTrainedTokenizerBase, tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.BertConfig(**sizes, vocab_size=len(tokenizer), tie_word_embeddings=tied)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
    model = tf.BertForMaskedLM(config).eval()
    texts = corpus(0)[:9]
    kept = used_tokens(tokenizer, counted(tokenizer, texts))
    small = trimmed_tokenizer(tokenizer, kept)
    with torch.inference_mode():
        before = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        trim_model(model, kept)
        after = model(**small(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(after, before[:, :, kept])
    assert model.config.vocab_size == len(kept)
    assert model.config.pad_token_id == small.pad_token_id == model.get_input_embeddings().padding_idx
    assert model.config.eos_token_id == small.sep_token_id
    model.save_pretrained(tmp_path)
    again = tf.BertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(**small(texts, padding=True, return_tensors="pt")).logits, after)


def test_what_cannot_be_trimmed_says_so(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    slow = tf.ByT5Tokenizer()
    with pytest.raises(ModelError, match="ByT5Tokenizer"):
        used_tokens(slow, torch.ones(len(slow), dtype=torch.int64))
    model = tf.ViTModel(tf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24))
    with pytest.raises(ModelError, match="no table of tokens"):
        trim_model(model, torch.arange(3))
    bert = tf.BertModel(tf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ModelError, match=r"token 9, and the model 9"):
        trim_model(bert, torch.tensor([0, 9]))
