"""`factorformer compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorformer.cli._options import (
    AsJson,
    BatchSize,
    Budget,
    CalibrationFile,
    CalibrationRows,
    Distill,
    Epochs,
    EvalFile,
    Exclude,
    FreezeEmbeddings,
    Include,
    Int8,
    LabelColumn,
    LearningRate,
    MaxLength,
    Method,
    Model,
    Output,
    Overwrite,
    Ratio,
    Regression,
    Scope,
    Seed,
    Share,
    TextColumns,
    TrainFile,
    emit,
    note,
)
from factorformer.errors import DataError, MethodError

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        rich_help_panel="What becomes of the weights",
        help="Carry out a plan that `factorformer plan --output` wrote, instead of making one.",
    ),
]


def compress(
    model: Model,
    output: Output,
    method: Method = None,
    ratio: Ratio = None,
    budget: Budget = None,
    int8: Int8 = False,
    scope: Scope = None,
    include: Include = None,
    exclude: Exclude = None,
    share: Share = None,
    plan: PlanFile = None,
    calibration: CalibrationFile = None,
    calibration_rows: CalibrationRows = 512,
    train: TrainFile = None,
    evaluation: EvalFile = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    regression: Regression = False,
    max_length: MaxLength = 128,
    epochs: Epochs = 3.0,
    lr: LearningRate = 1e-4,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    distill: Distill = None,
    freeze_embeddings: FreezeEmbeddings = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Replace the weight matrices of a model by smaller factors, train them if there is data, and save the result.

    [bold]Without --train[/bold] this is post-training compression: it takes seconds, and everything beside the weights
    (tokenizer, pooling of a sentence encoder) is copied as it is. Give it some text with --calibration.

    [bold]With --train and --label[/bold] the compressed model is fine-tuned on a task. MODEL may be fine-tuned already,
    which is better; otherwise it gets a new head.

    [bold]With --train and --distill but no --label[/bold] the compressed model learns on plain text to embed as the
    teacher does. --eval is then plain text as well, by default a part of the training file; 'embedding cosine' is the
    mean cosine between the embeddings of the original and the compressed model, and 'similarity spearman' the rank
    correlation of the similarities that the two see between texts.

    The output is an ordinary Hugging Face model directory; the result lies in it as factorformer.json. 'ratio' is the
    bytes of the original tensors in scope over the bytes of what replaces them, at equal precision.

    \b
    [bold]Examples[/bold]
      factorformer compress minilm small/ --ratio 2 --calibration texts.txt
      factorformer compress minilm small/ --train texts.txt --distill minilm
      factorformer compress minilm small/ --int8 --ratio 8 --calibration texts.txt
      factorformer compress dense/ small/ --ratio 2.8 --train train.tsv \\
          --eval dev.tsv --label label --distill dense/
    """
    from factorformer import recipes
    from factorformer.files import check_output
    from factorformer.planning import Plan

    check_output(output, overwrite=overwrite, inputs=(model, plan, calibration, train, evaluation, distill))
    options = (method, ratio, budget, scope, include, exclude, share)
    if plan is not None and (int8 or any(option is not None for option in options)):
        raise MethodError(
            "--plan holds method, budget, scope, patterns, sharing and int8 already: leave these options out"
        )
    if distill is not None and train is None:
        raise DataError("--distill needs text to learn on: give --train")
    if train is not None and label is None and distill is None:
        raise DataError("training needs labels or a teacher: give --label, or --distill with the original model")
    if label is not None and train is None and evaluation is None and calibration is None:
        raise DataError("--label is the name of a column: give --train, --eval or --calibration")
    if regression and label is None:
        raise DataError("--regression is about labels: name their column with --label")
    planned = None if plan is None else Plan.load(plan)
    method = planned.method if planned is not None else method
    measured = calibration is not None or train is not None
    chosen = method or recipes.default_method(calibrated=measured)
    needs = recipes.get(chosen).needs
    if needs != "nothing" and not measured:
        raise DataError(f"method '{chosen}' needs {needs} to measure on: give --calibration or --train, or use 'svd'")
    if needs == "labelled text" and label is None:
        raise DataError(f"method '{chosen}' needs labelled text: name the column of the labels with --label")
    if needs == "nothing" and calibration is not None and train is None and evaluation is None:
        note(f"method '{chosen}' measures nothing: --calibration is not used")
    if label is not None and train is None and evaluation is None and needs != "labelled text":
        note(f"method '{chosen}' reads no labels: --label is not used without --train or --eval")
        label = None

    recipe = recipes.get(chosen)
    if share is not None and not recipe.structure.shareable:
        able = [name for name, other in recipes.RECIPES.items() if other.structure.shareable]
        raise MethodError(f"--share needs a method whose matrices can share: choose --method {' or '.join(able)}")
    if recipe.training == "none" and train is not None:
        note(f"method '{chosen}' is a fit without training, which --train adds to it")
    if recipe.training == "straight-through" and train is None:
        note(f"method '{chosen}' learns in training: without --train, this is its start alone")

    if recipe.allocation == "dynamic" and train is None:
        note(f"method '{chosen}' finds its ranks in training: without --train, all matrices shrink alike")

    from factorformer.cli._inputs import columns_of
    from factorformer.cli._jobs.compress import Job, run

    note(f"method: {chosen}" + ("" if method else f" (the default {'with' if measured else 'without'} text)"))
    job = Job(
        model=model,
        output=str(output),
        method=method,
        ratio=ratio,
        budget="bytes" if budget is None else budget.value,
        int8=int8,
        scope="blocks" if scope is None else scope.value,
        include=include,
        exclude=exclude,
        share=None if share is None else share.value,
        plan=planned,
        columns=columns_of(text, label),
        regression=regression,
        train=train,
        evaluation=evaluation,
        calibration=(calibration or train) if needs != "nothing" else None,
        calibration_rows=calibration_rows,
        max_length=max_length,
        epochs=epochs,
        learning_rate=lr,
        batch_size=batch_size,
        seed=seed,
        freeze_embeddings=freeze_embeddings,
        distill=distill,
        overwrite=overwrite,
    )
    emit(run(job), as_json=as_json)
