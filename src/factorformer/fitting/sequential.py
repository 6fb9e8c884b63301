"""Fits to what a compressed model sees: block by block, each matrix after those that its input comes from.

A matrix that is fitted to the dense model's inputs meets others once the matrices before it are compressed. Here its
inputs `x'` are those of the model as it is compressed so far, and its target is still what the dense matrix makes of
the dense model's inputs `x`: with `C' = E[x' x'^T]`, no matrix comes nearer to `W x` than `W E[x x'^T] C'^-1`, and
the fit under the metric of `C'` is of that one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorformer.fitting.batches import Batch, real_tokens
from factorformer.fitting.linalg import square_root
from factorformer.fitting.moments import SecondMoment
from factorformer.layers.dense import dense_weight, is_transposed
from factorformer.layers.modes import evaluating
from factorformer.layers.surgery import find_blocks

FitOne = Callable[[str, Tensor, Tensor], Tensor]
"""A matrix by name, its target and the root of the metric of its inputs -> its approximation, multiplied out."""

SHRINKAGE = 0.1
"""Weight of the identity in both moments, as in `moments.SHRINKAGE`: the more, the nearer a target stays to `W`."""


class _Reached(Exception):
    """A forward pass has come as far as it was to."""


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
            stages, inputs, dense = block.dense(inside, dense)
            if first.output is not None and not torch.allclose(first.output, dense[0], rtol=1e-3, atol=1e-3):
                return fitted  # the block does something else when it is called again
            for stage in stages:
                target, root = block.moments(stage, compressed, inputs)
                for name in stage:
                    weight = dense_weight(model.get_submodule(name)).double()
                    block.replace(name, fit(name, weight @ target, root))
                    fitted.add(name)
            inputs.clear()
            compressed = block.run(compressed)
    return fitted


def _chains(model: nn.Module, batches: Sequence[Batch]) -> list[list[_Call]] | None:
    """Calls of blocks for each batch, in their order; None where blocks are not all called once."""
    blocks = find_blocks(model)
    chains = []
    for batch in batches:
        calls = _calls(model, blocks, batch, keep=not chains)
        names = [call.block for call in calls]
        if not names or len(set(names)) < len(names) or (chains and names != [call.block for call in chains[0]]):
            return None
        chains.append(calls)
    return chains or None


def _calls(model: nn.Module, blocks: Sequence[str], batch: Batch, *, keep: bool) -> list[_Call]:
    """The calls of blocks in one forward pass; with the output of each if it is to be kept."""
    calls: list[_Call] = []
    previous: list[Tensor | None] = [None]

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            known = next((value for value in given if value is previous[0] and value is not None), None)
            hidden = next((v for v in given if isinstance(v, Tensor) and v.is_floating_point()), None)
            place = hidden if known is None else known
            exchanged = [PREVIOUS if value is place else value for value in args]
            named = {key: PREVIOUS if value is place else value for key, value in kwargs.items()}
            calls.append(_Call(name, exchanged, named, hidden if known is None else None, None))

        return hook

    def after(_: nn.Module, __: Any, output: Any) -> None:
        previous[0] = _first(output)
        calls[-1].output = previous[0] if keep else None
        if len({call.block for call in calls}) == len(blocks):
            raise _Reached

    handles = []
    for name in blocks:
        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(before(name), with_kwargs=True)]
        handles += [module.register_forward_hook(after)]
    try:
        with contextlib.suppress(_Reached):
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
        return _first(torch.func.functional_call(self.module, dict(weights), args, kwargs))

    def run(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the block, as it is compressed so far, makes of hidden states."""
        return [self.call(position, states, self.replaced) for position, states in enumerate(hidden)]

    def dense(
        self, names: Sequence[str], hidden: Sequence[Tensor]
    ) -> tuple[list[list[str]], list[list[Tensor]], list[Tensor]]:
        """One pass as it was.

        Returns:
            Groups of the layers that read one tensor, in the order in which they are called; what each group reads, by
            batch and without padding; and the outputs.
        """
        stages: list[list[str]] = []
        inputs: list[list[Tensor]] = []
        outputs: list[Tensor] = []
        for position, states in enumerate(hidden):
            seen: list[tuple[str, Tensor]] = []
            with _watching({name: self.layer(name) for name in names}, seen):
                outputs.append(self.call(position, states, {}))
            if not stages:
                stages = _stages(seen, states)
            first = dict(seen)
            inputs.append([self.real(stage[0], position, first[stage[0]]) for stage in stages])
        return stages, inputs, outputs

    def moments(
        self, stage: Sequence[str], hidden: Sequence[Tensor], inputs: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """`E[x x'^T] C'^-1` and a root of `C'`, for the input of a group of layers, both `(width, width)` in float64.

        Args:
            stage: names of the layers.
            hidden: states that the block starts from, by batch.
            inputs: of the dense block, by batch; the next group's is taken off.
        """
        moment, cross = None, None
        for position, states in enumerate(hidden):
            found = self.real(stage[0], position, self.input_of(stage[0], position, states)).float()
            known = inputs[position].pop(0).float()
            if moment is None or cross is None:
                moment = SecondMoment.zeros(found.shape[1], found.device)
                cross = torch.zeros_like(moment.total)
            moment.add(found)
            cross.addmm_(known.T, found)
        assert moment is not None
        assert cross is not None
        width = len(cross)
        weight = SHRINKAGE * width / (width + moment.count)
        lower = moment.total.double().tril()
        inner = (lower + lower.tril(-1).T) * ((1 - weight) / moment.count)
        cross = cross.double() * ((1 - weight) / moment.count)
        size = moment.mean_square() or 1.0
        inner.diagonal().add_(weight * size)
        cross.diagonal().add_(weight * size)
        root = square_root(inner)
        return torch.cholesky_solve(cross.T, root).T, root

    def input_of(self, name: str, position: int, hidden: Tensor) -> Tensor:
        """What a layer reads, in the block as it is compressed so far."""
        seen: list[tuple[str, Tensor]] = []
        with contextlib.suppress(_Reached), _watching({name: self.layer(name)}, seen, stop=True):
            self.call(position, hidden, self.replaced)
        return seen[0][1]

    def real(self, name: str, position: int, x: Tensor) -> Tensor:
        """What a layer reads, without padding, one row for each token."""
        return real_tokens(self.model, name, self.batches[position], x, x.shape[:-1])


def _stages(seen: Sequence[tuple[str, Tensor]], hidden: Tensor) -> list[list[str]]:
    """Layers that read one tensor, of those that are called once, for every token of the hidden states."""
    names = [name for name, _ in seen]
    stages: list[list[str]] = []
    last: Tensor | None = None
    for name, x in seen:
        if names.count(name) > 1 or x.shape[:-1] != hidden.shape[:-1]:
            continue
        if x is last:
            stages[-1].append(name)
        else:
            stages.append([name])
        last = x
    return stages


@contextlib.contextmanager
def _watching(layers: Mapping[str, nn.Module], seen: list[tuple[str, Tensor]], *, stop: bool = False) -> Iterator[None]:
    """Note what layers read, and go no further if that is enough."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append((name, args[0]))
            if stop:
                raise _Reached

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _placed(model: nn.Module, batch: Batch) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """A cache would grow with every call of a block."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
