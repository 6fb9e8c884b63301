"""`factorformer finetune`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from factorformer.cli._options import (
    AsJson,
    BatchSize,
    Distill,
    Epochs,
    EvalFile,
    FreezeEmbeddings,
    LearningRate,
    MaxLength,
    Model,
    Output,
    Overwrite,
    Regression,
    Seed,
    TextColumns,
    emit,
)

TrainFile = Annotated[
    str, typer.Option("--train", metavar="FILE", show_default=False, help="What the model is trained on.")
]
LabelColumn = Annotated[
    str,
    typer.Option(
        "--label",
        metavar="COLUMN",
        help="The column that holds the label: names or whole numbers are classes, fractions are a regression.",
    ),
]


def finetune(
    model: Model,
    output: Output,
    train: TrainFile,
    label: LabelColumn = "label",
    evaluation: EvalFile = None,
    text: TextColumns = None,
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
    """Train a model on labelled text: the dense baseline, and the teacher for `compress --distill`.

    The model gets a head for the labels that the training file holds, or keeps its own if that knows them all.
    MODEL may be compressed: then its factors are trained, and stay in int8 if they are. The output is an ordinary
    Hugging Face model directory with the tokenizer, and the result as factorformer.json.

    Metrics are accuracy, macro-F1, Matthews correlation (and the F1 of the second of two classes), or Pearson and
    Spearman correlation and mean squared error for a regression.

    \b
    [bold]Examples[/bold]
      factorformer finetune minilm dense/ --train train.tsv --eval dev.tsv
      factorformer finetune minilm pairs/ --train mrpc.jsonl \\
          --text sentence1 --text sentence2 --label same
    """
    from factorformer.files import check_output

    check_output(output, overwrite=overwrite, inputs=(model, train, evaluation, distill))
    from factorformer import compression
    from factorformer.cli._inputs import columns_of, load_teacher, note_new_head, read_table, save
    from factorformer.hf.source import find, load_tokenizer
    from factorformer.progress import bars
    from factorformer.report import Result, inventory
    from factorformer.tasks.classification import load_classifier
    from factorformer.tasks.data import Labels, check_lengths, encode
    from factorformer.tasks.finetuning import TrainingSettings
    from factorformer.tasks.finetuning import evaluate as evaluate_model
    from factorformer.tasks.finetuning import train as train_model

    started = time.perf_counter()
    path = find(model)
    columns = columns_of(text, label)
    rows = read_table(train, columns)
    eval_rows = None if evaluation is None else read_table(evaluation, columns)
    tokenizer = load_tokenizer(path)
    classifier = load_classifier(path, Labels.of(rows, label, regression), seed)
    note_new_head(classifier)
    data = encode(tokenizer, rows, columns, classifier.labels, max_length)
    eval_data = None if eval_rows is None else encode(tokenizer, eval_rows, columns, classifier.labels, max_length)
    for encoded in (data, eval_data):
        if encoded is not None:
            check_lengths(classifier.model, encoded)
    teacher = None if distill is None else load_teacher(distill, classifier.model, labelled=True)
    settings = TrainingSettings(epochs, lr, batch_size, seed, freeze_embeddings=freeze_embeddings)
    compression.hold_floats(classifier.model)
    metrics: dict[str, float] = {}
    with bars() as progress:
        seconds = {
            "train": train_model(classifier.model, tokenizer, data, settings, teacher=teacher, progress=progress)
        }
        compression.quantize(classifier.model)
        if eval_data is not None:
            metrics = evaluate_model(classifier.model, tokenizer, eval_data, classifier.labels, progress)
    result = Result.of(
        inventory(classifier.model),
        metrics=metrics,
        seconds=seconds | {"total": time.perf_counter() - started},
        seed=seed,
        output=str(output),
    )
    save(result, classifier.model, overwrite=overwrite, tokenizer=tokenizer)
    emit(result, as_json=as_json)
