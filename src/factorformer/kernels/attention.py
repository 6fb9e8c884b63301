"""Attention and GELU for inference, by the compiled kernels: what is left of a model's time when its matrices are small."""

# Annotations stay types here: torch reads the schemas of operators from them.

import torch
import torch.nn.functional as F
from torch import Tensor

from factorformer.kernels import cpu
from factorformer.kernels.dense import served


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * query @ key.T) @ value` where the mask is true; see `attends` for what it takes.

    Args:
        query: `(batch, heads, queries, width)`.
        key, value: `(batch, key heads, keys, width)`; a number of consecutive heads may share one of these.
        mask: booleans that broadcast to `(batch, heads, queries, keys)`; None for all. Who may see no key gets the mean.
        scale: of the scores.

    Returns:
        `(batch, queries, heads, width)`.
    """
    operator = torch.ops.factorformer.attention if torch.compiler.is_compiling() else cpu.attention
    return operator(query, key, value, mask, scale)


def attends(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the compiled kernel serves: float32, for inference, each head's vectors in one piece, a boolean mask."""
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu):
        return False
    if not all(t.stride(-1) == 1 and t.dtype == torch.float32 and t.is_cpu for t in (query, key, value)):
        return False
    wanted = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    return not wanted and value.shape[-1] == query.shape[-1] and served(query)


def gelu(x: Tensor, *, overwrite: bool = False) -> Tensor:
    """The exact GELU, in place of its input if that may be lost and the compiled kernels serve."""
    if not served(x) or not x.is_contiguous():
        return F.gelu(x)
    if torch.compiler.is_compiling():
        return torch.ops.factorformer.gelu(x)
    return cpu.gelu(x, x if overwrite else torch.empty_like(x))


@torch.library.custom_op("factorformer::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # A compiler may hand over other layouts than those that it saw.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    return cpu.attention(query, key, value, mask, scale)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, width = query.shape
    return query.new_empty(batch, queries, heads, width)


@torch.library.custom_op("factorformer::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    return cpu.gelu(x, torch.empty_like(x))


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
