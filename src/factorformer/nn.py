"""Layers whose weight is in factorized form; they replace `nn.Linear`, `Conv1D` and `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from factorformer.errors import ModelError
from factorformer.structures import Factors, Selection, Shape, Structure


def new_factors(
    spec: Structure, shape: Shape, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Factors of a structure, all zero: `spec.initialize` fills them."""
    return {
        name: torch.zeros(tensor.size, device=device, dtype=tensor.dtype or dtype)
        for name, tensor in spec.tensors(shape).items()
    }


class TrainingForm(Protocol):
    """What a matrix is while it trains in another form than that of its factors."""

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product in that form."""
        ...

    def pack(self) -> None:
        """Write what the form is worth now into the factors."""
        ...


class FactorizedMatrix(nn.Module):
    """A matrix `W` of shape `(out, in)` that is only ever stored as the factors of `spec`.

    The factors are registered directly under their own names (`weight`, `right`, ...), values as parameters and
    integers as buffers, so a state dict holds exactly what the structure stores.

    Args:
        spec: the structure of the matrix.
        shape: `(out, in)`.
        factors: the tensors to hold; without them new ones are drawn so that the entries of `W` have the variance of
            a fresh `nn.Linear`.
        shared: names of factors that other layers hold too, as the very same parameters.
        device, dtype: for new tensors.

    Raises:
        ModelError: the shape does not admit the structure, or a factor is missing, extra or misshapen.
    """

    form: TrainingForm | None = None
    """What multiplies in place of the factors, for as long as a training lasts."""

    def __init__(
        self,
        spec: Structure,
        shape: Shape,
        factors: Factors | None = None,
        *,
        shared: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec.check(shape, shared)
        self.shape = shape
        self.shared = tuple(shared)
        self.register_load_state_dict_pre_hook(_check_incoming)
        self._adopt(spec, new_factors(spec, shape, device, dtype) if factors is None else factors)
        if self.get_parameter("weight").is_meta:
            return
        if factors is None:
            with torch.no_grad():
                spec.initialize(self.factors, std=(3 * shape[1]) ** -0.5)
        else:
            self.check_factors()

    def _adopt(self, spec: Structure, factors: Mapping[str, Tensor]) -> None:
        expected = spec.tensors(self.shape)
        sizes = {name: tuple(tensor.shape) for name, tensor in factors.items()}
        wanted = {name: tensor.size for name, tensor in expected.items()}
        if sizes != wanted:
            raise ModelError(f"{spec} of a {self.shape[0]}x{self.shape[1]} matrix stores {wanted}, got {sizes}")
        self.spec = spec
        for name, tensor in factors.items():
            if expected[name].dtype is not None:
                self.register_buffer(name, tensor)
            elif isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)  # tied layers hold the very same parameter
            else:
                self.register_parameter(name, nn.Parameter(tensor.contiguous()))

    @property
    def factors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.spec.tensors(self.shape)}

    def check_factors(self) -> None:
        """Raise `ModelError` if integer factors are out of range; called on all tensors that come from outside."""
        self.spec.check_factors(self.shape, self.factors)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + bias`, `(..., in)` to `(..., out)`."""
        if self.form is not None:
            return self.form.matmul(x, bias)
        return self.spec.matmul(self.shape, self.factors, x, bias)

    def rows(self, index: Tensor) -> Tensor:
        """`W[index]`, integers `(...)` to `(..., in)`."""
        return self.spec.rows(self.shape, self.factors, index)

    def to_dense(self) -> Tensor:
        """`W`, `(out, in)`; nothing else builds it."""
        if self.form is not None:
            self.form.pack()
        return self.spec.to_dense(self.shape, self.factors)

    def resize(self, smaller: Structure) -> None:
        """Shrink the factors to a smaller spec of the same kind, keeping the leading units bit for bit.

        Raises:
            ModelError: the spec is not smaller or of another kind, or factors would shrink that other layers hold too,
                or the matrix trains straight through.
        """
        if self.form is not None:
            raise ModelError(f"cannot resize {self.spec} while it trains straight through: call finish() first")
        resized = self.spec.resize(self.factors, smaller)
        for name in self.shared:
            if resized[name].shape != getattr(self, name).shape:
                raise ModelError(
                    f"cannot resize {self.spec} to {smaller}: other layers hold its {name} too, which would go from "
                    f"{list(getattr(self, name).shape)} to {list(resized[name].shape)} for this one alone; keep that "
                    "size, or replace the layer by one that has the factor to itself"
                )
        factors = {
            name: getattr(self, name) if name in self.shared else t.detach().clone() for name, t in resized.items()
        }
        trainable = {name: getattr(self, name).requires_grad for name in factors}
        self._adopt(smaller, factors)
        for name, flag in trainable.items():
            getattr(self, name).requires_grad_(flag)

    def keep(self, selection: Selection) -> None:
        """Drop the units that `spec.select` left out; the rest stays bit for bit what it is.

        Raises:
            ModelError: other layers hold a factor too.
        """
        if self.shared:
            raise ModelError(f"units of {self.spec} cannot be removed: other layers hold its {self.shared[0]} too")
        factors = {name: cut(getattr(self, name).detach()) for name, cut in selection.cut.items()}
        trainable = {name: getattr(self, name).requires_grad for name in factors}
        self._adopt(selection.spec, {**factors, **selection.fixed})
        for name, flag in trainable.items():
            getattr(self, name).requires_grad_(flag)

    def extra_repr(self) -> str:
        """Spec and shape, for `print(model)`."""
        return f"{self.spec}, shape={self.shape[0]}x{self.shape[1]}"


def _check_incoming(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse integers out of range before they replace what the layer holds; sizes are for torch to compare."""
    assert isinstance(module, FactorizedMatrix)
    factors = module.factors
    incoming = {name: state[prefix + name] for name in factors if isinstance(state.get(prefix + name), Tensor)}
    whole = module.spec.tensors(module.shape)
    for name, tensor in incoming.items():
        if whole[name].dtype is not None and tensor.dtype != whole[name].dtype:
            raise ModelError(f"'{prefix}{name}' is stored as {tensor.dtype}, but has to be {whole[name].dtype}")
    if any(
        t.is_meta or t.shape != factors[n].shape or t.dtype.is_floating_point != factors[n].dtype.is_floating_point
        for n, t in incoming.items()
    ):
        return
    try:
        module.spec.check_factors(module.shape, factors | incoming)
    except ModelError as error:
        raise ModelError(f"layer '{prefix.removesuffix('.')}': {error}" if prefix else str(error)) from error


class FactorizedLinear(FactorizedMatrix):
    """`y = x W^T + b` with `W` in factorized form.

    >>> from factorformer import LowRank
    >>> FactorizedLinear(LowRank(rank=2), (6, 8))(torch.zeros(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        spec: Structure,
        shape: Shape,
        factors: Factors | None = None,
        bias: Tensor | bool | None = None,
        *,
        shared: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, shape, factors, shared=shared, device=device, dtype=dtype)
        self.out_features, self.in_features = shape
        if bias is True:
            bias = torch.zeros(shape[0], device=device, dtype=dtype)
        if bias is None or bias is False:
            self.register_parameter("bias", None)
        else:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return self.matmul(x, self.bias)


class FactorizedEmbedding(FactorizedMatrix):
    """Rows of a factorized matrix: `(...)` integers to `(..., width)`. Only the rows asked for are evaluated."""

    def __init__(
        self,
        spec: Structure,
        shape: Shape,
        factors: Factors | None = None,
        padding_idx: int | None = None,
        *,
        shared: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, shape, factors, shared=shared, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx

    def forward(self, index: Tensor) -> Tensor:
        """`(...)` to `(..., width)`."""
        # As from `nn.Embedding`, the type is that of the parameters also where products are made in a smaller one.
        return self.rows(index).to(self.get_parameter("weight").dtype)
