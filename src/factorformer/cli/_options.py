"""Options that several subcommands share, and how results reach the terminal.

This and the file of each subcommand import at the top only what a help page needs; the rest takes seconds to import.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from factorformer.report import Result


class ScopeChoice(str, Enum):
    """What is compressed and counted."""

    blocks = "blocks"
    all = "all"


class ShareChoice(str, Enum):
    """Which matrices share one dictionary."""

    inputs = "inputs"
    layers = "layers"


class BudgetChoice(str, Enum):
    """What a ratio counts."""

    bytes = "bytes"
    flops = "flops"
    milliseconds = "milliseconds"


MODELS = "A directory, a name on the Hugging Face Hub, or 'minilm' for the all-MiniLM-L6-v2 that comes with pip."

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=MODELS)]
Output = Annotated[
    Path,
    typer.Argument(
        metavar="OUTPUT", show_default=False, help="The directory to make. It appears complete, or not at all."
    ),
]

_BUDGET = "What becomes of the weights"
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        rich_help_panel=_BUDGET,
        help="One of `factorformer methods`. By default the data-aware fit where there is text to measure on, "
        "and the plain one where there is none.",
    ),
]
Ratio = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        show_default=False,
        rich_help_panel=_BUDGET,
        help="Bytes of the original tensors in scope over the bytes of what replaces them; met within 1 %. "
        "By default 3, and 10 with --int8.",
    ),
]
Budget = Annotated[
    BudgetChoice | None,
    typer.Option(
        "--budget",
        show_default=False,
        rich_help_panel=_BUDGET,
        help="What the ratio counts: 'bytes' (the default), 'flops' of products for a token, or 'milliseconds' that "
        "they take on this machine, measured now. Others than bytes are for 'auto' and 'whitened_by_loss'.",
    ),
]
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        rich_help_panel=_BUDGET,
        help="Store the factors in int8 with a scale for each row. The ratio counts them so: at 4 times the ratio, "
        "factors have about as many values as without it. Training rounds them.",
    ),
]
Scope = Annotated[
    ScopeChoice | None,
    typer.Option(
        "--scope",
        show_default=False,
        rich_help_panel=_BUDGET,
        help="What the ratio is about: 'blocks' (the default, but for 'shapeshifter') changes and counts the "
        "Transformer blocks, 'all' the whole model with its embeddings.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        rich_help_panel=_BUDGET,
        help="Factorize only modules whose name matches, e.g. '*.attention.*'. Can be given several times.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        rich_help_panel=_BUDGET,
        help="Keep modules dense whose name matches. Can be given several times.",
    ),
]

Share = Annotated[
    ShareChoice | None,
    typer.Option(
        "--share",
        show_default=False,
        rich_help_panel=_BUDGET,
        help="Give several matrices one dictionary: with 'inputs' those of a block that read the same tensor (query, "
        "key and value; gate and up) and the output of attention, with 'layers' the same matrix of all blocks.",
    ),
]

_DATA = "Data: CSV, TSV, JSONL, TXT (also compressed) or Parquet files, or NAME[:CONFIG]:SPLIT on the Hub"
TextColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="COLUMN",
        show_default=False,
        rich_help_panel=_DATA,
        help="The column that holds the text, by default 'text'; given twice, the two texts of sentence pairs.",
    ),
]
Words = Annotated[
    bool,
    typer.Option(
        "--words",
        rich_help_panel=_DATA,
        help="Texts are lists of words, and labels lists with a label for each: the task of tagging words (JSONL or "
        "Parquet hold lists).",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="COLUMN",
        rich_help_panel=_DATA,
        help="The column that holds the label: names or whole numbers are classes, fractions are a regression.",
    ),
]
Regression = Annotated[
    bool,
    typer.Option("--regression", rich_help_panel=_DATA, help="Read labels that are whole numbers as scores as well."),
]
CalibrationFile = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        rich_help_panel=_DATA,
        help="Text that a data-aware fit measures the layers on; `compress` takes the training file by default.",
    ),
]
CalibrationRows = Annotated[
    int, typer.Option("--calibration-rows", min=1, rich_help_panel=_DATA, help="How many of its rows are used.")
]
TrainFile = Annotated[
    str | None,
    typer.Option("--train", metavar="FILE", rich_help_panel=_DATA, help="What the model is trained on."),
]
EvalFile = Annotated[
    str | None,
    typer.Option("--eval", metavar="FILE", rich_help_panel=_DATA, help="What the result is measured on."),
]
MaxLength = Annotated[
    int, typer.Option("--max-length", min=2, rich_help_panel=_DATA, help="Tokens after which a text is cut.")
]

_TRAINING = "Training"
Epochs = Annotated[
    float, typer.Option("--epochs", min=1e-3, rich_help_panel=_TRAINING, help="Passes over the training data.")
]
LearningRate = Annotated[
    float, typer.Option("--lr", min=0.0, rich_help_panel=_TRAINING, help="Peak of the learning rate.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, rich_help_panel=_TRAINING, help="Rows in a step.")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=2**32 - 1, rich_help_panel=_TRAINING, help="Of everything that is drawn at random."
    ),
]
Distill = Annotated[
    str | None,
    typer.Option(
        "--distill",
        metavar="TEACHER",
        rich_help_panel=_TRAINING,
        help="A model to learn from as well, usually the uncompressed one. With it, training needs no labels.",
    ),
]
FreezeEmbeddings = Annotated[
    bool,
    typer.Option(
        "--freeze-embeddings/--train-embeddings",
        rich_help_panel=_TRAINING,
        help="Leave the word embeddings as they are, which saves memory and, in small models, half of the time. "
        "Factorized ones are trained in any case.",
    ),
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output's place.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own logging and bars for a while; ours go to standard error."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def note(text: str) -> None:
    """Tell a person something beside the result."""
    typer.echo(text, err=True)


def emit(result: Result, *, as_json: bool) -> None:
    """Print a result on standard output, for a program or for a person."""
    if as_json:
        emit_json(result.to_dict())
        return
    from factorformer.report.tables import show

    show(result, console())


def console() -> Console:
    """Standard output for tables; wide enough to keep one matrix on one line where no terminal limits it."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160 if wide else None)


def emit_json(content: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(content, indent=1))
