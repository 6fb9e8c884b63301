"""`factorformer plan`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from factorformer import processes
from factorformer.cli._given import note_unused
from factorformer.cli._options import (
    LENGTH,
    AsJson,
    Budget,
    CalibrationFile,
    CalibrationRows,
    Device,
    DeviceChoice,
    Each,
    Exclude,
    Include,
    Int4,
    Int8,
    Method,
    Model,
    Overwrite,
    RankMultiple,
    Ratio,
    ReadLength,
    Scope,
    Seed,
    SequenceLength,
    Share,
    Task,
    TaskChoice,
    TextColumns,
    emit,
    note,
    place_of,
)
from factorformer.errors import DataError, FactorformerError, OutputError
from factorformer.files import check_file

PlanFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the plan as JSON, for `factorformer compress --plan`."),
]


def plan(
    model: Model,
    method: Method = None,
    ratio: Ratio = None,
    budget: Budget = None,
    int8: Int8 = False,
    int4: Int4 = False,
    scope: Scope = None,
    include: Include = None,
    exclude: Exclude = None,
    share: Share = None,
    rank_multiple: RankMultiple = None,
    calibration: CalibrationFile = None,
    calibration_rows: CalibrationRows = None,
    text: TextColumns = None,
    task: Task = None,
    max_length: ReadLength = None,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    device: Device = DeviceChoice.auto,
    output: PlanFile = None,
    each: Each = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what `compress` would make of every weight matrix, without changing anything.

    The table lists what each matrix becomes, the bytes that this takes, and why it has its size or stays dense.
    The plan can be written to a file, edited, and carried out with `compress --plan`.

    A dictionary and its nonzeros can divide their bytes in many ways: a few cheap fits of the weights decide, which
    takes some seconds. With --calibration the output on that text decides, as in `compress`.

    [bold]fisher[/bold] and [bold]auto[/bold] give bytes, FLOPs or milliseconds to the matrices that gain most by them,
    'auto' in any structure, and predict what the compression costs before any training: with --calibration by how much
    the loss rises, or 1 - cosine of embeddings, and without it the mean squared error of the weights.

    \b
    [bold]Examples[/bold]
      factorformer plan minilm --ratio 2.8
      factorformer plan minilm --ratio 2 --scope all --output plan.json
      factorformer plan minilm --method auto --ratio 3 --calibration texts.txt
      factorformer plan minilm --method auto --ratio 1.5 --budget milliseconds
      factorformer plan minilm --exclude '*.output.dense'
    """
    if output is not None:
        check_file(output, overwrite=overwrite, inputs=(model, calibration))
        _check_is_plan(output)
    import datasets

    from factorformer import compression, recipes
    from factorformer.bench.layers import slower_than_dense
    from factorformer.cli._inputs import check_dense, find_pooling, off_target, predictions
    from factorformer.cli._texts import (
        calibration_batches,
        columns_of,
        encode_text,
        longest_of,
        plain_columns,
        read_text,
        written,
    )
    from factorformer.export.sentence import read_writing
    from factorformer.fitting.statistics import too_few_tokens
    from factorformer.hf.source import find, load_model, load_tokenizer, read_config
    from factorformer.progress import bars
    from factorformer.report import Result
    from factorformer.tasks.classification import embeds, gives_scores, is_causal
    from factorformer.tasks.data import check_lengths
    from factorformer.tasks.targets import Embeddings

    unit = "bytes" if budget is None else budget.value
    chosen = recipes.default_method(calibrated=calibration is not None) if method is None else method
    needs = recipes.get(chosen).needs
    if needs == "labelled text" and calibration is not None:
        raise DataError(
            f"method '{chosen}' measures the model on labels, which `plan` does not read: leave out --calibration, or "
            "plan and compress at once with `factorformer compress --label`"
        )
    if needs == "nothing" and calibration is not None:
        note(f"method '{chosen}' measures nothing: --calibration is not used")
        calibration = None
    if task not in (None, TaskChoice.tokens):
        raise DataError(
            "`plan` reads no labels: of --task it knows token-classification, whose texts are lists of words"
        )
    if calibration is None:
        read = ("text", "task", "max_length", "sequence_length")
        note_unused("without --calibration", *read, "calibration_rows", "seed")
    compression.check_options(chosen, ratio, None if share is None else share.value, unit, rank_multiple or 1)
    started = time.perf_counter()
    path = find(model)
    config = read_config(path)
    check_dense(path, config)
    tokenizer, rows, data = None, None, None
    if calibration is not None:
        tokenizer, columns = load_tokenizer(path), plain_columns(calibration, columns_of(text, None, task))
        found = read_text(calibration, columns, config)
        if is_causal(config):
            note_unused("of language models", "max_length", "task")
        else:
            note_unused("but for causal language models", "sequence_length")
        longest = LENGTH
        if isinstance(found, datasets.Dataset):  # as `compress` reads it
            longest = longest_of(path, config, max_length)
            found = found if gives_scores(config) else written(found, columns, read_writing(path))
        lengths = {"max_length": longest, "sequence_length": sequence_length}
        rows = encode_text(calibration, found, columns, tokenizer, config, **lengths)
    loaded = load_model(path, device=place_of(device))
    if tokenizer is not None and rows is not None:
        check_lengths(loaded, rows, "the calibration data")
        data = calibration_batches(loaded, tokenizer, rows, calibration_rows, seed)
    if method is None and calibration is None:
        with_data, without = (recipes.default_method(calibrated=calibrated) for calibrated in (True, False))
        note(f"method: left to compress, which takes '{with_data}' with calibration data and '{without}' without")
    elif method is None:
        note(f"method: {chosen} (the default with calibration data)")
    if budget is not None and budget.value == "milliseconds":
        note(f"milliseconds are those of this machine's {loaded.device.type}")
    pooled = calibration is not None and not is_causal(config) and embeds(config)
    shown = Embeddings(find_pooling(path).pooler).shown(loaded) if pooled else contextlib.nullcontext()
    with bars() as progress, shown:
        made = compression.plan(
            loaded,
            method,
            ratio,
            None if scope is None else scope.value,
            include,
            exclude,
            share=None if share is None else share.value,
            rank_multiple=rank_multiple or 1,
            budget=unit,
            int8=int8,
            int4=int4,
            calibration=data,
            progress=progress,
            keep_statistics=True,
        )
    for line in (off_target(made), too_few_tokens(made.statistics)):
        if line is not None:
            note(line)
    warnings = slower_than_dense(made.entries, loaded.device)
    for line in warnings:
        note(f"slower: {line}")
    if output is not None and processes.is_first():
        made.save(output)
    result = Result.of(
        made,
        method=made.method,
        metrics=predictions(made),
        seconds={"plan": time.perf_counter() - started},
        output=None if output is None else str(output),
        warnings=warnings,
        layers=made.entries,
    )
    emit(result, as_json=as_json, each=each)


def _check_is_plan(path: Path) -> None:
    """Raise `OutputError` if a file stands where the plan is to be written, and is none."""
    from factorformer.planning import Plan

    if not path.exists() or path.stat().st_size == 0:
        return
    try:
        Plan.load(path)
    except FactorformerError as error:
        raise OutputError(f"'{path}' is no plan, so --overwrite does not replace it: choose another name") from error
