"""What `finetune` does, step by step."""

from __future__ import annotations

import dataclasses
import time

from factorformer.cli._inputs import check_teacher, load_teacher, note_new_head, save, saved, update
from factorformer.cli._text_files import Source
from factorformer.cli._texts import about, columns_in, encode_table, read_table
from factorformer.hf.source import find, load_tokenizer, read_config
from factorformer.layers.quantization import hold_floats, quantize
from factorformer.progress import bars
from factorformer.report import Result, inventory
from factorformer.tasks.classification import find_head, labels_of, load_classifier
from factorformer.tasks.data import Columns, check_lengths
from factorformer.tasks.evaluation import evaluate
from factorformer.tasks.finetuning import TrainingSettings, train
from factorformer.tasks.labels import Kind
from factorformer.tasks.trainer import in_full_precision


def run(
    model_name: str,
    output: str,
    train_file: Source,
    eval_file: Source | None,
    columns: Columns,
    settings: TrainingSettings,
    *,
    task: Kind | None,
    max_length: int,
    distill: str | None,
    device: str,
    overwrite: bool,
) -> Result:
    """Check, train, save, measure; no weight is read before everything is checked. Options as its help has them."""
    started = time.perf_counter()
    path, learned = find(model_name), columns_in(train_file, columns)
    assert learned.label is not None
    config = read_config(path)
    rows = read_table(train_file, learned)
    eval_rows = None if eval_file is None else read_table(eval_file, columns_in(eval_file, columns))
    with about(train_file):
        labels = labels_of(path, config, rows, learned.label, task)
        head = find_head(path, labels, config)
    note_new_head(head)
    if distill is not None:
        check_teacher(distill, config, head)
    tokenizer = load_tokenizer(path)
    options = (tokenizer, head.labels, max_length, config)
    data, eval_data = encode_table(train_file, rows, learned, *options), None
    if eval_file is not None and eval_rows is not None:
        eval_data = encode_table(eval_file, eval_rows, columns_in(eval_file, columns), *options)
    model = load_classifier(path, head.labels, settings.seed, None, device).model
    for encoded in (data, eval_data):
        if encoded is not None:
            check_lengths(model, encoded)
    restore = in_full_precision(model)
    hold_floats(model)
    with bars() as progress:
        teacher = load_teacher(distill, model)
        seconds = {"train": train(model, tokenizer, data, settings, teacher=teacher, progress=progress)}
    quantize(model)
    restore()
    result = Result.of(
        inventory(model),
        seconds=seconds | {"total": time.perf_counter() - started},
        seed=settings.seed,
        output=output,
    )
    save(result, model, overwrite=overwrite, tokenizer=tokenizer)
    if eval_data is None:
        return result
    with saved(output, "trained"):
        with bars() as progress:
            metrics = evaluate(model, tokenizer, eval_data, head.labels, progress)
        seconds |= {"total": time.perf_counter() - started}
        result = dataclasses.replace(result, metrics=metrics, seconds=seconds)
        update(result, model)
    return result
