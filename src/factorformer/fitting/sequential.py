"""Fits to what a compressed model sees: block by block, each matrix after those that its input comes from.

A matrix that is fitted to the dense model's inputs meets others once the matrices before it are compressed. Here its
inputs `x'` are those of the model as it is compressed so far, and its target is still what the dense matrix makes of
the dense model's inputs `x`: with `C' = E[x' x'^T]`, no matrix comes nearer to `W x` than `W E[x x'^T] C'^-1`, and
the fit under the metric of `C'` is of that one. Where the output is added to a residual stream `r`, which has errors
`r - r'` of its own by now, the matrix makes up for a part of those too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorformer.fitting.batches import Batch, real_tokens
from factorformer.fitting.linalg import square_root
from factorformer.fitting.moments import SecondMoment
from factorformer.fitting.watch import Reached, Stage, Watch
from factorformer.layers.dense import dense_weight, is_transposed
from factorformer.layers.modes import evaluating, fast_float32, fast_products
from factorformer.layers.surgery import find_blocks

COMPENSATION = 0.5
"""Part of the error of the residual stream that a matrix is to make up for."""

FitOne = Callable[[str, Tensor, Tensor], Tensor]
"""A matrix by name, its target and the root of the metric of its inputs -> its approximation, multiplied out."""

SHRINKAGE = 0.03
"""Weight of the identity in both moments: the more, the nearer a target stays to `W`."""


class _Previous:
    """Stands for the output of the block before."""


PREVIOUS = _Previous()


@dataclasses.dataclass
class _Call:
    """One call of a block: its arguments, with `PREVIOUS` or `hidden` where its hidden states go."""

    block: str
    args: list[Any]
    kwargs: dict[str, Any]
    hidden: Tensor | None
    output: Tensor | None

    @property
    def continues(self) -> bool:
        """Whether it reads hidden states."""
        return any(value is PREVIOUS for value in (*self.args, *self.kwargs.values()))


def fit_sequentially(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    fit: FitOne,
) -> set[str]:
    """Fit those of the matrices that stand in blocks which can be run one after the other.

    That is where each block is called once in a forward pass, and runs on the hidden states that the one before it
    returned; an encoder and a decoder are two such chains. A matrix whose inputs are not those of all tokens, such as
    an expert's, or that is called more than once, is not fitted.

    Args:
        model: not changed.
        names: of matrices.
        batches: of calibration data.
        fit: called once for each matrix, in the order of the model.

    Returns:
        Names of the matrices that were fitted.
    """
    wanted = set(names)
    fitted: set[str] = set()
    with evaluating(model), torch.no_grad():
        chains = _chains(model, batches)
        if chains is None:
            return fitted
        dense: list[Tensor] = []
        compressed: list[Tensor] = []
        for position, first in enumerate(chains[0]):
            calls = [chain[position] for chain in chains]
            if first.hidden is not None:
                dense = [call.hidden for call in calls if call.hidden is not None]
                compressed = list(dense)
            block = _Block(model, first.block, calls, batches)
            inside = [name for name in wanted if name.startswith(f"{first.block}.")]
            stages, dense = block.dense(inside, dense)
            if first.output is not None and not torch.allclose(first.output, dense[0], rtol=1e-3, atol=1e-3):
                return fitted  # the block does something else when it is called again
            for stage in stages:
                moments = block.moments(stage, compressed)
                for name in stage.names:
                    weight = dense_weight(model.get_submodule(name))
                    block.replace(name, fit(name, moments.target(weight), moments.root))
                    fitted.add(name)
            compressed = block.run(compressed)
    return fitted


def _chains(model: nn.Module, batches: Sequence[Batch]) -> list[list[_Call]] | None:
    """Calls of blocks for each batch, in their order; None where blocks are not all called once."""
    blocks = find_blocks(model)
    chains = []
    for batch in batches:
        calls = _calls(model, blocks, batch, len(chains[0]) if chains else None)
        names = [call.block for call in calls]
        alike = not chains or names == [call.block for call in chains[0]]
        if not names or len(set(names)) < len(names) or not alike or not all(call.continues for call in calls):
            return None
        chains.append(calls)
    return chains or None


def _calls(model: nn.Module, blocks: Sequence[str], batch: Batch, count: int | None) -> list[_Call]:
    """The first calls of blocks in a forward pass; if no number of them is given, all, with their outputs."""
    calls: list[_Call] = []
    previous: list[Tensor | None] = [None]

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            known = next((value for value in given if value is previous[0] and value is not None), None)
            hidden = next((v for v in given if isinstance(v, Tensor) and v.is_floating_point()), None)
            place = hidden if known is None else known
            exchanged = [PREVIOUS if isinstance(value, Tensor) and value is place else value for value in args]
            named = {k: PREVIOUS if isinstance(v, Tensor) and v is place else v for k, v in kwargs.items()}
            calls.append(_Call(name, exchanged, named, hidden if known is None else None, None))

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        previous[0] = _first(output)
        calls[-1].output = previous[0] if count is None else None
        if len(calls) == count:
            raise Reached

    handles = []
    for name in blocks:
        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True)]
        handles += [module.register_forward_hook(after)]
    try:
        with contextlib.suppress(Reached), fast_products(model):
            model(**{**_placed(model, batch), **_without_cache(model)})
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Block:
    """One block of a model, as it was and as it is compressed so far.

    Args:
        model: that it is a part of.
        name: of the block.
        calls: of it, one for each batch.
        batches: what they are of.
    """

    def __init__(self, model: nn.Module, name: str, calls: Sequence[_Call], batches: Sequence[Batch]) -> None:
        self.model, self.name, self.calls, self.batches = model, name, calls, batches
        self.module = model.get_submodule(name)
        self.replaced: dict[str, Tensor] = {}

    def layer(self, name: str) -> nn.Module:
        """A layer of the block, by its name in the model."""
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))

    def replace(self, name: str, weight: Tensor) -> None:
        """Give a layer another weight from now on."""
        layer = self.layer(name)
        weight = weight.T if is_transposed(layer) else weight
        own = layer.get_parameter("weight")
        self.replaced[f"{name.removeprefix(f'{self.name}.')}.weight"] = weight.to(own.dtype)

    def call(self, position: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The output for one batch."""
        call = self.calls[position]
        args = tuple(hidden if value is PREVIOUS else value for value in call.args)
        kwargs = {key: hidden if value is PREVIOUS else value for key, value in call.kwargs.items()}
        with fast_products(self.model):
            return _first(torch.func.functional_call(self.module, dict(weights), args, kwargs))

    def run(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the block, as it is compressed so far, makes of hidden states."""
        return [self.call(position, states, self.replaced) for position, states in enumerate(hidden)]

    def dense(self, names: Sequence[str], hidden: Sequence[Tensor]) -> tuple[list[Stage], list[Tensor]]:
        """One pass as it was.

        Returns:
            Groups of the layers that read one tensor, in the order in which they are called, with what they read; and
            the outputs.
        """
        stages: list[Stage] = []
        outputs: list[Tensor] = []
        for position, states in enumerate(hidden):
            with Watch({self.layer(name): name for name in names}) as watch:
                outputs.append(self.call(position, states, {}))
            stages = stages or watch.stages(states)
            for stage in stages:
                stage.inputs.append(self.real(stage.name, position, watch.read[stage.name][0]))
                if stage.residual:
                    stage.residuals.append(self.real(stage.name, position, watch.added[stage.name]))
        return stages, outputs

    def moments(self, stage: Stage, hidden: Sequence[Tensor]) -> _Moments:
        """Of the input of a group of layers, in the block as it is compressed so far."""
        moments = None
        for position, states in enumerate(hidden):
            layer = self.layer(stage.name)
            watch = Watch({layer: stage.name}, until="added" if stage.residual else "read")
            with contextlib.suppress(Reached), watch:
                self.call(position, states, self.replaced)
            found = self.real(stage.name, position, watch.read[stage.name][0])
            moments = moments or _Moments.zeros(found.shape[1], found.device)
            moments.add(found, stage.inputs[position])
            if stage.residual:
                left = stage.residuals[position] - self.real(stage.name, position, watch.added[stage.name])
                moments.add_residual(found, left)
        assert moments is not None
        stage.inputs.clear()
        stage.residuals.clear()
        return moments

    def real(self, name: str, position: int, x: Tensor) -> Tensor:
        """What a layer reads, without padding, one row for each token."""
        return real_tokens(self.model, name, self.batches[position], x, x.shape[:-1])


@dataclasses.dataclass
class _Moments:
    """Sums over tokens, of inputs `x` of the dense model and `x'` of the compressed one, and errors of the residual.

    Args:
        inner: of `x' x'^T`.
        cross: of `x x'^T`.
        residual: of `(r - r') x'^T`; None where nothing is to be made up for.
    """

    inner: SecondMoment
    cross: Tensor
    residual: Tensor | None = None

    @classmethod
    def zeros(cls, width: int, device: torch.device) -> _Moments:
        inner = SecondMoment.zeros(width, device)
        return cls(inner, torch.zeros_like(inner.total))

    def add(self, found: Tensor, known: Tensor) -> None:
        rounded, found = found.dtype == known.dtype == torch.bfloat16, found.float()
        self.inner.add(found)
        with fast_float32(found.device, rounding=rounded):
            self.cross.addmm_(known.float().T, found)

    def add_residual(self, found: Tensor, left: Tensor) -> None:
        with fast_float32(found.device):
            product = left.float().T @ found.float()
        self.residual = product if self.residual is None else self.residual.add_(product)

    @functools.cached_property
    def root(self) -> Tensor:
        """A lower-triangular root of `C' = E[x' x'^T]`, shrunk."""
        moment = self.inner.symmetric() * self.share
        moment.diagonal().add_(self.least)
        return square_root(moment)

    @property
    def share(self) -> float:
        """What a sum is multiplied by."""
        return (1 - SHRINKAGE) / self.inner.count

    @property
    def least(self) -> float:
        """What shrinkage adds to diagonals."""
        return SHRINKAGE * (self.inner.mean_square() or 1.0)

    def target(self, weight: Tensor) -> Tensor:
        """`(W E[x x'^T] + E[(r - r') x'^T]) C'^-1`, in float64."""
        weight = weight.double()
        wanted = weight @ self.cross.double() * self.share + self.least * weight
        if self.residual is not None:
            wanted += self.residual.double() * (self.share * COMPENSATION)
        return torch.cholesky_solve(wanted.T, self.root).T


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _placed(model: nn.Module, batch: Batch) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """A cache would grow with every call of a block."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
