"""The candidates of a benchmark: model directories by one of several routes, and files of other runtimes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from jaxtyping import Int
from torch import Tensor, nn

from factorformer.errors import FactorformerWarning, MethodError, ModelError, one_line, one_of
from factorformer.layers.nn import FactorizedMatrix

VARIANTS = {
    "fused": "whole layers, or attention and activations, by our compiled kernels (`factorformer.fuse`)",
    "fused-bf16": "the same, with products of layers in bfloat16",
    "fused-int8": "the same, with products of layers in int8",
    "compile": "through torch.compile, compiled for each shape",
    "bf16": "weights and activations in bfloat16",
    "int8": "torch's dynamic int8 of every nn.Linear",
    "torchao-int8": "torchao's dynamic int8 of every nn.Linear",
    "onnx": "the model.onnx of a directory that holds other weights as well, or of its folder onnx/",
    "openvino": "likewise openvino_model.xml, in OpenVINO",
}
"""Prefixes of a model's name, and what they mean."""

PRECISIONS = ("bf16", "int8", "torchao-int8", "fused-bf16", "fused-int8")

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

VOCABULARY = 1000
"""Assumed size of the vocabulary where no configuration gives it."""

Tokens = Int[Tensor, "batch tokens"]
Route = Literal["torch", "onnxruntime", "openvino"]

FILES: dict[str, tuple[Route, str]] = {
    "onnx": ("onnxruntime", "model.onnx"),
    "openvino": ("openvino", "openvino_model.xml"),
}
"""Variants that are files: what runs them, and their names."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model and the runtime that runs it.

    Args:
        name: as the user wrote it, e.g. `compile:small/`.
        path: a model directory, or a file of another runtime.
        route: the runtime.
        variants: names of `VARIANTS`, outermost first.
    """

    name: str
    path: Path
    route: Route = "torch"
    variants: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        if self.route == "openvino":
            return [self.path, self.path.with_suffix(".bin")]
        if self.route == "onnxruntime":
            external = [f"{self.path.name}{ending}" for ending in (".data", "_data")]
            beside = [self.path.with_name(name) for name in external]
            return [self.path, *(file for file in beside if file.is_file())]
        from factorformer.hf.layout import place

        folder = place(self.path).folder if self.path.is_dir() else self.path
        return next((sorted(found) for found in (list(folder.glob(end)) for end in WEIGHTS) if found), [])


def parse(text: str) -> Candidate:
    """Read `[VARIANT:]...MODEL`.

    MODEL is a directory, a name on the Hub, `minilm`, a file `*.onnx` or `*.xml`, or a directory with a `model.onnx` or
    an `openvino_model.xml` and no other weights. Variants can be combined, e.g. `compile:bf16:small/`.

    Raises:
        MethodError: an unknown variant, or some that do not go together.
        ModelError: no such model.
    """
    variants: list[str] = []
    rest = text
    while ":" in rest and not Path(rest).exists():
        first, _, after = rest.partition(":")
        if first not in VARIANTS:
            raise MethodError(f"'{text}': unknown variant {one_of(first, VARIANTS)}")
        variants.append(first)
        rest = after
    precisions = [name for name in variants if name in PRECISIONS]
    if len(set(variants)) < len(variants) or len(precisions) > 1:
        raise MethodError(f"'{text}': each variant once, and at most one of {', '.join(PRECISIONS)}")
    asked = [form for form in FILES if form in variants]
    for form in asked or FILES:
        route, name = FILES[form]
        file = _file(text, Path(rest), form, name, forced=form in variants)
        if file is not None:
            if set(variants) - {form}:
                raise MethodError(f"'{text}': other runtimes run a file as it is: leave out '{variants[0]}:'")
            return Candidate(text, file, route)
    from factorformer.hf.source import find

    return Candidate(text, find(rest), "torch", tuple(variants))


def _file(text: str, path: Path, form: str, name: str, *, forced: bool) -> Path | None:
    """The file that a name means; None if it is none of this form."""
    if path.suffix == Path(name).suffix and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"no such file: '{path}'")
        return path
    at_top, inside = path / name, path / name
    if forced and not at_top.is_file():
        from factorformer.hf.layout import place

        folder = place(path).folder if (path / "modules.json").is_file() else path
        inside = folder / form / name
    if forced and not inside.is_file():
        raise ModelError(f"'{text}': there is neither '{at_top}' nor '{inside}'")
    if inside.is_file() and (forced or not any(any(path.glob(pattern)) for pattern in WEIGHTS)):
        return inside
    return None


@dataclasses.dataclass(frozen=True)
class Runner:
    """A loaded candidate.

    Args:
        prepare: binds token ids to a forward pass.
        vocabulary: number of token ids.
        padding: id of the padding token; None if there is none.
        positions: maximum length of the input in tokens; None if unlimited.
        module: the module that torch runs; None for other runtimes.
    """

    prepare: Callable[[Tokens], Callable[[], object]]
    vocabulary: int
    padding: int | None
    positions: int | None
    module: nn.Module | None = None


def load(candidate: Candidate, threads: int, device: torch.device) -> Runner:
    """Load a candidate.

    Args:
        candidate: from `parse`.
        threads: that other runtimes may use; torch's are set for the whole process.
        device: for the models that torch runs.

    Raises:
        MethodError: a variant or route that does not run on the device or without a package that is missing.
        ModelError: the model cannot be loaded, or reads other things than tokens.
    """
    if candidate.route != "torch":
        if device.type != "cpu":
            raise MethodError(f"'{candidate.name}': only models in torch run on {device}, and this one on the CPU")
        return (_load_onnx if candidate.route == "onnxruntime" else _load_openvino)(candidate, threads)
    from factorformer.hf.source import load_model, most_tokens

    model = load_model(candidate.path, device=str(device))
    config = model.config
    if model.main_input_name != "input_ids":
        raise ModelError(f"'{candidate.name}' reads {model.main_input_name}: only models of text can be compared")
    if getattr(config, "use_cache", False):
        # Keys and values are kept for generating, and what is timed is one pass over all tokens.
        config.use_cache = False
    known, padding = config.get_text_config().vocab_size, config.get_text_config().pad_token_id
    positions, encoder_decoder = most_tokens(model), config.is_encoder_decoder
    run: Any = _changed(candidate, model, device)

    def prepare(ids: Tokens) -> Callable[[], object]:
        ids = ids.to(device)
        arguments = {"input_ids": ids, "attention_mask": real(ids, padding)}
        if encoder_decoder:
            arguments["decoder_input_ids"] = ids
        return lambda: run(**arguments)

    return Runner(prepare, known, padding, positions, run)


def _changed(candidate: Candidate, model: Any, device: torch.device) -> nn.Module:
    """The model in its precision, compiled if it is to be."""
    for name in candidate.variants:
        if name.startswith("fused"):
            model = _fused(candidate, name, model)
        elif name == "bf16":
            model = model.to(torch.bfloat16)
        elif name in PRECISIONS:
            model = _in_int8(candidate, name, model, device)
    if "compile" not in candidate.variants:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler imports what torch itself deprecates
        return torch.compile(model, dynamic=False)  # pyright: ignore


def _fused(candidate: Candidate, variant: str, model: Any) -> Any:
    from factorformer.hf.fused import fuse

    if variant == "fused":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FactorformerWarning)  # attention and activations are ours in any case
            return fuse(model)
    if "compile" in candidate.variants:
        raise MethodError(f"'{candidate.name}': what is compiled runs no layers in one call: leave 'compile' out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FactorformerWarning)
        try:
            return fuse(model, "bfloat16" if variant == "fused-bf16" else "int8")
        except FactorformerWarning as warning:  # products would be made as before
            raise MethodError(f"'{candidate.name}': {warning}") from None


def _in_int8(candidate: Candidate, variant: str, model: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cpu":
        raise MethodError(f"'{candidate.name}': '{variant}' runs on the CPU only, not on {device}")
    factorized = next((name for name, module in model.named_modules() if isinstance(module, FactorizedMatrix)), None)
    if factorized is not None:
        raise MethodError(
            f"'{candidate.name}': '{variant}' turns every nn.Linear into int8, and here '{factorized}' is in factors: "
            "put the variant before a dense model"
        )
    if not any(type(module) is nn.Linear for module in model.modules()):
        raise MethodError(f"'{candidate.name}': '{variant}' turns every nn.Linear into int8, and here is none")
    if variant == "int8":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is going to move into torchao
            from torch.ao.quantization import quantize_dynamic

            return quantize_dynamic(model.float(), {nn.Linear}, dtype=torch.qint8)
    if importlib.util.find_spec("torchao") is None:
        raise MethodError(f"'{candidate.name}' needs torchao: pip install torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_  # pyright: ignore

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _load_onnx(candidate: Candidate, threads: int) -> Runner:
    if importlib.util.find_spec("onnxruntime") is None:
        raise MethodError(f"'{candidate.name}' needs ONNX Runtime: pip install 'factorformer[onnx]'")
    import onnxruntime  # pyright: ignore

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # errors are raised as well
    # Threads that spin while they wait for their next work slow down everybody else's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(candidate.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many types, for files that are no models and for operators that it does not know
        raise ModelError(f"cannot load '{candidate.name}': {one_line(error)}") from error
    inputs = {item.name: item.shape for item in session.get_inputs()}
    return _runner(candidate, inputs, lambda feed: lambda: session.run(None, feed))


def _load_openvino(candidate: Candidate, threads: int) -> Runner:
    if importlib.util.find_spec("openvino") is None:
        raise MethodError(f"'{candidate.name}' needs OpenVINO: pip install 'factorformer[openvino]'")
    import openvino  # pyright: ignore

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    try:
        compiled = openvino.Core().compile_model(candidate.path, "CPU", settings)
    except Exception as error:  # of types of its own
        raise ModelError(f"cannot load '{candidate.name}': {one_line(error)}") from error
    request: Any = compiled.create_infer_request()
    inputs = dict.fromkeys((item.get_any_name() for item in compiled.inputs), ())
    # A view of the output in place of a copy: nobody reads it here.
    return _runner(candidate, inputs, lambda feed: lambda: request.infer(feed, share_outputs=True))


def _runner(
    candidate: Candidate,
    inputs: Mapping[str, Sequence[Any]],
    bind: Callable[[dict[str, Any]], Callable[[], object]],
) -> Runner:
    """A file with inputs of these names and sizes, and what runs it on arrays of them, of texts from their start."""
    from factorformer.export.task import PAST

    known = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    past = {name: size for name, size in inputs.items() if name.startswith(PAST) and len(size) == 4}
    names = [name for name in inputs if name not in past]
    if "input_ids" not in names or set(names) - known:
        raise ModelError(
            f"'{candidate.name}' reads {', '.join(names)}: only models of input_ids (and {', '.join(sorted(known))}) "
            "can be compared"
        )
    config = _config_beside(candidate.path)

    def prepare(ids: Tokens) -> Callable[[], object]:
        values = {
            "input_ids": ids,
            "attention_mask": real(ids, config.get("pad_token_id")),
            "token_type_ids": torch.zeros_like(ids),
            "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
        }
        values |= {name: torch.zeros(len(ids), size[1], 0, size[3]) for name, size in past.items()}
        return bind({name: numpy.ascontiguousarray(values[name].numpy()) for name in inputs})

    return Runner(prepare, config.get("vocab_size", VOCABULARY), config.get("pad_token_id"), None)


def real(ids: Tokens, padding: int | None) -> Tokens:
    """The mask of what is not padding."""
    return torch.ones_like(ids) if padding is None else (ids != padding).to(ids.dtype)


def _config_beside(file: Path) -> dict[str, Any]:
    path = file.with_name("config.json")
    if not path.is_file():  # in a folder of the model's directory
        path = path.resolve().parents[1] / path.name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def common_vocabulary(runners: Iterable[Runner]) -> int:
    """Ids below this are words to all of them."""
    return min(runner.vocabulary for runner in runners)


def draw(runners: Sequence[Runner], batch: int, tokens: int, seed: int, vocabulary: int | None = None) -> Tokens:
    """Random words that all of them know, or below a smaller vocabulary; none is padding."""
    known = common_vocabulary(runners) if vocabulary is None else min(common_vocabulary(runners), vocabulary)
    padding = sorted({runner.padding for runner in runners if runner.padding is not None and runner.padding < known})
    ids = torch.randint(known - len(padding), (batch, tokens), generator=torch.Generator().manual_seed(seed))
    for skipped in padding:
        ids[ids >= skipped] += 1
    return ids
