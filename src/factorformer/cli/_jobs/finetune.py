"""What `finetune` does, step by step."""

from __future__ import annotations

import dataclasses
import time

from factorformer.cli._inputs import (
    about,
    check_teacher,
    encode_table,
    load_teacher,
    note_new_head,
    read_table,
    save,
    saved,
    update,
)
from factorformer.hf.source import find, load_tokenizer
from factorformer.layers.quantization import hold_floats, quantize
from factorformer.progress import bars
from factorformer.report import Result, inventory
from factorformer.tasks.classification import find_head, load_classifier
from factorformer.tasks.data import Columns, Labels, check_lengths
from factorformer.tasks.evaluation import evaluate
from factorformer.tasks.finetuning import TrainingSettings, train
from factorformer.tasks.trainer import in_full_precision


@dataclasses.dataclass(frozen=True)
class FinetuneJob:
    """The options of `finetune`; their help texts say what they are."""

    model: str
    output: str
    train: str
    evaluation: str | None
    columns: Columns
    regression: bool
    max_length: int
    settings: TrainingSettings
    distill: str | None
    device: str
    overwrite: bool


def run(job: FinetuneJob) -> Result:
    """Check, train, save, measure; no weight is read before everything is checked."""
    started = time.perf_counter()
    path, label = find(job.model), job.columns.label
    assert label is not None
    rows = read_table(job.train, job.columns)
    eval_rows = None if job.evaluation is None else read_table(job.evaluation, job.columns)
    with about(job.train):
        head = find_head(path, Labels.of(rows, label, job.regression, job.columns.words))
    note_new_head(head)
    if job.distill is not None:
        check_teacher(job.distill, path, head)
    tokenizer = load_tokenizer(path)
    options = (job.columns, tokenizer, head.labels, job.max_length, path)
    data = encode_table(job.train, rows, *options)
    eval_data = (
        None if job.evaluation is None or eval_rows is None else encode_table(job.evaluation, eval_rows, *options)
    )
    model = load_classifier(path, head.labels, job.settings.seed, None, job.device).model
    for encoded in (data, eval_data):
        if encoded is not None:
            check_lengths(model, encoded)
    restore = in_full_precision(model)
    hold_floats(model)
    with bars() as progress:
        teacher = load_teacher(job.distill, model)
        seconds = {"train": train(model, tokenizer, data, job.settings, teacher=teacher, progress=progress)}
    quantize(model)
    restore()
    result = Result.of(
        inventory(model),
        seconds=seconds | {"total": time.perf_counter() - started},
        seed=job.settings.seed,
        output=job.output,
    )
    save(result, model, overwrite=job.overwrite, tokenizer=tokenizer)
    if eval_data is None:
        return result
    with saved(job.output, "trained"):
        with bars() as progress:
            metrics = evaluate(model, tokenizer, eval_data, head.labels, progress)
        seconds |= {"total": time.perf_counter() - started}
        result = dataclasses.replace(result, metrics=metrics, seconds=seconds)
        update(result)
    return result
