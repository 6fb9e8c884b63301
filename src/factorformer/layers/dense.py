"""Dense layers that factorized ones can stand in for: which these are, and their weights."""

from __future__ import annotations

import inspect
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from factorformer.layers._compat import is_hooked, placement_of, with_parameters
from factorformer.structures import Shape


def dense_shape(module: nn.Module) -> Shape | None:
    """`(out, in)` of a layer that can be factorized; None for any other module."""
    if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) or not _is_plain(module):
        return None
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _is_plain(module: nn.Linear | nn.Embedding | Conv1D) -> bool:
    """Whether a layer computes `x @ W.T + b`, or looks up rows of `W`, and nothing else."""
    if is_altered(module):
        return False
    if isinstance(module, nn.Embedding) and module.max_norm is not None:  # it rescales the rows that are looked up
        return False
    if type(module) in (nn.Linear, nn.Embedding, Conv1D):
        return "weight" in dict(module.named_parameters(recurse=False))  # or else a parametrization computes it
    parts = dict(module.named_parameters(recurse=False)).keys()
    if isinstance(module, Conv1D) or "weight" not in parts or parts - {"weight", "bias"}:
        return False
    if any(True for _ in module.buffers(recurse=False)) or any(True for _ in module.children()):
        return False
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a caller may pass a second argument
        return False
    return all(_computes_product(module, dtype) for dtype in (torch.float64, torch.bfloat16))


def is_altered(module: nn.Module) -> bool:
    """Whether hooks, or a `forward` of its own, may change what a module computes and would be lost with it."""
    own = vars(module).get("forward")
    replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
    return is_hooked(module) or (replaced and placement_of(module) is None)


def _computes_product(module: nn.Linear | nn.Embedding, dtype: torch.dtype) -> bool:
    """A trial on a small layer of the same class and with the same settings, in training and in evaluation."""
    random = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device="cpu", dtype=torch.float64).to(dtype)

    weight = draw(7, 5)
    bias = draw(7) if "bias" in dict(module.named_parameters(recurse=False)) else None
    tensors = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    twin = with_parameters(module, tensors)
    sizes = {"out_features": 7, "in_features": 5, "num_embeddings": 7, "embedding_dim": 5}
    vars(twin).update({name: size for name, size in sizes.items() if name in vars(twin)})
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
