"""Both sides of the curvature of a model that memory does not hold: forward once, and back block by block.

Batches pass all blocks, and what each block reads is kept on disk. Behind the last one the loss is differentiated, and
from there on, block by block, each is computed once more from what it read, and takes the gradients at what it wrote to
those at what it read. So one block and what is between its layers are in memory.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorformer.fitting.batches import Batch, fingerprint
from factorformer.fitting.dependence import Sample, with_dependence
from factorformer.fitting.gradient_recorders import FisherRecorder
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.objective import Objective, objective
from factorformer.layers.matrix import Matrix
from factorformer.layers.modes import fast_products
from factorformer.layers.surgery import find_blocks
from factorformer.planning.evidence.curves import StructuresOf
from factorformer.planning.evidence.prediction import Prediction
from factorformer.progress import Progress
from factorformer.streaming.chain import Chain
from factorformer.streaming.stored import Stored
from factorformer.streaming.unfinished import Run, keep_object, read_object
from factorformer.structures.integers import Bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bytes_on_disk(model: PreTrainedModel, tokens: int) -> int:
    """What is kept there of so many tokens, about: what blocks read, gradients of two, moments of both sides."""
    blocks = tuple(f"{block}." for block in find_blocks(model))
    width, size = model.config.get_text_config().hidden_size, torch.finfo(model.dtype).bits // 8
    inside = (tensor for name, tensor in model.named_parameters() if name.startswith(blocks))
    moments = sum(out**2 + inner**2 for out, inner in (tensor.shape for tensor in inside if tensor.dim() == 2))
    return (len(blocks) + 3) * tokens * width * size + 4 * moments


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What is measured, of what, and where it is kept.

    Args:
        model: whose blocks have no weights but for the one at hand.
        stored: its tensors on disk.
        chain: its blocks.
        run: where all is kept.
        batches: of calibration data.
        progress: progress callback.
    """

    model: PreTrainedModel
    stored: Stored
    chain: Chain
    run: Run
    batches: Sequence[Batch]
    progress: Progress

    def measure(
        self, matrices: Sequence[Matrix], structures: StructuresOf, ratio: float, second: Bits | None
    ) -> Prediction:
        """What each matrix adds to the loss by what it becomes; moments of each block are kept for the fits.

        Args:
            matrices: of the blocks, those that can be factorized.
            structures: what each can become.
            ratio: dense bytes over the bytes that matrices have on average.
            second: bits in which matrices may be stored that are planned in 4; None for no others.

        Raises:
            DataError: nothing to predict, or values that are not finite.
            ModelError: the blocks cannot be run one by one.
        """
        names = find_blocks(self.model)
        if not all(self.run.prediction(place).exists() for place in range(len(names))):
            self._measure_all(names, matrices, (structures, ratio, second))
        for place in range(len(names)):
            self.chain.lengths[place] = read_object(self.run.passed(place))
        return Prediction.together([read_object(self.run.prediction(place)) for place in range(len(names))])

    def _measure_all(
        self, names: Sequence[str], matrices: Sequence[Matrix], curves: tuple[StructuresOf, float, Bits | None]
    ) -> None:
        for place, block in enumerate(names):
            if not self.run.passed(place).exists():
                self._pass(place, block)
            self.chain.lengths[place] = read_object(self.run.passed(place))
            self.progress("pass block", place + 1, len(names))
        if not self.run.goals.exists():
            self._differentiate(len(names))
        goals = read_object(self.run.goals)
        for place, block in reversed(list(enumerate(names))):
            if not self.run.prediction(place).exists():
                inside = [matrix for matrix in matrices if matrix.name.startswith(f"{block}.")]
                self._go_back(place, block, inside, goals, curves)
            shutil.rmtree(self.run.hidden(place + 1), ignore_errors=True)
            shutil.rmtree(self.run.gradients(place + 1), ignore_errors=True)
            self.progress("measure block", len(names) - place, len(names))

    def _filled(self, block: str) -> Any:
        """A block with its weights."""
        self.stored.fill(name for name in self.stored.names if name.startswith(f"{block}."))
        return self.model.get_submodule(block)

    def _pass(self, place: int, block: str) -> None:
        """What the next block reads."""
        module = self._filled(block)
        for number, batch in enumerate(self.batches):
            hidden = self.run.read(place, number) if place else self.chain.begin(batch)
            if place == 0:
                self.run.keep(0, number, hidden)
            with fast_products(self.model):
                self.run.keep(place + 1, number, self.chain.run(place, batch, hidden))
        keep_object(self.run.passed(place), self.chain.lengths[place])
        module.to("meta")

    def _differentiate(self, last: int) -> None:
        """Gradients at what the last block makes, of everything that is drawn for a batch."""
        goals: list[Objective] = []
        for number, batch in enumerate(self.batches):
            hidden = self.run.read(last, number).requires_grad_()
            with fast_products(self.model):
                output = self.chain.finish(batch, hidden)
            goal = objective(self.model, batch, output, torch.Generator().manual_seed(fingerprint(batch)))
            found = []
            for draw in range(goal.draws):
                found += torch.autograd.grad(goal.draw(), [hidden], retain_graph=draw + 1 < goal.draws)
            self.run.keep_gradients(last, number, found)
            goals.append(dataclasses.replace(goal, draw=_nothing))
            self.progress("differentiate", number + 1, len(self.batches))
        keep_object(self.run.goals, goals)

    def _go_back(
        self,
        place: int,
        block: str,
        matrices: Sequence[Matrix],
        goals: Sequence[Objective],
        curves: tuple[StructuresOf, float, Bits | None],
    ) -> None:
        """Moments and curves of a block, and gradients at what it reads."""
        module, sample = self._filled(block), Sample()
        structures, ratio, second = curves
        recorder = FisherRecorder(self.model, [matrix.name for matrix in matrices])
        steps = _Steps(self, place, goals, recorder)
        with recorder.attached():
            for number, batch in enumerate(self.batches if matrices or place > 0 else []):
                sample.add(batch)
                steps.run(number, batch, passes_on=place > 0)
        known: Mapping[str, LayerStatistics] = recorder.statistics()
        numbers = {fingerprint(batch): number for number, batch in enumerate(self.batches)}

        def prepare(again: FisherRecorder) -> None:
            _Steps(self, place, goals, again, numbers)

        known = with_dependence(self.model, known, sample.batches, prepare=prepare)
        keep_object(self.run.moments(place), known)
        found = Prediction.of(self.model, matrices, structures, known, ratio, self.progress, second)
        keep_object(self.run.prediction(place), found)
        module.to("meta")


class _Steps:
    """What a recorder of a block runs and differentiates: the block alone, by the gradients at what it makes.

    Args:
        of: the model.
        place: of the block.
        goals: what is differentiated of each batch.
        recorder: which is told.
        numbers: of batches, by their fingerprints, where they come in another order.
    """

    def __init__(
        self,
        of: Curvature,
        place: int,
        goals: Sequence[Objective],
        recorder: FisherRecorder,
        numbers: Mapping[int, int] | None = None,
    ) -> None:
        self.of, self.place, self.goals, self.recorder, self.numbers = of, place, goals, recorder, numbers
        self.number = 0
        self.hidden = torch.zeros(0)
        recorder.runs = self.forward  # pyright: ignore[reportAttributeAccessIssue]
        recorder.goal = self.goal

    def run(self, number: int, batch: Batch, *, passes_on: bool) -> None:
        """One batch; the gradients at what the block reads of it are kept."""
        self.number, found = number, []

        def drawn() -> None:
            found.append(self.hidden.grad)
            self.hidden.grad = None

        self.recorder.drawn = drawn if passes_on else _ignored
        self.recorder.run(batch)
        if passes_on:
            self.of.run.keep_gradients(self.place, number, found)

    def forward(self, **batch: Any) -> Tensor:
        """What the block makes."""
        if self.numbers is not None:
            self.number = self.numbers[fingerprint(batch)]
        self.hidden = self.of.run.read(self.place, self.number).requires_grad_()
        return self.of.chain.run(self.place, batch, self.hidden, differentiable=True)

    def goal(self, output: object, _: torch.Generator) -> Objective:
        """The sum over what the block makes, weighted by the gradients there."""
        assert isinstance(output, Tensor)
        gradients = iter(self.of.run.read_gradients(self.place + 1, self.number))
        draw: Callable[[], Tensor] = lambda: (output * next(gradients).to(output)).sum()  # noqa: E731
        return dataclasses.replace(self.goals[self.number], draw=draw)


def _nothing() -> Tensor:
    return torch.zeros(())


def _ignored() -> None:
    """Nobody reads gradients at what the first block reads."""
