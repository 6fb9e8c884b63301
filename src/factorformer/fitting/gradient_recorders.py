"""What gradients say of a model's layers: Fisher rows, and both sides of the Kronecker-factored Fisher information."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factorformer import processes
from factorformer.errors import DataError
from factorformer.fitting.batches import Batch, fingerprint
from factorformer.fitting.fisher_rows import fisher_rows
from factorformer.fitting.moments import LayerStatistics, SecondMoment, join_moments, join_rows
from factorformer.fitting.objective import Objective, objective
from factorformer.fitting.recorder import Recorder, granted
from factorformer.layers.modes import fast_attention, fast_products, requiring_gradients

WIDE = 2**14
"""Outputs beyond which only the diagonal of the moment of their gradients is kept: those of vocabularies."""


NOTHING = "the calibration data holds nothing to predict: all labels are left out, or all tokens are padding"


class FisherRowsRecorder(Recorder):
    """Squared gradients of the rows of weights."""

    gradients = True

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__(model, layers, moments=False)
        self.examples = 0
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def count_tokens(self, counts: Tensor) -> None:
        """Rows count by their gradients, however often they are looked up."""

    def _differentiable(self) -> contextlib.AbstractContextManager[None]:
        # Gradients with respect to outputs exist only downstream of something that requires them.
        return requiring_gradients([p for layer in self.layers.values() for p in layer.parameters()], True)

    def run(self, batch: Batch) -> None:
        """A forward pass and its gradients; one for each example where the loss mixes them."""
        size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
        labels = batch.get("labels")
        # A loss over tokens is a mean over those of the whole batch: only alone has an example its own.
        alone = size > 1 and labels is not None and labels.dim() > 1
        for row in range(size) if alone else [slice(None)]:
            part = slice(row, row + 1) if isinstance(row, int) else row
            self._calls = {}
            super().run({k: v[part] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()})

    def _see(self, name: str, path: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding) and self._for_each_row(x) is not x:
            x, output = self._for_each_row(x), output.expand(self._size, -1, -1)
        self._calls.setdefault(name, []).append((x.detach(), output))
        return output

    def _finish(self, output: object) -> None:
        loss = getattr(output, "loss", None)
        if loss is None:
            raise DataError(
                f"Fisher rows need a loss, but {type(self.model).__name__} returned none: "
                "give calibration batches with labels, to a model with a task head"
            )
        self.examples += self._size
        calls = [(name, x, y) for name, seen in self._calls.items() for x, y in seen]
        if calls and loss.requires_grad:
            for name, rows in fisher_rows(loss, calls, self.layers, self._size).items():
                self.reached.add(name)
                self._add_rows(name, rows)
        self._calls = {}

    def join(self) -> None:
        """Add up what all processes have counted."""
        super().join()
        self.examples = int(processes.total(self.examples))

    def _statistics_of(self, name: str) -> LayerStatistics:
        rows = self.rows.get(name)
        return LayerStatistics(None, None if rows is None else rows.clamp_min(0) / self.examples)


class Part(Protocol):
    """A part of a model that runs alone, by what is known of what comes before and behind it."""

    def forward(self, **batch: Any) -> object:
        """What it makes of a batch."""
        ...

    def goal(self, output: object) -> Objective:
        """What is differentiated of that."""
        ...

    def drawn(self) -> None:
        """Called after each backward pass."""
        ...


class FisherRecorder(Recorder):
    """Second moments of inputs and of gradients at outputs: the two sides of the Kronecker-factored Fisher information.

    Gradients are taken of nothing but outputs: no weight gets one, and the graph begins at the first layers.

    Args:
        model, layers: as for all.
        new_head: whether the head has learned nothing yet; the model below it runs alone then.
    """

    gradients = True

    def __init__(self, model: nn.Module, layers: Sequence[str], *, new_head: bool = False) -> None:
        super().__init__(model, layers)
        self.new_head = new_head
        if new_head and isinstance(model, PreTrainedModel):
            self.runs = getattr(model, model.base_model_prefix, model)
        self.part: Part | None = None
        self.outputs: dict[str, SecondMoment] = {}
        self.squares: dict[str, Tensor] = {}
        self.looked_up: dict[str, SecondMoment] = {}
        self.units = 0.0
        self.objective = ""
        self._draws, self._drawn_before, self._pooled = 1, 0, False
        self._orders: dict[tuple[int, torch.device], Tensor] = {}

    def _counts(self, module: nn.Module, layer: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and module.weight is layer.weight

    @contextlib.contextmanager
    def _products(self) -> Iterator[None]:
        tensors = [value for value in self._batch.values() if isinstance(value, Tensor)]
        lengths = [value.shape[1] for value in tensors if value.dim() == 2 and not value.is_floating_point()]
        others = any(value.is_floating_point() and value.dim() > 2 for value in tensors)  # images, or sound
        device = next(self.model.parameters()).device
        with fast_products(self.model):
            rounded = torch.is_autocast_enabled("cpu") and bool(lengths) and not others
            with fast_attention(device, max(lengths, default=0), rounded=rounded):
                yield

    def _differentiable(self) -> contextlib.AbstractContextManager[None]:
        return requiring_gradients(self.model.parameters(), False)

    def run(self, batch: Batch) -> None:
        """A forward pass, and a backward pass for each draw."""
        super().run({key: value for key, value in batch.items() if not (self.new_head and key == "labels")})

    def join(self) -> None:
        """Add up what all processes have counted."""
        if processes.count() == 1:
            return
        super().join()
        device = next(self.model.parameters()).device
        join_moments(self.outputs, device)
        join_moments(self.looked_up, device)
        join_rows(self.squares, device)
        self.units = processes.total(self.units)
        self.objective = max(processes.gathered(self.objective))
        self._draws = max(processes.gathered(self._draws))

    def check(self, batches: int) -> None:
        """Raise `DataError` for no batches, none that reached a layer, or none with anything to predict."""
        super().check(batches)
        if self.units == 0:
            raise DataError(NOTHING)

    def _see(self, name: str, path: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a part that the model itself does not differentiate
            return output
        self._add_inputs(name, path, module, x)
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # what follows may change it in place
        if isinstance(module, nn.Embedding) and self._for_each_row(x) is not x:
            output = output.expand(self._size, *output.shape[1:])
        kept = self._kept(name, module, x)
        output.register_hook(lambda gradient: self._add_gradient(name, path, module, gradient, kept))
        return output

    def _kept(self, name: str, module: nn.Module, x: Tensor) -> Tensor | None:
        """What is needed of an input once the gradient is there: nothing."""

    def _add_gradient(self, name: str, path: str, module: nn.Module, gradient: Tensor, kept: Tensor | None) -> None:
        self.reached.add(name)
        vectors = self._without_padding(path, gradient.detach(), gradient.shape[:-1])
        width, device = vectors.shape[1], vectors.device
        times = 1
        if self._pooled and self._draws % 2 == 0 and len(vectors) > self._size and width <= WIDE:
            # Tokens that are pooled have much of their gradients in common: each draw counts a half of them twice.
            vectors, times = vectors[self._half(len(vectors), vectors.device)], 2
        if isinstance(module, nn.Embedding):
            self.looked_up.setdefault(name, SecondMoment.zeros(width, device)).add(vectors, times)
        elif width > WIDE:
            squares = vectors.float().square().sum(0).double() / self._draws
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares
        else:
            self.outputs.setdefault(name, SecondMoment.zeros(width, device)).add(vectors, times)

    def _half(self, count: int, device: torch.device) -> Tensor:
        """A half of so many tokens, drawn at random, and at every other draw the other half."""
        if (count, device) not in self._orders:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
            self._orders[count, device] = order.to(device)
        return self._orders[count, device].tensor_split(2)[self._drawn_before % 2]

    def _finish(self, output: object) -> None:
        # The same draws for the same batch, in whatever order batches come.
        generator = torch.Generator().manual_seed(fingerprint(self._batch))
        goal = self._goal(output, generator)
        self.units, self.objective, self._draws = self.units + goal.units, goal.name, goal.draws
        self._orders, self._pooled = {}, goal.pooled
        for draw in range(goal.draws):
            self._drawn_before = draw
            goal.draw().backward(retain_graph=draw + 1 < goal.draws)
            self._drawn()
            if self.part is not None:
                self.part.drawn()

    def run_part(self, part: Part) -> None:
        """Let a part of the model run in its place from now on."""
        self.part, self.runs = part, part.forward  # pyright: ignore[reportAttributeAccessIssue]

    def _goal(self, output: object, generator: torch.Generator) -> Objective:
        """What is differentiated."""
        return objective(self.runs, self._batch, output, generator) if self.part is None else self.part.goal(output)

    def _drawn(self) -> None:
        """What follows a backward pass: nothing."""

    def _statistics_of(self, name: str) -> LayerStatistics:
        parts = [self._of_product(name), self._of_look_ups(name)]
        known = [part for part in parts if part is not None]
        return known[0] if len(known) == 1 else _together(*known)

    def _of_product(self, name: str) -> LayerStatistics | None:
        inputs, outputs, squares = self.inputs.get(name), self.outputs.get(name), self.squares.get(name)
        if inputs is None or (outputs is None and squares is None):
            return None
        if outputs is None:
            assert squares is not None
            return LayerStatistics(inputs, squares / inputs.count, None, inputs.count / self.units, self.objective)
        # Of several calls, gradients may have come to some.
        return LayerStatistics(inputs, None, outputs, outputs.count / self._draws / self.units, self.objective)

    def _of_look_ups(self, name: str) -> LayerStatistics | None:
        gradients = self.looked_up.get(name)
        if gradients is None:
            return None
        rows = self.rows[name]
        return LayerStatistics(
            gradients, granted(rows / rows.sum()), None, float(rows.sum()) / self.units, self.objective
        )


def _diagonal(statistics: LayerStatistics) -> Tensor:
    """The importance of each row."""
    if statistics.outputs is None:
        assert statistics.rows is not None
        return statistics.rows
    return statistics.outputs.total.diagonal().double() / statistics.outputs.count


def _together(first: LayerStatistics, second: LayerStatistics) -> LayerStatistics:
    """Of a weight that is used in two ways, a tied output head: the sum of two products, as a product of two sums."""
    rows = torch.zeros(())
    moment, total = torch.zeros(()), 0.0
    for part in (first, second):
        assert part.inputs is not None
        size = part.inputs.mean_square()
        weights = _diagonal(part) * (part.tokens * size)
        rows = rows + weights
        mass = float(weights.sum())
        moment = moment + part.inputs.total * (mass / (part.inputs.count * size or 1))
        total += mass
    assert first.inputs is not None
    assert second.inputs is not None
    count = min(first.inputs.count, second.inputs.count)
    return LayerStatistics(SecondMoment(moment * (count / (total or 1)), count), rows, None, 1.0, first.objective)
