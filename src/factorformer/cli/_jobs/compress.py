"""The job of `compress`, step by step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from factorformer import compression, processes, recipes
from factorformer.bench.layers import slower_than_dense
from factorformer.cli._inputs import fit_plan, load_teacher, off_target, predictions, save, saved, update
from factorformer.cli._jobs import stream
from factorformer.cli._jobs.compress_inputs import Inputs, OriginalInputs, read_inputs
from factorformer.cli._jobs.compress_options import CompressJob, check
from factorformer.cli._jobs.unfinished import Unfinished
from factorformer.cli._measure import Measured, compare, measure
from factorformer.cli._options import command_line, note
from factorformer.cli._texts import LOGITS, calibration_batches
from factorformer.errors import MethodError, OutputError
from factorformer.files import FITTED
from factorformer.hf.source import load_model
from factorformer.layers.embeddings import embeddings_of
from factorformer.layers.matrix import Cost
from factorformer.layers.modes import has_bfloat16_products
from factorformer.layers.quantization import quantize
from factorformer.layers.tying import stacks_of, tie_layers
from factorformer.planning import Plan, left_dense
from factorformer.planning.evidence.prediction import WEIGHTS
from factorformer.progress import Progress, bars
from factorformer.report import Result, inventory
from factorformer.report.result import fits
from factorformer.tasks.checkpoints import begun_at, last_checkpoint
from factorformer.tasks.classification import load_classifier
from factorformer.tasks.data import check_lengths, count_tokens, sample
from factorformer.tasks.finetuning import train
from factorformer.tasks.healing import heal
from factorformer.tasks.targets import Embeddings
from factorformer.tasks.trainer import in_full_precision
from factorformer.tasks.vocabulary import trim_model
from factorformer.tasks.windows import together
from factorformer.training.dynamic_rank import DynamicRank
from factorformer.training.rank_history import RankHistory
from factorformer.training.straight_through import StraightThrough

LOOKED_AT = 2**15
"""Tokens that a language model is compared on at each point of its training."""

ROWS = 512
"""Calibrated on, unless told otherwise."""

ROWS_TO_HEAL = 2048
"""The same before an encoder learns for minutes from its original, beside which a better fit costs little."""


def run(job: CompressJob, *, resume: bool) -> Result:
    """Check, plan, fit, train, save, measure; a model that learns without labels leaves checkpoints."""
    started = time.perf_counter()
    if processes.count() > 1 and (job.train is not None or job.stream):
        raise MethodError(
            f"{processes.count()} processes divide calibration and fits, and neither training nor --stream: compress "
            "by --calibration, and train the result"
        )
    if job.stream:
        if resume:
            note("not used with --stream, which goes on by itself: --resume")
        return stream.run(job)
    chosen = check(job)
    if job.stream is None and not resume and processes.count() == 1 and stream.is_too_large(job):
        return stream.run(job)
    job = chosen
    inputs = read_inputs(job)
    if not inputs.heals:
        if resume:
            raise OutputError(
                "--resume is for models that learn on --train without labels: other runs leave no checkpoint"
            )
        return _measured(job, inputs, *_make(job, inputs, None, started))
    unfinished = Unfinished(Path(job.output))
    with unfinished.open(job.to_dict(), resume=resume, overwrite=job.overwrite):
        made = _make(job, inputs, unfinished, started)
    return _measured(job, inputs, *made)


def _make(
    job: CompressJob, inputs: Inputs, unfinished: Unfinished | None, started: float
) -> tuple[Result, PreTrainedModel, Measured | None]:
    """The result, whose directory is complete but for what is measured; the model, and what the original measured."""
    model = _load(job, inputs)
    before, whole = _drop(job, inputs, model)
    calibration, counts = None, None
    if inputs.calibration is not None and inputs.tokenizer is not None:
        usual, size = ROWS_TO_HEAL if inputs.heals else ROWS, job.settings.batch_size
        calibration = calibration_batches(
            model, inputs.tokenizer, inputs.calibration, job.calibration_rows, job.settings.seed, size, usual
        )
        table = embeddings_of(model, "input_embeddings")
        if isinstance(table, nn.Embedding):
            text = [data for data in (inputs.train, inputs.calibration) if data is not None]
            counts = count_tokens(text, table.num_embeddings)
    begun = time.perf_counter()
    with _shown(inputs, model):
        plan, warnings = _plan(job, model, calibration, counts, inputs.fresh, whole, unfinished)
    seconds = {} if job.plan is not None else {"plan": time.perf_counter() - begun}
    with bars() as progress:
        if before is None and not inputs.fresh:
            before = _measure(inputs, model, progress, "evaluate original")
        restore = in_full_precision(model) if inputs.train is not None else None
        made = _fit(job, inputs, model, plan, calibration, counts, unfinished, progress)
        plan, history = made.plan, made.history
        if restore is not None:
            restore()
    seconds |= made.seconds
    result = Result.of(
        plan if history is None else inventory(model, plan.scope),
        method=job.chosen,
        metrics=predictions(plan) | compare(before, None) | made.metrics,
        # What was trained before an interruption counts as well.
        seconds=seconds | {"total": max(time.perf_counter() - started, sum(seconds.values()))},
        seed=None if inputs.tokenizer is None else job.settings.seed,
        output=job.output,
        warnings=warnings,
        command=command_line(),
        fits=fits(plan, made.errors),
        curve=made.curve,
    )
    # Whatever lies beside the weights belongs to the model as it was; a new head makes it a model for something else.
    tokenizer, companions = (inputs.tokenizer, None) if inputs.fresh else (None, inputs.path)
    if inputs.kept is not None:
        tokenizer = inputs.tokenizer
    save(result, model, overwrite=job.overwrite, tokenizer=tokenizer, companions=companions, history=history)
    return result, model, before


def _measured(
    job: CompressJob, inputs: Inputs, result: Result, model: PreTrainedModel, before: Measured | None
) -> Result:
    """The result with what the compressed model measures, in its directory as well."""
    if inputs.evaluation is None or not processes.is_first():
        return result
    with saved(job.output, "compressed"):
        begun = time.perf_counter()
        with bars() as progress:
            after = _measure(inputs, model, progress, "evaluate", original=_original(inputs, model))
        evaluated = time.perf_counter() - begun
        seconds = {**result.seconds, "total": result.seconds["total"] + evaluated}
        result = dataclasses.replace(result, metrics={**result.metrics, **compare(before, after)}, seconds=seconds)
        update(result, model, None if inputs.fresh else inputs.path)
    return result


def _load(job: CompressJob, inputs: Inputs) -> PreTrainedModel:
    """The model in its own precision, with the head to be trained."""
    if inputs.head is None:
        model = load_model(inputs.path, device=job.device)
    else:
        model = load_classifier(inputs.path, inputs.head.labels, job.settings.seed, None, job.device).model
    for name in ("train", "evaluation", "calibration"):
        data = getattr(inputs, name)
        if data is not None:
            check_lengths(model, data, f"the {name} data")
    return model


def _drop(job: CompressJob, inputs: Inputs, model: PreTrainedModel) -> tuple[Measured | None, Cost | None]:
    """Drop tokens and layers in place, if asked to; what the whole model measured then, and its cost."""
    if inputs.kept is None and job.unique_layers is None:
        return None, None
    if job.unique_layers is not None:
        stacks_of(model, job.unique_layers)  # refuses what cannot be, before anything is measured
    before, whole = None, inventory(model, job.scope or recipes.get(job.chosen).scope).original
    with bars() as progress:
        if inputs.original is not None and not inputs.fresh:
            before = _measure(inputs, model, progress, "evaluate original", inputs.original)
        if inputs.kept is not None:
            trim_model(model, inputs.kept)
        if job.unique_layers is not None:
            if before is None and not inputs.fresh:
                before = _measure(inputs, model, progress, "evaluate original")
            tie_layers(model, job.unique_layers)
    return before, whole


def _plan(
    job: CompressJob,
    model: PreTrainedModel,
    calibration: list[dict[str, Tensor]] | None,
    counts: Tensor | None,
    new_head: bool,
    before: Cost | None,
    unfinished: Unfinished | None,
) -> tuple[Plan, list[str]]:
    """The plan, that of the interrupted run if there is one, and warnings about it, which are printed as well."""
    if unfinished is not None and unfinished.plan.exists():
        plan = Plan.load(unfinished.plan)
    elif job.plan is not None:
        plan = fit_plan(job.plan, model)
        if calibration is not None and plan.objective == WEIGHTS:  # made without text, for another fit
            plan = plan.without_prediction()
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
                rank_multiple=job.rank_multiple or 1,
                budget=job.budget or "bytes",
                int8=job.int8,
                int4=job.int4,
                calibration=calibration,
                progress=progress,
                keep_statistics=True,
                new_head=new_head,
                token_counts=counts,
                before=before,
            )
    if unfinished is not None:
        plan.save(unfinished.plan)
    if (line := off_target(plan)) is not None:
        note(line)
    for line in left_dense(plan.entries, plan.original.bytes):
        note(f"left dense: {line}")
    warnings = list(slower_than_dense(plan.entries, model.device))
    for line in warnings:
        note(f"slower: {line}")
    return plan, warnings


@dataclasses.dataclass
class _Made:
    """What became of a model.

    Args:
        plan: as it was carried out.
        seconds: by phase.
        errors: of fits, by the name of the matrix.
        history: how ranks moved, if they did.
        metrics: of before training, if there was any, and rows with labels to measure them on.
        curve: of a training without labels.
    """

    plan: Plan
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    history: RankHistory | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    curve: list[dict[str, float]] | None = None


def _fit(
    job: CompressJob,
    inputs: Inputs,
    model: PreTrainedModel,
    plan: Plan,
    calibration: list[dict[str, Tensor]] | None,
    counts: Tensor | None,
    unfinished: Unfinished | None,
    progress: Progress,
) -> _Made:
    """Replace matrices by factors and train these, in place."""
    recipe, training = recipes.get(job.chosen), inputs.train is not None
    made, ranks, straight = _Made(plan), None, None
    with _shown(inputs, model):
        if training and recipe.allocation == "dynamic":
            begun = time.perf_counter()
            begun_from = None if unfinished is None else last_checkpoint(unfinished.checkpoints)
            ranks = DynamicRank(
                model, plan, calibration, progress=progress, new_head=inputs.fresh, resume_from=begun_from
            )
            made.seconds["start"] = time.perf_counter() - begun
        else:
            through = training and recipe.training == "straight-through"
            if through and not any(entry.spec is not None and entry.spec.training_form for entry in plan.factorized):
                note(
                    f"method '{job.chosen}' has no supports to learn at this ratio: all matrices are dense in integers"
                )
                through = False
            if not through and unfinished is not None and begun_at(unfinished.checkpoints) is not None:
                compression.outline(model, plan)  # what was fitted, and learned since, is in the checkpoint
            else:
                made, straight = _fit_once(job, inputs, model, plan, calibration, counts, progress, through)
                if unfinished is not None:
                    made.plan.save(unfinished.plan)  # as it was carried out
    if training:
        if ranks is None and inputs.labels is not None and not inputs.fresh:
            fitted = _measure(inputs, model, progress, "evaluate before training")
            made.metrics = {} if fitted is None else {FITTED + name: found for name, found in fitted.metrics.items()}
        made.seconds["train"], made.curve = _train(job, inputs, model, straight, ranks, unfinished, progress)
        quantize(model)
    made.history = None if ranks is None else ranks.history
    return made


def _fit_once(
    job: CompressJob,
    inputs: Inputs,
    model: PreTrainedModel,
    plan: Plan,
    calibration: list[dict[str, Tensor]] | None,
    counts: Tensor | None,
    progress: Progress,
    through: bool,
) -> tuple[_Made, StraightThrough | None]:
    """Replace matrices by fitted factors, in place: what became of them, and what trains `through` them."""
    dense = copy.deepcopy(model) if through else None
    report = compression.compress(
        model,
        plan,
        calibration,
        progress,
        keep_statistics=through,
        hold_floats=inputs.train is not None,
        new_head=inputs.fresh,
        token_counts=counts,
    )
    for line in report.notes:
        note(line)
    made = _Made(report.plan, report.seconds, report.errors)
    return made, None if dense is None else StraightThrough(model, report.statistics, dense)


def _train(
    job: CompressJob,
    inputs: Inputs,
    model: PreTrainedModel,
    straight: StraightThrough | None,
    ranks: DynamicRank | None,
    unfinished: Unfinished | None,
    progress: Progress,
) -> tuple[float, list[dict[str, float]] | None]:
    """Train what was compressed, in place: seconds, and points on the way of what learns without labels."""
    assert inputs.train is not None
    assert inputs.tokenizer is not None
    teacher = load_teacher(job.distill, model)
    moving: dict[str, Any] = {"straight": straight, "ranks": ranks, "progress": progress}
    if teacher is not None and inputs.kept is not None and (unfinished is None or inputs.speaks):
        trim_model(teacher, inputs.kept)  # so that both have the same states of the same tokens
    if unfinished is None:
        return train(model, inputs.tokenizer, inputs.train, job.settings, teacher=teacher, **moving), None
    assert inputs.evaluation is not None
    fast = model.device.type == "cpu" and has_bfloat16_products()
    settings, held = dataclasses.replace(job.healing, precision="bf16" if fast else "fp32"), inputs.evaluation
    if inputs.speaks:
        longest = max(inputs.train["length"])
        settings = dataclasses.replace(settings, batch_size=job.batch_size or together(model.config, longest, LOGITS))
        held = sample(held, max(LOOKED_AT // longest, 1), settings.seed)
    first: dict[str, float] = {}
    curve = heal(
        model,
        teacher,
        inputs.train,
        settings,
        tokenizer=inputs.tokenizer,
        held=held,
        target=inputs.target,
        reading=None if inputs.original is None else inputs.original.reading,
        output=unfinished.checkpoints,
        report=note,
        before=first.update,
        **moving,
    )
    return curve[-1]["seconds"], [*([{"step": 0, "seconds": 0.0, **first}] if first else []), *curve]


def _shown(inputs: Inputs, model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """While this lasts, outputs tell what users of an encoder make of its hidden states."""
    return inputs.target.shown(model) if isinstance(inputs.target, Embeddings) else contextlib.nullcontext()


def _original(inputs: Inputs, model: PreTrainedModel) -> PreTrainedModel | None:
    """What a language model was before, once more, for their predictions are compared; None for other models."""
    if not inputs.speaks:
        return None
    original = load_model(inputs.path, device=str(model.device)).to(model.dtype)  # pyright: ignore
    if inputs.kept is not None:
        trim_model(original, inputs.kept)
    return original


def _measure(
    inputs: Inputs,
    model: PreTrainedModel,
    progress: Progress,
    phase: str,
    reads: OriginalInputs | None = None,
    original: PreTrainedModel | None = None,
) -> Measured | None:
    """Of rows as they are read, or as the original did; of language models both are measured together, in the end."""
    tokenizer, rows = (reads or inputs).tokenizer, (reads or inputs).evaluation
    if rows is None or tokenizer is None or (inputs.speaks and original is None):
        return None
    return measure(model, tokenizer, rows, inputs.labels, progress, phase, inputs.target, original)
