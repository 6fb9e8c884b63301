"""A tokenizer trained on one's own text: exact, complete, and an ordinary tokenizer after saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf

from factorformer.errors import DataError
from factorformer.tasks.tokenization import SPECIAL, train_tokenizer

TEXTS = ["Zwei junge, weiße Männer sind im Freien.", "Two young, White males are outside near many bushes."] * 3


@pytest.fixture(scope="module")
def trained() -> tf.PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize(
    "text",
    [
        "Two young, White males!",
        " leading and trailing ",
        "don't  stop , ever .",
        "tab\tand\nnewline",
        "</s> <pad> are characters here",
        "日本語 🙂 \u2028 e\u0301",
        "",
    ],
)
def test_decoding_gives_back_the_text(trained: tf.PreTrainedTokenizerFast, text: str) -> None:
    ids = trained(text)["input_ids"]
    assert ids[-1] == trained.eos_token_id
    assert not set(ids[:-1]) & set(trained.all_special_ids)
    assert trained.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_and_size(trained: tf.PreTrainedTokenizerFast) -> None:
    assert (trained.pad_token_id, trained.eos_token_id, trained.bos_token_id) == (0, 1, 2)
    assert trained.unk_token is None
    assert len(trained) == trained.vocab_size == 300
    cut = trained(TEXTS[0], truncation=True, max_length=5)["input_ids"]
    assert len(cut) == 5
    assert cut[-1] == trained.eos_token_id


@pytest.mark.parametrize("beside", [None, tf.MarianConfig(), tf.T5Config()])
def test_survives_saving(
    trained: tf.PreTrainedTokenizerFast, beside: tf.PreTrainedConfig | None, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    if beside is not None:
        beside.save_pretrained(tmp_path)
    loaded = tf.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "</s> x", " Übung"):
        assert loaded(text)["input_ids"] == trained(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded.pad(loaded(TEXTS))["input_ids"][0][-1] == 0 or len(set(map(len, loaded(TEXTS)["input_ids"]))) == 1


def test_the_same_text_gives_the_same_tokenizer(trained: tf.PreTrainedTokenizerFast) -> None:
    told = []
    again = train_tokenizer(iter(TEXTS), 300, lambda *step: told.append(step))
    assert again.get_vocab() == trained.get_vocab()
    assert told == [("tokenizer", len(TEXTS), len(TEXTS))]


def test_errors() -> None:
    with pytest.raises(DataError, match=rf"100 tokens.* {256 + len(SPECIAL)}\b"):
        train_tokenizer(TEXTS, 100)
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(texts, 300)
    with pytest.raises(DataError, match=r" \d+ tokens.* 50000"):
        train_tokenizer(TEXTS, 50000)
