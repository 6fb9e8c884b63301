"""Find the weight matrices of a model, and put factorized layers in their place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import fnmatch
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factorformer.errors import MethodError, ModelError, one_of
from factorformer.layers.bypass import bypassed, embeddings_of
from factorformer.layers.matrix import Cost, LeftOut, Matrix, Role, Scope
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix
from factorformer.structures import Factors, Shape, Structure

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
    """Parameters, and what is stored in int8 in place of some."""
    return [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.dtype == torch.int8)]


def find_matrices(
    model: nn.Module,
    scope: Scope = "blocks",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    int8: bool = False,
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
        int8: whether factors are to be stored in int8, which some architectures do not bear in some places.
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
    reasons = _saved_by_others(model, layers) | bypassed(model, layers, int8=int8, batch=batch)
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
        matrix = _describe(model, path, parameter, holding, block, calls.get(block or "", 1), include, exclude)
        if matrix.dense is None:
            reason = next((reasons[name] for name in holding if name in reasons), None)
            matrix = dataclasses.replace(matrix, int8=int8 and reason is None, dense=reason)
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


def _describe(
    model: nn.Module,
    path: str,
    parameter: nn.Parameter,
    names: list[str],
    block: str | None,
    calls: int,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> Matrix:
    dtype = str(parameter.dtype).removeprefix("torch.")
    modules = [model.get_submodule(name) for name in names]
    if all(dense_shape(module) is None for module in modules):
        shape = (parameter.numel() // parameter.shape[-1], parameter.shape[-1])
        kind, products = _other_kind(model, modules[0], path, parameter)
        return Matrix(path, shape, dtype, products=calls * products, dense=f"{kind}, left dense")
    embeddings = sum(isinstance(module, nn.Embedding) for module in modules)
    others = [type(module).__name__ for module in modules if dense_shape(module) is None]
    shape = next(shape for shape in map(dense_shape, modules) if shape is not None)

    def named(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)

    dense = None
    if others:
        dense = f"tied to a {others[0]}, left dense"
    elif len({isinstance(module, Conv1D) for module in modules}) > 1:
        dense = "tied between layouts, left dense"
    elif min(shape) < SMALLEST_SIDE:
        dense = f"a side below {SMALLEST_SIDE}, too small to gain"
    elif embeddings and block is not None:
        dense = "a table inside a block (T5's position biases), left dense"
    elif (
        embeddings == len(names)
        and not parameter.requires_grad
        and modules[0] is not embeddings_of(model, "input_embeddings")
    ):
        # Whisper's sinusoids: the architecture writes such a table itself whenever it initializes a model.
        dense = "a fixed table, left dense"
    elif include is not None and not named(include):
        dense = LeftOut.NOT_INCLUDED.value
    elif exclude is not None and named(exclude):
        dense = LeftOut.EXCLUDED.value
    return Matrix(
        names[0],
        shape,
        dtype,
        products=(len(names) - embeddings) * calls,
        lookups=min(embeddings, 1),  # a token is looked up once, in the encoder's or in the decoder's embeddings
        aliases=tuple(names[1:]),
        dense=dense,
        role=_role(model, names[0], modules[0]),
    )


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
    if isinstance(owner, (nn.Linear, nn.Embedding, Conv1D)) and _is_altered(owner):
        return "a layer with hooks", int(not isinstance(owner, nn.Embedding))
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "a convolution", 1
    return "not a linear layer or embedding", int(parameter.dim() == 2 and not isinstance(owner, nn.Embedding))


def dense_shape(module: nn.Module) -> Shape | None:
    """`(out, in)` of a layer that can be factorized; None for any other module."""
    if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or not _is_plain(module):
        return None
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _is_plain(module: nn.Linear | nn.Embedding | Conv1D) -> bool:
    """Whether a layer computes `x @ W.T + b`, or looks up rows of `W`, and nothing else."""
    if _is_altered(module):
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:  # it rescales the rows that are looked up
        return False
    if type(module) in (nn.Linear, nn.Embedding, Conv1D):
        return "weight" in module._parameters  # a parametrization computes it
    parts = {name for name, parameter in module._parameters.items() if parameter is not None}
    if isinstance(module, Conv1D) or "weight" not in parts or parts - {"weight", "bias"}:
        return False
    if module._buffers or module._modules or len(inspect.signature(type(module).forward).parameters) != 2:
        return False  # a caller may pass a second argument
    return all(_computes_product(module, dtype) for dtype in (torch.float64, torch.bfloat16))


def _is_altered(module: nn.Module) -> bool:
    """Whether hooks, or a `forward` of its own, may change what a module computes and would be lost with it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _computes_product(module: nn.Linear | nn.Embedding, dtype: torch.dtype) -> bool:
    """A trial on a small layer of the same class and with the same settings, in training and in evaluation."""
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device="cpu", dtype=torch.float64).to(dtype)

    weight = draw(7, 5)
    bias = None if module._parameters.get("bias") is None else draw(7)
    twin = copy.copy(module)
    sizes = {"out_features": 7, "in_features": 5, "num_embeddings": 7, "embedding_dim": 5}
    vars(twin).update({name: size for name, size in sizes.items() if name in vars(twin)})
    vars(twin)["_parameters"] = {
        name: None if tensor is None else nn.Parameter(tensor) for name, tensor in (("weight", weight), ("bias", bias))
    }
    for training, scale in itertools.product((False, True), (1.0, 1e4)):
        vars(twin)["training"] = training
        x = draw(3, 4, 5) * scale
        if isinstance(module, nn.Embedding):
            x = torch.arange(12, device="cpu").view(3, 4) % 7
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                found = twin(x)
        except Exception:  # it takes something else
            return False
        expected = F.embedding(x, weight) if isinstance(module, nn.Embedding) else F.linear(x, weight, bias)
        if not isinstance(found, Tensor) or found.dtype != dtype or found.shape != expected.shape:
            return False
        rounding = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        if not float((found - expected).abs().max()) <= rounding:
            return False
    return True


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as `(in, out)`, as GPT-2's `Conv1D` does."""
    return isinstance(module, Conv1D)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, `Conv1D` or embedding as `(out, in)`, detached; a view where that is possible."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def factorized_like(
    module: nn.Module,
    spec: Structure,
    shape: Shape,
    factors: Factors | None = None,
    shared: Sequence[str] = (),
    *,
    quantized: bool = False,
) -> FactorizedMatrix:
    """A factorized layer to stand in for `module`, with its bias, device and mode.

    Without factors (a skeleton for loading) the tensors are created on the current default device and type. Other
    layers hold those that are named as `shared`. They are stored in int8 if `quantized`.
    """
    options = {"shared": shared, "quantized": quantized}
    if isinstance(module, nn.Embedding):
        new: FactorizedMatrix = FactorizedEmbedding(spec, shape, factors, module.padding_idx, **options)
    else:
        new = FactorizedLinear(spec, shape, factors, getattr(module, "bias", None), **options)
    return new.train(module.training)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` everywhere that `old` is registered (a shared module has several parents)."""
    for parent in model.modules():
        for name, child in parent._modules.items():  # `named_children` names a child once
            if child is old:
                parent._modules[name] = new


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

    Where the matrix is to be stored in int8, its factors are fake-quantized from then on.

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
        if matrix.int8:
            new.fake_quantize()
        replace_module(model, old, new)
        factors = new.factors
    if frozen:
        for name, value in factors.items():
            if name not in shared:
                value.requires_grad_(False)
