"""Low rank as pairs of `nn.Linear`: a checkpoint that loads without this package.

Beside the weights lies a small file of Python, which `from_pretrained(..., trust_remote_code=True)` runs: it puts two
layers in the place of one wherever the configuration says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from factorformer.errors import ExportError, one_line
from factorformer.files import check_output, output_directory
from factorformer.hf import compat
from factorformer.hf.attachment import detach
from factorformer.hf.source import copy_companions, find, load_model, place_of_weights
from factorformer.layers._compat import undivided
from factorformer.layers.dummies import accepted
from factorformer.layers.nn import FactorizedEmbedding, FactorizedMatrix
from factorformer.layers.surgery import replace_module

FILE = "modeling_low_rank.py"
RANKS = "low_rank"
"""The field of the configuration that holds the rank of each layer, by name."""

TOLERANCE = 1e-4
"""Of the norm of the outputs, by which those of the checkpoint may deviate."""

SOURCE = '''"""{kind} with two layers in the place of one, wherever `config.{ranks}` gives a rank.

Made by factorformer, which is not needed to load it: from_pretrained(..., trust_remote_code=True).
"""

from torch import nn
from transformers import {imports}


class LowRank{config}({config}):
    model_type = "low_rank_{type}"


def split(model, ranks):
    for path, rank in ranks.items():
        for name in (path, path.removeprefix(model.base_model_prefix + ".")):
            parent, _, last = name.rpartition(".")
            try:
                old = model.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(old, nn.Embedding):
                rows, width = old.weight.shape
                new = nn.Sequential(
                    nn.Embedding(rows, rank, padding_idx=old.padding_idx), nn.Linear(rank, width, bias=False)
                )
            else:
                out, inner = old.weight.shape if isinstance(old, nn.Linear) else reversed(old.weight.shape)
                bias = old.bias is not None
                pair = (nn.Linear(inner, rank, bias=False), nn.Linear(rank, out, bias=bias)) if rank else ()
                new = nn.Sequential(*pair) if rank else nn.Linear(inner, out, bias=bias)
            setattr(model.get_submodule(parent), last, new)
            break
'''

CLASS = """

class LowRank{kind}({kind}):
    config_class = LowRank{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        split(self, config.{ranks})
"""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Result of `export`.

    Args:
        path: the directory.
        file_bytes: of the weights.
        deviation: of the outputs for random tokens, the norm of the difference relative to that of the output.
    """

    path: Path
    file_bytes: int
    deviation: float


def export(
    model: PreTrainedModel | str | os.PathLike[str], path: str | os.PathLike[str], *, overwrite: bool = False
) -> Exported:
    """Write a model whose factors are of low rank as a checkpoint of plain layers.

    Factors that are stored in integers become floats of the model's type; what they are compared with are products of
    the same values in floats. The tokenizer and what else lies beside the weights of a directory comes along.

    Args:
        model: compressed by low rank; or its directory. It is left as it is.
        path: the directory to make; it appears complete or not at all.
        overwrite: replace what is there.

    Raises:
        ExportError: nothing is of low rank, or something is of another structure, or the class is not of transformers,
            or the checkpoint does not compute the same.
        ModelError: no such model.
        OutputError: the path exists and `overwrite` is off, or it cannot be written.
    """
    source = None if isinstance(model, PreTrainedModel) else find(os.fspath(model))
    check_output(path, overwrite=overwrite, inputs=() if source is None else (source,))
    whole = undivided(model) if isinstance(model, PreTrainedModel) else load_model(Path(source or ""), device="cpu")
    whole.cpu().eval()
    kind = type(whole)
    loaders = _loaders(kind, compat.base_class(whole.config))
    batch = accepted(whole)
    if batch is None:
        raise ExportError(f"{kind.__name__} runs on no input that can be made up, so that nothing could be compared")
    expected = _output(whole, batch)
    ranks = _split(whole)
    detach(whole)
    whole.tie_weights()
    config: Any = whole.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    code = _code(config, list(dict.fromkeys([kind.__name__, *loaders.values()])))
    module = FILE.removesuffix(".py")
    described = {
        "architectures": [f"LowRank{kind.__name__}"],
        "auto_map": {auto: f"{module}.LowRank{name}" for auto, name in loaders.items()},
        "model_type": f"low_rank_{config.model_type}",  # so that nothing takes it for the original and draws the rest
        RANKS: ranks,
    }
    described["auto_map"]["AutoConfig"] = f"{module}.LowRank{type(config).__name__}"
    with output_directory(path, overwrite=overwrite) as directory:
        folder = directory if source is None else directory / place_of_weights(source)
        whole.save_pretrained(folder)
        file = folder / "config.json"
        known = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**known, **described}, indent=2) + "\n", encoding="utf-8")
        (folder / FILE).write_text(code, encoding="utf-8")
        if source is not None:
            copy_companions(source, directory, without=("README.md",))
        deviation = _deviation(folder, f"LowRank{kind.__name__}", batch, expected)
        size = sum(weights.stat().st_size for weights in folder.glob("*.safetensors"))
    return Exported(Path(path), size, deviation)


def _code(config: Any, names: list[str]) -> str:
    """The file of Python."""
    known = {"config": type(config).__name__, "ranks": RANKS}
    imports = ", ".join(sorted({type(config).__name__, *names}))
    code = SOURCE.format(kind=names[0], imports=imports, type=config.model_type, **known)
    return code + "".join(CLASS.format(kind=name, **known) for name in names)


def _loaders(kind: type[PreTrainedModel], base: type[PreTrainedModel] | None) -> dict[str, str]:
    """Which classes of transformers load this one, and its part without a head, with the names of these.

    Raises:
        ExportError: transformers does not have the class.
    """
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ExportError(f"{kind.__name__} is no class of transformers, on whose code the checkpoint would build")
    found = {} if base is None else {"AutoModel": base.__name__}
    return found | dict.fromkeys(compat.auto_classes(kind), kind.__name__)


def _split(model: PreTrainedModel) -> dict[str, int]:
    """Put pairs of layers in the place of low rank, and plain ones in that of dense matrices; the ranks by name."""
    ranks: dict[str, int] = {}
    factorized = {name: m for name, m in model.named_modules() if isinstance(m, FactorizedMatrix)}
    ties = compat.expanded_ties(model, whole=True)
    tied = {name.rpartition(".")[0] for pair in ties.items() for name in pair}
    chains = {name: layer.spec.chain(layer.multiplied) for name, layer in factorized.items()}
    for name, layer in factorized.items():
        if not 0 < len(chains[name]) <= 2:
            raise ExportError(
                f"'{name}' is stored as {layer.spec}, and pairs of nn.Linear are low rank: compress by svd, fwsvd or "
                "whitened, or save the materialized matrices (model.dequantize())"
            )
        if len(chains[name]) == 2 and name in tied:
            raise ExportError(f"'{name}' is in factors, and tied to another layer: leave it dense (--scope blocks)")
    if not any(len(chain) == 2 for chain in chains.values()):
        raise ExportError(f"{type(model).__name__} has no layer of low rank: save it as it is")
    with torch.no_grad():
        for name, layer in factorized.items():
            if len(chains[name]) == 2:
                ranks[name] = chains[name][0].weight.shape[0]
            elif not isinstance(layer, FactorizedEmbedding):
                ranks[name] = 0  # of one plain layer, whatever the class had in its place
            values = [matrix.values(layer.values.dtype) for matrix in chains[name]]
            replace_module(model, layer, _plain(layer, values).train(layer.training))
    return ranks


def _plain(layer: FactorizedMatrix, values: Sequence[Tensor]) -> nn.Module:
    """One layer of torch, or two."""
    bias = getattr(layer, "bias", None)
    if len(values) == 1:
        return _layer(layer, values[0], bias)
    right, weight = values
    if isinstance(layer, FactorizedEmbedding):
        return nn.Sequential(_layer(layer, weight, None), _linear(right.T, None))
    return nn.Sequential(_linear(right, None), _linear(weight, bias))


def _layer(layer: FactorizedMatrix, weight: Tensor, bias: Tensor | None) -> nn.Module:
    if not isinstance(layer, FactorizedEmbedding):
        return _linear(weight, bias)
    with torch.device("meta"):
        new = nn.Embedding(*weight.shape, padding_idx=layer.padding_idx)
    new.weight = nn.Parameter(weight.detach().clone())
    return new


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    new.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new


@torch.no_grad()
def _output(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The first output, of products in floats: where operators are counted, kernels leave them to torch."""
    with FlopCounterMode(display=False):
        return model(**batch)[0].float()


def _deviation(directory: Path, name: str, batch: Mapping[str, Tensor], expected: Tensor) -> float:
    """How far the output of a checkpoint is from the one expected; `ExportError` if that is more than the tolerance."""
    module = types.ModuleType(f"factorformer_exported_{id(expected)}")
    module.__file__ = str(directory / FILE)
    sys.modules[module.__name__] = module  # where transformers looks for the source of a class
    try:
        exec(compile((directory / FILE).read_text(encoding="utf-8"), module.__file__, "exec"), vars(module))
        found = _output(getattr(module, name).from_pretrained(directory).eval(), batch)
    except Exception as error:  # of transformers, which has checks of its own
        raise ExportError(f"the checkpoint of {name} does not load: {one_line(error)}") from error
    finally:
        del sys.modules[module.__name__]
    deviation = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if not deviation <= TOLERANCE:
        raise ExportError(f"{name} deviates by {deviation:.2g} of the output, more than the {TOLERANCE:g} allowed")
    return deviation
