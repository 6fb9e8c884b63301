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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache

from factorformer import processes
from factorformer.fitting.batches import Batch, placed, real_tokens
from factorformer.fitting.linalg import square_root
from factorformer.fitting.moments import SecondMoment
from factorformer.fitting.watch import Reached, Stage, Watch
from factorformer.layers.dense import dense_weight, is_transposed
from factorformer.layers.modes import evaluating, fast_float32, fast_products
from factorformer.layers.surgery import find_blocks

COMPENSATION = 0.5
"""Part of the error of the residual stream that a matrix is to make up for."""

FitOne = Callable[[str, Tensor | None, Tensor | None], Tensor | None]
"""A matrix by name, its target and the root of the metric of its inputs -> its approximation, multiplied out; no target
where another process does it."""

Made = TypeVar("Made")

REPEATS = 0.01
"""How far a block may be from what it made of the same hidden states before, relative to what it does to them."""

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


class _CannotRepeat(Exception):
    """A block does not run alone, or does something else than in the model."""


def fit_sequentially(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    fit: FitOne,
    replaced: Mapping[str, Tensor] | None = None,
) -> None:
    """Fit those of the matrices that stand in blocks which can be run one after the other.

    That is where each block is called once in a forward pass, and runs on the hidden states that the one before it
    returned; an encoder and a decoder are two such chains. A matrix whose inputs are not those of all tokens, such as
    an expert's, that is called more than once, or whose weight has other places in the model too, is not fitted.

    Args:
        model: not changed.
        names: of matrices.
        batches: of calibration data.
        fit: called once for each of these matrices, in the order of the model.
        replaced: weights outside of blocks that differ in the compressed model, such as those of embeddings, by the
            names of parameters.
    """
    wanted = set(names) - _in_many_places(model)
    changed = dict(replaced or {})
    if len(batches) >= processes.count():
        batches = batches[processes.place() :: processes.count()]
    with evaluating(model), _without_cache(model), torch.no_grad(), contextlib.suppress(_CannotRepeat):
        chains = _agreed(_chains, model, batches, {})
        now, dense, compressed = chains, [], []
        for position, first in enumerate(chains[0]):
            if first.hidden is not None:
                # What a chain begins with, and reads besides hidden states, has errors of its own by now.
                now = _agreed(_chains, model, batches, changed) if changed else chains
                dense, compressed = (_agreed(_starts, each, position) for each in (chains, now))
            calls = [chain[position] for chain in chains]
            block = _Block(model, first.block, calls, [chain[position] for chain in now], batches)
            inside = [name for name in wanted if name.startswith(f"{first.block}.")]
            stages, after = _agreed(_passed, block, first, inside, dense)
            for stage in stages:
                moments = _agreed(block.moments, stage, compressed)
                moments.join()
                made: dict[str, Tensor] = {}
                mine = processes.own(stage.names)
                for name in stage.names:
                    known: tuple[Tensor, Tensor] | tuple[None, None] = None, None
                    if name in mine:
                        known = moments.target(dense_weight(model.get_submodule(name))), moments.root
                    if (approximation := fit(name, *known)) is not None:
                        made[name] = approximation
                for name, weight in processes.merged(made).items():
                    block.replace(name, weight)
            dense, compressed = after, _agreed(block.run, compressed)
            changed |= {f"{first.block}.{name}": weight for name, weight in block.replaced.items()}


def _agreed(make: Callable[..., Made], *arguments: Any) -> Made:
    """What a function makes, if it can in all processes."""
    try:
        made = make(*arguments)
    except _CannotRepeat:
        processes.agree(holds=False)
        raise
    if not processes.agree(holds=True):
        raise _CannotRepeat
    return made


def _passed(
    block: _Block, call: _Call, names: Sequence[str], hidden: Sequence[Tensor]
) -> tuple[list[Stage], list[Tensor]]:
    """One pass of a block as it was, which is to do what it did in the model; see `_Block.dense`."""
    stages, after = block.dense(names, hidden)
    _check_same(call, hidden[0], after[0])
    return stages, after


def _in_many_places(model: nn.Module) -> set[str]:
    """Layers whose weight other layers have too, or that the model holds under several names."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight":
                places.setdefault(id(parameter), []).append(path)
    return {path for paths in places.values() if len(paths) > 1 for path in paths}


def _chains(model: nn.Module, batches: Sequence[Batch], weights: Mapping[str, Tensor]) -> list[list[_Call]]:
    """Calls of blocks for each batch, in their order."""
    blocks = find_blocks(model)
    chains: list[list[_Call]] = []
    for batch in batches:
        calls = _calls(model, blocks, batch, weights, len(chains[0]) if chains else None)
        names = [call.block for call in calls]
        alike = not chains or names == [call.block for call in chains[0]]
        if not names or len(set(names)) < len(names) or not alike or not all(call.continues for call in calls):
            raise _CannotRepeat
        chains.append(calls)
    if not chains:
        raise _CannotRepeat
    return chains


def _starts(chains: Sequence[Sequence[_Call]], position: int) -> list[Tensor]:
    """What a chain begins with, for each batch."""
    found = [chain[position].hidden for chain in chains]
    if any(hidden is None for hidden in found):
        raise _CannotRepeat
    return [hidden for hidden in found if hidden is not None]


def _check_same(call: _Call, hidden: Tensor, output: Tensor) -> None:
    """That a block has made of hidden states again what it made of them in the model."""
    if call.output is None:
        return
    known, again = call.output.float(), output.float()
    hidden = hidden.to(known)  # of the block before it, which may be on another device
    change = known - hidden if known.shape == hidden.shape else known
    if known.shape != again.shape or float((known - again).norm()) > REPEATS * float(change.norm()):
        raise _CannotRepeat


def _calls(
    model: nn.Module, blocks: Sequence[str], batch: Batch, weights: Mapping[str, Tensor], count: int | None
) -> list[_Call]:
    """The first calls of blocks in a forward pass; if no number of them is given, all, with their outputs."""
    calls: list[_Call] = []
    previous: list[Tensor | None] = [None]

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            known = next((value for value in given if value is previous[0] and value is not None), None)
            hidden = next((v for v in given if isinstance(v, Tensor) and v.is_floating_point()), None)
            place = hidden if known is None else known

            def kept(value: Any) -> Any:
                # A cache would grow with every call.
                return None if isinstance(value, Cache) else PREVIOUS if value is place and place is not None else value

            exchanged, named = [kept(value) for value in args], {key: kept(v) for key, v in kwargs.items()}
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
            torch.func.functional_call(model, dict(weights), (), placed(batch, next(model.parameters()).device))
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
        now: the same in the model as it is compressed so far.
        batches: what they are of.
    """

    def __init__(
        self, model: nn.Module, name: str, calls: Sequence[_Call], now: Sequence[_Call], batches: Sequence[Batch]
    ) -> None:
        self.model, self.name, self.calls, self.now, self.batches = model, name, calls, now, batches
        self.module = model.get_submodule(name)
        self.products = fast_products(model)
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

    def call(self, call: _Call, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The output for one batch."""
        args = tuple(hidden if value is PREVIOUS else value for value in call.args)
        kwargs = {key: hidden if value is PREVIOUS else value for key, value in call.kwargs.items()}
        try:
            with self.products:
                return _first(torch.func.functional_call(self.module, dict(weights), args, kwargs))
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _CannotRepeat from error

    def run(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """What the block, as it is compressed so far, makes of hidden states."""
        return [self.call(call, states, self.replaced) for call, states in zip(self.now, hidden, strict=True)]

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
                outputs.append(self.call(self.calls[position], states, {}))
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
                self.call(self.now[position], states, self.replaced)
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

    def join(self) -> None:
        """Add up the sums of all processes."""
        if processes.count() == 1:
            return
        self.inner.count = int(processes.total(self.inner.count))
        for total in (self.inner.total, self.cross, self.residual):
            if total is not None:
                processes.add(total)

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
        """`(W E[x x'^T] + 1/2 E[(r - r') x'^T]) C'^-1`, `(out, in)`, in float64."""
        weight = weight.double()
        wanted = weight @ self.cross.double() * self.share + self.least * weight
        if self.residual is not None:
            wanted += self.residual.double() * (self.share * COMPENSATION)
        return torch.cholesky_solve(wanted.T, self.root).T


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A decoder that keeps nothing of what it has read."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", None)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
