"""The Straight-Through Factorizer: factors learn which of their parts to keep while the model is fine-tuned.

Each factorized matrix gets a *shadow*, a larger free variable. The forward pass uses its projection onto what the
structure can store, and the gradient with respect to the projection is passed straight to the shadow, so that entries
outside of the support go on learning and may come back. In the last part of training the support is frozen.

The idea is DSFormer's (Chand, Prabhu and Kumar, arXiv 2312.13211), whose steps are not known; these are ours, found by
the trials in `docs/log.md`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from factorformer.errors import MethodError, ModelError
from factorformer.fitting import Metric
from factorformer.fitting.linalg import WITHOUT_FLOAT64
from factorformer.fitting.moments import LayerStatistics
from factorformer.kernels.support import unpack
from factorformer.layers.dense import dense_shape, dense_weight
from factorformer.layers.nn import TEMPORARY, FactorizedLinear, FactorizedMatrix
from factorformer.structures import DenseSparse
from factorformer.training.data_parallel import check_whole

SHADOW, PROJECTION, FROZEN, MOMENT = TEMPORARY

LAST = 10
"""Times the usual proximal steps, before the support is frozen."""


@dataclasses.dataclass(frozen=True)
class StraightThroughSettings:
    """How supports move while a model trains straight through.

    Args:
        interval: optimizer steps from one projection to the next.
        freeze: part of the training after which supports stay as they are.
        steps: proximal steps of each projection.
    """

    interval: int = 4
    freeze: float = 0.3
    steps: int = 1

    def __post_init__(self) -> None:
        if not (self.interval >= 1 and 0 < self.freeze <= 1 and self.steps >= 1):
            raise MethodError(f"interval and steps must be at least 1, and freeze above 0 and at most 1; got {self}")


class StraightThrough:
    """Puts the factorized linear layers of a model into their training form, and takes them out of it again.

    Where a plain loop has `optimizer.step()`, call `after_step(done, total)` next; at the end, `finish()`. Optimizers
    have to be made after this object, for it adds parameters. State dicts hold, beside the shadows, the factors that
    the model would have if it ended here, so a checkpoint is a compressed model at any time.

    Matrices without a sparse support, those that several modules hold (tied weights) and embeddings train as they are.

    Args:
        model: from `compress`.
        statistics: of `compress`'s report; with the second moment of the inputs, projections minimize the error of a
            layer's output instead of that of its weights.
        dense: the model before it was compressed: shadows start from its weights, with all that the factors lost.
            None starts them from the factors.
        settings: how supports move.

    Raises:
        ModelError: the model has no factorized linear layer that could be trained so.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, LayerStatistics] | None = None,
        dense: nn.Module | None = None,
        settings: StraightThroughSettings | None = None,
    ) -> None:
        self.settings = settings or StraightThroughSettings()
        self.forms: dict[str, SparseForm] = {}
        holders: dict[int, list[tuple[str, FactorizedMatrix]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, FactorizedMatrix):
                holders.setdefault(id(module.weight), []).append((name, module))
        for (name, module), *others in holders.values():
            if module.form is not None:
                raise ModelError(f"layer '{name}' trains straight through already: call finish() of that first")
            if others or not isinstance(module, FactorizedLinear) or not module.values.requires_grad:
                continue
            form = FORMS.get(module.spec.training_form)
            if form is None:
                continue
            original = None if dense is None else _original(dense, name, module)
            measured = None if statistics is None else statistics.get(name)
            self.forms[name] = form(module, Metric.of(measured), original, self.settings)
        if not self.forms:
            raise ModelError(
                "straight-through training needs factorized linear layers with a sparse support (dense_sparse), "
                "trained and not tied to others: compress the model first, unfreeze them, and store them in integers "
                "only when training is over"
            )

    def after_step(self, done: int, total: int) -> None:
        """Project the shadows if it is time.

        Args:
            done: optimizer steps so far, at least 1.
            total: optimizer steps of the whole training.

        Raises:
            ModelError: parameters are sharded over processes.
        """
        check_whole((form.shadow for form in self.forms.values()), "straight-through projections")
        for form in self.forms.values():
            form.after_step(done, total)

    def refresh(self) -> None:
        """Follow tensors that were loaded into the model."""
        for form in self.forms.values():
            form.refresh()

    def finish(self) -> None:
        """Leave the factors where training brought them, and drop everything else."""
        for form in self.forms.values():
            form.refresh()
            form.finish()
        self.forms = {}


class SparseForm:
    """`W = S D` in training: the shadow is a dense `S`, projected onto `nonzeros` entries a row; `D` trains directly.

    With the Gram matrix `G = D C D^T` of the atoms under the second moment `C` of the input (the identity if it is not
    known, or where `S` covers the inputs), the projection takes hard-thresholded gradient steps on
    `min_P ||(P - shadow) D||_C` from where it was: `P <- top(P - (P - shadow) G / lambda_max(G))`. Entries outside
    that correlate with chosen ones are so made up for, which cutting the shadow off would not do.
    """

    def __init__(
        self, module: FactorizedMatrix, metric: Metric, original: Tensor | None, settings: StraightThroughSettings
    ) -> None:
        assert isinstance(module.spec, DenseSparse)
        self.spec = module.spec
        self.settings = settings
        codes = self.spec.coefficients(module.factors).detach()
        rows, moment = self.spec.side == "rows", None
        if metric.columns is not None and rows:
            moment = (metric.columns @ metric.columns.T).to(codes)
        self.frozen, self.moved = False, False
        self.outside: Tensor | None = None
        latent = codes
        if original is not None and (rows or metric.columns is None):
            # Where a metric couples the rows of S, dense codes would be those of the plain one: projections would then
            # undo a data-aware fit.
            dictionary = module.get_parameter("dictionary").detach()
            latent = _dense_codes((original if rows else original.T).to(codes), dictionary, moment)
        self.module = module
        self.trainable = {name: factor.requires_grad for name, factor in module.factors.items()}
        module.substitute(self)
        self._hook = module.register_state_dict_pre_hook(self._before_state_dict)
        module.register_parameter(SHADOW, nn.Parameter(latent.clone().contiguous()))
        module.get_parameter("weight").requires_grad_(False)
        module.register_buffer(PROJECTION, codes.clone())
        module.register_buffer(FROZEN, torch.zeros(1, dtype=torch.uint8, device=codes.device))
        if moment is not None:
            module.register_buffer(MOMENT, moment)

    @property
    def shadow(self) -> nn.Parameter:
        """The free variable."""
        return self.module.get_parameter(SHADOW)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the projection of the shadow; its gradient goes to the shadow."""
        if self.frozen:
            codes = self.shadow.masked_fill(self._pruned(), 0)
        else:
            codes = _Replace.apply(self.shadow, self.module.get_buffer(PROJECTION))
        dictionary = self.module.get_parameter("dictionary")
        if self.spec.side == "rows":
            return F.linear(F.linear(x, dictionary), codes, bias)
        return F.linear(F.linear(x, codes.T), dictionary.T, bias)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix with the present projection."""
        self.pack()
        return self.spec.rows(self.module.shape, self.module.factors, index)

    @torch.no_grad()
    def after_step(self, done: int, total: int) -> None:
        """Let the projection follow the shadow if it is time: `done` optimizer steps of `total` are over."""
        if self.frozen:
            return
        self.moved = True
        if done < self.settings.freeze * total:
            if done % self.settings.interval == 0:
                self._follow(self.settings.steps)
            return
        self._follow(LAST * self.settings.steps)
        self.pack()
        self.shadow.copy_(self.module.get_buffer(PROJECTION))
        self.module.get_buffer(FROZEN).fill_(1)
        self.refresh()

    def refresh(self) -> None:
        """Rebuild what is derived from tensors of the module."""
        self.frozen = bool(self.module.get_buffer(FROZEN).item())
        self.outside = None

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the module with its factors alone."""
        if self.moved and not self.frozen:  # training ended between two projections
            self._follow(self.settings.steps)
        self.pack()
        self._hook.remove()
        self.module.restore()
        for name in TEMPORARY:
            if hasattr(self.module, name):
                delattr(self.module, name)
        for name, trains in self.trainable.items():
            getattr(self.module, name).requires_grad_(trains)

    def _before_state_dict(self, *_: Any) -> None:
        self.refresh()
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Write the projection into the factors."""
        projection = self.module.get_buffer(PROJECTION)
        if self.frozen:
            projection.copy_(self.shadow.masked_fill(self._pruned(), 0))
            self.module.get_parameter("weight").copy_(projection.gather(1, self._positions()))
            return
        gram = self._gram()
        for name, tensor in self.spec.pack(projection, _energy(projection, gram)).items():
            getattr(self.module, name).copy_(tensor)

    def _positions(self) -> Int[Tensor, "long nonzeros"]:
        return unpack(self.module.get_buffer("support"), self.spec.atoms, self.spec.nonzeros)

    def _pruned(self) -> Bool[Tensor, "long atoms"]:
        if self.outside is None:
            self.outside = torch.ones_like(self.shadow, dtype=torch.bool).scatter_(1, self._positions(), False)
        return self.outside

    def _gram(self) -> Float[Tensor, "atoms atoms"]:
        dictionary = self.module.get_parameter("dictionary").detach()
        moment = getattr(self.module, MOMENT, None)
        return (dictionary if moment is None else dictionary @ moment) @ dictionary.T

    def _follow(self, steps: int) -> None:
        gram = self._gram()
        rate = 1 / _largest_eigenvalue(gram)
        for _ in range(steps):
            projection = self.module.get_buffer(PROJECTION)
            codes = projection - rate * ((projection - self.shadow) @ gram)
            positions = self.spec.choose(_energy(codes, gram))
            projection.zero_().scatter_(1, positions, codes.gather(1, positions))
        self.moved = False


FORMS: dict[str | None, type[SparseForm]] = {"sparse_codes": SparseForm}
"""Training forms by the names that structures give them."""


class _Replace(torch.autograd.Function):
    """The projection in the place of the shadow; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, shadow: Tensor, projection: Tensor) -> Tensor:
        return projection.clone()  # the projection changes in place between steps

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradients[0], None


def _original(dense: nn.Module, name: str, module: FactorizedMatrix) -> Tensor:
    try:
        layer = dense.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or dense_shape(layer) != module.shape:
        raise ModelError(
            f"the dense model has no layer '{name}' of shape {module.shape}: give a copy of the model from before "
            "it was compressed (copy.deepcopy)"
        )
    return dense_weight(layer)


def _energy(codes: Float[Tensor, "long atoms"], gram: Float[Tensor, "atoms atoms"]) -> Float[Tensor, "long atoms"]:
    """What each entry of `S` adds to the squared output, alone."""
    return codes.square() * gram.diagonal()


def _dense_codes(
    target: Float[Tensor, "long short"], dictionary: Float[Tensor, "atoms short"], moment: Tensor | None
) -> Float[Tensor, "long atoms"]:
    """The dense `S` with the least error: `T C D^T (D C D^T)^-1`."""
    weighted, wide, matrix = dictionary if moment is None else dictionary @ moment, dictionary, target
    if target.device.type in WITHOUT_FLOAT64:
        weighted, wide, matrix = weighted.cpu(), wide.cpu(), matrix.cpu()
    weighted, wide, matrix = weighted.double(), wide.double(), matrix.double()
    gram = weighted @ wide.T
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    return torch.cholesky_solve(weighted @ matrix.T, torch.linalg.cholesky(gram)).T.to(target)


def _largest_eigenvalue(gram: Float[Tensor, "n n"], rounds: int = 20) -> Float[Tensor, ""]:
    """About the largest eigenvalue of a Gram matrix: 1.1 times what power iteration finds from a fixed random vector.

    With eigenvalues close to each other that may lie a little below it. Gradient steps of its inverse converge as long
    as it is above a half.
    """
    vector = torch.randn(len(gram), generator=torch.Generator().manual_seed(0)).to(gram)
    for _ in range(rounds):
        vector = vector / vector.norm().clamp_min(torch.finfo(gram.dtype).tiny)
        vector = gram @ vector
    return 1.1 * vector.norm().clamp_min(torch.finfo(gram.dtype).tiny)
