"""`factorformer export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from factorformer.cli._options import MODELS, AsJson, Overwrite, TextColumns, emit, note
from factorformer.errors import MethodError

Exported = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
To = Annotated[
    Literal["onnx", "linear"],
    typer.Option(
        "--to",
        help="The format: a file for ONNX Runtime, or, of low rank, a checkpoint of plain layers that transformers "
        "loads without this package (trust_remote_code=True).",
    ),
]
OutputDirectory = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="OUTPUT",
        show_default=False,
        help="The directory to make, by default one beside DIR, or here, whose name ends in '-onnx', '-onnx-int8' or "
        "'-linear'. It appears complete, or not at all.",
    ),
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Store weights as int8, and multiply in int8: smaller and faster, less exact.")
]
CheckedOn = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        show_default=False,
        help="Text like that of the model's task, which --int8 is checked on; by default words of the vocabulary.",
    ),
]

LARGE = 0.25
"""Deviation of an int8 file on text from which on a note is worth it."""


def export(
    model: Exported,
    to: To = "onnx",
    output: OutputDirectory = None,
    int8: Int8 = False,
    calibration: CheckedOn = None,
    text: TextColumns = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model of text, compressed or not, for another runtime: a file, its configuration, and its tokenizer.

    A file for ONNX Runtime holds the factors as they are stored, and takes batches and texts of any size. It puts out
    'logits', 'last_hidden_state', or the 'sentence_embedding' of a directory with the layout of sentence-transformers.
    Before a file or checkpoint appears it is run, and what comes out is compared with torch: 'deviation' is the norm of
    the difference, relative to that of the output, for random tokens, or for text where products are in int8.

    \b
    [bold]Examples[/bold]
      factorformer export small/
      factorformer export small/ --int8 --calibration texts.txt --output small-onnx/
      factorformer export minilm --to onnx
      factorformer export small/ --to linear
    """
    from factorformer.cli._inputs import columns_of, plain_columns, read_table
    from factorformer.export import onnx
    from factorformer.export.sentence import find_layout
    from factorformer.files import check_output
    from factorformer.hf.source import load_model
    from factorformer.report import Result, inventory
    from factorformer.tasks.data import sample

    if to == "linear":
        if int8 or calibration is not None or text is not None:
            raise MethodError("--int8, --calibration and --text are for --to onnx: the checkpoint is one of floats")
        return _export_linear(model, output, overwrite=overwrite, as_json=as_json)
    texts = None
    if calibration is not None and int8:
        columns = plain_columns(calibration, columns_of(text, None))
        rows = sample(read_table(calibration, columns), onnx.TEXTS)
        texts = [" ".join(str(row[column]) for column in columns.text) for row in rows]  # pyright: ignore
    elif calibration is not None or text is not None:
        note("text is read for the check of --int8 alone, from --calibration: it is not used")
    layout = find_layout(model)
    suffix = "-onnx-int8" if int8 else "-onnx"
    output = output or _beside(model, layout.source, suffix)
    check_output(output, overwrite=overwrite, inputs=(model, layout.source))
    onnx.check_exportable(layout)
    costs = inventory(load_model(layout.source, device="cpu"), "all")
    started = time.perf_counter()
    done = onnx.export(layout.source, output, int8=int8, texts=texts, overwrite=overwrite)
    seconds = {"export": time.perf_counter() - started}
    if int8 and done.deviation > LARGE:
        note(
            f"int8 moves the output by {done.deviation:.0%} on text: activations of this model have outliers. "
            "Measure it on your own data, or export without --int8"
        )
    metrics = {"file_bytes": done.file_bytes, "deviation": done.deviation}
    emit(Result.of(costs, metrics=metrics, seconds=seconds, output=str(output)), as_json=as_json)


def _export_linear(model: str, output: Path | None, *, overwrite: bool, as_json: bool) -> None:
    from factorformer.export import linear
    from factorformer.files import check_output
    from factorformer.hf.source import find, load_model
    from factorformer.report import Result, inventory

    source = find(model)
    output = output or _beside(model, source, "-linear")
    check_output(output, overwrite=overwrite, inputs=(model, source))
    costs = inventory(load_model(source, device="cpu"), "all")
    started = time.perf_counter()
    done = linear.export(source, output, overwrite=overwrite)
    metrics = {"file_bytes": done.file_bytes, "deviation": done.deviation}
    seconds = {"export": time.perf_counter() - started}
    emit(Result.of(costs, metrics=metrics, seconds=seconds, output=str(output)), as_json=as_json)


def _beside(model: str, source: Path, suffix: str) -> Path:
    """A directory beside that of the model, or here where it has none."""
    named = source.resolve() if Path(model).is_dir() else Path(Path(model).name)
    return named.with_name(named.name + suffix)
