"""How far the Fisher information of a layer is from the product of its two moments.

The product takes tokens for independent of each other, and the input of a layer for independent of the gradient at its
output. Neither is so: an encoder that pools its tokens gives all of them one gradient, and attention gives most of it
to few. One number for each matrix mends what this does to its price. With `D = sum_t g_t x_t^T`, the gradient of the
weight for one row of a batch, `x~` and `g~` whitened by the moments,

    dependence = E || sum_t g~_t x~_t^T ||_F^2 / (n E |g~|^2 E |x~|^2)

is 1 where both hold, with `n` the tokens of a row. Instead of whitened vectors their projections on `SKETCH` random
directions are taken, which keep norms on average. The two extremes for shared weights are the expand and reduce of
Eschenhagen et al. (NeurIPS 2023); George et al. (NeurIPS 2018) have a scale for each direction instead of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from factorformer import processes
from factorformer.fitting.batches import Batch, fingerprint, real_mask
from factorformer.fitting.gradient_recorders import FisherRecorder, Part
from factorformer.fitting.metric import Metric
from factorformer.fitting.moments import LayerStatistics, SecondMoment
from factorformer.fitting.objective import Objective, objective
from factorformer.layers.dense import dense_shape
from factorformer.layers.modes import exact_products

SKETCH = 64
"""Random directions that whitened vectors are projected on."""

BATCHES = 2
"""Batches that are run again: those of the smallest fingerprints, in whatever order all come."""


class Sample:
    """A few of many batches, the same in whatever order they come."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Batch]] = []

    def add(self, batch: Batch) -> None:
        """Keep a batch if it is among the first by fingerprint."""
        number = fingerprint(batch)
        if len(self._kept) == BATCHES and number >= self._kept[-1][0]:
            return
        # Whoever makes batches may fill the same tensors again.
        copied = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
        self._kept = sorted([*self._kept, (number, copied)], key=lambda pair: pair[0])[:BATCHES]

    @property
    def batches(self) -> list[Batch]:
        """Those that were kept."""
        return [batch for _, batch in self._kept]


def with_dependence(
    model: nn.Module,
    statistics: Mapping[str, LayerStatistics],
    batches: Sequence[Batch],
    new_head: bool = False,
    part: Part | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics that know how far their product is from the Fisher information.

    Args:
        model: left as it was.
        statistics: both moments of layers, by name.
        batches: some of those that moments are of.
        new_head: as for `collect`.
        part: of the model that runs alone; None for all of it.
    """
    recorder = _DependenceRecorder(model, statistics, new_head)
    if part is not None:
        recorder.run_part(part)
    with recorder.attached():
        for batch in processes.own(batches):
            recorder.run(batch)
    recorder.join()
    return {
        name: dataclasses.replace(known, dependence=recorder.dependence(name)) for name, known in statistics.items()
    }


@dataclasses.dataclass
class _Sums:
    """Of one use of a weight: squared norms of all that it read, and of all gradients, and how many there were."""

    inputs: float = 0.0
    gradients: float = 0.0
    count: int = 0

    def plus(self, other: _Sums) -> _Sums:
        """Of both."""
        return _Sums(self.inputs + other.inputs, self.gradients + other.gradients, self.count + other.count)


class _DependenceRecorder(FisherRecorder):
    """Gradients of weights, projected, for each row of a batch."""

    def __init__(self, model: nn.Module, statistics: Mapping[str, LayerStatistics], new_head: bool) -> None:
        super().__init__(model, list(statistics), new_head=new_head)
        self._rows: dict[str, Tensor] = {}
        self._columns: dict[str, Tensor] = {}
        shared: dict[int, Tensor] = {}
        for name, known in statistics.items():
            shape = dense_shape(self.layers[name])
            assert known.inputs is not None, f"the moments of '{name}' were not measured"
            assert shape is not None, f"'{name}' is no layer that can be factorized"
            device = known.inputs.total.device
            rows = _directions(shape[0], 1, device)
            if known.outputs is not None:
                rows = _whitening(known.outputs, rows)
            elif known.rows is not None:
                diagonal = Metric.of(dataclasses.replace(known, inputs=None)).rows
                assert diagonal is not None
                rows = (rows / diagonal[:, None]).float()
            self._rows[name] = rows
            if id(known.inputs) not in shared:
                shared[id(known.inputs)] = _whitening(known.inputs, _directions(shape[1], 2, device))
            self._columns[name] = shared[id(known.inputs)]
        self._gradients: dict[str, Tensor] = {}
        self._together = dict.fromkeys(statistics, 0.0)
        self._apart: dict[str, dict[bool, _Sums]] = {name: {} for name in statistics}

    def join(self) -> None:
        """Add up the sums of all processes."""
        if processes.count() == 1:
            return
        found = processes.gathered((self._together, self._apart))
        self._together = {name: sum(together[name] for together, _ in found) for name in self._together}
        for name in self._apart:
            parts = [apart[name] for _, apart in found]
            self._apart[name] = {
                use: functools.reduce(_Sums.plus, [part[use] for part in parts if use in part])
                for use in sorted({use for part in parts for use in part})
            }

    def dependence(self, name: str) -> float:
        """Of one layer; 1 where nothing is known."""
        apart = sum(sums.inputs * sums.gradients / max(sums.count, 1) for sums in self._apart[name].values())
        return self._together[name] / apart if 0 < apart < math.inf else 1.0

    def _goal(self, output: object, generator: torch.Generator) -> Objective:
        """One draw, of labels too where there are logits: given ones pull all tokens of a row in one direction."""
        if self.part is not None:
            return dataclasses.replace(self.part.goal(output), draws=1)
        return dataclasses.replace(objective(self.runs, self._batch, output, generator, drawn=True), draws=1)

    def _add_inputs(self, name: str, path: str, module: nn.Module, x: Tensor) -> None:
        """Nothing: moments are known."""

    def _kept(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        """What a layer reads, projected: `(..., SKETCH)`."""
        if isinstance(module, nn.Embedding):
            return self._rows[name][self._for_each_row(x)]
        with exact_products(x.device):
            return x.detach().float() @ self._columns[name]

    def _add_gradient(self, name: str, path: str, module: nn.Module, gradient: Tensor, kept: Tensor | None) -> None:
        positions, looked_up = gradient.shape[:-1], isinstance(module, nn.Embedding)
        mask = real_mask(self.model, path, self._batch, positions)
        written = gradient.detach().float() @ (self._columns if looked_up else self._rows)[name]
        assert kept is not None
        if mask is not None:
            padding = ~mask.to(written.device)[..., None]
            written, kept = written.masked_fill(padding, 0), kept.masked_fill(padding, 0)
        gradients, inputs = self._by_rows(written, mask is not None), self._by_rows(kept, mask is not None)
        if gradients is None or inputs is None:
            return
        sums = self._apart[name].setdefault(looked_up, _Sums())
        sums.inputs += float(kept.square().sum())
        sums.gradients += float(written.square().sum())
        sums.count += positions.numel() if mask is None else int(mask.sum())
        rows, columns = (inputs, gradients) if looked_up else (gradients, inputs)
        of_rows = rows.transpose(1, 2) @ columns
        self._gradients[name] = self._gradients[name] + of_rows if name in self._gradients else of_rows

    def _by_rows(self, vectors: Tensor, folded: bool) -> Tensor | None:
        """`(rows of the batch, tokens, SKETCH)`; None where it is not known which row a token is of.

        Args:
            vectors: `(*positions, SKETCH)`, in which rows are outermost, or second to positions.
            folded: whether a single dimension is known to hold both.
        """
        size, positions = self._size, vectors.shape[:-1]
        if len(positions) > 1 and positions[0] != size == positions[1]:  # Longformer, XLNet
            return vectors.transpose(0, 1).flatten(1, -2)
        known = size == 1 or positions[0] == size or len(positions) > 1 or folded
        return vectors.reshape(size, -1, SKETCH) if known and positions[0] % size == 0 else None

    def _drawn(self) -> None:
        """All gradients of a draw are there."""
        for name, gradient in self._gradients.items():
            self._together[name] += float(gradient.square().sum())
        self._gradients = {}


def _whitening(moment: SecondMoment, directions: Tensor) -> Tensor:
    """Directions for vectors as they are, such that what they see is whitened, `L^-T S` for a moment `L L^T`."""
    root, failed = torch.linalg.cholesky_ex(moment.moment(dtype=torch.float32))
    if int(failed):
        root = moment.root()
    return torch.linalg.solve_triangular(root.T, directions.to(root), upper=True).float()


def _directions(width: int, seed: int, device: torch.device) -> Tensor:
    """`(width, SKETCH)`; norms of projections are those of vectors on average, and exactly where there are so few."""
    if width <= SKETCH:
        return torch.eye(width, SKETCH, device=device)
    drawn = torch.randn(width, SKETCH, generator=torch.Generator().manual_seed(seed))
    return (drawn / SKETCH**0.5).to(device)
