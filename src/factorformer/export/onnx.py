"""Models as ONNX files: the factors as they are stored, in a graph that ONNX Runtime runs fast.

Whatever is exported is run, in ONNX Runtime, on batches of two shapes with padding, and compared with torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import ExportError, one_line
from factorformer.export.sentence import Pooling
from factorformer.export.subject import LOSS_INT8, SHAPES, TOLERANCE, Exported, Sample, Subject, Text, checked, prepare

if TYPE_CHECKING:
    import onnx_ir as ir

FILES = EXTERNAL, FILE = "model.onnx_data", "model.onnx"
"""Where weights go if they are too many for a file, and the file."""

FOLDER = "onnx"
"""Where other programs look for it in the directory of a model."""

OPSET = 23
"""The first with an operator for attention."""

TOLERANCE_INT8 = 0.2
"""Of the norm of a product in int8, by which it may deviate from the product of the same input in float32.

Rounding an input of standard deviation 1 and range `r` to 256 levels changes it by `r / (256 * 12^0.5)`: 0.14 at the
range of 127 that the worst layer of all-mpnet-base-v2 has, where the product deviates by 0.09. A wrong scale, sign or
order of columns gives 0.5 to 2.
"""

LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights that a file in this format can have beside the graph; more are in a file of their own."""


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
    """Write a model of text, compressed or not, as a directory with `model.onnx`, its configuration and its tokenizer.

    Batch and length are dynamic. The file holds the tensors of the model as they are stored, sparse factors packed and
    half precision as such; products are made in float32, and with `int8` in int8.

    Args:
        model: an encoder of text, or a decoder used as one, with a head that gives logits or without one; or a causal
            language model, which reads and puts out keys and values of the tokens before, to go on with; or the
            directory of one, a name on the Hub, or `minilm`. It is left as it is.
        path: the directory to make; it appears complete or not at all. None puts a folder `onnx` into the directory
            of the model, as sentence-transformers, text-embeddings-inference and fastembed look for it; of an encoder
            the file puts out hidden states then, of which these make embeddings.
        tokenizer: written beside the model; by default that of the directory.
        pooling: makes a sentence encoder of an encoder; by default what `modules.json` of the directory says.
        int8: store weights as int8 with one scale for each output, and quantize activations as they come.
        texts: on which a file in int8 is compared with torch, or pairs of texts; by default words of the tokenizer's
            vocabulary.
        overwrite: replace what is there.

    Raises:
        ExportError: a package is missing, the model is of another kind, or the file does not compute what it does.
        ModelError: no such model.
        OutputError: the path exists and `overwrite` is off, or it cannot be written.
    """
    require_packages()
    from factorformer.export import graph

    subject = prepare(model, path, FOLDER, FILES, tokenizer=tokenizer, pooling=pooling, overwrite=overwrite)
    drawn = subject.random()
    spoken = subject.spoken(texts) if int8 else drawn
    with subject.files(*FILES) as files:
        file = files[-1]
        translated = translate(subject)
        exact = _save(translated, file, subject, drawn, TOLERANCE)
        if int8:
            _quantize(translated, file, subject, spoken)
            exact = _save(translated, file, subject, spoken, LOSS_INT8)
        elif subject.dtype in graph.HALVES:
            graph.store_as(translated, subject.dtype)
            exact = _save(translated, file, subject, drawn, TOLERANCE)
        return subject.exported(files, *exact)


def require_packages() -> None:
    """Raise `ExportError` if a package is missing or old."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export to ONNX needs the package {error.name}: pip install 'factorformer[onnx]'") from error
    if not hasattr(torch.onnx, "ops"):
        raise ExportError(f"export to ONNX needs torch 2.9 or newer, and this is {torch.__version__}")


def translate(subject: Subject) -> ir.Model:
    """The graph of a model, which is of no other use afterwards."""
    from factorformer.export import graph, lowering

    task = subject.task
    lowering.freeze(task.model, quantized=False)
    lowering.replace_attention(task.model)
    example = subject.draw(2, 8, seed=len(SHAPES))
    with _silent(), torch.no_grad():
        try:
            program = torch.onnx.export(
                task,
                tuple(example),
                dynamo=True,
                dynamic_shapes=(tuple(task.shapes),),
                input_names=task.names,
                output_names=task.outputs,
                opset_version=OPSET,
                custom_translation_table=lowering.table(),
                optimize=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None and not isinstance(cause, ExportError):
                cause = cause.__cause__
            if isinstance(cause, ExportError):
                raise cause from error
            raise ExportError(f"torch cannot export {subject.kind} to ONNX: {one_line(cause)}") from error
        assert program is not None
        graph.simplify(program.model)
    return program.model


def write(model: ir.Model, file: Path) -> None:
    """Write a graph, with its weights in a file beside it where they are more than one file can have."""
    import onnx_ir

    from factorformer.export import graph

    graph.clean(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    beside = size > LARGEST_FILE
    if not beside:
        file.with_name(EXTERNAL).unlink(missing_ok=True)  # of a larger one that was written before
    onnx_ir.save(model, file, external_data=EXTERNAL if beside else None)


def _save(
    model: ir.Model, file: Path, subject: Subject, sample: Sample, tolerance: float
) -> tuple[float, float | None]:
    """Write a file, and see how far it deviates from torch, and how alike the outputs are.

    Raises:
        ExportError: by more than the tolerance.
    """
    write(model, file)
    found = _run(file, subject, sample.feeds(subject.task.names))
    if tolerance == LOSS_INT8:  # which is of what is made in the end
        found = [outputs[:1] for outputs in found]
    return sample.compare(found, tolerance, f"{subject.kind} cannot be exported: ONNX Runtime")


def _quantize(model: ir.Model, file: Path, subject: Subject, sample: Sample) -> None:
    """Turn a graph into int8, and compare each of its products with that of the same input in floats.

    Args:
        model: in floats.
        file: that it was saved in.
        subject, sample: what it runs on.

    Raises:
        ExportError: a product deviates by more than rounding explains.
    """
    import onnx_ir

    from factorformer.export import graph

    alone = onnx_ir.load(file)
    names = graph.products_alone(alone)
    products = graph.quantize(model)
    if not products:
        return
    outputs = list(model.graph.outputs)
    inside = dict.fromkeys(value for pair in products for value in pair if value not in outputs)
    model.graph.outputs.extend(inside)
    found = _run(model, subject, sample.feeds(subject.task.names))
    places = {value: place for place, value in enumerate(model.graph.outputs)}
    del model.graph.outputs[len(outputs) :]
    lefts = [{name: run[places[left]] for name, (left, _) in zip(names, products, strict=True)} for run in found]
    expected = _run(alone, subject, lefts)
    pairs = [
        (run[places[product]], exact)
        for run, floats in zip(found, expected, strict=True)
        for (_, product), exact in zip(products, floats, strict=True)
    ]
    what = f"{subject.kind} cannot be exported: ONNX Runtime deviates from its products in float32"
    checked(pairs, TOLERANCE_INT8, what)


def _run(model: Path | ir.Model, subject: Subject, feeds: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """All that ONNX Runtime puts out, for each feed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() if not isinstance(model, Path) else contextlib.nullcontext() as folder:
        if not isinstance(model, Path):
            write(model, file := Path(folder or "", FILE))
        else:
            file = model
        try:
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            arrays = [{name: tensor.numpy() for name, tensor in feed.items()} for feed in feeds]
            return [[torch.from_numpy(output) for output in session.run(None, feed)] for feed in arrays]
        except Exception as error:  # ONNX Runtime raises types of its own, which share no base
            raise ExportError(f"ONNX Runtime cannot run the exported {subject.kind}: {one_line(error)}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No warnings and no messages of torch's exporter: what goes wrong is an error, and the result is checked."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
