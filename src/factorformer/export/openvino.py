"""Models for OpenVINO: the factors in an intermediate representation, in half precision or in static int8.

Whatever is exported is run, in OpenVINO, on batches of two shapes with padding, and compared with torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import DataError, ExportError, one_line
from factorformer.export import onnx
from factorformer.export.sentence import Pooling
from factorformer.export.subject import LOSS_INT8, TOLERANCE, Batch, Exported, Sample, Subject, Text, prepare
from factorformer.export.task import Continuation

FILES = "openvino_model.bin", "openvino_model.xml"
"""Weights, and the graph that reads them."""

FOLDER = "openvino"
"""Where other programs look for them in the directory of a model."""

TOLERANCE_HALF = 0.02
"""Of the norm of the outputs, by which those of a file in half precision may deviate from torch's: rounding weights to
11 bits changes each by up to 0.0005 of it, which adds up over layers."""

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
"""For products of floats in float32."""

SENTENCES = 200
"""Of the texts that scales are calibrated on."""

ROWS = 4
"""Of them in a batch."""


def export(
    model: PreTrainedModel | str | os.PathLike[str],
    path: str | os.PathLike[str] | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: Pooling | None = None,
    int8: bool = False,
    texts: Sequence[Text] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model of text, compressed or not, as a directory with `openvino_model.xml`, configuration and tokenizer.

    Batch and length are dynamic. The file holds the factors in half precision, whatever they were stored in, and sparse
    ones with their zeros; with `int8` most of them, and the inputs of their products, are in int8 with scales that do
    not change any more.

    Args:
        model: an encoder of text, or a decoder used as one, with a head that gives logits or without one; or its
            directory, a name on the Hub, or `minilm`. It is left as it is.
        path: the directory to make; it appears complete or not at all. None puts a folder `openvino` into the directory
            of the model, as sentence-transformers looks for it; of an encoder the file puts out hidden states then, of
            which that makes embeddings.
        tokenizer: written beside the model; by default that of the directory.
        pooling: makes a sentence encoder of an encoder; by default what `modules.json` of the directory says.
        int8: multiply in int8 (NNCF's quantization after training).
        texts: what `int8` is calibrated on, such as the model is to read, or pairs of texts: the first 200 of them.
        overwrite: replace what is there.

    Raises:
        DataError: `int8` without texts.
        ExportError: a package is missing, the model is of another kind, or the file does not compute what it does.
        ModelError: no such model.
        OutputError: the path exists and `overwrite` is off, or it cannot be written.
    """
    require_packages(int8=int8)
    import openvino  # pyright: ignore[reportMissingImports]

    texts = [text for text in texts or () if "".join(text).strip()]
    if int8 and not texts:
        raise DataError("scales of int8 in OpenVINO do not change at run time: give text to calibrate them on")
    subject = prepare(model, path, FOLDER, FILES, tokenizer=tokenizer, pooling=pooling, overwrite=overwrite)
    if isinstance(subject.task, Continuation):
        raise ExportError(
            f"{subject.kind} goes on with texts: export it to ONNX, which keeps what it has read (--to onnx)"
        )
    drawn, spoken = subject.random(), subject.spoken(texts) if int8 else None
    calibration = subject.read(texts[:SENTENCES], ROWS) if int8 else []
    if int8 and not calibration:
        raise ExportError(f"the {subject.kind} has no tokenizer to read text by: give one, or leave int8 out")
    with subject.files(*FILES) as files:
        graph = _converted(subject)
        _compare(graph, subject, drawn, TOLERANCE)
        if int8:
            graph = _quantized(graph, subject, calibration)
        openvino.save_model(graph, files[-1], compress_to_fp16=True)
        saved = openvino.Core().read_model(files[-1])
        _compare(saved, subject, spoken or drawn, LOSS_INT8 if int8 else TOLERANCE_HALF)
        # As it runs where nobody asks for float32: in bfloat16 on processors that have it.
        return subject.exported(files, *_compare(saved, subject, spoken or drawn, math.inf, {}))


def require_packages(*, int8: bool) -> None:
    """Raise `ExportError` if a package is missing or old."""
    for name in ("openvino", *(("nncf",) if int8 else ())):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"export to OpenVINO needs the package {name}: pip install 'factorformer[openvino]'")
    onnx.require_packages()


def _converted(subject: Subject) -> Any:
    """The model in OpenVINO's operators, which all of ONNX's that we write have a translation to."""
    import openvino  # pyright: ignore[reportMissingImports]

    from factorformer.export import graph

    translated = onnx.translate(subject)
    graph.fold(translated)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        onnx.write(translated, file := Path(folder, onnx.FILE))
        try:
            found = openvino.convert_model(file)
        except Exception as error:  # of types of its own
            raise ExportError(f"OpenVINO cannot read the exported {subject.kind}: {one_line(error)}") from error
        # Weights are mapped from the file, which goes.
        return found.clone()


def _quantized(graph: Any, subject: Subject, calibration: Sequence[Batch]) -> Any:
    """The graph with products in int8, whose scales are those of the inputs."""
    import nncf  # pyright: ignore[reportMissingImports]

    names = subject.task.names
    feeds = [{name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)} for batch in calibration]
    with _quiet():
        nncf.set_log_level(logging.ERROR)
        try:
            return nncf.quantize(
                graph, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)
            )
        except Exception as error:  # of types of its own
            raise ExportError(f"NNCF cannot quantize the exported {subject.kind}: {one_line(error)}") from error


def _compare(
    graph: Any, subject: Subject, sample: Sample, tolerance: float, settings: Mapping[str, str] = EXACT
) -> tuple[float, float | None]:
    """How far OpenVINO deviates from torch, and how alike the outputs are.

    Raises:
        ExportError: by more than the tolerance.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    try:
        run: Any = openvino.Core().compile_model(graph, "CPU", dict(settings))
        feeds = [{name: tensor.numpy() for name, tensor in feed.items()} for feed in sample.feeds(subject.task.names)]
        found = [[torch.from_numpy(run(feed)[0].copy())] for feed in feeds]
    except Exception as error:  # of types of its own
        raise ExportError(f"OpenVINO cannot run the exported {subject.kind}: {one_line(error)}") from error
    return sample.compare(found, tolerance, f"{subject.kind} cannot be exported: OpenVINO")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Bars of progress where messages go, and no warnings: what goes wrong is an error, and the result is checked."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
