"""Blocks of a model one at a time, driven by the model's own forward pass: those before it are skipped.

Whatever a block takes beside hidden states (masks, positions, their rotations) the model makes for it as always. The
blocks before return, in place of what they would compute, what they did return when they had their weights; those
behind are not reached. So one forward pass computes one block, and everything outside of blocks before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorformer.errors import ModelError, one_line
from factorformer.fitting.batches import Batch
from factorformer.fitting.watch import Reached
from factorformer.layers.surgery import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Wrap = Callable[[Tensor], Any]
"""Hidden states as a block returns them."""

BARE = 0
"""The length of an output that is no tuple."""


class Chain:
    """The blocks of a model in the order in which they run.

    Args:
        model: of which all but the blocks has its values.
        batch: to find out whether the blocks are a chain: they are called once each, in order, and each reads what the
            one before it returned.

    Raises:
        ModelError: they are not.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch) -> None:
        self.model: Any = model
        self.names = find_blocks(model)
        self._blocks = [model.get_submodule(name) for name in self.names]
        self.lengths: list[int] = [BARE] * len(self.names)
        """Of the tuples that blocks return, as far as they are known."""
        self._check(batch)

    def begin(self, batch: Batch) -> Tensor:
        """What the first block reads.

        Raises:
            ModelError: the model does not come as far without the weights of its blocks, or not at all.
        """
        found: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            found.append(_hidden_of(args, kwargs))
            raise Reached

        with self._only(self._blocks[:1], [first]):
            self.model(**batch)
        return found[0]

    def run(self, place: int, batch: Batch, hidden: Tensor, *, differentiable: bool = False) -> Tensor:
        """What one block returns.

        Args:
            place: of the block, which has its weights.
            batch: arguments of the model.
            hidden: what the block reads of it.
            differentiable: whether the result has a graph.
        """
        block, found = self._blocks[place], []

        def here(*args: Any, **kwargs: Any) -> Any:
            with torch.set_grad_enabled(differentiable):
                output = type(block).forward(block, *args, **kwargs)
            self.lengths[place] = BARE if isinstance(output, Tensor) else len(output)
            found.append(output if isinstance(output, Tensor) else output[0])
            raise Reached

        before = [self._skipped(earlier, hidden) for earlier in range(place)]
        with self._only(self._blocks[: place + 1], [*before, here]):
            self.model(**batch)
        return found[0]

    def finish(self, batch: Batch, hidden: Tensor, earlier: Sequence[Tensor] = ()) -> Any:
        """What the model makes of what the last block returned, with a graph.

        Args:
            batch: arguments of the model.
            hidden: what that was.
            earlier: what the blocks before it return meanwhile, if not the same.

        Raises:
            ModelError: it makes nothing of it while no block runs.
        """
        given = [*earlier, *[hidden] * (len(self._blocks) - len(earlier))]
        # What follows may write into what it reads.
        forwards = [self._skipped(place, tensor.clone()) for place, tensor in enumerate(given)]
        with self._naming(-1), _as(self._blocks, forwards, differentiable=True):
            return self.model(**{**batch, "return_dict": True})

    @contextlib.contextmanager
    def _only(self, blocks: list[Any], forwards: list[Callable[..., Any]]) -> Iterator[None]:
        """A forward pass that ends in the last of these blocks, however it gets there."""
        with self._naming(len(blocks) - 1):
            try:
                with _as(blocks, forwards):
                    yield
            except Reached:
                return
        raise ModelError(
            f"{type(self.model).__name__} never calls its block '{self.names[len(blocks) - 1]}': methods without data "
            "can (svd)"
        )

    @contextlib.contextmanager
    def _naming(self, place: int) -> Iterator[None]:
        """Errors of a model on the way to a block, or behind the last one."""
        try:
            yield
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            what = f"'{self.names[place]}' is not reached" if place >= 0 else "nothing is made of hidden states"
            raise ModelError(
                f"{type(self.model).__name__} cannot run block by block: {what} without the weights of other blocks, "
                f"or not on this batch ({one_line(error)}); methods without data can (svd)"
            ) from error

    def _skipped(self, place: int, hidden: Tensor) -> Callable[..., Any]:
        length = self.lengths[place]
        output = hidden if length == BARE else (hidden, *[None] * (length - 1))
        return lambda *_, **__: output

    def _check(self, batch: Batch) -> None:
        """Passes in which no block computes anything; whether they return tuples is not known yet."""
        start, order = self.begin(batch), list(range(len(self._blocks)))
        beside = torch.zeros(1)  # what else a block may return
        attempts = [
            self._passed(batch, start, beside, wrap)
            for wrap in (lambda hidden: hidden, lambda hidden: (hidden, beside))
        ]
        if any(called == order and all(read) for called, read in attempts):
            return
        called, read = max(attempts, key=lambda attempt: sum(attempt[1]))
        kind = type(self.model).__name__
        if called != order[: len(called)]:
            names = ", ".join(self.names[place] for place in called[:5])
            raise ModelError(
                f"the blocks of {kind} are not called one after the other, each once ({names}, ...): it cannot be "
                "compressed block by block on data; methods that need none can (svd)"
            )
        place = read.index(False) if False in read else len(called) - 1
        raise ModelError(
            f"the block '{self.names[place]}' of {kind} does not read what the one before it returned, or reads more: "
            "it cannot be compressed block by block on data; methods that need none can (svd)"
        )

    def _passed(self, batch: Batch, start: Tensor, beside: Tensor, wrap: Wrap) -> tuple[list[int], list[bool]]:
        """The blocks in the order in which they are called, and whether each reads what it should, and no more."""
        called: list[int] = []
        read: list[bool] = []
        common: set[int] = set()  # what one block can leave in for another

        def pass_on(place: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = (*args, *kwargs.values())
                handed = {id(value) for value in given if isinstance(value, MutableMapping)}
                more = any(value is beside for value in given) or bool(handed & common)
                common.update(handed)
                called.append(place)
                read.append(not more and (place == 0 or any(value is start for value in given)))
                return wrap(start)

            return forward

        forwards = [pass_on(place) for place in range(len(self._blocks))]
        with _as(self._blocks, forwards), contextlib.suppress(Exception):  # of what is made of them in the end
            self.model(**batch)
        return called, read


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())


@contextlib.contextmanager
def _as(blocks: list[Any], forwards: list[Callable[..., Any]], *, differentiable: bool = False) -> Iterator[None]:
    """Blocks with other forward passes, while this lasts."""
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        with torch.set_grad_enabled(differentiable):
            yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
