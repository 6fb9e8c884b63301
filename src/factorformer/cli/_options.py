"""Options that several subcommands share, and how results reach the terminal.

This and the file of each subcommand import at the top only what a help page needs; the rest takes seconds to import.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from factorformer import processes
from factorformer.cli._text_files import Parallel, Source
from factorformer.errors import DataError, MethodError

if TYPE_CHECKING:
    from rich.console import Console

    from factorformer.report import Result
    from factorformer.tasks.labels import Kind


class ScopeChoice(str, Enum):
    """Scope of compression and of counting."""

    blocks = "blocks"
    all = "all"


class ShareChoice(str, Enum):
    """Which matrices share one dictionary."""

    inputs = "inputs"
    layers = "layers"


class BudgetChoice(str, Enum):
    """Unit of the budget."""

    bytes = "bytes"
    flops = "flops"
    milliseconds = "milliseconds"


class TaskChoice(str, Enum):
    """Tasks by the names that users know; those of the members are `tasks.labels.Kind`."""

    classification = "classification"
    regression = "regression"
    multi_label = "multi-label"
    tokens = "token-classification"
    answers = "question-answering"
    text = "text-to-text"


class DeviceChoice(str, Enum):
    """Where models run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def finite(value: float | None) -> float | None:
    """The value of an option; a usage error if it is NaN or infinite, which are within any bounds of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


LARGEST = 2**31 - 1
"""Upper bound of options that count something; libraries below take no larger numbers."""

MODELS = "A directory, a name on the Hugging Face Hub, or 'minilm' for the all-MiniLM-L6-v2 that comes with pip."

Model = Annotated[str, typer.Argument(metavar="MODEL", show_default=False, help=MODELS)]
Output = Annotated[
    Path,
    typer.Argument(
        metavar="OUTPUT", show_default=False, help="The directory to make. It appears complete, or not at all."
    ),
]

weights_option = partial(typer.Option, rich_help_panel="What becomes of the weights")
Method = Annotated[
    str | None,
    weights_option(
        "--method",
        metavar="NAME",
        help="One of `factorformer methods`. By default 'fisher' if there is calibration data, and 'svd' where there "
        "is none.",
    ),
]
Ratio = Annotated[
    float | None,
    weights_option(
        "--ratio",
        callback=finite,
        help="Bytes of the original tensors in scope over the bytes of what replaces them; met within 1 %, or exceeded "
        "where --int8 alone takes less. By default 3, 10 with --int8 and in `train`, and 15 with --int4.",
    ),
]
Budget = Annotated[
    BudgetChoice | None,
    weights_option(
        "--budget",
        help="What the ratio counts: 'bytes' (the default), 'flops' of products for a token, or 'milliseconds' that "
        "they take on this machine (on its GPU, if there is one), measured now. Others than bytes are for 'auto' and "
        "'fisher'.",
    ),
]
Int8 = Annotated[
    bool,
    weights_option(
        "--int8",
        help="Store factors and matrices that stay dense in int8 with a scale for each row. The ratio counts them so: "
        "at 4 times the ratio, factors have about as many values as without it; at a ratio of 4 all matrices are dense "
        "in int8, and below it 'fisher' and 'auto' leave floats where rounding harms most. Training is "
        "quantization-aware: it rounds factors in the forward pass; only 'dsformer' rounds "
        "them once, at the end.",
    ),
]
Int4 = Annotated[
    bool,
    weights_option(
        "--int4",
        help="As --int8, with two values in a byte: twice as many in as many bytes, each rounded to 16 levels, which "
        "training makes up for. Where that loses less for its bytes, 'fisher' and 'auto' keep matrices in int8, as "
        "long as all would fit dense in 4 bits, and in 3 bits beyond.",
    ),
]
Scope = Annotated[
    ScopeChoice | None,
    weights_option(
        "--scope",
        help="What the ratio is about: 'blocks' (the default, but for 'shapeshifter') changes and counts the "
        "Transformer blocks, 'all' the whole model with its embeddings.",
    ),
]
Include = Annotated[
    list[str] | None,
    weights_option(
        "--include",
        metavar="PATTERN",
        help="Factorize only modules whose name matches, e.g. '*.attention.*'. Can be given several times.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    weights_option(
        "--exclude", metavar="PATTERN", help="Keep modules dense whose name matches. Can be given several times."
    ),
]

RankMultiple = Annotated[
    int | None,
    weights_option(
        "--rank-multiple",
        min=1,
        help="Ranks of low-rank matrices are multiples of this, by default 1. For methods that make such matrices; "
        "other structures, of which 'auto' makes some, stay as they are.",
    ),
]
UniqueLayers = Annotated[
    int | None,
    weights_option(
        "--unique-layers",
        min=1,
        help="Let blocks share their matrices, as those of ALBERT do, so that so many different ones are left of each "
        "stack of blocks; with --int8 or --int4. The ratio counts all blocks of the original.",
    ),
]
TrimVocabulary = Annotated[
    str | None,
    weights_option(
        "--trim-vocabulary",
        metavar="TEXT",
        help="Drop the tokens that this text never uses, but for special ones and single characters, which spell the "
        "rest; the ratio counts them as part of the original.",
    ),
]
Share = Annotated[
    ShareChoice | None,
    weights_option(
        "--share",
        help="Give several matrices one dictionary: with 'inputs' those of a block that read the same tensor (query, "
        "key and value; gate and up) and the output of attention, with 'layers' the same matrix of all blocks.",
    ),
]

data_option = partial(
    typer.Option,
    rich_help_panel="Data: CSV, TSV, JSONL, TXT (also compressed) or Parquet files, or NAME[:CONFIG]:SPLIT on the Hub",
)
TextColumns = Annotated[
    list[str] | None,
    data_option(
        "--text",
        metavar="COLUMN",
        help="The column that holds the text, by default 'text', in all files; given twice, the two texts of sentence "
        "pairs.",
    ),
]
Task = Annotated[
    TaskChoice | None,
    data_option(
        "--task",
        show_default=False,
        help="What labels mean, by default what they say: fractions are scores ('regression'), lists any number of "
        "classes ('multi-label'), objects answers. 'token-classification' has to be said: texts are lists of words "
        "then, and labels lists with a label for each (JSONL or Parquet hold lists). A model with a head for another "
        "task is refused.",
    ),
]
LabelColumn = Annotated[
    str | None,
    data_option(
        "--label",
        metavar="COLUMN",
        help="The column that holds the label: names or whole numbers are classes, fractions are a regression.",
    ),
]
CalibrationFile = Annotated[
    str | None,
    data_option(
        "--calibration",
        metavar="FILE",
        help="Text that a data-aware fit measures the layers on; `compress` takes the training file by default.",
    ),
]
CalibrationRows = Annotated[
    int | None,
    data_option(
        "--calibration-rows",
        min=1,
        max=LARGEST,
        show_default=False,
        help="How many of its rows are used. By default 512, and of windows of text as many as hold 131,072 tokens.",
    ),
]
TrainFile = Annotated[str | None, data_option("--train", metavar="FILE", help="What the model is trained on.")]
EvalFile = Annotated[
    str | None,
    data_option(
        "--eval", metavar="FILE", help="What the result is measured on, and what training without labels is steered by."
    ),
]
LENGTH = 128
"""Tokens after which texts are cut, unless told otherwise."""

MaxLength = Annotated[int, data_option("--max-length", min=2, max=LARGEST, help="Tokens after which a text is cut.")]

ReadLength = Annotated[
    int | None,
    data_option(
        "--max-length",
        min=2,
        max=LARGEST,
        show_default=False,
        help="Tokens after which a text is cut. By default 128; of embeddings and scores without labels where "
        "sentence-transformers does.",
    ),
]

SequenceLength = Annotated[
    int | None,
    data_option(
        "--sequence-length",
        min=2,
        max=LARGEST,
        show_default=False,
        help="Of a causal language model, whose texts are joined: tokens of the windows that they are cut into. By "
        "default 2,048, or what the model reads.",
    ),
]

training_option = partial(typer.Option, rich_help_panel="Training")
Epochs = Annotated[
    float, training_option("--epochs", min=1e-3, max=1e6, callback=finite, help="Passes over the training data.")
]
LearningRate = Annotated[float, training_option("--lr", min=0.0, callback=finite, help="Peak of the learning rate.")]
BatchSize = Annotated[
    int, training_option("--batch-size", min=1, max=LARGEST, help="Rows in a step: texts, pairs or blocks.")
]
Minutes = Annotated[
    float | None,
    training_option(
        "--minutes",
        min=1e-3,
        max=1e6,
        callback=finite,
        help="Train for so many minutes, in place of --epochs, where there are no labels. Plan and fits come on top.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run of the same command, from its last checkpoint.")
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        show_default=False,
        rich_help_panel="Models larger than memory",
        help="Hold one block of the model in memory at a time. So it is done without being asked where the weights "
        "take more than half of the memory that is free. A run that was interrupted goes on by itself.",
    ),
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential",
        rich_help_panel="Models larger than memory",
        help="With --stream: let each block read what the compressed ones before it make.",
    ),
]
Seed = Annotated[int, training_option("--seed", min=0, max=2**32 - 1, help="Seed of all randomness.")]
Distill = Annotated[
    str | None,
    training_option(
        "--distill",
        metavar="TEACHER",
        help="A model to learn from as well, usually the uncompressed one. With it, training needs no labels.",
    ),
]
FactorsOnly = Annotated[
    bool,
    training_option(
        "--factors-only", help="Without labels: leave all that is dense as it is, norms and biases included."
    ),
]
Checkpointing = Annotated[
    bool,
    training_option(
        "--gradient-checkpointing",
        help="Without labels: compute layers again in the backward pass instead of keeping what is inside them.",
    ),
]
FreezeEmbeddings = Annotated[
    bool,
    training_option(
        "--freeze-embeddings/--train-embeddings",
        help="Leave the word embeddings as they are, which saves memory and, in small models, half of the time. "
        "Factorized ones are trained in any case.",
    ),
]

Device = Annotated[DeviceChoice, typer.Option("--device", help="Where to compute; 'auto' takes a GPU if there is one.")]
Each = Annotated[
    bool,
    typer.Option("--each", help="List every matrix, where models have so many that those of a role are one line."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace a model directory or a file that is there; never one with files of another kind."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]


def kind_of(task: TaskChoice | None, *sources: Source | None) -> Kind | None:
    """What a task is called inside; two files of texts say it themselves.

    Raises:
        DataError: another one was given beside these.
    """
    if any(isinstance(source, Parallel) for source in sources):
        if task not in (None, TaskChoice.text):
            raise DataError(f"--source and --target are for text-to-text, and --task is {task.value}: leave one out")
        return "text"
    return None if task is None else cast("Kind", task.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' logging and progress bars for a while; this package's go to standard error."""
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


def place_of(device: DeviceChoice) -> str:
    """The device of torch that an option means, with a note if that is a GPU that nobody named.

    Raises:
        MethodError: there is no such device.
    """
    import torch

    if device is DeviceChoice.cpu:
        return "cpu"
    if torch.cuda.is_available():
        if device is DeviceChoice.auto:
            note(f"device: {torch.cuda.get_device_name()} (--device cpu leaves it alone)")
        return "cuda"
    if device is DeviceChoice.cuda:
        raise MethodError("--device cuda: torch finds no CUDA GPU here; choose cpu or auto")
    return "cpu"


def command_line() -> str | None:
    """The command line of this process, as a shell takes it; None where Python code runs the command.

    It goes into files that may be published: of absolute places the last name is enough.
    """
    name, *words = sys.argv
    if not Path(name).name.startswith("factorformer"):
        return None
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join([Path(name).name, *shown])


def note(text: str) -> None:
    """Print something beside the result on standard error, in one process of several."""
    if processes.is_first():
        typer.echo(text, err=True)


def emit(result: Result, *, as_json: bool, each: bool = False) -> None:
    """Print a result on standard output, as JSON or as tables, with a line for each matrix or for each role."""
    if not processes.is_first():
        return
    if as_json:
        emit_json(result.to_dict())
        return
    from factorformer.report.tables import show

    show(result, console(), each=each)


def console() -> Console:
    """Standard output for tables; wide enough to keep one matrix on one line where no terminal limits it."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160 if wide else None)


def emit_json(content: Any) -> None:
    """Print one JSON document on standard output."""
    typer.echo(json.dumps(content, indent=1))
