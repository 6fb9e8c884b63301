"""`factorformer evaluate`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from factorformer.cli._options import (
    MODELS,
    AsJson,
    Device,
    DeviceChoice,
    MaxLength,
    TextColumns,
    Words,
    emit,
    place_of,
)

Evaluated = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
DataFile = Annotated[str, typer.Option("--data", metavar="FILE", show_default=False, help="Rows to measure on.")]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="COLUMN",
        show_default=False,
        help="The column that holds the label, by default 'label': a name of the model's, or its id. Causal language "
        "models are measured on text alone.",
    ),
]


def evaluate(
    model: Evaluated,
    data: DataFile,
    text: TextColumns = None,
    words: Words = False,
    label: LabelColumn = None,
    max_length: MaxLength = 128,
    device: Device = DeviceChoice.auto,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned model on labelled rows, or a causal language model on text; compressed or not.

    Classes: accuracy, macro-F1 (the mean over classes, each counting the same), Matthews correlation, and with two
    classes the F1 of the second. Several classes a text: micro- and macro-F1 and the accuracy of whole sets. Classes of
    words: accuracy and macro-F1. Regression: Pearson and Spearman correlation and mean squared error. What the labels
    mean is read from the model's configuration.

    Language models: the mean loss of a token in nats, perplexity, and how often the likeliest token is the next one,
    each text by itself.

    \b
    [bold]Examples[/bold]
      factorformer evaluate small/ --data test.tsv
      factorformer evaluate small/ --data test.jsonl --text question --label intent
      factorformer evaluate chat/ --data texts.txt
    """
    from factorformer.cli._inputs import about, columns_of, encode_table, plain_columns, read_table
    from factorformer.cli._measure import check_measurable, measure
    from factorformer.hf.source import find, load_model, load_tokenizer, read_config
    from factorformer.progress import bars
    from factorformer.report import Result, inventory
    from factorformer.tasks.classification import check_head, is_causal, labels_for
    from factorformer.tasks.data import check_lengths

    path = find(model)
    config = read_config(path)
    plain = label is None and is_causal(config)
    columns, labels = columns_of(text, None if plain else label or "label", words), None
    head = None if plain else check_head(path, config)
    columns = plain_columns(data, columns) if plain else columns
    rows = read_table(data, columns)
    if head is not None and columns.label is not None:
        with about(data):
            labels = labels_for(head, rows, columns.label)
    tokenizer = load_tokenizer(path)
    encoded = encode_table(data, rows, columns, tokenizer, labels, max_length, config)
    if plain:
        check_measurable(config, encoded, data)
    loaded = load_model(path, device=place_of(device), whole=not plain)
    check_lengths(loaded, encoded, f"'{data}'")
    started = time.perf_counter()
    with bars() as progress:
        metrics = measure(loaded, tokenizer, encoded, labels, progress, "evaluate").metrics
    seconds = {"evaluate": time.perf_counter() - started}
    emit(Result.of(inventory(loaded), metrics=metrics, seconds=seconds), as_json=as_json)
