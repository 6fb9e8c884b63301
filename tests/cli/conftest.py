"""A tiny model with a tokenizer, small tables, and the command line in this process."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
)
from typer.testing import CliRunner

from factorformer.cli.app import app
from factorformer.tasks import finetuning

GOOD = ["good", "fine", "great", "lovely"]
BAD = ["bad", "poor", "awful", "weak"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "film", "book", "and", *GOOD, *BAD]

Run = Callable[..., Any]
IMPORTED = (Trainer, finetuning)  # what most tests import sooner or later


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_stays() -> None:
    """Garbage is collected before and after each training: without a look at all that was imported, this is quick."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _products_timed_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of a plan is timed for as many rounds as it takes at least, and no longer."""
    monkeypatch.setattr("factorformer.bench.layers.PART", 0.0)


@pytest.fixture
def run() -> Run:
    """Run the command line with these arguments."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder as sentence-transformers lays it out: weights, tokenizer, modules, pooling, clutter."""
    path = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        hidden_dropout_prob=0.0,
        initializer_range=0.1,  # large enough for blocks to change what passes through them
    )
    BertModel(config).save_pretrained(path)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(path)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 24,   "do_lower_case": false}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    (path / "README.md").write_text("the model card of the original")
    (path / "onnx").mkdir()
    (path / "onnx" / "model.onnx").write_bytes(b"weights")
    return path


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small tables: a task of two classes, a regression, pairs, plain text, and broken ones."""
    path = tmp_path_factory.mktemp("tables")
    rows = [
        {"text": f"{word} {word} {thing}", "label": label, "score": score + 0.25 * i, "other": f"the {word}"}
        for i, thing in enumerate(["film", "book"])
        for label, score, words in (("plus", 1.0, GOOD), ("minus", 0.0, BAD))
        for word in words
    ]
    write = {
        "train.jsonl": rows,
        "unseen.jsonl": [*rows[:4], {**rows[0], "label": "never"}],
        "numbered.jsonl": [{**row, "label": int(row["label"] == "plus")} for row in rows],
    }
    for name, content in write.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    (path / "nulls.jsonl").write_text('{"text": "a film"}\n{"text": null}\n{"text": null}\n')
    (path / "two.txt").write_text("a film\nthe book\n")
    (path / "words.jsonl").write_text('{"text": ["a", "film"], "label": "plus"}\n')
    (path / "long.txt").write_text("a film\n" + "the book " * 20 + "\n")
    lines = ["text\tlabel"] + [f"{row['text']}\t{row['label']}" for row in rows]
    (path / "train.tsv").write_text("\n".join(lines) + "\n")
    (path / "texts.txt").write_text("".join(f"{row['text']}\n" for row in rows * 2))
    (path / "empty.jsonl").touch()
    (path / "broken.jsonl").write_text('{"text": "a film", "label": \n{[')
    return path


@pytest.fixture(scope="session")
def trained(base: Path, tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model fine-tuned by the command line."""
    path = tmp_path_factory.mktemp("trained") / "dense"
    training = ["--train", tables / "train.jsonl", "--epochs", 10, "--batch-size", 4, "--lr", 3e-3]
    arguments = ["finetune", base, path, *training]
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return path


@pytest.fixture
def base_copy(base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A causal language model whose tokenizer knows no padding."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    source = tmp_path / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]").save_pretrained(source)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "initializer_range": 0.3}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), bos_token_id=3, eos_token_id=3, **sizes)).save_pretrained(source)
    return source
