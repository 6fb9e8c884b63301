"""Both sides of the curvature of a model that memory does not hold: forward once, and back block by block.

Batches pass all blocks, and what each block reads is kept on disk. Behind the last one the loss is differentiated, and
from there on, block by block, each is computed once more from what it read, and takes the gradients at what it wrote to
those at what it read. So one block and what is between its layers are in memory.

Where batches have labels of tokens, how far tokens depend on each other is measured by these, and not by labels that
are drawn, as it is of a model that memory holds.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from factorformer.errors import DataError, ModelError
from factorformer.fitting.batches import Batch, fingerprint
from factorformer.fitting.dependence import BATCHES, with_dependence
from factorformer.fitting.gradient_recorders import NOTHING, FisherRecorder
from factorformer.fitting.objective import DRAWS, Objective, objective
from factorformer.layers.matrix import Matrix
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
    return (len(blocks) + 1 + 2 * DRAWS) * tokens * width * size + 4 * moments


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
            with torch.inference_mode(False), torch.enable_grad():
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

    def _pass(self, place: int, block: str) -> None:
        """What the next block reads."""
        self.stored.fill(self.stored.inside(block))
        for number, batch in enumerate(self.batches):
            hidden = self.run.read(place, number) if place else self.chain.begin(batch)
            if place == 0:
                self.run.keep(0, number, hidden)
            self.run.keep(place + 1, number, self.chain.run(place, batch, hidden))
        keep_object(self.run.passed(place), self.chain.lengths[place])
        self.stored.empty(self.stored.inside(block))  # and buffers that no file holds stay

    def _differentiate(self, last: int) -> None:
        """Gradients at what the last block makes, of everything that is drawn for a batch."""
        goals = []
        for number, batch in enumerate(self.batches):
            goals.append(self._differentiate_batch(last, number, batch))
            self.progress("differentiate", number + 1, len(self.batches))
        if sum(goal.units for goal in goals) == 0:
            raise DataError(NOTHING)
        keep_object(self.run.goals, goals)

    def _differentiate_batch(self, last: int, number: int, batch: Batch) -> Objective:
        hidden = self.run.read(last, number).requires_grad_()
        # What else is made of what earlier blocks return would be lost: of the first batch, it is looked for.
        earlier = [hidden.detach().clone().requires_grad_() for _ in range(last - 1 if number == 0 else 0)]
        output = self.chain.finish(batch, hidden, earlier)
        goal = objective(self.model, batch, output, torch.Generator().manual_seed(fingerprint(batch)))
        found: list[Tensor] = []
        for draw in range(goal.draws):
            first, *others = torch.autograd.grad(
                goal.draw(), [hidden, *earlier], retain_graph=draw + 1 < goal.draws, allow_unused=True
            )
            if any(other is not None for other in others):
                kind = type(self.model).__name__
                raise ModelError(
                    f"{kind} makes something else of what blocks before the last one return: block by block its "
                    "gradients are not known; methods that read inputs alone can (whitened)"
                )
            found.append(torch.zeros_like(hidden) if first is None else first)
        self.run.keep_gradients(last, number, found)
        return dataclasses.replace(goal, draw=_nothing)

    def _go_back(
        self,
        place: int,
        block: str,
        matrices: Sequence[Matrix],
        goals: Sequence[Objective],
        curves: tuple[StructuresOf, float, Bits | None],
    ) -> None:
        """Moments and curves of a block, and gradients at what it reads."""
        self.stored.fill(self.stored.inside(block))
        structures, ratio, second = curves
        recorder = FisherRecorder(self.model, [matrix.name for matrix in matrices])
        part = _Block(self, place, goals, range(len(self.batches)))
        recorder.run_part(part)
        with recorder.attached():
            for number, batch in enumerate(self.batches if matrices or place > 0 else []):
                recorder.run(batch)
                if place > 0:
                    self.run.keep_gradients(place, number, part.found)
                part.found = []
        known = recorder.statistics()
        sampled = sorted(range(len(self.batches)), key=lambda number: fingerprint(self.batches[number]))[:BATCHES]
        part = _Block(self, place, goals, sampled)
        known = with_dependence(self.model, known, [self.batches[number] for number in sampled], part=part)
        keep_object(self.run.moments(place), known)
        found = Prediction.of(self.model, matrices, structures, known, ratio, self.progress, second)
        keep_object(self.run.prediction(place), found)
        self.stored.empty(self.stored.inside(block))  # and buffers that no file holds stay


class _Block:
    """A block that runs alone, and is differentiated by the gradients at what it makes.

    Args:
        of: the model.
        place: of the block.
        goals: what is differentiated of each batch.
        order: in which batches come.
    """

    def __init__(self, of: Curvature, place: int, goals: Sequence[Objective], order: Iterable[int]) -> None:
        self.of, self.place, self.goals, self.order = of, place, goals, iter(order)
        self.number = 0
        self.hidden = torch.zeros(0)
        self.found: list[Tensor] = []
        """Gradients at what it reads of the last batch, one for each draw; of the first block there are none."""

    def forward(self, **batch: Any) -> Tensor:
        """What the block makes."""
        self.number = next(self.order)
        self.hidden = self.of.run.read(self.place, self.number).requires_grad_()
        # It may write into what it reads.
        return self.of.chain.run(self.place, batch, self.hidden.clone(), differentiable=True)

    def goal(self, output: object) -> Objective:
        """The sum over what the block makes, weighted by the gradients there."""
        assert isinstance(output, Tensor)
        gradients = iter(self.of.run.read_gradients(self.place + 1, self.number))
        return dataclasses.replace(self.goals[self.number], draw=lambda: (output * next(gradients).to(output)).sum())

    def drawn(self) -> None:
        """Keep the gradient of a draw."""
        if self.hidden.grad is not None:
            self.found.append(self.hidden.grad)
            self.hidden.grad = None


def _nothing() -> Tensor:
    return torch.zeros(())
