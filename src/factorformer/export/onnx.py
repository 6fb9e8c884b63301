"""Models as ONNX files: the factors as they are stored, in a graph that ONNX Runtime runs fast.

Whatever is exported is run, in ONNX Runtime, on batches of two shapes with padding, and compared with torch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import ExportError, one_line
from factorformer.export.sentence import Layout, Pooling, find_layout, read_longest
from factorformer.export.task import HEADS, Task, input_names
from factorformer.files import check_output, output_directory
from factorformer.hf.checkpoint import choose
from factorformer.hf.source import load_model, load_tokenizer, most_tokens

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
OPSET = 23
"""The first with an operator for attention."""

TOLERANCE = 1e-4
"""Of the norm of the outputs, by which those of the file may deviate from torch's."""

TOLERANCE_INT8 = 0.2
"""Of the norm of a product in int8, by which it may deviate from the product of the same input in float32.

Rounding an input of standard deviation 1 and range `r` to 256 levels changes it by `r / (256 * 12^0.5)`: 0.14 at the
range of 127 that the worst layer of all-mpnet-base-v2 has, where the product deviates by 0.09. A wrong scale, sign or
order of columns gives 0.5 to 2.
"""

LOSS_INT8 = 0.7
"""Of the norm of the outputs, by which those of a file in int8 may deviate from torch's on text: half of what outputs
that have nothing to do with each other do. Rounding adds up over layers: to 0.13 in MiniLM, 0.5 in all-mpnet-base-v2.
"""

TEXTS = 16
"""Texts on which a file in int8 is compared, in two batches."""

LONGEST = 128
"""Tokens after which these are cut."""

SHAPES = ((4, 9), (7, 16))
"""Batch and length of the comparison, neither of them that of the trace."""

LARGEST_FILE = 2**31 - 2**20
"""Bytes that a file in this format can have, with room for the graph."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Result of `export`.

    Args:
        path: the directory.
        file_bytes: of `model.onnx`.
        inputs: names of its inputs, int64 of `(batch, length)` each.
        output: the name of its output: `logits`, `last_hidden_state` or `sentence_embedding`.
        deviation: from torch, the norm of the difference relative to that of the output, of the worse of two batches:
            of random tokens, or of text where products are in int8.
    """

    path: Path
    file_bytes: int
    inputs: tuple[str, ...]
    output: str
    deviation: float


def check_exportable(layout: Layout) -> None:
    """Refuse a directory by its descriptions alone, before weights are read.

    Raises:
        CheckpointError: descriptions that cannot be read.
        ExportError: a package is missing, or neither the class of the model nor that without a head can be exported.
    """
    _require_packages()
    choice = choose(layout.source)
    refused: list[ExportError] = []
    for kind in (choice.loader, choice.base):
        if choice.config is None or kind is None:
            continue
        try:
            with torch.device("meta"):
                skeleton = kind(choice.config)
            head = kind.__name__.endswith(HEADS)
            Task(skeleton, input_names(skeleton, None), None if head else layout.pooling)
        except ExportError as error:
            refused.append(error)
            continue
        except Exception:  # a class that cannot be made without weights is asked when it has some
            return
        return
    if refused:
        raise refused[0]


def export(
    model: PreTrainedModel | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: Pooling | None = None,
    int8: bool = False,
    texts: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model of text, compressed or not, as a directory with `model.onnx`, its configuration and its tokenizer.

    Batch and length are dynamic. The file holds the tensors of the model as they are stored, sparse factors packed and
    half precision as such; products are made in float32, and with `int8` in int8.

    Args:
        model: an encoder of text, or a decoder used as one, with a head that gives logits or without one; or its
            directory, a name on the Hub, or `minilm`. It is left as it is.
        path: the directory to make; it appears complete or not at all.
        tokenizer: written beside the model; by default that of the directory.
        pooling: makes a sentence encoder of an encoder; by default what `modules.json` of the directory says.
        int8: store weights as int8 with one scale for each output, and quantize activations as they come.
        texts: on which a file in int8 is compared with torch; by default words of the tokenizer's vocabulary.
        overwrite: replace what is there.

    Raises:
        ExportError: a package is missing, the model is of another kind, or the file does not compute what it does.
        ModelError: no such model.
        OutputError: the path exists and `overwrite` is off, or it cannot be written.
    """
    _require_packages()
    from factorformer.export import graph, lowering

    check_output(path, overwrite=overwrite, inputs=() if isinstance(model, PreTrainedModel) else (model,))
    if isinstance(model, PreTrainedModel):
        whole = copy.deepcopy(model)
    else:
        layout = find_layout(os.fspath(model))
        check_output(path, overwrite=overwrite, inputs=(layout.source,))
        if tokenizer is None:
            with_tokenizer = (layout.source / "tokenizer_config.json").is_file()
            tokenizer = load_tokenizer(layout.source if with_tokenizer else layout.transformer)
            tokenizer.model_max_length = read_longest(layout.transformer) or tokenizer.model_max_length
        whole = load_model(layout.source)
        if pooling is None and not type(whole).__name__.endswith(HEADS):
            pooling = layout.pooling
    dtype = whole.dtype
    whole.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
    lowering.freeze(whole, quantized=True)
    kind = type(whole).__name__
    task = Task(whole, input_names(whole, tokenizer), pooling)
    with torch.no_grad():
        batches = [_batch(whole, task.names, *shape, seed) for seed, shape in enumerate(SHAPES)]
        expected = [task(*batch) for batch in batches]
        longest = most_tokens(whole) or LONGEST
        read = _text_batches(tokenizer, task.names, texts, longest) if int8 and tokenizer is not None else []
        spoken, wanted = (read, [task(*batch) for batch in read]) if read else (batches, expected)
    size = sum(tensor.nbytes for tensor in whole.state_dict().values())
    if size > LARGEST_FILE:
        raise ExportError(f"{kind} takes {size:,} bytes in float32; an ONNX file can have 2 GiB")
    with output_directory(path, overwrite=overwrite) as directory:
        file = directory / FILE
        translated = _translate(task)
        deviation = _save(translated, file, task, batches, expected, TOLERANCE)
        if int8:
            _quantize(translated, file, task, spoken)
            deviation = _save(translated, file, task, spoken, wanted, LOSS_INT8)
        elif dtype in graph.HALVES:
            graph.store_as(translated, dtype)
            deviation = _save(translated, file, task, batches, expected, TOLERANCE)
        config: Any = copy.deepcopy(whole.config)
        if hasattr(config, "quantization_config"):  # the file needs no plug-in to be read
            del config.quantization_config
        config.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        size = file.stat().st_size
    return Exported(Path(path), size, tuple(task.names), task.output, deviation)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export to ONNX needs the package {error.name}: pip install 'factorformer[onnx]'") from error
    if not hasattr(torch.onnx, "ops"):
        raise ExportError(f"export to ONNX needs torch 2.9 or newer, and this is {torch.__version__}")


def _batch(model: PreTrainedModel, names: list[str], rows: int, length: int, seed: int) -> list[Int[Tensor, "b n"]]:
    """Random tokens, all rows but the first padded, each to another length; on the left where the seed is odd."""
    config, draws = model.config, torch.Generator().manual_seed(seed)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None:  # models that count positions from behind the padding token have fewer of them
        length = max(2, min(length, longest - 2 - (config.pad_token_id or 0)))
    padding = config.pad_token_id or 0
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=draws)
    ids = torch.where(ids == padding, (padding + 1) % config.vocab_size, ids)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, -min(row + 1, length - 1) :] = 0
    mask = mask.flip(1) if seed % 2 else mask
    ids = torch.where(mask == 0, padding, ids)
    given = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in names:
        given["token_type_ids"] = torch.zeros_like(ids)
        given["token_type_ids"][:, length // 2 :] = 1
    return [given[name] for name in names]


def _text_batches(
    tokenizer: PreTrainedTokenizerBase, names: list[str], texts: Sequence[str] | None, longest: int
) -> list[list[Tensor]]:
    """Inputs of two batches of text; none where the vocabulary has too few words to make up some."""
    texts = _made_up(tokenizer) if texts is None else [text for text in texts if text.strip()][:TEXTS]
    if not texts:
        return []
    longest = min(tokenizer.model_max_length, longest, LONGEST)
    halves = [half for half in (texts[::2], texts[1::2]) if half]
    found = [tokenizer(half, padding=True, truncation=True, max_length=longest, return_tensors="pt") for half in halves]
    return [[batch.get(name, torch.zeros_like(batch["input_ids"])) for name in names] for batch in found]


def _made_up(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Sentences of whole words of a vocabulary, always the same."""
    tokens = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    words = [word for token in tokens if (word := tokenizer.convert_tokens_to_string([token]).strip()).isalpha()]
    words = [word for word in words if len(word) > 2 or not word.isascii()]
    draws = random.Random(0)
    return [" ".join(draws.choices(words, k=draws.randint(5, 14))) + "." for _ in range(TEXTS if len(words) > 9 else 0)]


def _translate(task: Task) -> ir.Model:
    """The graph of a model, which is of no other use afterwards."""
    from factorformer.export import graph, lowering

    lowering.freeze(task.model, quantized=False)
    lowering.replace_attention(task.model)
    example = _batch(task.model, task.names, 2, 8, seed=len(SHAPES))
    with _silent(), torch.no_grad():
        try:
            program = torch.onnx.export(
                task,
                tuple(example),
                dynamo=True,
                dynamic_shapes=(tuple({0: "batch", 1: "length"} for _ in task.names),),
                input_names=task.names,
                output_names=[task.output],
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
            name = type(task.model).__name__
            raise ExportError(f"torch cannot export {name} to ONNX: {one_line(cause)}") from error
        assert program is not None
        graph.simplify(program.model)
    return program.model


def _save(
    model: ir.Model, file: Path, task: Task, batches: list[list[Tensor]], expected: list[Tensor], tolerance: float
) -> float:
    """Write a file, and see how far it deviates from torch: the norm of the difference, relative to the output.

    Raises:
        ExportError: by more than the tolerance.
    """
    import onnx_ir

    from factorformer.export import graph

    graph.clean(model)
    onnx_ir.save(model, file)
    found = [outputs[0] for outputs in _run(file, task, [dict(zip(task.names, b, strict=True)) for b in batches])]
    pairs = [(_real(a, mask), _real(b, mask)) for a, b, (_, mask, *_) in zip(found, expected, batches, strict=True)]
    return _checked(task, pairs, tolerance)


def _quantize(model: ir.Model, file: Path, task: Task, batches: list[list[Tensor]]) -> None:
    """Turn a graph into int8, and compare each of its products with that of the same input in floats.

    Args:
        model: in floats.
        file: that it was saved in.
        task, batches: what it runs on.

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
    found = _run(model, task, [dict(zip(task.names, batch, strict=True)) for batch in batches])
    places = {value: place for place, value in enumerate(model.graph.outputs)}
    del model.graph.outputs[len(outputs) :]
    lefts = [{name: run[places[left]] for name, (left, _) in zip(names, products, strict=True)} for run in found]
    expected = _run(alone, task, lefts)
    pairs = [
        (run[places[product]], exact)
        for run, floats in zip(found, expected, strict=True)
        for (_, product), exact in zip(products, floats, strict=True)
    ]
    _checked(task, pairs, TOLERANCE_INT8, "its products in float32")


def _run(model: Path | ir.Model, task: Task, feeds: list[dict[str, Tensor]]) -> list[list[Tensor]]:
    """All that ONNX Runtime puts out, for each feed."""
    import onnx_ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = model if isinstance(model, Path) else onnx_ir.to_proto(model).SerializeToString()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        arrays = [{name: tensor.numpy() for name, tensor in feed.items()} for feed in feeds]
        return [[torch.from_numpy(output) for output in session.run(None, feed)] for feed in arrays]
    except Exception as error:  # ONNX Runtime raises types of its own, which share no base
        kind = type(task.model).__name__
        raise ExportError(f"ONNX Runtime cannot run the exported {kind}: {one_line(error)}") from error


def _checked(task: Task, pairs: list[tuple[Tensor, Tensor]], tolerance: float, reference: str = "torch") -> float:
    """The largest deviation among pairs of found and expected; `ExportError` if it is more than the tolerance."""
    tiny = torch.finfo(torch.float32).tiny
    found = [float((got - wanted).norm() / wanted.norm().clamp_min(tiny)) for got, wanted in pairs]
    deviation = max(found, key=lambda value: (value != value, value), default=0.0)
    if not deviation <= tolerance:
        raise ExportError(
            f"{type(task.model).__name__} cannot be exported: ONNX Runtime deviates from {reference} by "
            f"{deviation:.2g} of the output, more than the {tolerance:g} allowed"
        )
    return deviation


def _real(output: Tensor, mask: Tensor) -> Tensor:
    """What is put out for tokens, without that for padding."""
    return output[mask.bool()] if output.shape[:-1] == mask.shape else output


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
