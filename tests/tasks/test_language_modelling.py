"""Language models from scratch: packing, labels, perplexity, training that can be resumed, reloading."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import factorformer
from factorformer.errors import DataError, ModelError, OutputError
from factorformer.tasks import language_modelling
from factorformer.tasks.architectures import Architecture, Task, new_model
from factorformer.tasks.from_scratch import ScratchSettings, train
from factorformer.tasks.language_modelling import (
    MASKED,
    collator,
    encode,
    predict,
    training_collator,
    with_labels,
)
from factorformer.tasks.tokenization import train_tokenizer

FAST = ScratchSettings(steps=12, batch_size=8, learning_rate=5e-3, points=3, label_smoothing=0.0)
SIZES = {
    "bert": ["hidden_size=32", "num_hidden_layers=2", "intermediate_size=64", "max_position_embeddings=24"],
    "gpt2": ["n_embd=32", "n_layer=2", "n_positions=24"],
    "llama": ["hidden_size=32", "num_hidden_layers=2", "intermediate_size=64"],
}
TASKS: dict[str, Task] = {"bert": "masked", "gpt2": "causal", "llama": "causal"}


def texts(rows: int = 60) -> list[str]:
    random = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six"]
    return [" ".join(words[(start + i) % 6] for i in range(8)) for start in random.integers(0, 6, rows)]


def words(task: Task) -> tf.PreTrainedTokenizerFast:
    return train_tokenizer(texts(), 280 + (task == "masked"), task=task)


def make(name: str, method: str = "shapeshifter") -> tf.PreTrainedModel:
    architecture = Architecture.of(name, SIZES[name])
    model = new_model(architecture.for_tokenizer(words(TASKS[name])), TASKS[name])
    if method != "dense":
        factorformer.initialize(model, factorformer.plan(model, method, ratio=1.8, scope="all"))
    return model


# Packing


def test_blocks_hold_every_token_once() -> None:
    tokenizer = words("causal")
    data = encode(["one two", "", "  ", "three"], tokenizer, "causal", max_length=4)
    end = tokenizer.eos_token_id
    plain = tokenizer(["one two", "three"])["input_ids"]
    assert [token for block in data["input_ids"] for token in block] == [end, *plain[0], end, *plain[1], end]
    assert all(len(block) == 4 for block in data["input_ids"][:-1])
    assert data["length"] == [len(block) for block in data["input_ids"]]


def test_blocks_of_a_masked_model_are_framed() -> None:
    tokenizer = words("masked")
    data = encode(texts(), tokenizer, "masked", max_length=10)
    for block in data["input_ids"]:
        assert (block[0], block[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(block) <= 10


def test_a_causal_tokenizer_appends_nothing_and_a_masked_one_knows_its_mask(tmp_path: Path) -> None:
    for task, tokens in (("causal", ["one"]), ("masked", ["<s>", "one", "</s>"])):
        words(task).save_pretrained(tmp_path / task)
        again = tf.AutoTokenizer.from_pretrained(tmp_path / task)
        assert again.convert_ids_to_tokens(again("one")["input_ids"]) == tokens
    assert "<mask>" in again.convert_ids_to_tokens(again("one <mask>")["input_ids"])
    assert (again.mask_token_id, len(again)) == (3, 281)


@pytest.mark.parametrize("lines", [[], ["", " \n"]])
def test_there_has_to_be_text(lines: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        encode(lines, words("causal"), "causal")


def test_there_has_to_be_room() -> None:
    with pytest.raises(DataError, match=r"--max-length of 3 .*at least 4"):
        encode(texts(), words("masked"), "masked", max_length=3)


# Labels


def test_a_causal_model_predicts_its_inputs_and_no_padding() -> None:
    tokenizer = words("causal")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token  # which is predicted where a text ends
    end = tokenizer.eos_token_id
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, end], [8, 9]], "length": [3, 2]})
    rows = with_labels(rows, tokenizer, "causal").remove_columns("length")
    batch = collator(tokenizer, make("gpt2"))(list(rows))
    assert batch["input_ids"].tolist() == [[5, 6, end], [8, 9, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, end], [8, 9, -100]]
    assert tokenizer.padding_side == "left"


def test_hidden_tokens_are_drawn_once_to_measure_and_anew_to_train() -> None:
    tokenizer = words("masked")
    data = encode(texts(200), tokenizer, "masked", max_length=16)
    first, second = with_labels(data, tokenizer, "masked"), with_labels(data, tokenizer, "masked")
    assert first["labels"] == second["labels"]
    special = np.isin(np.concatenate(data["input_ids"]), tokenizer.all_special_ids)
    chosen = np.concatenate(first["labels"]) != -100
    assert not chosen[special].any()
    assert chosen[~special].mean() == pytest.approx(MASKED, abs=0.03)
    for ids, hidden, block in zip(data["input_ids"], first["labels"], first["input_ids"], strict=True):
        assert all(label in (-100, token) for label, token in zip(hidden, ids, strict=True))
        assert all(token == seen for label, token, seen in zip(hidden, ids, block, strict=True) if label == -100)
    rows = [{"input_ids": block} for block in data["input_ids"][:8]]
    collate = training_collator(tokenizer, make("bert"), "masked")
    assert not collate(rows)["labels"].equal(collate(rows)["labels"])


def test_a_masked_model_needs_a_mask() -> None:
    with pytest.raises(ModelError, match="mask token"):
        training_collator(words("causal"), make("bert"), "masked")


# Perplexity


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_perplexity_is_that_of_the_models_own_loss(name: str) -> None:
    model, tokenizer = make(name).eval(), words("causal")
    data = encode(texts(9), tokenizer, "causal", max_length=16)
    total, tokens = 0.0, 0
    for block in data["input_ids"]:  # one at a time, without padding
        ids = torch.tensor([block])
        with torch.inference_mode():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(block) - 1)
        tokens += len(block) - 1
    steps: list[int] = []
    found = predict(model, tokenizer, data, "causal", batch_size=4, progress=lambda _, done, __: steps.append(done))
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert 0 <= found["token_accuracy"] <= 1
    assert (found["tokens"], found["window"], found["stride"]) == (tokens, 16, 16)
    written = [tokenizer.decode(block[1:], skip_special_tokens=True) for block in data["input_ids"]]
    size = sum(len(text.encode()) for text in written)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert steps[-1] == len(data)


def test_predictions_beside_those_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = words("causal")
    data = encode(texts(9), tokenizer, "causal", max_length=16)
    model, original = make("gpt2").eval(), make("gpt2", "dense").eval()
    divergence, same, tokens = 0.0, 0, 0
    for block in data["input_ids"]:
        with torch.inference_mode():
            ours, theirs = (each(input_ids=torch.tensor([block])).logits[0, :-1] for each in (model, original))
        p = theirs.softmax(-1)
        divergence += float((p * (p.log() - ours.softmax(-1).log())).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        tokens += len(block) - 1
    monkeypatch.setattr(language_modelling, "PLACES", 5)  # in several parts
    found = predict(model, tokenizer, data, "causal", 4, original=original)
    assert found["next_token_divergence"] == pytest.approx(divergence / tokens, rel=1e-3)
    assert found["next_token_agreement"] == pytest.approx(same / tokens)
    alone = [predict(each, tokenizer, data, "causal", 3) for each in (model, original)]
    for name in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
        assert found[name] == pytest.approx(alone[0][name], rel=1e-4)
        assert found[f"original_{name}"] == pytest.approx(alone[1][name], rel=1e-4)
    itself = predict(original, tokenizer, data, "causal", original=original)
    assert itself["next_token_divergence"] == pytest.approx(0, abs=1e-6)
    assert itself["next_token_agreement"] == 1


def test_a_masked_model_is_measured_on_its_hidden_tokens() -> None:
    model, tokenizer = make("bert").eval(), words("masked")
    data = encode(texts(), tokenizer, "masked", max_length=16)
    hidden = with_labels(data, tokenizer, "masked")
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for ids, labels in zip(hidden["input_ids"], hidden["labels"], strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            total += float(F.cross_entropy(logits, torch.tensor(labels), ignore_index=-100, reduction="sum"))
            tokens += sum(label != -100 for label in labels)
    assert predict(model, tokenizer, data, "masked")["loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_predictions_that_are_no_numbers() -> None:
    model, tokenizer = make("gpt2", "dense"), words("causal")
    data = encode(texts(), tokenizer, "causal", max_length=16)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        predict(model, tokenizer, data, "causal")


# Training


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("method", ["shapeshifter", "dense"])
def test_training_lowers_the_perplexity_and_reloads_identically(name: str, method: str, tmp_path: Path) -> None:
    task, model, tokenizer = TASKS[name], make(name, method), words(TASKS[name])
    data, held = (encode(rows, tokenizer, task, max_length=16) for rows in (texts(), texts(12)))
    before = predict(model, tokenizer, held, task)
    seen: list[tuple[str, int, int | None]] = []
    curve = train(model, tokenizer, data, held, task, FAST, tmp_path / "run", lambda *step: seen.append(step))
    after = predict(model, tokenizer, held, task)
    assert after["loss"] < 0.9 * before["loss"]
    assert seen == [("train", step + 1, 12) for step in range(12)]
    assert [row["step"] for row in curve] == [4, 8, 12]
    assert curve[-1]["validation_loss"] == pytest.approx(after["loss"], rel=1e-4)
    assert not model.training
    model.save_pretrained(tmp_path / "saved")
    again = factorformer.load(tmp_path / "saved")
    state = again.state_dict()
    assert all(tensor.equal(state[key]) for key, tensor in model.state_dict().items())
    ids = torch.tensor(data["input_ids"][:4])
    with torch.inference_mode():
        assert model(ids).logits.equal(again(ids).logits)
    if task == "causal":
        prompt = tokenizer("one two", return_tensors="pt")
        written = [m.generate(**prompt, max_new_tokens=8, do_sample=False) for m in (model, again)]
        assert written[0].equal(written[1])


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    """Within an epoch and where one begins; the hidden tokens of a masked model are the same ones as well."""
    task, tokenizer = TASKS[name], words(TASKS[name])
    data, held = (encode(rows, tokenizer, task, max_length=16) for rows in (texts(), texts(12)))
    epoch = math.ceil(len(data) / FAST.batch_size)
    settings = dataclasses.replace(FAST, steps=2 * epoch, points=2 * epoch)

    def run(model: tf.PreTrainedModel, folder: str, stop: int = 2 * epoch) -> list[dict[str, float]]:
        def kill(phase: str, done: int, total: int | None) -> None:
            if done > stop:
                raise KeyboardInterrupt

        return train(model, tokenizer, data, held, task, settings, tmp_path / folder, kill)

    fresh = make(name)
    whole = copy.deepcopy(fresh)
    curve = run(whole, "whole")
    for stop in (epoch, epoch + 1):
        with pytest.raises(KeyboardInterrupt):
            run(copy.deepcopy(fresh), f"{stop}", stop)
        assert (tmp_path / f"{stop}" / f"checkpoint-{stop}").exists()
        torch.rand(5)
        resumed = make(name)
        again = run(resumed, f"{stop}")
        assert [row["step"] for row in again] == list(range(1, 2 * epoch + 1))
        assert [row["loss"] for row in again] == [row["loss"] for row in curve]
        assert all(a.equal(b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_what_training_refuses(tmp_path: Path) -> None:
    tokenizer = words("causal")
    data = encode(texts(), tokenizer, "causal", max_length=32)
    with pytest.raises(DataError, match="--max-length of at most 24"):
        train(make("gpt2"), tokenizer, data, data, "causal", FAST, tmp_path / "a")
    marian = new_model(Architecture.of("marian", ["d_model=32", "encoder_layers=1"]).build({}), "translation")
    with pytest.raises(ModelError, match=r"MarianMTModel.*pairs"):
        train(marian, tokenizer, data, data, "causal", FAST, tmp_path / "b")
    short = encode(texts(), tokenizer, "causal", max_length=16)
    train(make("gpt2"), tokenizer, short, short, "causal", FAST, tmp_path / "c")
    other = dataclasses.replace(FAST, batch_size=4)
    with pytest.raises(OutputError, match="batch_size was 8, not 4"):
        train(make("gpt2"), tokenizer, short, short, "causal", other, tmp_path / "c")
