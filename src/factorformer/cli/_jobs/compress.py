"""The job of `compress`, step by step."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import datasets
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer import compression, recipes
from factorformer.bench.layers import slower_than_dense
from factorformer.cli._inputs import (
    about,
    calibration_batches,
    check_dense,
    check_teacher,
    encode_table,
    fit_plan,
    hold_out,
    load_teacher,
    note_new_head,
    plain_columns,
    predictions,
    read_table,
    save,
    saved,
    update,
)
from factorformer.cli._measure import Measured, check_measurable, compare, measure
from factorformer.cli._options import note
from factorformer.errors import DataError, MethodError
from factorformer.hf.source import find, load_model, load_tokenizer, read_config
from factorformer.layers.matrix import Scope
from factorformer.layers.quantization import quantize
from factorformer.planning import Plan, Share, Unit, left_dense
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory
from factorformer.tasks.classification import Head, find_head, labels_for, load_classifier
from factorformer.tasks.data import Columns, Labels, check_lengths, sample
from factorformer.tasks.finetuning import TrainingSettings, train
from factorformer.tasks.trainer import in_full_precision
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.rank_history import RankHistory
from factorformer.training.straight_through import StraightThrough

COMPARED = 1000
"""Embeddings are compared on at most so many rows: the similarities are those of all pairs."""


@dataclasses.dataclass(frozen=True)
class CompressJob:
    """The options of `compress`; their help texts say what they are."""

    model: str
    output: str
    method: str | None
    ratio: float | None
    budget: Unit | None
    int8: bool
    scope: Scope | None
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
    settings: TrainingSettings
    distill: str | None
    device: str
    overwrite: bool

    @property
    def chosen(self) -> str:
        """The method, by default the data-aware one where there is text."""
        method = self.method if self.plan is None else self.plan.method
        return method or recipes.default_method(calibrated=self.calibration is not None or self.train is not None)

    @property
    def needs(self) -> str:
        """What data the fit of the method needs."""
        return recipes.get(self.chosen).needs


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is read and checked before the weights of a model are.

    Args:
        path: the model's directory.
        tokenizer: None where there is no text at all.
        labels: of the task, in the order of the model's head; None without one.
        head: where the head to train comes from; None if none is trained.
        train, evaluation, calibration: encoded rows.
    """

    path: Path
    tokenizer: PreTrainedTokenizerBase | None
    labels: Labels | None
    head: Head | None
    train: datasets.Dataset | None
    evaluation: datasets.Dataset | None
    calibration: datasets.Dataset | None

    @property
    def fresh(self) -> bool:
        """The head is new: its predictions mean nothing yet."""
        return self.head is not None and not self.head.trained


def run(job: CompressJob) -> Result:
    """Check, plan, fit, train, save, measure."""
    started = time.perf_counter()
    job = check(job)
    inputs = read_inputs(job)
    model = _load(job, inputs)
    calibration = None
    if inputs.calibration is not None and inputs.tokenizer is not None:
        rows, size = job.calibration_rows, job.settings.batch_size
        calibration = calibration_batches(model, inputs.tokenizer, inputs.calibration, rows, job.settings.seed, size)
    plan, warnings = _plan(job, model, calibration)
    with bars() as progress:
        before = None if inputs.fresh else _measure(inputs, model, progress, "evaluate original")
        restore = in_full_precision(model) if inputs.train is not None else None
        plan, history, seconds = _fit(job, inputs, model, plan, calibration, progress)
        if restore is not None:
            restore()
    result = Result.of(
        plan if history is None else inventory(model, plan.scope),
        method=job.chosen,
        metrics=predictions(plan) | compare(before, None),
        seconds=seconds | {"total": time.perf_counter() - started},
        seed=None if inputs.tokenizer is None else job.settings.seed,
        output=job.output,
        warnings=warnings,
    )
    # Whatever lies beside the weights belongs to the model as it was; a new head makes it a model for something else.
    tokenizer, companions = (inputs.tokenizer, None) if inputs.fresh else (None, inputs.path)
    save(result, model, overwrite=job.overwrite, tokenizer=tokenizer, companions=companions, history=history)
    if inputs.evaluation is None:
        return result
    with saved(job.output, "compressed"):
        with bars() as progress:
            after = _measure(inputs, model, progress, "evaluate")
        seconds |= {"total": time.perf_counter() - started}
        result = dataclasses.replace(result, metrics=predictions(plan) | compare(before, after), seconds=seconds)
        update(result)
    return result


# Options


def check(job: CompressJob) -> CompressJob:
    """Refuse options that do not go together, and drop, with a note, what nothing reads.

    Raises:
        MethodError: an unknown method, or options of methods that do not go together.
        DataError: data, or the name of a column, that is missing.
        BudgetError: a ratio that no model can meet.
    """
    _check_method(job)
    _check_data(job)
    recipe, label, untrained = recipes.get(job.chosen), job.columns.label, job.train is None
    unread = job.needs == "nothing" and untrained and job.evaluation is None and job.calibration is not None
    for happens, text in (
        (unread, "measures nothing: --calibration is not used"),
        (recipe.training == "none" and not untrained, "is a fit without training, which --train adds to it"),
        (
            recipe.training == "straight-through" and untrained,
            "learns in training: without --train, this is its start alone",
        ),
        (
            recipe.allocation == "dynamic" and untrained,
            "finds its ranks in training: without --train, all matrices shrink alike",
        ),
    ):
        if happens:
            note(f"method '{job.chosen}' {text}")
    measured = job.calibration is not None or job.train is not None
    given = job.method if job.plan is None else job.plan.method
    note(
        f"method: {job.chosen}"
        + ("" if given else f" (the default {'with' if measured else 'without'} calibration data)")
    )
    if label is not None and untrained and job.evaluation is None and job.needs != "labelled text":
        note(f"method '{job.chosen}' reads no labels: --label is not used without --train or --eval")
        job = dataclasses.replace(job, columns=dataclasses.replace(job.columns, label=None))
    return dataclasses.replace(job, calibration=(job.calibration or job.train) if job.needs != "nothing" else None)


def _check_method(job: CompressJob) -> None:
    options = (job.method, job.ratio, job.budget, job.scope, job.include, job.exclude, job.share)
    if job.plan is not None and (job.int8 or any(option is not None for option in options)):
        raise MethodError(
            "--plan holds method, budget, scope, patterns, sharing and int8 already: leave these options out"
        )
    if recipes.get(job.chosen).training == "from scratch":
        raise MethodError(
            f"method '{job.chosen}' trains a new model from scratch, not the weights of one: use `factorformer train`, "
            "or method 'kronecker' to fit these"
        )
    compression.check_options(job.chosen, job.ratio, job.share, job.budget or "bytes")


def _check_data(job: CompressJob) -> None:
    label = job.columns.label
    if job.distill is not None and job.train is None:
        raise DataError("--distill needs text to learn on: give --train")
    if job.train is not None and label is None and job.distill is None:
        raise DataError("training needs labels or a teacher: give --label, or --distill with the original model")
    if label is not None and job.train is None and job.evaluation is None and job.calibration is None:
        raise DataError("--label is the name of a column: give --train, --eval or --calibration")
    if job.regression and label is None:
        raise DataError("--regression is about labels: name their column with --label")
    if job.needs != "nothing" and job.calibration is None and job.train is None:
        raise DataError(
            f"method '{job.chosen}' needs {job.needs} to measure on: give --calibration or --train, or use 'svd'"
        )
    if job.needs == "labelled text" and label is None:
        raise DataError(f"method '{job.chosen}' needs labelled text: name the column of the labels with --label")


# Data


def read_inputs(job: CompressJob) -> Inputs:
    """Read all data, and check that it fits the model, of which nothing but the configuration is looked at.

    Raises:
        DataError: data that is missing, malformed, too little, or does not fit the model.
        ModelError: no such model, a head for another task, or a teacher that does not fit.
    """
    path, label = find(job.model), job.columns.label
    config = read_config(path)
    check_dense(path)
    labelled = {"train": job.train, "evaluation": job.evaluation} if label is not None else {}
    if job.needs == "labelled text":
        labelled["calibration"] = job.calibration
    sources = {"train": job.train, "evaluation": job.evaluation, "calibration": job.calibration}
    sources = {name: source for name, source in sources.items() if source is not None}
    columns: dict[str, Columns] = {name: job.columns for name in sources if labelled.get(name) is not None}
    tables = {name: read_table(sources[name], job.columns) for name in columns}
    for name in sources.keys() - columns.keys():
        columns[name] = plain_columns(sources[name], job.columns)
        tables[name] = read_table(sources[name], columns[name])
    labels, head = _task(job, path, {name: tables[name] for name in labelled if name in tables})
    if head is not None and not head.trained and job.needs == "labelled text":
        raise DataError(
            f"method '{job.chosen}' measures the model on labels, but '{job.model}' has no head trained for them: "
            "run `factorformer finetune` first and compress its output"
        )
    if job.distill is not None:
        check_teacher(job.distill, path, head)
    tokenizer = load_tokenizer(path) if tables else None
    data: dict[str, datasets.Dataset] = {}
    for name, rows in tables.items():
        assert tokenizer is not None
        known = labels if columns[name].label is not None else None
        data[name] = encode_table(sources[name], rows, columns[name], tokenizer, known, job.max_length, path)
    seed = job.settings.seed
    if label is None and job.train is not None and job.evaluation is None:
        data["train"], data["evaluation"] = hold_out(data["train"], seed)
        if job.calibration == job.train:  # what is measured on is not calibrated on
            data["calibration"] = data["train"]
    if labels is None and "evaluation" in data:
        check_measurable(config, data["evaluation"], job.evaluation or job.train or "")
        data["evaluation"] = sample(data["evaluation"], COMPARED, seed)
    names = ("train", "evaluation", "calibration")
    return Inputs(path, tokenizer, labels, head, *(data.get(name) for name in names))


def _task(job: CompressJob, path: Path, tables: Mapping[str, datasets.Dataset]) -> tuple[Labels | None, Head | None]:
    """What labels mean, and the head that is trained on them, if one is."""
    label = job.columns.label
    if label is None or not tables:
        return None, None
    name = next(name for name in ("train", "evaluation", "calibration") if name in tables)
    with about(getattr(job, name)):
        if name != "train":
            return labels_for(path, tables[name], label), None
        head = find_head(path, Labels.of(tables[name], label, job.regression, job.columns.words))
    note_new_head(head)
    return head.labels, head


# Model


def _load(job: CompressJob, inputs: Inputs) -> PreTrainedModel:
    """The model in its own precision, with the head that is to be trained."""
    if inputs.head is None:
        model = load_model(inputs.path, device=job.device)
    else:
        model = load_classifier(inputs.path, inputs.head.labels, job.settings.seed, None, job.device).model
    for name in ("train", "evaluation", "calibration"):
        data = getattr(inputs, name)
        if data is not None:
            check_lengths(model, data, f"the {name} data")
    return model


def _plan(
    job: CompressJob, model: PreTrainedModel, calibration: list[dict[str, Tensor]] | None
) -> tuple[Plan, list[str]]:
    """The plan, and warnings about it, which are printed as well."""
    if job.plan is not None:
        plan = fit_plan(job.plan, model)
    else:
        with bars() as progress:
            plan = compression.plan(
                model,
                job.method,
                job.ratio,
                job.scope,
                job.include,
                job.exclude,
                share=job.share,
                budget=job.budget or "bytes",
                int8=job.int8,
                calibration=calibration,
                progress=progress,
            )
    for line in left_dense(plan.entries, plan.original.bytes):
        note(f"left dense: {line}")
    warnings = list(slower_than_dense(plan.entries, model.device))
    for line in warnings:
        note(f"slower: {line}")
    return plan, warnings


def _fit(
    job: CompressJob,
    inputs: Inputs,
    model: PreTrainedModel,
    plan: Plan,
    calibration: list[dict[str, Tensor]] | None,
    progress: Progress,
) -> tuple[Plan, RankHistory | None, dict[str, float]]:
    """Replace matrices by factors and train these, in place.

    Returns:
        The plan as it was carried out, how ranks moved, if they did, and seconds by phase.
    """
    recipe, training = recipes.get(job.chosen), inputs.train is not None
    ranks, straight, seconds = None, None, {}
    if training and recipe.allocation == "dynamic":
        begun = time.perf_counter()
        ranks = DynamicRank(model, plan, calibration, progress=progress)
        seconds["start"] = time.perf_counter() - begun
    else:
        through = training and recipe.training == "straight-through"
        if through and not any(entry.spec is not None and entry.spec.training_form for entry in plan.factorized):
            note(f"method '{job.chosen}' has no supports to learn at this ratio: all matrices are dense in int8")
            through = False
        dense = copy.deepcopy(model) if through else None
        report = compression.compress(model, plan, calibration, progress, keep_statistics=through, hold_floats=training)
        straight = None if dense is None else StraightThrough(model, report.statistics, dense)
        seconds |= report.seconds
        plan = report.plan
        for line in report.notes:
            note(f"left dense: {line}")
        del dense, report  # both are large
    if inputs.train is not None and inputs.tokenizer is not None:
        seconds["train"] = train(
            model,
            inputs.tokenizer,
            inputs.train,
            job.settings,
            teacher=load_teacher(job.distill, model),
            straight=straight,
            ranks=ranks,
            progress=progress,
        )
        quantize(model)
    return plan, None if ranks is None else ranks.history, seconds


def _measure(inputs: Inputs, model: PreTrainedModel, progress: Progress, phase: str) -> Measured | None:
    if inputs.evaluation is None or inputs.tokenizer is None:
        return None
    return measure(model, inputs.tokenizer, inputs.evaluation, inputs.labels, progress, phase)
