"""`factorformer export`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from factorformer.cli._options import MODELS, AsJson, Overwrite, TextColumns, emit, note
from factorformer.errors import MethodError, ModelError, one_line

if TYPE_CHECKING:
    from factorformer.export.sentence import Layout

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

Timed = Annotated[
    bool, typer.Option("--timing/--no-timing", help="Say which way to run the model is the fastest on this machine.")
]

LARGE = 0.25
"""Deviation of an int8 file on text from which on a note is worth it."""

NEEDED = ("torch", "fused", "file")
"""Ways without which nothing is compared."""

TIMED = (8, 64)
"""Texts and tokens of the input over which the ways to run a model are compared."""

SECONDS = 4.0
"""Of that comparison, about."""

LARGEST = 2**30
"""Bytes of weights up to which all ways are held in memory side by side."""

WAYS = {
    "torch": "the model in torch as it is",
    "fused": "the model in torch with its kernels (factorformer.fuse)",
    "fused_int8": 'the model in torch, its products rounded to int8 (factorformer.fuse(model, "int8"))',
    "file": "this file",
}
"""What they are called; files beside by their names."""


def export(
    model: Exported,
    to: To = "onnx",
    output: OutputDirectory = None,
    inside: Inside = False,
    int8: Int8 = False,
    calibration: Calibrated = None,
    timing: Timed = True,
    text: TextColumns = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model of text, compressed or not, for another runtime: a file, its configuration, and its tokenizer.

    A file for ONNX Runtime holds the factors as they are stored, one for OpenVINO in half precision. It takes batches
    and texts of any size, and puts out 'logits', 'last_hidden_state', or the 'sentence_embedding' of a directory with
    the layout of sentence-transformers; with --inside what the Transformer alone puts out.

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
    from factorformer.cli._texts import columns_of, plain_columns, read_table
    from factorformer.export import onnx, openvino, subject
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
        rows: Any = sample(read_table(calibration, columns), subject.TEXTS if to == "onnx" else openvino.SENTENCES)
        cells = [tuple(str(row[column]) for column in columns.text) for row in rows]
        texts = [cell if len(cell) == 2 else cell[0] for cell in cells]
    elif calibration is not None or text is not None:
        note("text is read for --int8 alone, from --calibration: it is not used")
    layout = subject.layout_of(model, inside=inside)
    place = None if inside else output or _beside(model, layout.source, f"-{to}-int8" if int8 else f"-{to}")
    if place is None:
        shown = layout.transformer / exporter.FOLDER
        check_files(shown, exporter.FILES, overwrite=overwrite)
    else:
        check_output(shown := place, overwrite=overwrite, inputs=(model, layout.source))
    subject.check_exportable(layout)
    costs = inventory(load_model(layout.source, device="cpu"), "all")
    started = time.perf_counter()
    done = exporter.export(str(layout.source), place, int8=int8, texts=texts, overwrite=overwrite)
    seconds = {"export": time.perf_counter() - started}
    if int8 and done.deviation > LARGE:
        note(
            f"int8 moves the output by {done.deviation:.0%} on text: activations of this model have outliers. "
            "Measure it on your own data, or export without --int8"
        )
    metrics = {"file_bytes": done.file_bytes, "deviation": done.deviation}
    metrics |= {} if done.cosine is None else {"cosine": done.cosine}
    file = shown / exporter.FILES[-1]
    files = {"file": file, **_beside_it(model, layout, file)}
    if timing and (times := _times(model, files)):
        fastest, (batch, tokens) = min(times, key=lambda name: times[name]), TIMED
        called = WAYS.get(fastest) or f"'{files[fastest]}'"
        note(f"fastest of {len(times)} ways here, {batch} texts of at most {tokens} tokens at a time: {called}")
        metrics |= {f"milliseconds_{name}": value for name, value in times.items()}
    emit(Result.of(costs, metrics=metrics, seconds=seconds, output=str(shown)), as_json=as_json)


def _beside_it(model: str, layout: Layout, file: Path) -> dict[str, Path]:
    """Files of other exports of the same model, where they lie by default; none that are older than its weights."""
    from factorformer.export import onnx, openvino

    found: dict[str, Path] = {}
    for to, exporter in (("onnx", onnx), ("openvino", openvino)):
        for end in ("", "-int8"):
            found[f"{to}{end}".replace("-", "_")] = _beside(model, layout.source, f"-{to}{end}") / exporter.FILES[-1]
        found[f"{to}_inside"] = layout.transformer / exporter.FOLDER / exporter.FILES[-1]
    made = max((weights.stat().st_mtime for weights in layout.source.rglob("*.safetensors")), default=0.0)
    there = {name: path for name, path in found.items() if path.is_file() and path.resolve() != file.resolve()}
    return {name: path for name, path in there.items() if path.stat().st_mtime >= made}


def _times(model: str, files: Mapping[str, Path]) -> dict[str, float]:
    """Milliseconds of a pass of the model in torch, through its kernels, in int8 where they do that, and of files.

    Empty, with a note, where they could not be taken: the file is there in any case.
    """
    import torch

    from factorformer.bench.candidates import Candidate, Runner, load, parse
    from factorformer.bench.comparison import Shape, compare

    names = {"torch": model, "fused": f"fused:{model}", "fused_int8": f"fused-int8:{model}"}
    timed: dict[str, tuple[Candidate, Runner]] = {}
    try:
        for name, text in {**names, **{name: str(file) for name, file in files.items()}}.items():
            candidate = parse(text)
            if sum(part.stat().st_size for part in candidate.files) > LARGEST:
                note(f"not timed: '{text}' has more than {LARGEST:,} bytes; `factorformer bench` compares them")
                return {}
            try:
                timed[name] = candidate, load(candidate, torch.get_num_threads(), torch.device("cpu"))
            except (MethodError, ModelError):
                if name in NEEDED:  # not all models have the others, and what lies beside may be anything
                    raise
        candidates, runners = zip(*timed.values(), strict=True)
        batch, tokens = TIMED
        tokens = min([tokens, *(runner.positions for runner in runners if runner.positions is not None)])
        (found,) = compare(candidates, runners, [Shape(batch, tokens)], seconds=SECONDS)
    except Exception as error:  # whatever it is, the export is done
        note(f"not timed: {one_line(error)}")
        return {}
    return {name: timing.milliseconds.median for name, timing in zip(timed, found.timings, strict=True)}


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
