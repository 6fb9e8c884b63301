"""What `compress` does, step by step."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer import compression, recipes
from factorformer.bench.layers import slower_than_dense
from factorformer.cli._inputs import (
    fit_plan,
    hold_out,
    load_teacher,
    note_new_head,
    plain_columns,
    predictions,
    read_table,
    save,
)
from factorformer.cli._options import note
from factorformer.errors import DataError, ModelError
from factorformer.hf.source import find, load_model, load_tokenizer
from factorformer.layers.matrix import Scope
from factorformer.planning import Plan, Share, Unit, left_dense
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory
from factorformer.report.result import BEFORE
from factorformer.tasks.classification import labels_for, load_classifier
from factorformer.tasks.data import Columns, Labels, batches, check_lengths, encode, sample
from factorformer.tasks.finetuning import TrainingSettings, compare_embeddings, embed, evaluate, train
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.straight_through import StraightThrough

COMPARED = 1000
"""Embeddings are compared on at most so many rows: the similarities are those of all pairs."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The options of `compress`, checked; their help texts say what they are."""

    model: str
    output: str
    method: str | None
    ratio: float | None
    budget: Unit
    int8: bool
    scope: Scope
    include: list[str] | None
    exclude: list[str] | None
    share: Share | None
    plan: Plan | None
    columns: Columns
    regression: bool
    train: str | None
    evaluation: str | None
    calibration: str | None
    calibration_rows: int
    max_length: int
    epochs: float
    learning_rate: float
    batch_size: int
    seed: int
    freeze_embeddings: bool
    distill: str | None
    overwrite: bool


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model and its data, read and checked before any long work starts.

    Args:
        model: still dense.
        tokenizer: None where there is no text at all.
        labels: of the task, in the order of the model's head; None without one.
        fresh: the head is new: its predictions mean nothing yet.
        train, evaluation, calibration: encoded rows.
        teacher: to learn from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    labels: Labels | None
    fresh: bool
    train: datasets.Dataset | None
    evaluation: datasets.Dataset | None
    calibration: datasets.Dataset | None
    teacher: PreTrainedModel | None


def run(job: Job) -> Result:
    """Plan, fit, train, measure, save."""
    started = time.perf_counter()
    path = find(job.model)
    ready = _prepare(job, path)
    model = ready.model
    calibration = _calibration_batches(job, ready)
    if job.plan is None:
        with bars() as progress:
            plan = compression.plan(
                model,
                job.method,
                job.ratio,
                job.scope,
                job.include,
                job.exclude,
                share=job.share,
                budget=job.budget,
                int8=job.int8,
                calibration=calibration,
                progress=progress,
            )
    else:
        plan = fit_plan(job.plan, model)
    for line in left_dense(plan.entries, plan.original.bytes):
        note(f"left dense: {line}")
    warnings = slower_than_dense(plan.entries, model.device)
    for line in warnings:
        note(f"slower: {line}")
    chosen = plan.method or recipes.default_method(calibrated=calibration is not None)
    with bars() as progress:
        before = _measure(ready, progress, "evaluate original")
        through = ready.train is not None and recipes.get(chosen).training == "straight-through"
        ranks, straight, seconds = None, None, {}
        if ready.train is not None and recipes.get(chosen).allocation == "dynamic":
            begun = time.perf_counter()
            ranks = DynamicRank(model, plan, calibration, progress=progress)
            seconds["start"] = time.perf_counter() - begun
        else:
            dense = copy.deepcopy(model) if through else None
            report = compression.compress(
                model, plan, calibration, progress, keep_statistics=through, hold_floats=ready.train is not None
            )
            plan = report.plan
            for line in report.notes:
                note(f"left dense: {line}")
            straight = None if dense is None else StraightThrough(model, report.statistics, dense)
            dense, seconds = None, dict(report.seconds)
            del report  # its statistics are large
        if ready.train is not None and ready.tokenizer is not None:
            settings = TrainingSettings(
                job.epochs, job.learning_rate, job.batch_size, job.seed, freeze_embeddings=job.freeze_embeddings
            )
            seconds["train"] = train(
                model,
                ready.tokenizer,
                ready.train,
                settings,
                teacher=ready.teacher,
                straight=straight,
                ranks=ranks,
                progress=progress,
            )
            compression.quantize(model)
        after = _measure(ready, progress, "evaluate", trained=ready.train is not None)
    seconds["total"] = time.perf_counter() - started
    result = Result.of(
        plan if ranks is None else inventory(model, plan.scope),
        method=chosen,
        metrics=predictions(plan) | _metrics(before, after),
        seconds=seconds,
        seed=None if ready.tokenizer is None else job.seed,
        output=job.output,
        warnings=warnings,
    )
    history = None if ranks is None else ranks.history
    # Whatever lies beside the weights belongs to the model as it was; a new head makes it a model for something else.
    if ready.fresh:
        save(result, model, overwrite=job.overwrite, tokenizer=ready.tokenizer, history=history)
    else:
        save(result, model, overwrite=job.overwrite, companions=path, history=history)
    return result


def _prepare(job: Job, path: Path) -> Prepared:
    columns, label = job.columns, job.columns.label
    needs_labels = recipes.get(job.method).needs == "labelled text" if job.method else False
    rows: dict[str, datasets.Dataset] = {}
    columns_of: dict[str, Columns] = {}
    for name, source in (("train", job.train), ("evaluation", job.evaluation), ("calibration", job.calibration)):
        if source is None:
            continue
        plain = label is None or (name == "calibration" and not needs_labels)
        columns_of[name] = plain_columns(source, columns) if plain else columns
        rows[name] = read_table(source, columns_of[name])
    tokenizer = load_tokenizer(path) if rows else None
    labels, fresh, precision = None, False, torch.float32 if job.train is not None else None
    if label is not None and "train" in rows:
        classifier = load_classifier(path, Labels.of(rows["train"], label, job.regression), job.seed, precision)
        note_new_head(classifier)
        model, labels, fresh = classifier.model, classifier.labels, not classifier.trained
    else:
        model = load_model(path, precision)
        if label is not None:
            # `compress` drops a label that nothing reads: without training, one of these two is labelled.
            labels = labels_for(path, rows["evaluation" if "evaluation" in rows else "calibration"], label)
    if fresh and needs_labels:
        raise DataError(
            f"method '{job.method}' measures the model on labels, but '{job.model}' has no head trained for them: "
            "run `factorformer finetune` first and compress its output"
        )
    data = {
        name: encode(tokenizer, table, columns_of[name], labels, job.max_length)
        for name, table in rows.items()
        if tokenizer is not None
    }
    for name, encoded in data.items():
        check_lengths(model, encoded, f"the {name} data")
    if label is None and "train" in data and "evaluation" not in data:
        data["train"], data["evaluation"] = hold_out(data["train"], job.seed)
        if job.calibration == job.train:  # what is measured on is not calibrated on
            data["calibration"] = data["train"]
    if labels is None and "evaluation" in data:
        data["evaluation"] = sample(data["evaluation"], COMPARED, job.seed)
        if model.config.is_encoder_decoder:
            raise ModelError(f"'{job.model}' is an encoder and a decoder: embeddings of texts are not defined for it")
    teacher = None if job.distill is None else load_teacher(job.distill, model, labelled=labels is not None)
    names = ("train", "evaluation", "calibration")
    return Prepared(model, tokenizer, labels, fresh, *(data.get(name) for name in names), teacher=teacher)


def _calibration_batches(job: Job, ready: Prepared) -> list[dict[str, Tensor]] | None:
    if ready.calibration is None or ready.tokenizer is None:
        return None
    rows = sample(ready.calibration, job.calibration_rows, job.seed)
    return list(batches(ready.tokenizer, rows, job.batch_size))


def _measure(
    ready: Prepared, progress: Progress, phase: str, *, trained: bool = False
) -> dict[str, float] | Tensor | None:
    """Metrics of a task, or embeddings of plain text; None without data, or where a new head knows nothing yet."""
    if ready.evaluation is None or ready.tokenizer is None or (ready.fresh and not trained):
        return None
    if ready.labels is not None:
        return evaluate(ready.model, ready.tokenizer, ready.evaluation, ready.labels, progress, phase)
    return embed(ready.model, ready.tokenizer, ready.evaluation)


def _metrics(before: dict[str, float] | Tensor | None, after: dict[str, float] | Tensor | None) -> dict[str, float]:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return compare_embeddings(before, after)
    earlier = before if isinstance(before, dict) else {}
    later = after if isinstance(after, dict) else {}
    return {**{BEFORE + name: value for name, value in earlier.items()}, **later}
