"""Layers whose weight is in factorized form; they replace `nn.Linear`, `Conv1D` and `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factorformer.errors import ModelError
from factorformer.kernels import gelu
from factorformer.layers.factorized_matrix import TEMPORARY, FactorizedMatrix, Form, Mode, new_factors
from factorformer.structures import Factors, Shape, Structure
from factorformer.structures.integers import Bits

__all__ = ["TEMPORARY", "FactorizedEmbedding", "FactorizedLinear", "FactorizedMatrix", "Form", "Mode", "new_factors"]


class FactorizedLinear(FactorizedMatrix):
    """`y = x W^T + b` with `W` in factorized form.

    >>> from factorformer import LowRank
    >>> FactorizedLinear(LowRank(rank=2), (6, 8))(torch.zeros(3, 8)).shape
    torch.Size([3, 6])
    """

    gelu: bool = False
    """Whether the output is the GELU of the product; see `hf.fused.fuse`."""

    def __init__(
        self,
        spec: Structure,
        shape: Shape,
        factors: Factors | None = None,
        bias: Tensor | bool | None = None,
        *,
        shared: Sequence[str] = (),
        bits: Bits | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, shape, factors, shared=shared, bits=bits, device=device, dtype=dtype)
        self.out_features, self.in_features = shape
        if bias is True:
            bias = torch.zeros(shape[0], device=device, dtype=dtype)
        if bias is None or bias is False:
            self.register_parameter("bias", None)
        else:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        product = self.matmul(x, self.bias)
        return gelu(product, overwrite=True) if self.gelu else product


class FactorizedEmbedding(FactorizedMatrix):
    """Rows of a factorized matrix: `(...)` integers to `(..., width)`. Only the rows asked for are evaluated.

    As in `nn.Embedding`, no gradient comes from the row of `padding_idx`. Factors are common to all rows, though, so
    that what other rows learn moves this one as well.

    Raises:
        ModelError: as `FactorizedMatrix`, or `padding_idx` is no row.
    """

    def __init__(
        self,
        spec: Structure,
        shape: Shape,
        factors: Factors | None = None,
        padding_idx: int | None = None,
        *,
        shared: Sequence[str] = (),
        bits: Bits | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, shape, factors, shared=shared, bits=bits, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = shape
        if padding_idx is not None and not -shape[0] <= padding_idx < shape[0]:
            raise ModelError(f"padding_idx {padding_idx} is no row of an embedding with {shape[0]} rows")
        self.padding_idx = None if padding_idx is None else padding_idx % shape[0]

    def forward(self, index: Tensor) -> Tensor:
        """`(...)` to `(..., width)`."""
        # As from `nn.Embedding`, the type is that of the parameters also where products are made in a smaller one.
        rows = self.rows(index).to(self.values.dtype)
        if self.padding_idx is not None and rows.requires_grad and not torch.compiler.is_exporting():
            rows = torch.where((index == self.padding_idx)[..., None], rows.detach(), rows)
        return rows
