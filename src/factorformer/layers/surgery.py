"""Find the weight matrices of a model, and put factorized layers in their place."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factorformer.errors import MethodError, ModelError, one_of
from factorformer.layers._compat import is_offloaded, place_like
from factorformer.layers.bypass import bypassed
from factorformer.layers.dense import dense_shape, is_altered, is_transposed
from factorformer.layers.embeddings import embeddings_of
from factorformer.layers.matrix import Cost, LeftOut, Matrix, Role, Scope
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix
from factorformer.structures import Factors, Shape, Structure
from factorformer.structures.integers import Bits

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that can be factorized."""

SMALLEST_SIDE = 16
"""Matrices with a shorter side than this (classifier heads, token types) stay dense: there is nothing to gain."""


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the Transformer blocks: members of the outermost module lists that hold weight matrices."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in blocks):
            children = [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]
            blocks += [path for path, child in children if sum(t.dim() >= 2 for t in _weights(child)) >= 2]
    return blocks


def _weights(module: nn.Module) -> list[Tensor]:
    """Parameters, and what is stored in integers in place of some."""
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.dtype == torch.int8)]


def find_matrices(
    model: nn.Module,
    scope: Scope = "blocks",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    bits: Bits | None = None,
    batch: Mapping[str, Any] | None = None,
) -> tuple[list[Matrix], Cost]:
    """Every weight matrix in scope, each once, and the cost of the other tensors in scope.

    `nn.Linear`, GPT-2's `Conv1D`, `nn.Embedding`, and subclasses that compute the same can be factorized, unless the
    architecture uses their weights without calling them. Everything else of two or more dimensions is listed with the
    reason why it stays dense.

    Args:
        model: any `nn.Module`.
        scope: `blocks` for linear layers inside Transformer blocks, `all` for the whole model, embeddings included.
        include: shell patterns of module names; if given, other matrices stay dense.
        exclude: shell patterns of module names that stay dense.
        bits: of the integers in which factors are to be stored, which some architectures do not bear in some places.
        batch: keyword arguments of the model, for the trial that finds out how it uses its weights; by default random
            ones, made from its configuration.

    Raises:
        MethodError: an unknown scope.
        ModelError: no blocks, a pattern that matches nothing, layers factorized already, an adapter on top, or weights
            in integers or in 8 bits.
    """
    if scope not in ("blocks", "all"):
        raise MethodError(f"unknown scope {one_of(str(scope), ['blocks', 'all'])}")
    done = [name for name, module in model.named_modules() if isinstance(module, FactorizedMatrix)]
    if done:
        raise ModelError(f"the model is compressed already ('{done[0]}' is factorized): start from the dense model")
    if getattr(model, "is_quantized", False) is True:
        raise ModelError("the model is quantized: its weights are codes, so start from the model in full precision")
    if any("peft" in {cls.__module__.partition(".")[0] for cls in type(m).__mro__} for m in model.modules()):
        raise ModelError(
            "the model has an adapter of PEFT, and would be saved as that alone: merge it first (`merge_and_unload`), "
            "or compress the model that it belongs to"
        )
    elsewhere = next((name for name, module in model.named_modules() if is_offloaded(module)), None)
    if elsewhere is not None:
        raise ModelError(
            f"the weights of '{elsewhere}' are offloaded by its device_map: load the model where all of it fits, or "
            "compress its directory by --stream"
        )
    calls = _calls_of_blocks(model)
    if scope == "blocks" and not calls:
        raise ModelError(f"no Transformer blocks found in {type(model).__name__}: use scope='all'")
    holders = _holders(model)
    layers = {name: module for name, module in model.named_modules() if dense_shape(module) is not None}
    for name, layer in layers.items():
        dtype = layer.get_parameter("weight").dtype
        if dtype not in FLOATS:
            raise ModelError(f"the weight of '{name}' is {dtype}: start from the model in full precision")
    include, exclude = _patterns(include), _patterns(exclude)
    _check_patterns([*(include or []), *(exclude or [])], list(layers))
    reasons = _saved_by_others(model, layers) | bypassed(model, layers, int8=bits is not None, batch=batch)
    matrices: list[Matrix] = []
    rest = Cost()
    for path, parameter in model.named_parameters():
        block = next((block for block in calls if path.startswith(f"{block}.")), None)
        if scope == "blocks" and block is None:
            continue
        if parameter.dim() < 2:
            rest += Cost(parameter.numel(), parameter.numel() * parameter.element_size(), 0)
            continue
        holding = holders[id(parameter)]
        held = _Held(path, parameter, holding, [model.get_submodule(name) for name in holding], block)
        matrix = _describe(model, held, calls.get(block or "", 1), include, exclude)
        if matrix.dense is None:
            reason = next((reasons[name] for name in holding if name in reasons), None)
            matrix = dataclasses.replace(matrix, bits=bits if reason is None else None, dense=reason)
        matrices.append(matrix)
    return matrices, rest


def _saved_by_others(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Layers that what wraps a model of transformers saves itself: the `Dense` module of a `SentenceTransformer`."""
    if isinstance(model, transformers.PreTrainedModel) or not hasattr(model, "save_pretrained"):
        return {}
    inner = [name for name, module in model.named_modules() if isinstance(module, transformers.PreTrainedModel)]
    outside = [name for name in layers if not any(name.startswith(f"{part}.") for part in inner)]
    return dict.fromkeys(outside, "outside of the model of transformers, left dense")


def _patterns(given: Sequence[str] | str | None) -> list[str] | None:
    """Patterns as a list, where one alone may be given as it is."""
    return given if given is None else [given] if isinstance(given, str) else list(given)


def _calls_of_blocks(model: nn.Module) -> dict[str, int]:
    """How often each block is called in one forward pass: once, but for ALBERT, whose groups share their layers."""
    config = getattr(model, "config", None)
    blocks = find_blocks(model)
    if config is None or not hasattr(config, "num_hidden_groups"):
        return dict.fromkeys(blocks, 1)
    layers, groups = config.num_hidden_layers, config.num_hidden_groups
    used = [int(layer / (layers / groups)) for layer in range(layers)]  # as AlbertTransformer chooses the group
    return {block: used.count(group) for group, block in enumerate(blocks)}


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """By identity of a parameter: the modules that hold it; several where weights are tied."""
    holders: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names = holders.setdefault(id(parameter), [])
        name = path.rpartition(".")[0]
        # A module that stands in two places holds its weight once.
        if not any(model.get_submodule(other) is model.get_submodule(name) for other in names):
            names.append(name)
    return holders


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            last = {name.rpartition(".")[2]: name for name in reversed(names)}
            close = difflib.get_close_matches(pattern.rpartition(".")[2].strip("*"), last, n=3, cutoff=0.5)
            near = [last[part] for part in close] or list(names[:3])
            raise ModelError(f"the pattern '{pattern}' matches no weight matrix; names look like {', '.join(near)}")


@dataclasses.dataclass(frozen=True)
class _Held:
    """A parameter of two or more dimensions.

    Args:
        path: its name.
        parameter: itself.
        names, modules: what holds it; several where weights are tied.
        block: the Transformer block that it is in, if any.
    """

    path: str
    parameter: nn.Parameter
    names: Sequence[str]
    modules: Sequence[nn.Module]
    block: str | None

    @property
    def embeddings(self) -> int:
        """How many of the modules look up rows of it."""
        return sum(isinstance(module, nn.Embedding) for module in self.modules)


def _describe(
    model: nn.Module, held: _Held, calls: int, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> Matrix:
    """A matrix, and why it stays dense if it does; `calls` of its block in one forward pass."""
    dtype = str(held.parameter.dtype).removeprefix("torch.")
    shape = next((shape for shape in map(dense_shape, held.modules) if shape is not None), None)
    if shape is None:
        width = held.parameter.shape[-1]
        kind, products = _other_kind(model, held.modules[0], held.path, held.parameter)
        whole = held.parameter.numel() // width, width
        return Matrix(held.path, whole, dtype, products=calls * products, dense=f"{kind}, left dense")
    first, *others = held.names
    return Matrix(
        first,
        shape,
        dtype,
        products=(len(held.names) - held.embeddings) * calls,
        lookups=min(held.embeddings, 1),  # a token is looked up once, in the encoder's or in the decoder's embeddings
        aliases=tuple(others),
        dense=_why_dense(model, held, shape) or _left_out(held.names, include, exclude),
        role=_role(model, first, held.modules[0]),
    )


def _why_dense(model: nn.Module, held: _Held, shape: Shape) -> str | None:
    """Why a linear layer or an embedding cannot be factorized, or not with gain; None if it can."""
    others = [type(module).__name__ for module in held.modules if dense_shape(module) is None]
    if others:
        return f"tied to a {others[0]}, left dense"
    if len({is_transposed(module) for module in held.modules}) > 1:
        return "tied between layouts, left dense"
    if min(shape) < SMALLEST_SIDE:
        return f"a side below {SMALLEST_SIDE}, too small to gain"
    if held.embeddings and held.block is not None:
        return "a table inside a block (T5's position biases), left dense"
    own = held.modules[0] is embeddings_of(model, "input_embeddings")
    if held.embeddings == len(held.modules) and not held.parameter.requires_grad and not own:
        # Whisper's sinusoids: the architecture writes such a table itself whenever it initializes a model.
        return "a fixed table, left dense"
    return None


def _left_out(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> str | None:
    """Whether patterns of names leave a matrix out, whichever of its names they match."""
    if include is not None and not _named(names, include):
        return LeftOut.NOT_INCLUDED.value
    return LeftOut.EXCLUDED.value if exclude is not None and _named(names, exclude) else None


def _named(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def _role(model: nn.Module, name: str, module: nn.Module) -> Role:
    if isinstance(module, nn.Embedding) or module is embeddings_of(model, "output_embeddings"):
        return "embedding"
    # So architectures of transformers name these modules, or `self_attn`, `SelfAttention`, `multi_head_attention`.
    return "attention" if re.search("attn|attention", name, re.IGNORECASE) else "feed_forward"


def _other_kind(model: nn.Module, owner: nn.Module, path: str, parameter: nn.Parameter) -> tuple[str, float]:
    """What a tensor is that cannot be factorized, and what part of it each token is multiplied by."""
    if parameter.dim() == 3 and "expert" in path:
        chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or len(parameter)
        return "expert weights fused in a 3-D parameter", chosen / len(parameter)
    if isinstance(owner, (nn.Linear, nn.Embedding, Conv1D)) and is_altered(owner):
        return "a layer with hooks", int(not isinstance(owner, nn.Embedding))
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "a convolution", 1
    return "not a linear layer or embedding", int(parameter.dim() == 2 and not isinstance(owner, nn.Embedding))


def factorized_like(
    module: nn.Module,
    spec: Structure,
    shape: Shape,
    factors: Factors | None = None,
    shared: Sequence[str] = (),
    *,
    bits: Bits | None = None,
) -> FactorizedMatrix:
    """A factorized layer to stand in for `module`, with its bias, device and mode.

    Without factors (a skeleton for loading) the tensors are created on the current default device and type. Other
    layers hold those that are named as `shared`. They are stored in integers of so many bits, if any.
    """
    if isinstance(module, nn.Embedding):
        padding = module.padding_idx
        new: FactorizedMatrix = FactorizedEmbedding(spec, shape, factors, padding, shared=shared, bits=bits)
    else:
        bias = getattr(module, "bias", None)
        new = FactorizedLinear(spec, shape, factors, bias, shared=shared, bits=bits)
    return new.train(module.training)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` everywhere that `old` is registered (a shared module has several parents)."""
    place_like(new, old)
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if name and module is old]:
        model.set_submodule(name, new)


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give a model its layers, tensors and settings back if what changes it fails, or is interrupted.

    Tensors are kept, not copied: what is written into them stays.
    """
    modules = list(model.modules())
    configs = {id(c): c for module in modules if (c := module.__dict__.get("config")) is not None}
    holders = [*modules, *(c for c in configs.values() if hasattr(c, "__dict__"))]
    before = [
        ({**vars(holder)}, {k: type(v)(v) for k, v in vars(holder).items() if type(v) is dict}) for holder in holders
    ]
    try:
        yield
    except BaseException:
        for holder, (attributes, tables) in zip(holders, before, strict=True):
            vars(holder).clear()
            vars(holder).update(attributes)
            for name, table in tables.items():
                vars(holder)[name].clear()
                vars(holder)[name].update(table)
        raise


def factorize(model: nn.Module, matrix: Matrix, spec: Structure, factors: Factors, shared: Sequence[str] = ()) -> None:
    """Replace all modules that hold a matrix; tied modules hold the very same parameters again.

    Where the matrix is to be stored in integers, its factors are fake-quantized from then on.

    Args:
        model: changed in place.
        matrix: what is replaced.
        spec: its structure.
        factors: of that structure; a parameter among them is held as it is.
        shared: factors that layers of other matrices hold too. A frozen weight does not freeze those.
    """
    frozen = not model.get_submodule(matrix.name).get_parameter("weight").requires_grad
    for name in (matrix.name, *matrix.aliases):
        old = model.get_submodule(name)
        new = factorized_like(old, spec, matrix.shape, factors, shared)
        if matrix.bits is not None:
            new.fake_quantize(matrix.bits)
        replace_module(model, old, new)
        factors = new.factors
    if frozen:
        for name, value in factors.items():
            if name not in shared:
                value.requires_grad_(False)
