"""`factorformer evaluate`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from factorformer.cli._given import note_unused
from factorformer.cli._options import (
    LARGEST,
    LENGTH,
    MODELS,
    AsJson,
    Device,
    DeviceChoice,
    SequenceLength,
    Task,
    TextColumns,
    emit,
    kind_of,
    place_of,
)
from factorformer.cli._text_files import SourceFile, TargetFile, source_of
from factorformer.errors import DataError, MethodError

Evaluated = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
DataFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        show_default=False,
        help="Rows to measure on; with --against, and for language models, several files can be given.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="ORIGINAL",
        show_default=False,
        help="The model that this one was made of, if it is an encoder or a causal language model: what are its "
        "embeddings good for beside the original's, or how far are its predictions from these?",
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
    data: DataFiles = None,
    against: Against = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    source: SourceFile = None,
    target: TargetFile = None,
    task: Task = None,
    max_length: EvaluatedLength = None,
    sequence_length: SequenceLength = None,
    device: Device = DeviceChoice.auto,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned model on labelled rows, or a causal language model on text; compressed or not.

    Classes: accuracy, macro-F1 (the mean over classes, each counting the same), Matthews correlation, and with two
    classes the F1 of the second. Several classes a text: micro- and macro-F1 and the accuracy of whole sets. Classes of
    words: accuracy and macro-F1. Regression: Pearson and Spearman correlation and mean squared error. Answers from a
    context (--text question --text context --label answers): exact match and F1 of words. Texts that an encoder-decoder
    writes, the labels or the lines of --target: loss and perplexity of tokens, BLEU and chrF. What the labels mean is
    read from the model's configuration.

    Causal language models: texts are joined and cut into windows of --sequence-length tokens; a text file is one
    document, and so is each row of other data, or each conversation of a column of messages. The mean loss of a token
    in nats, perplexity, how often the likeliest token is the next one, bits per byte of text, and what they depend on:
    the predicted tokens, the window, and from one window to the next the stride. With --against also how far
    predictions are from the original's: the mean divergence in nats, and how often both find the same token the
    likeliest. Several files tell whether a model that was calibrated on one text fails on another.

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
      factorformer evaluate translator/ --source test.de --target test.en
      factorformer evaluate chat/ --data texts.txt
      factorformer evaluate small-chat/ --against chat/ --data wiki.txt --data talks.jsonl --text messages
      factorformer evaluate small/ --against minilm --data others.txt --data intents.tsv --data pairs.tsv
    """
    from factorformer.cli._measure import measure
    from factorformer.cli._texts import about, columns_in, columns_of, encode_table, read_table
    from factorformer.hf.source import find, load_model, load_tokenizer, read_config
    from factorformer.progress import bars
    from factorformer.report import Result, inventory
    from factorformer.tasks.classification import check_head, is_causal, labels_for
    from factorformer.tasks.data import check_lengths

    files = data or []
    measured = source_of("--data", files[0] if files else None, source, target)
    if measured is None:
        raise DataError("there is nothing to measure on: give --data, or --source and --target")
    path = find(model)
    config = read_config(path)
    if label is None and files and is_causal(config):
        from factorformer.cli._jobs.language import LanguageJob, evaluate_language

        note_unused("of language models", "task", "max_length")
        language = LanguageJob(model, against, files, text, sequence_length, place_of(device))
        emit(evaluate_language(language), as_json=as_json)
        return
    note_unused("but for causal language models on text", "sequence_length")
    if against is not None:
        from factorformer.cli._jobs.embeddings import EmbeddingJob, evaluate_embeddings

        if task is not None or not files:
            raise MethodError(
                "--against is about embeddings of the texts of --data: leave --task, --source and --target out"
            )
        job = EmbeddingJob(model, against, files, text, label, max_length, place_of(device))
        emit(evaluate_embeddings(job), as_json=as_json)
        return
    if len(files) > 1:
        raise MethodError(
            f"--data was given {len(files)} times: several files are for --against and for language models"
        )
    if source is not None:
        note_unused("beside --source and --target", "text", "label")
    columns = columns_in(measured, columns_of(text, label or "label", task))
    head = check_head(path, config, kind_of(task, measured))
    rows = read_table(measured, columns)
    with about(measured):
        labels = labels_for(head, rows, columns.label or "")
    tokenizer = load_tokenizer(path)
    encoded = encode_table(measured, rows, columns, tokenizer, labels, max_length or LENGTH, config)
    loaded = load_model(path, device=place_of(device), whole=True)
    check_lengths(loaded, encoded, f"'{measured}'")
    started = time.perf_counter()
    with bars() as progress:
        metrics = measure(loaded, tokenizer, encoded, labels, progress, "evaluate").metrics
    seconds = {"evaluate": time.perf_counter() - started}
    emit(Result.of(inventory(loaded), metrics=metrics, seconds=seconds), as_json=as_json)
