"""The jobs of `quickstart`, step by step: a classifier, and a sentence encoder."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer import compression
from factorformer.cli._inputs import find_pooling, predictions, write
from factorformer.cli._jobs.embeddings import EmbeddingJob, evaluate_embeddings
from factorformer.cli._options import note
from factorformer.errors import CheckpointError
from factorformer.files import BEFORE, RESULT_FILE, check_output, output_directory
from factorformer.hf import card
from factorformer.hf.source import copy_companions, find, load_model, load_tokenizer, place_of_weights
from factorformer.layers.modes import has_bfloat16_products
from factorformer.layers.quantization import quantize
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory, latency
from factorformer.tasks.classification import load_classifier
from factorformer.tasks.data import Columns, Labels, batches, count_tokens, encode, hold_out, sample, unlike
from factorformer.tasks.docstrings import stdlib_docstrings
from factorformer.tasks.evaluation import evaluate
from factorformer.tasks.finetuning import TrainingSettings, train
from factorformer.tasks.healing import HealingSettings, heal
from factorformer.tasks.targets import Embeddings

# Nearly all of the time goes to training steps: epochs * TRAIN_ROWS / BATCH_SIZE, 225 for either model.
MODEL = "minilm"
RATIO = 3.0
MAX_LENGTH = 64
TRAIN_ROWS = 3600
CALIBRATION_ROWS = 512
BATCH_SIZE = 32
DENSE_EPOCHS = 2
COMPRESSED_EPOCHS = 2
LEARNING_RATE = 3e-4
CHECKED_ROWS = 64
"""Rows whose logits have to survive saving and loading bit for bit."""
TIMED_BATCHES = (1, 32)


FILES = ("original", "compressed", "train.jsonl", "test.jsonl")
"""What the directory holds beside the result."""

ENCODER_RATIO, ENCODER_MINUTES = 10.0, 1.0
"""Of the whole file, and of training."""


def demonstrate(target: Path, *, overwrite: bool) -> Result:
    """Fine-tune, compress, fine-tune again, measure, save, load in a new process."""
    check_output(target, overwrite=overwrite, known=FILES)
    started = time.perf_counter()
    path = find(MODEL)
    rows = stdlib_docstrings()
    names = Counter(sorted(rows["train"]["label"]))
    majority = rows["test"]["label"][:].count(names.most_common(1)[0][0]) / len(rows["test"])
    rows["train"] = rows["train"].take(min(TRAIN_ROWS, len(rows["train"])))
    note(
        f"{len(rows['train'])} docstrings to train on, {len(rows['test'])} to test on, {len(names)} classes; "
        f"always guessing the largest class scores {majority:.3f}"
    )
    tokenizer = load_tokenizer(path)
    columns, labels = Columns(("text",), "label"), Labels("classification", tuple(names))
    data = {name: encode(tokenizer, table, columns, labels, MAX_LENGTH) for name, table in rows.items()}
    settings = TrainingSettings(DENSE_EPOCHS, LEARNING_RATE, BATCH_SIZE)
    dense = load_classifier(path, labels, settings.seed).model
    with bars() as progress:
        seconds = {
            "train_original": train(
                dense, tokenizer, data["train"], settings, progress=progress, phase="train original"
            )
        }
        original = evaluate(dense, tokenizer, data["test"], labels, progress, "evaluate original")
        small = _copy(dense)
        fit_on = sample(data["train"], CALIBRATION_ROWS, settings.seed).remove_columns("labels")
        texts = list(batches(tokenizer, fit_on, BATCH_SIZE))
        begun = time.perf_counter()
        plan = compression.plan(small, ratio=RATIO, calibration=texts, progress=progress, keep_statistics=True)
        seconds["plan"] = time.perf_counter() - begun
        report = compression.compress(small, plan, texts, progress)
        for line in report.notes:
            note(line)
        settings = dataclasses.replace(settings, epochs=COMPRESSED_EPOCHS)
        seconds |= report.seconds
        seconds["train"] = train(
            small, tokenizer, data["train"], settings, teacher=dense, progress=progress, phase="train compressed"
        )
        metrics = evaluate(small, tokenizer, data["test"], labels, progress, "evaluate compressed")
        metrics |= {BEFORE + name: value for name, value in original.items()} | predictions(plan)
        metrics |= _latencies(dense, small, tokenizer, data["test"], progress)
    metrics["majority_accuracy"] = majority
    found = {
        "original": (dense, Result.of(inventory(dense), metrics=original, seed=settings.seed)),
        "compressed": (small, Result.of(report, method=report.method, metrics=metrics, seed=settings.seed)),
    }
    with output_directory(target, overwrite=overwrite, known=FILES) as partial:
        _write_rows(rows, partial)
        for name, (model, result) in found.items():
            result = dataclasses.replace(result, output=str(target / name))
            write(result, model, partial / name, tokenizer=tokenizer)
            prefix = BEFORE if name == "original" else ""
            metrics[f"{prefix}file_bytes"] = (partial / name / "model.safetensors").stat().st_size
        checked = data["test"].select(range(CHECKED_ROWS)).remove_columns("labels")
        _check_reload(partial / "compressed", small, next(batches(tokenizer, checked, CHECKED_ROWS)))
        seconds["total"] = time.perf_counter() - started
        result = dataclasses.replace(found["compressed"][1], metrics=metrics, seconds=seconds, output=str(target))
        (partial / RESULT_FILE).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    note(f"loaded in a new process: the logits of {CHECKED_ROWS} test rows are identical, bit for bit")
    return result


def demonstrate_encoder(target: Path, *, overwrite: bool) -> Result:
    """Compress a sentence encoder to a tenth of its file on plain text, and measure what it is used for."""
    check_output(target, overwrite=overwrite, known=FILES)
    started = time.perf_counter()
    path = find(MODEL)
    rows = stdlib_docstrings()
    note(f"{len(rows['train'])} docstrings to learn from, without labels, {len(rows['test'])} others to measure on")
    tokenizer, original, small = load_tokenizer(path), load_model(path), load_model(path)
    settings = HealingSettings(minutes=ENCODER_MINUTES, precision="bf16" if has_bfloat16_products() else "fp32")
    data = encode(tokenizer, rows["train"].select_columns("text"), Columns(("text",)), max_length=MAX_LENGTH)
    data, held = hold_out(data, settings.seed)
    data = data.select(unlike(data, held))
    texts = list(batches(tokenizer, sample(data, CALIBRATION_ROWS, settings.seed), BATCH_SIZE))
    counts = count_tokens([data], small.config.vocab_size)
    seconds: dict[str, float] = {}
    with bars() as progress:
        begun = time.perf_counter()
        options = {"calibration": texts, "token_counts": counts, "progress": progress}
        learned = Embeddings(find_pooling(path).pooler)
        plan = compression.plan(small, ratio=ENCODER_RATIO, scope="all", int4=True, keep_statistics=True, **options)
        seconds["plan"] = time.perf_counter() - begun
        report = compression.compress(small, plan, hold_floats=True, **options)
        for line in report.notes:
            note(line)
        curve = heal(
            small,
            original,
            data,
            settings,
            tokenizer=tokenizer,
            held=held,
            target=learned,
            report=note,
            progress=progress,
        )
        quantize(small)
    seconds |= {**report.seconds, "train": curve[-1]["seconds"]}
    with output_directory(target, overwrite=overwrite, known=FILES) as partial:
        _write_rows(rows, partial)
        compressed, test = partial / "compressed", partial / "test.jsonl"
        result = Result.of(
            plan, method=plan.method, seconds=seconds, seed=settings.seed, output=str(target / "compressed")
        )
        write(result, small, compressed, weights=compressed / place_of_weights(path))
        copy_companions(path, compressed)
        card.write(small, compressed, result.to_dict(), path)
        use = EmbeddingJob(
            str(compressed), MODEL, [str(test)], text=None, label=None, max_length=MAX_LENGTH, device="cpu"
        )
        metrics = dict(evaluate_embeddings(use).metrics)
        for prefix, folder in ((BEFORE, path), ("", compressed)):
            file = folder / place_of_weights(path) / "model.safetensors"
            metrics[f"{prefix}file_bytes"] = float(file.stat().st_size)
        seconds["total"] = time.perf_counter() - started
        result = dataclasses.replace(result, metrics=metrics, seconds=seconds, output=str(target))
        (partial / RESULT_FILE).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    return result


def _write_rows(tables: Mapping[str, datasets.Dataset], folder: Path) -> None:
    for name, table in tables.items():
        lines = (json.dumps(row) + "\n" for row in table)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        return load_model(Path(scratch))


def _latencies(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    progress: Progress,
) -> dict[str, float]:
    result: dict[str, float] = {}
    for done, size in enumerate(TIMED_BATCHES):
        batch = next(batches(tokenizer, data.select(range(size)).remove_columns("labels"), size))
        slow, fast = latency([dense, small], batch)
        result |= {f"{BEFORE}latency_ms_batch_{size}": slow, f"latency_ms_batch_{size}": fast}
        progress("measure latency", done + 1, len(TIMED_BATCHES))
    return result


RELOAD = """
import sys, torch, factorformer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
directory, inputs, logits = sys.argv[1:]
torch.set_num_threads({threads})
model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
with torch.inference_mode():
    save_file({{"logits": model(**load_file(inputs)).logits.clone()}}, logits)
"""
"""A user's program in a new process: nothing of the running one can help it."""


def _check_reload(directory: Path, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    with torch.inference_mode():
        expected = model.cpu().eval()(**inputs).logits
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({name: value.contiguous() for name, value in inputs.items()}, given)
        program = RELOAD.format(threads=torch.get_num_threads())
        command = [sys.executable, "-W", "ignore", "-c", program, str(directory), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"the saved model does not load in a new process: {last}")
        if not torch.equal(load_file(found)["logits"], expected):
            raise CheckpointError("the saved model gives other logits in a new process")
