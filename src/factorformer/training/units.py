"""Matrices as sums of units that can be removed while an optimizer trains them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from factorformer.errors import ModelError
from factorformer.fitting import Metric
from factorformer.fitting.linalg import WITHOUT_FLOAT64, leading_eigenvectors
from factorformer.fitting.metric import divided
from factorformer.layers.dense import is_transposed
from factorformer.layers.matrix import Matrix
from factorformer.layers.nn import FactorizedMatrix
from factorformer.layers.surgery import factorize
from factorformer.structures import LowRank, Structure, largest_rank
from factorformer.training.optimizer_state import LINEAR, SQUARED, State, converted, substitute


class Importance:
    """Moving average of the importance of units.

    A unit is a product of factors, such as `s_i u_i v_i^T`. With `p` its parameters in one factor and `g` their
    gradients, `p . g = s_i dL/ds_i`, whichever factor it is: the first-order estimate of the change of the loss when
    the unit is removed. Averaged is `|p . g|`.

    A step without gradients, or with none but zeros, is one in which nothing depended on the matrix, such as an expert
    that got no token. It leaves the average alone, for a moving average would forget a rare expert between two of its
    tokens, and counts in `values` instead.

    Args:
        decay: what each step leaves of the average before it.
        average: of the steps that reached the matrix, `(units,)`; None before the first.
        reached: number of these steps.
        steps: number of all steps.
    """

    def __init__(
        self, decay: float, average: Float[Tensor, " units"] | None = None, reached: int = 0, steps: int = 0
    ) -> None:
        self.decay, self.average, self.reached, self.steps = decay, average, reached, steps

    @property
    def values(self) -> Float[Tensor, " units"] | None:
        """The mean over all steps, those without gradients included; None where the loss never reached the matrix."""
        return None if self.average is None else self.average * (self.reached / self.steps)

    def update(self, changes: Float[Tensor, " units"] | None) -> None:
        """Take in one step.

        Args:
            changes: of the loss, to first order; None without gradients. If they are not finite, the step does not
                count.
        """
        now = None if changes is None else changes.abs().float()
        if now is not None and not torch.isfinite(now.sum()):
            return
        self.steps += 1
        if now is None or not now.any():
            return
        self.reached += 1
        if self.average is None:
            self.average = now
        else:  # the model may have moved since
            self.average = self.average.to(now.device).lerp_(now, 1 - self.decay)

    def keep(self, kept: Int[Tensor, " units"]) -> None:
        """Forget the units that were removed."""
        if self.average is not None:
            self.average = self.average[kept.to(self.average.device)]

    def join(self) -> None:
        """Make one unit of all."""
        if self.average is not None:
            self.average = self.average.sum().reshape(1)


class Units(ABC):
    """One matrix of a model in training, its remaining units, and what is known of their importance.

    Args:
        model: that holds it.
        matrix: which one.
        full: the structure with all units; smaller ones are `full.with_units(n)`.
        importance: moving average, empty at first.
    """

    def __init__(self, model: nn.Module, matrix: Matrix, full: Structure, importance: Importance) -> None:
        self.model, self.matrix, self.full, self.importance = model, matrix, full, importance

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of units that remain."""

    @property
    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters, by their name in the layer."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether there are gradients."""

    @abstractmethod
    def changes(self) -> Float[Tensor, " units"]:
        """Parameters times gradients, summed over each unit; see `Importance`."""

    @abstractmethod
    def keep(self, kept: Int[Tensor, " units"], optimizer: Optimizer | None) -> Units:
        """Remove all units but these, also from the optimizer; returns what stands for the matrix from then on."""

    @abstractmethod
    def bytes(self, count: int) -> int:
        """Stored bytes of the matrix with so many units."""

    def unit_bytes(self) -> float:
        """Bytes of one unit, on average."""
        return self.matrix.bytes(self.full) / self.full.units


class FactorUnits(Units):
    """A matrix whose factors are trained; a unit is a slice of each of them."""

    @property
    def module(self) -> FactorizedMatrix:
        """The layer; others that are tied to it hold the same factors."""
        module = self.model.get_submodule(self.matrix.name)
        assert isinstance(module, FactorizedMatrix)
        return module

    @property
    def count(self) -> int:
        return self.module.spec.units

    def bytes(self, count: int) -> int:
        return self.matrix.bytes(self.full.with_units(count))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: factor for name, factor in self.module.factors.items() if isinstance(factor, nn.Parameter)}

    @property
    def ready(self) -> bool:
        return all(parameter.grad is not None for parameter in self.parameters.values())

    @torch.no_grad()
    def changes(self) -> Tensor:
        module = self.module
        values = {name: p * p.grad for name, p in self.parameters.items() if p.grad is not None}
        return next(iter(module.spec.by_unit(module.factors, values).values())).sum(1)

    @torch.no_grad()
    def keep(self, kept: Tensor, optimizer: Optimizer | None) -> FactorUnits:
        module = self.module
        old, selection = self.parameters, module.spec.select(module.factors, kept, self.full.with_units(len(kept)))
        module.keep(selection)
        for name in self.matrix.aliases:
            tied = self.model.get_submodule(name)
            assert isinstance(tied, FactorizedMatrix)
            tied._adopt(module.spec, module.factors)
        if optimizer is not None:
            for name, parameter in old.items():
                cut = selection.cut[name]
                state = converted(optimizer.state.get(parameter, {}), parameter, lambda _, t, cut=cut: cut(t).clone())
                substitute(optimizer, parameter, {name: self.parameters[name]}, [state])
        self.importance.keep(kept)
        return self


class DenseUnits(Units):
    """A dense matrix, trained as it is, as the sum of its rank-1 components (singular triplets).

    With `T` the matrix or its transpose, whichever is wider than tall, and a fixed `basis` of which `dual` is the
    inverse, `T = sum_i basis_i (dual_i T)` whatever training does to `T`. At the start the groups are the singular
    groups `s_i u_i v_i^T` of the weight under the metric. The first-order importance of a group is
    `basis_i^T G (dual_i T)^T` with `G = dL/dT`, which at the start is `s_i dL/ds_i`.

    As long as factors of the groups that it would keep are larger than the matrix, removing the others frees neither
    bytes nor time. It stays dense and whole then, and all its groups go on competing; below that rank it is replaced by
    its factors, of equal norm for each group. Averages of gradients in the optimizer's state are then carried over
    exactly, for they are linear in the gradient, and averages of their squares as if entries were independent. In a
    plan in integers, a matrix that is whole in the end is `stored` in integers as well.

    Args:
        model, matrix, importance: as for `Units`.
        basis: `(short, units)`.
        dual: `(units, short)`.
    """

    def __init__(
        self,
        model: nn.Module,
        matrix: Matrix,
        importance: Importance,
        basis: Float[Tensor, "short units"],
        dual: Float[Tensor, "units short"],
    ) -> None:
        super().__init__(model, matrix, LowRank(min(matrix.shape)), importance)
        self.basis, self.dual = basis, dual
        self.tall = matrix.shape[0] > matrix.shape[1]
        self.turned = self.tall != is_transposed(model.get_submodule(matrix.name))

    @classmethod
    def of(cls, model: nn.Module, matrix: Matrix, importance: Importance, weight: Tensor, metric: Metric) -> DenseUnits:
        """The rank-1 components of the singular value decomposition under a metric.

        Args:
            model, matrix, importance: as for `Units`.
            weight: `(out, in)`.
            metric: `||R (W - W') L||_F`.

        Raises:
            ModelError: the weight holds NaN or infinite values.
        """
        like = weight
        if weight.device.type in WITHOUT_FLOAT64:
            weight, metric = weight.cpu(), metric.to("cpu")
        scaled = metric.apply(weight).double()
        scale = scaled.abs().amax()
        if not torch.isfinite(scale):
            raise ModelError("the matrix holds NaN or infinite values")
        scaled = scaled / scale.clamp_min(torch.finfo(scaled.dtype).tiny)
        if weight.shape[0] <= weight.shape[1]:
            vectors, _ = leading_eigenvectors(scaled @ scaled.T, weight.shape[0])
            basis, dual = divided(vectors, metric.rows), vectors.T
            if metric.rows is not None:
                rows = metric.rows.to(vectors)
                dual = dual * rows if rows.dim() == 1 else dual @ rows
        else:
            vectors, _ = leading_eigenvectors(scaled.T @ scaled, weight.shape[1])
            basis, dual = vectors, vectors.T
            if metric.columns is not None:
                root = metric.columns.to(vectors)
                basis, dual = torch.linalg.solve_triangular(root.T, vectors, upper=True), vectors.T @ root.T
        return cls(model, matrix, importance, basis.to(like), dual.to(like).contiguous())

    @property
    def weight(self) -> nn.Parameter:
        """The trained weight."""
        return self.model.get_submodule(self.matrix.name).get_parameter("weight")

    @property
    def count(self) -> int:
        return len(self.dual)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    @property
    def ready(self) -> bool:
        return self.weight.grad is not None

    @functools.cached_property
    def largest(self) -> int:
        """The largest number of groups whose factors are smaller than the whole matrix."""
        whole = self.matrix.bytes(self.matrix.whole)
        counts = range(largest_rank(self.matrix.shape), 0, -1)
        return next((count for count in counts if self._in_factors(count) < whole), 0)

    def bytes(self, count: int) -> int:
        return self._in_factors(count) if count <= self.largest else self.matrix.bytes(self.matrix.whole)

    def _in_factors(self, count: int) -> int:
        return self.matrix.bytes(LowRank(count))

    def _turn(self, tensor: Tensor) -> Float[Tensor, "short long"]:
        return tensor.T if self.turned else tensor

    @torch.no_grad()
    def changes(self) -> Tensor:
        weight, gradient, (basis, dual) = self._turn(self.weight), self.weight.grad, self.groups()
        assert gradient is not None
        return ((dual @ (weight @ self._turn(gradient).T)) * basis.T).sum(1)

    def groups(self) -> tuple[Tensor, Tensor]:
        """Basis and dual, where the weight is by now and of its type."""
        self.basis, self.dual = self.basis.to(self.weight), self.dual.to(self.weight)
        return self.basis, self.dual

    @torch.no_grad()
    def keep(self, kept: Tensor, optimizer: Optimizer | None) -> Units:
        if len(kept) > self.largest:
            return self
        basis, dual = self.groups()
        self.importance.keep(kept)
        weight = self.weight
        state = {} if optimizer is None else optimizer.state.get(weight, {})
        first, second = basis[:, kept], dual[kept] @ self._turn(weight)
        # Factors of equal norm learn at equal speed.
        tiny = torch.finfo(first.dtype).tiny
        balance = (second.norm(dim=1).clamp_min(tiny) / first.norm(dim=0).clamp_min(tiny)).sqrt()
        first, second = first * balance, second / balance[:, None]
        states = self._carried(weight, state, first, second)
        pair = (second.T, first.T) if self.tall else (first, second)
        factors = {"weight": pair[0].contiguous(), "right": pair[1].contiguous()}
        factorize(self.model, self.matrix, LowRank(len(kept)), factors)
        units = FactorUnits(self.model, self.matrix, self.full, self.importance)
        if optimizer is not None:
            substitute(optimizer, weight, units.parameters, states[::-1] if self.tall else states)
        return units

    @torch.no_grad()
    def stored(self, optimizer: Optimizer | None) -> Units:
        """What stands for a matrix that is known to stay whole: in a plan in integers a factor that products round."""
        whole = self.matrix.whole
        if whole is None:
            return self
        weight, transposed = self.weight, is_transposed(self.model.get_submodule(self.matrix.name))

        def as_factor(tensor: Tensor) -> Tensor:
            return (tensor.T if transposed else tensor).unsqueeze(1).contiguous()

        state = {} if optimizer is None else optimizer.state.get(weight, {})
        states = [converted(state, weight, lambda _, tensor: as_factor(tensor))]
        factorize(self.model, self.matrix, whole, {"weight": as_factor(weight.detach())})
        self.importance.join()
        units = FactorUnits(self.model, self.matrix, whole, self.importance)
        if optimizer is not None:
            substitute(optimizer, weight, units.parameters, states)
        return units

    def _carried(self, weight: Tensor, state: State, first: Tensor, second: Tensor) -> list[State]:
        """States of the first and the second factor from that of their product."""

        def carried(
            name: str, factor: Tensor, product: Callable[[Tensor, Tensor], Tensor], tensor: Tensor
        ) -> Tensor | None:
            if name not in (*LINEAR, *SQUARED):
                return None  # nothing is known of how it was made
            result = product(self._turn(tensor), factor.square() if name in SQUARED else factor)
            return (result.T if self.tall else result).contiguous()

        return [
            converted(state, weight, lambda name, tensor: carried(name, second, lambda t, f: t @ f.T, tensor)),
            converted(state, weight, lambda name, tensor: carried(name, first, lambda t, f: f.T @ t, tensor)),
        ]
