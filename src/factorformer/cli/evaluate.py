"""`factorformer evaluate`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from factorformer.cli._options import (
    LARGEST,
    LENGTH,
    MODELS,
    AsJson,
    Device,
    DeviceChoice,
    TextColumns,
    Words,
    emit,
    place_of,
)
from factorformer.errors import MethodError

Evaluated = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
DataFiles = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="FILE",
        show_default=False,
        help="Rows to measure on; with --against several files can be given.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="ORIGINAL",
        show_default=False,
        help="The encoder that this one was made of: what are its embeddings good for, beside those of the original?",
    ),
]
EvaluatedLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        min=2,
        max=LARGEST,
        show_default=False,
        help=f"Tokens after which a text is cut. By default {LENGTH}; with --against as sentence-transformers does, by "
        "what the directory of the original says.",
    ),
]
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
    data: DataFiles,
    against: Against = None,
    text: TextColumns = None,
    words: Words = False,
    label: LabelColumn = None,
    max_length: EvaluatedLength = None,
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

    Sentence encoders (--against): on texts, the mean cosine to the embeddings of the original, the rank correlation of
    similarities, and the overlap of the ten nearest neighbours; with labels also how many texts have the class of their
    nearest neighbour, and the accuracy of logistic regression on embeddings (5-fold cross-validation). On pairs of
    texts, the rank correlation of their cosine with labels, and with two classes the area under its curve; the larger
    number means the same, or the name that sorts last, unless it denies the other (not_equivalent). Pooling is that of
    the directory; intervals are those of a bootstrap over rows, at 95 %.

    \b
    [bold]Examples[/bold]
      factorformer evaluate small/ --data test.tsv
      factorformer evaluate small/ --data test.jsonl --text question --label intent
      factorformer evaluate chat/ --data texts.txt
      factorformer evaluate small/ --against minilm --data others.txt --data intents.tsv --data pairs.tsv
    """
    from factorformer.cli._inputs import about, columns_of, encode_table, plain_columns, read_table
    from factorformer.cli._measure import check_measurable, measure
    from factorformer.hf.source import find, load_model, load_tokenizer, read_config
    from factorformer.progress import bars
    from factorformer.report import Result, inventory
    from factorformer.tasks.classification import check_head, is_causal, labels_for
    from factorformer.tasks.data import check_lengths

    if against is not None:
        from factorformer.cli._jobs.embeddings import EmbeddingJob, evaluate_embeddings

        if words:
            raise MethodError("--words is about classes of words, and --against about embeddings of texts: give one")
        job = EmbeddingJob(model, against, data, text, label, max_length, place_of(device))
        emit(evaluate_embeddings(job), as_json=as_json)
        return
    if len(data) > 1:
        raise MethodError(f"--data was given {len(data)} times: several files are for --against alone")
    (data_file,) = data
    path = find(model)
    config = read_config(path)
    plain = label is None and is_causal(config)
    columns, labels = columns_of(text, None if plain else label or "label", words), None
    head = None if plain else check_head(path, config)
    columns = plain_columns(data_file, columns) if plain else columns
    rows = read_table(data_file, columns)
    if head is not None and columns.label is not None:
        with about(data_file):
            labels = labels_for(head, rows, columns.label)
    tokenizer = load_tokenizer(path)
    encoded = encode_table(data_file, rows, columns, tokenizer, labels, max_length or LENGTH, config)
    if plain:
        check_measurable(config, encoded, data_file)
    loaded = load_model(path, device=place_of(device), whole=not plain)
    check_lengths(loaded, encoded, f"'{data_file}'")
    started = time.perf_counter()
    with bars() as progress:
        metrics = measure(loaded, tokenizer, encoded, labels, progress, "evaluate").metrics
    seconds = {"evaluate": time.perf_counter() - started}
    emit(Result.of(inventory(loaded), metrics=metrics, seconds=seconds), as_json=as_json)
