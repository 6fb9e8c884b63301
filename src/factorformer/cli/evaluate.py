"""`factorformer evaluate`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from factorformer.cli._options import MODELS, AsJson, MaxLength, TextColumns, emit

Evaluated = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
DataFile = Annotated[
    str, typer.Option("--data", metavar="FILE", show_default=False, help="Labelled rows to measure on.")
]
LabelColumn = Annotated[
    str,
    typer.Option(
        "--label", metavar="COLUMN", help="The column that holds the label: a name of the model's, or its id."
    ),
]


def evaluate(
    model: Evaluated,
    data: DataFile,
    text: TextColumns = None,
    label: LabelColumn = "label",
    max_length: MaxLength = 128,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned model, compressed or not, on labelled rows.

    Classes: accuracy, macro-F1 (the mean over classes, each counting the same), Matthews correlation, and with two
    classes the F1 of the second. Regression: Pearson and Spearman correlation and mean squared error. What the labels
    mean is read from the model's configuration.

    \b
    [bold]Examples[/bold]
      factorformer evaluate small/ --data test.tsv
      factorformer evaluate small/ --data test.jsonl --text question --label intent
    """
    from factorformer.cli._inputs import columns_of, read_table
    from factorformer.hf.source import find, load_model, load_tokenizer
    from factorformer.progress import bars
    from factorformer.report import Result, inventory
    from factorformer.tasks.classification import labels_for
    from factorformer.tasks.data import check_lengths, encode
    from factorformer.tasks.finetuning import evaluate as evaluate_model

    path = find(model)
    columns = columns_of(text, label)
    rows = read_table(data, columns)
    labels = labels_for(path, rows, label)
    tokenizer = load_tokenizer(path)
    encoded = encode(tokenizer, rows, columns, labels, max_length)
    loaded = load_model(path)
    check_lengths(loaded, encoded)
    started = time.perf_counter()
    with bars() as progress:
        metrics = evaluate_model(loaded, tokenizer, encoded, labels, progress)
    seconds = {"evaluate": time.perf_counter() - started}
    emit(Result.of(inventory(loaded), metrics=metrics, seconds=seconds), as_json=as_json)
