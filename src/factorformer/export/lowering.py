"""A model put into the form in which it becomes a fast graph: its attention, and products of its factors.

- Attention becomes one `Attention` operator (ONNX opset 23). What torch makes of `scaled_dot_product_attention` guards
  against rows that attend to nothing, at a cost of a tenth of the time in ONNX Runtime.
- Sparse factors are stored packed. They are materialized by ordinary operators on constants, which runtimes evaluate
  once when they load the file.
- A matrix whose factors cost more multiply-adds than itself is materialized in the same way, when the file is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from factorformer.errors import ExportError
from factorformer.hf.compat import whole_mask
from factorformer.kernels.support import code_of
from factorformer.layers.nn import FactorizedMatrix
from factorformer.structures.integers import floats

ATTENTION = "factorformer_onnx"
"""The name of this attention in transformers."""

UNSUPPORTED = ("softcap", "s_aux")
"""What some models add to attention, and the operator here does not do."""


def freeze(model: PreTrainedModel, *, quantized: bool) -> None:
    """Multiply by factors in operators of torch that ONNX has as well, in place.

    Args:
        model: of no use for training afterwards.
        quantized: only where factors are stored in integers: what factorformer's kernels compute in int8 is float32
            then.

    Raises:
        ExportError: the model trains straight through.
    """
    for name, module in model.named_modules():
        if isinstance(module, FactorizedMatrix) and not isinstance(module.form, _Constant):
            if module.form is not None:
                raise ExportError(f"'{name}' trains straight through: call finish() first")
            if module.quantized or not quantized:
                module.substitute(_Constant(module))


def replace_attention(model: PreTrainedModel) -> None:
    """Let a model compute its attention by the operator of ONNX, in place.

    Raises:
        ExportError: the model has an attention of its own.
    """
    causal = any(getattr(module, "is_causal", False) for module in model.modules())
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _causal_mask if causal else whole_mask)
    try:
        model.set_attn_implementation(ATTENTION)
    except (ValueError, ImportError) as error:
        raise ExportError(f"the attention of {type(model).__name__} cannot be exported: {error}") from error


class _Constant:
    """Products with a matrix whose factors do not change any more, in operators of torch that ONNX has as well."""

    def __init__(self, matrix: FactorizedMatrix) -> None:
        self.matrix = matrix

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        spec, shape, factors = self.matrix.spec, self.matrix.shape, floats(self.matrix.multiplied)
        chain = spec.dense_factors(factors)
        flops = 2 * sum(factor.numel() for factor in chain) or spec.flops(shape)
        if flops >= 2 * math.prod(shape):
            return F.linear(x, spec.to_dense(shape, factors), bias)
        if not chain:
            return spec.matmul(shape, factors, x, bias)
        for factor in chain[:-1]:
            x = F.linear(x, factor)
        return F.linear(x, chain[-1], bias)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix, as `FactorizedMatrix.rows`."""
        return self.matrix.spec.exported_rows(self.matrix.shape, self.matrix.multiplied, index)

    def pack(self) -> None:
        """Nothing has changed."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `(batch, heads, length, width)` to `(batch, length, heads, width)`."""
    present = [name for name in UNSUPPORTED if others.get(name) is not None]
    causal = others.get("is_causal")
    if (getattr(module, "is_causal", False) if causal is None else causal) and attention_mask is None:
        raise ExportError(f"{type(module).__name__} is causal without a mask, which cannot be exported")
    if present:
        raise ExportError(f"{type(module).__name__} uses {', '.join(present)}, which cannot be exported")

    bias = others.get("position_bias")
    if bias is not None and attention_mask is not None:
        attention_mask = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)

    # Heads side by side, as the layers before and after have them: their permutations cancel out.
    def flat(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    result = torch.onnx.ops.attention(
        flat(query),
        flat(key),
        flat(value),
        attention_mask,
        q_num_heads=query.shape[1],
        kv_num_heads=key.shape[1],
        scale=scaling,
    )[0]
    return result.unflatten(2, (query.shape[1], value.shape[3])), None


def _causal_mask(**arguments: Any) -> Tensor:
    """As `whole_mask`, where padding attends to itself: on the left it has no token before it, and what attends to
    nothing is NaN, which a weight of 0 does not hide from others."""
    mask = whole_mask(**arguments)
    new, all_ = mask.shape[-2:]  # the last ones of all, where others are in a cache
    places = torch.arange(all_, device=mask.device)
    return mask | (places[:new, None] + (all_ - new) == places)


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How factorformer's operators read in ONNX."""
    import onnxscript

    op: Any = onnxscript.opset23

    def positions(support: Any, atoms: int, nonzeros: int) -> Any:
        """`kernels.support.unpack` in operators of ONNX: `(rows, bytes)` to `(rows, nonzeros)`, int64."""
        code = code_of(atoms, nonzeros)
        if code == "bitmap":
            powers = op.Constant(value_ints=[2**bit for bit in range(8)])
            bytes_ = op.Unsqueeze(op.Cast(support, to=onnxscript.INT64.dtype), op.Constant(value_ints=[2]))
            bits = op.Mod(op.Div(bytes_, powers), op.Constant(value_int=2))
            bits = op.Reshape(bits, op.Constant(value_ints=[0, -1]))
            # Of equal values the first come first, so these are the places of the ones. ONNX Runtime does not evaluate
            # `NonZero` while it loads a file.
            return op.TopK(bits, op.Constant(value_ints=[nonzeros]), axis=1)[1]
        offsets = op.Cast(support, to=onnxscript.INT64.dtype)
        if code == "uint16":
            pairs = op.Reshape(offsets, op.Constant(value_ints=[-1, nonzeros, 2]))
            weighted = op.Mul(pairs, op.Constant(value_ints=[1, 256]))
            offsets = op.ReduceSum(weighted, op.Constant(value_ints=[2]), keepdims=0)
        return offsets

    return {torch.ops.factorformer.sparse_positions.default: positions}
