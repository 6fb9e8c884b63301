"""`factorformer export`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from factorformer.cli._options import MODELS, AsJson, Overwrite, TextColumns, emit, note
from factorformer.errors import MethodError

Exported = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
To = Annotated[
    Literal["onnx", "openvino", "linear"],
    typer.Option(
        "--to",
        help="The format: a file for ONNX Runtime, or for OpenVINO, or, of low rank, a checkpoint of plain layers that "
        "transformers loads without this package (trust_remote_code=True).",
    ),
]
OutputDirectory = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="OUTPUT",
        show_default=False,
        help="The directory to make, by default one beside DIR, or here, whose name ends in '-onnx', '-openvino', "
        "'-onnx-int8', '-openvino-int8' or '-linear'. It appears complete, or not at all.",
    ),
]
Inside = Annotated[
    bool,
    typer.Option(
        "--inside",
        help="Put the file into DIR itself, as onnx/model.onnx or openvino/openvino_model.xml, where "
        "sentence-transformers, text-embeddings-inference and fastembed look for it.",
    ),
]
Int8 = Annotated[
    bool, typer.Option("--int8", help="Store weights as int8, and multiply in int8: smaller and faster, less exact.")
]
Calibrated = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        show_default=False,
        help="Text like that of the model's task. For OpenVINO --int8 takes its scales from it and needs it; for ONNX "
        "Runtime it is checked on it, by default on words of the vocabulary.",
    ),
]

LARGE = 0.25
"""Deviation of an int8 file on text from which on a note is worth it."""

TIMED = (8, 64)
"""Texts and tokens of the input over which the ways to run a model are compared."""

SECONDS = 4.0
"""Of that comparison."""


def export(
    model: Exported,
    to: To = "onnx",
    output: OutputDirectory = None,
    inside: Inside = False,
    int8: Int8 = False,
    calibration: Calibrated = None,
    text: TextColumns = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model of text, compressed or not, for another runtime: a file, its configuration, and its tokenizer.

    A file for ONNX Runtime holds the factors as they are stored, one for OpenVINO in half precision. It takes batches
    and texts of any size, and puts out 'logits', 'last_hidden_state', or the 'sentence_embedding' of a directory with
    the layout of sentence-transformers.

    Before a file or checkpoint appears it is run, and what comes out is compared with torch: 'deviation' is the norm of
    the difference, relative to that of the output, for random tokens, or for text where products are in int8; 'cosine'
    is that of the two outputs. Then all ways to run the model are timed in turn, and the fastest one here is named.

    \b
    [bold]Examples[/bold]
      factorformer export small/
      factorformer export small/ --int8 --calibration texts.txt --output small-onnx/
      factorformer export small/ --to openvino --int8 --calibration texts.txt
      factorformer export small/ --to onnx --inside
      factorformer export small/ --to linear
    """
    from factorformer.cli._inputs import columns_of, plain_columns, read_table
    from factorformer.export import onnx, openvino, subject
    from factorformer.export.sentence import find_layout
    from factorformer.files import check_files, check_output
    from factorformer.hf.source import load_model
    from factorformer.report import Result, inventory
    from factorformer.tasks.data import sample

    if to == "linear":
        if int8 or inside or calibration is not None or text is not None:
            raise MethodError(
                "--int8, --inside, --calibration and --text are for files: --to linear makes a checkpoint of floats"
            )
        return _export_linear(model, output, overwrite=overwrite, as_json=as_json)
    if inside and output is not None:
        raise MethodError("--inside and --output both say where the file goes: leave one out")
    onnx.require_packages()
    if to == "openvino":
        openvino.require_packages(int8=int8)
        if int8 and calibration is None:
            raise MethodError("--int8 for OpenVINO needs text to take its scales from: --calibration FILE")
    exporter = onnx if to == "onnx" else openvino
    texts = None
    if calibration is not None and int8:
        columns = plain_columns(calibration, columns_of(text, None))
        rows = sample(read_table(calibration, columns), subject.TEXTS if to == "onnx" else openvino.SENTENCES)
        texts = [" ".join(str(row[column]) for column in columns.text) for row in rows]  # pyright: ignore
    elif calibration is not None or text is not None:
        note("text is read for --int8 alone, from --calibration: it is not used")
    layout = find_layout(model)
    place = None if inside else output or _beside(model, layout.source, f"-{to}-int8" if int8 else f"-{to}")
    if place is None:
        shown = layout.source / exporter.FOLDER
        check_files(shown, exporter.FILES, overwrite=overwrite)
    else:
        check_output(shown := place, overwrite=overwrite, inputs=(model, layout.source))
    subject.check_exportable(layout)
    costs = inventory(load_model(layout.source, device="cpu"), "all")
    started = time.perf_counter()
    done = exporter.export(layout.source, place, int8=int8, texts=texts, overwrite=overwrite)
    seconds = {"export": time.perf_counter() - started}
    if int8 and done.deviation > LARGE:
        note(
            f"int8 moves the output by {done.deviation:.0%} on text: activations of this model have outliers. "
            "Measure it on your own data, or export without --int8"
        )
    metrics = {"file_bytes": done.file_bytes, "deviation": done.deviation, "cosine": done.cosine}
    times = _times(model, shown / exporter.FILES[-1])
    metrics |= {f"milliseconds of {name}": value for name, value in times.items()}
    if times:
        fastest, (batch, tokens) = min(times, key=lambda name: times[name]), TIMED
        note(f"fastest here, {batch} texts of at most {tokens} tokens at a time: {fastest}")
    emit(Result.of(costs, metrics=metrics, seconds=seconds, output=str(shown)), as_json=as_json)


def _times(model: str, file: Path) -> dict[str, float]:
    """Milliseconds of a pass of the model as it is, through its kernels, in int8, and of the file; by name."""
    import torch

    from factorformer.bench.candidates import load, parse
    from factorformer.bench.comparison import Shape, compare
    from factorformer.errors import FactorformerError

    candidates, runners = [], []
    for name in (model, f"fused:{model}", f"fused-int8:{model}", str(file)):
        with contextlib.suppress(FactorformerError):
            candidate = parse(name)
            runners.append(load(candidate, torch.get_num_threads(), torch.device("cpu")))
            candidates.append(candidate)
    batch, tokens = TIMED
    tokens = min([tokens, *(runner.positions for runner in runners if runner.positions is not None)])
    (found,) = compare(candidates, runners, [Shape(batch, tokens)], seconds=SECONDS)
    return {
        candidate.name: timing.milliseconds.median for candidate, timing in zip(candidates, found.timings, strict=True)
    }


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
