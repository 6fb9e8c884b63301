"""`factorformer export`."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from factorformer.cli._options import MODELS, AsJson, Overwrite, emit


class Format(str, Enum):
    """What a model is exported to."""

    onnx = "onnx"


Exported = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
To = Annotated[Format, typer.Option("--to", help="The format. ONNX files run in ONNX Runtime.")]
OutputDirectory = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="OUTPUT",
        show_default=False,
        help="The directory to make, by default one beside DIR, or here, whose name ends in '-onnx' or '-onnx-int8'. "
        "It appears complete, or not at all.",
    ),
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Store weights as int8, and multiply in int8: smaller and faster, less exact.")
]


def export(
    model: Exported,
    to: To = Format.onnx,
    output: OutputDirectory = None,
    int8: Int8 = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an encoder, compressed or not, for another runtime: a file, its configuration, and its tokenizer.

    The file holds the factors as they are stored, and takes batches and texts of any size. It puts out 'logits',
    'last_hidden_state', or the 'sentence_embedding' of a directory with the layout of sentence-transformers. Before it
    appears, ONNX Runtime runs it, and what comes out is compared with torch: 'deviation' is the norm of the difference,
    relative to that of the output, for random tokens.

    \b
    [bold]Examples[/bold]
      factorformer export small/
      factorformer export small/ --int8 --output small-onnx/
      factorformer export minilm --to onnx
    """
    from factorformer.export import onnx
    from factorformer.files import check_output
    from factorformer.hf.source import find, load_model
    from factorformer.report import Result, inventory

    del to  # there is one so far
    path = find(model)
    suffix = "-onnx-int8" if int8 else "-onnx"
    if output is None:
        named = path.resolve() if Path(model).is_dir() else Path(Path(model).name)
        output = named.with_name(named.name + suffix)
    check_output(output, overwrite=overwrite, inputs=(model, path))
    costs = inventory(load_model(path, device="cpu"), "all")
    started = time.perf_counter()
    done = onnx.export(path, output, int8=int8, overwrite=overwrite)
    seconds = {"export": time.perf_counter() - started}
    metrics = {"file_bytes": done.file_bytes, "deviation": done.deviation}
    emit(Result.of(costs, metrics=metrics, seconds=seconds, output=str(output)), as_json=as_json)
