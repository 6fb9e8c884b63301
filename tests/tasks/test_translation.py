"""Translation from scratch: parallel text, training that can be resumed, beam search, scores."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import factorformer
from factorformer.errors import DataError, ModelError, OutputError
from factorformer.tasks.checkpoints import last_checkpoint
from factorformer.tasks.from_scratch import ScratchSettings, train
from factorformer.tasks.language_modelling import predict
from factorformer.tasks.reproducible import EpochSampler
from factorformer.tasks.tokenization import train_tokenizer
from factorformer.tasks.translation import bleu, encode, read_parallel, translate

NUMBERS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five", "sechs": "six"}
FAST = ScratchSettings(steps=12, batch_size=8, learning_rate=5e-3, points=3)
SHORT = dataclasses.replace(FAST, steps=4, points=1)


def pairs(rows: int = 44) -> list[tuple[str, str]]:
    random = np.random.default_rng(0)
    chosen = [random.choice(list(NUMBERS), random.integers(1, 6)) for _ in range(rows)]
    return [(" ".join(words), " ".join(NUMBERS[w] for w in words)) for words in chosen]


@pytest.fixture(scope="module")
def words() -> tf.PreTrainedTokenizerFast:
    return train_tokenizer([text for pair in pairs() for text in pair], 290)


Make = Callable[..., tf.PreTrainedModel]


@pytest.fixture
def make() -> Make:
    """A tiny Marian with dropout, dense or factorized."""

    def fresh(kind: str = "dense", **options: Any) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in SIZES.items()}
        config = tf.MarianConfig(
            **{
                **sizes,
                "d_model": 32,
                "vocab_size": 290,
                "max_position_embeddings": 40,
                "pad_token_id": 0,
                "eos_token_id": 1,
                "forced_eos_token_id": None,
                "decoder_start_token_id": 0,
                "scale_embedding": True,
                **options,
            }
        )
        model = tf.MarianMTModel(config)
        if kind != "dense":
            factorformer.initialize(model, factorformer.plan(model, kind, ratio=3, scope="all"))
        return model

    return fresh


SIZES = {"layers": 1, "ffn_dim": 64, "attention_heads": 4}


@pytest.fixture(scope="module")
def encoded(words: tf.PreTrainedTokenizerFast) -> datasets.Dataset:
    return encode(pairs(), words, 40)


# Data


def test_reads_pairs_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffEin  Haus.\r\n\nmit\u2028Zeile \nÜ".encode())
    (tmp_path / "b").write_bytes(b"A house.\n\nwith\x0cline\nU\n")
    expected = [("Ein  Haus.", "A house."), ("mit\u2028Zeile ", "with\x0cline"), ("Ü", "U")]
    assert read_parallel(tmp_path / "a", tmp_path / "b") == expected
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert read_parallel(tmp_path / "a.gz", tmp_path / "b") == expected
    (tmp_path / "a").write_bytes(b"Stra\xdfe\n")
    (tmp_path / "b").write_bytes(b"street\n")
    notes: list[str] = []
    assert read_parallel(tmp_path / "a", tmp_path / "b", notes.append) == [("Straße", "street")]
    assert "line 1, column 5" in notes[0]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (None, b"x\n", "/a'"),
        (b"x\ny\n", b"x\n", r"/a' has 2 lines .*/b' has 1\b"),
        (b"x\n\n", b"x\ny\n", "line 2 of '.*/a' is empty"),
        (b"x\ny\n", b"x\n \n", "line 2 of '.*/b' is empty"),
        (b"\xff\xfe\n", b"x\n", "/a' .*UTF-16"),
        (b"x\xff\x01\n", b"x\n", "/a'.*line 1, column 2.*0xff"),
        (b"a\n\x00\n", b"x\ny\n", "/a'.*line 2, column 1.*zero"),
        (b"", b"x\n", "/a' is empty"),
        (b"\n", b"\n", "/a'.*/b'.* no text"),
    ],
)
def test_refuses_files_that_are_no_pairs(source: bytes | None, target: bytes, message: str, tmp_path: Path) -> None:
    if source is not None:
        (tmp_path / "a").write_bytes(source)
    (tmp_path / "b").write_bytes(target)
    with pytest.raises(DataError, match=message):
        read_parallel(tmp_path / "a", tmp_path / "b")


def test_encodes_both_sides(words: tf.PreTrainedTokenizerFast) -> None:
    told = []
    rows = encode([("eins zwei", "one two"), ("drei " * 30, "three")], words, 12, lambda *step: told.append(step))
    assert rows["labels"][0] == words("one two")["input_ids"]
    assert rows["length"] == [max(len(rows["input_ids"][0]), len(rows["labels"][0])), 12]
    assert rows["input_ids"][1][-1] == words.eos_token_id
    assert told == [("encode", 2, 2)] * 2  # of each side


def test_refuses_to_encode_what_cannot_be_learned(
    words: tf.PreTrainedTokenizerFast, tokenizer: tf.PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match="no pairs"):
        encode([], words)
    with pytest.raises(DataError, match="end of text"):
        encode(pairs(), tokenizer)


@pytest.mark.parametrize("rows", [1, 7, 8, 1000, 1003])
def test_order_holds_every_row_once_and_depends_on_seed_and_epoch_alone(rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, rows).tolist()
    sampler = EpochSampler(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(3)
    assert first == list(sampler)
    assert sorted(first) == list(range(rows))
    assert len(sampler) == rows
    if rows >= 1000:
        sampler.set_epoch(1)
        assert first != list(sampler)
        assert first != list(EpochSampler(lengths, 8, seed=4))
        spread = [np.ptp(np.asarray(lengths)[first[i : i + 8]]) for i in range(0, 8 * (rows // 8), 8)]
        assert np.mean(spread) < 5
        assert np.corrcoef(np.arange(rows // 8), [lengths[row] for row in first[: 8 * (rows // 8) : 8]])[0, 1] < 0.5


# Training


def test_learns_to_translate(words: tf.PreTrainedTokenizerFast, make: Make, encoded: Any, tmp_path: Path) -> None:
    model, told = make(dropout=0.0, d_model=64), []
    settings = dataclasses.replace(FAST, steps=400, learning_rate=5e-3, label_smoothing=0.0)
    curve = train(
        model, words, encoded, encoded, "translation", settings, tmp_path, lambda *step: told.append(step), "learn"
    )
    assert told == [("learn", step, 400) for step in range(1, 401)]
    assert [row["step"] for row in curve] == [134, 268, 400]
    assert set(curve[0]) == {"step", "epoch", "loss", "validation_loss", "learning_rate", "seconds"}
    assert curve[-1]["validation_loss"] < 0.1 < curve[0]["validation_loss"]
    assert 0 < curve[0]["seconds"] < curve[-1]["seconds"]
    assert curve[-1]["epoch"] == pytest.approx(400 / 6)
    texts, references = map(list, zip(*pairs(), strict=True))
    for beams in (1, 3):
        assert bleu(translate(model, words, texts, beams, 40, batch=16), references)["bleu"] > 95


@pytest.mark.parametrize("kind", ["dense", "svd", "shapeshifter"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    kind: str, words: tf.PreTrainedTokenizerFast, make: Make, encoded: Any, tmp_path: Path
) -> None:
    whole = make(kind)
    curve = train(whole, words, encoded, encoded, "translation", FAST, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(phase: str, done: int, total: int | None) -> None:
        if done == 10:
            raise Killed

    with pytest.raises(Killed):
        train(make(kind), words, encoded, encoded, "translation", FAST, tmp_path / "cut", kill)
    (tmp_path / "cut" / "checkpoint-9").mkdir()  # another interruption, in the middle of writing
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-8"
    torch.manual_seed(1)
    resumed = make(kind)
    again = train(resumed, words, encoded, encoded, "translation", FAST, tmp_path / "cut")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in (curve, again)]
    assert untimed[0] == untimed[1]
    assert again[2]["seconds"] >= again[1]["seconds"] >= again[0]["seconds"] > 0  # rounded
    # A finished run returns at once.
    finished = make(kind)
    at_once = train(finished, words, encoded, encoded, "translation", FAST, tmp_path / "cut")
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in at_once] == untimed[0]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, finished.state_dict()[name]), name
    # Checkpoints are model directories.
    whole.save_pretrained(tmp_path / "saved")
    texts = [source for source, _ in pairs()[:6]]
    expected = translate(whole, words, texts, 2, 20)
    for folder in (last_checkpoint(tmp_path / "whole"), tmp_path / "saved"):
        loaded = factorformer.load(folder)  # type: ignore[arg-type]
        assert loaded.num_parameters() == whole.num_parameters()
        assert translate(loaded, words, texts, 2, 20) == expected


def test_bf16_follows_fp32_and_leaves_no_autocast_behind(
    words: tf.PreTrainedTokenizerFast, make: Make, encoded: Any, tmp_path: Path
) -> None:
    curves = {}
    for precision in ("fp32", "bf16"):
        model = make(dropout=0.0)
        settings = dataclasses.replace(FAST, precision=precision)
        curves[precision] = train(model, words, encoded, encoded, "translation", settings, tmp_path / precision)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert "forward" not in vars(model)
    for a, b in zip(curves["fp32"], curves["bf16"], strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], rel=0.02)
        assert a["validation_loss"] != b["validation_loss"]


def test_loss_counts_tokens_and_no_padding(words: tf.PreTrainedTokenizerFast, make: Make, encoded: Any) -> None:
    model = make()
    total, tokens = 0.0, 0
    model.eval()
    for row in encoded:
        labels = torch.tensor([row["labels"]])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
        total += float(F.cross_entropy(logits[0], labels[0], reduction="sum"))
        tokens += labels.numel()
    model.train()
    for batch_size in (1, 16):
        found = predict(model, words, encoded, "translation", batch_size)
        assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert model.training
    assert math.isfinite(total)


def test_refuses_what_cannot_be_trained(
    words: tf.PreTrainedTokenizerFast, make: Make, make_classifier: Make, encoded: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"BertForSequenceClassification.*single texts"):
        train(make_classifier(), words, encoded, encoded, "translation", FAST, tmp_path)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 290}
    model = tf.T5ForConditionalGeneration(tf.T5Config(**sizes))
    with pytest.raises(ModelError, match="no decoder_start_token_id"):
        train(model, words, encoded, encoded, "translation", FAST, tmp_path)
    with pytest.raises(DataError, match=r"training data.* \d+ (token|position)"):
        train(make(max_position_embeddings=4), words, encoded, encoded, "translation", FAST, tmp_path)
    settings = dataclasses.replace(FAST, learning_rate=1e30, clip=1e30)
    with pytest.raises(ModelError, match="diverged"):
        train(make(), words, encoded, encoded, "translation", settings, tmp_path / "diverged")


def test_goes_on_with_the_same_settings_only(
    words: tf.PreTrainedTokenizerFast, make: Make, encoded: Any, tmp_path: Path
) -> None:
    train(make(), words, encoded, encoded, "translation", SHORT, tmp_path)
    with pytest.raises(OutputError, match=r"learning_rate was 0\.005, not 0\.001"):
        train(make(), words, encoded, encoded, "translation", dataclasses.replace(SHORT, learning_rate=1e-3), tmp_path)
    with pytest.raises(OutputError, match="parameters was"):
        train(make("svd"), words, encoded, encoded, "translation", SHORT, tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match="cannot read"):
        train(make(), words, encoded, encoded, "translation", SHORT, tmp_path)
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


# Translations and scores


def test_translations_keep_the_order_of_the_texts(words: tf.PreTrainedTokenizerFast, make: Make) -> None:
    model, texts = make(), [source for source, _ in pairs(9)]
    told: list[Any] = []
    together = translate(model, words, texts, 2, 20, 4, lambda *step: told.append(step))
    assert told == [("translate", done, 9) for done in (4, 8, 9)]
    assert [translate(model, words, [text], 2, 20)[0] for text in texts] == together
    assert translate(model, words, []) == []


def test_scores() -> None:
    perfect = bleu(["A cat sits here now."], ["A cat sits here now."])
    assert (perfect["bleu"], perfect["chrf"]) == (pytest.approx(100), pytest.approx(100))
    assert "case:mixed" in str(perfect["bleu_signature"])
    assert "version:" in str(perfect["chrf_signature"])
    assert bleu(["a b c d"], ["w x y z"])["bleu"] < 1
    for hypotheses, references in ((["a"], []), ([], [])):
        with pytest.raises(DataError, match="cannot be scored"):
            bleu(hypotheses, references)
