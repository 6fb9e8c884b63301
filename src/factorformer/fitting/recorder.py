"""What calibration batches leave behind in a model's layers, gathered by hooks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorformer import processes
from factorformer.errors import DataError, FactorformerError
from factorformer.fitting.batches import Batch, placed, real_tokens
from factorformer.fitting.moments import LayerStatistics, SecondMoment, join_moments, join_rows
from factorformer.layers.embeddings import embeddings_of
from factorformer.layers.modes import evaluating

UNSEEN = 0.1
"""Look-ups granted to every row of an embedding, relative to the mean of those counted.

Ours, from one experiment on MiniLM's word embeddings: much less forgets the words of other domains, much more costs
accuracy in the domain that was calibrated on.
"""


@dataclasses.dataclass
class _Read:
    """A tensor, and the layers that have read it one after the other."""

    tensor: Tensor
    path: str
    names: list[str]


class Recorder:
    """Second moments of the inputs of layers, and how often rows of embeddings are looked up, in forward passes."""

    gradients = False
    """Whether backward passes are needed."""

    def __init__(self, model: nn.Module, layers: Sequence[str], *, moments: bool = True) -> None:
        self.model: nn.Module = model
        self.runs: nn.Module = model
        self.layers = {name: model.get_submodule(name) for name in layers}
        self.want_moments = moments
        self.inputs: dict[str, SecondMoment] = {}
        self.rows: dict[str, Tensor] = {}
        self.seen: set[str] = set()
        self.reached: set[str] = set()
        self._batch: Batch = {}
        self._size = 0
        self._pending: _Read | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks in their places, and the model in evaluation mode."""
        handles = [
            module.register_forward_hook(self._hook(name, path))
            for path, module in self.model.named_modules()
            for name, layer in self.layers.items()
            if self._counts(module, layer)
        ]
        try:
            # What was made in inference mode cannot be differentiated, and nor can layers that are called there.
            with (
                torch.inference_mode(False),
                evaluating(self.model),
                self._differentiable(),
                torch.set_grad_enabled(self.gradients),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _counts(self, module: nn.Module, layer: nn.Module) -> bool:
        """Whether what a module sees counts for a layer: tied ones of one kind are one, as T5's `shared` embedding."""
        return type(module) is type(layer) and module.weight is layer.weight

    def _products(self) -> contextlib.AbstractContextManager[object]:
        """In which precision the model runs: its own."""
        return contextlib.nullcontext()

    def _differentiable(self) -> contextlib.AbstractContextManager[None]:
        """Parameters as backward passes need them."""
        return contextlib.nullcontext()

    def join(self) -> None:
        """Add up what all processes have counted."""
        if processes.count() == 1:
            return
        self.seen, self.reached = (set().union(*processes.gathered(names)) for names in (self.seen, self.reached))
        device = next(self.model.parameters()).device
        join_moments(self.inputs, device)
        join_rows(self.rows, device)

    def check(self, batches: int) -> None:
        """Raise `DataError` if there were no batches, or none that reached a layer."""
        if batches == 0:
            raise DataError(
                "calibration data is empty: give at least one batch, and a list where both plan and compress read it"
            )
        if self.layers and not self.reached:
            name = next(iter(self.layers))
            raise DataError(f"no layer is reached by the calibration data: not '{name}', nor any other in scope")

    def _hook(self, name: str, path: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def see(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            self.seen.add(name)
            return self._see(name, path, module, inputs[0].to(output.device), output)  # which a hook may do later

        return see

    def run(self, batch: Batch) -> None:
        """One forward pass, and what follows it."""
        batch = placed(batch, next(self.model.parameters()).device)
        self._size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 1)
        self._batch, self._pending = batch, None
        try:
            with self._products(), _with_names(self.runs):
                output = self.runs(**batch)
            self._count_pending()
            self._finish(output)
        except FactorformerError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            given = ", ".join(f"{k} {tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in batch.items())
            raise DataError(
                f"{type(self.model).__name__} cannot run on a calibration batch of {given}: {error}"
            ) from error

    def _finish(self, output: object) -> None:
        """What follows a forward pass: nothing."""

    def _see(self, name: str, path: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """One call of a layer."""
        self.reached.add(name)
        self._add_inputs(name, path, module, x)
        return output

    def _add_inputs(self, name: str, path: str, module: nn.Module, x: Tensor) -> None:
        """Count the input of a layer."""
        if isinstance(module, nn.Embedding):
            looked_up = self._for_each_row(x)
            rows = self._without_padding(path, looked_up, looked_up.shape)
            self._add_rows(name, torch.bincount(rows, minlength=module.num_embeddings).double())
        elif self.want_moments:
            self._add_moment(name, path, x)

    def _for_each_row(self, index: Tensor) -> Tensor:
        """Positions that are looked up once for the whole batch, repeated for every row of it."""
        return index.expand(self._size, -1) if index.dim() == 2 and len(index) == 1 < self._size else index

    def _add_moment(self, name: str, path: str, x: Tensor) -> None:
        # Query, key and value are called in a row with one tensor object: its second moment is computed once.
        if self._pending is not None and self._pending.tensor is x and name not in self._pending.names:
            self._pending.names.append(name)
        else:
            self._count_pending()
            self._pending = _Read(x, path, [name])

    def _count_pending(self) -> None:
        """Add what some layers have read to the moment that they share; those that read other things have their own."""
        read, self._pending = self._pending, None
        if read is None:
            return
        vectors = self._without_padding(read.path, read.tensor.detach(), read.tensor.shape[:-1])
        left = list(read.names)
        while left:
            known = self.inputs.get(left[0])
            together = [name for name in left if self.inputs.get(name) is known]
            left = [name for name in left if name not in together]
            if known is None:
                known = SecondMoment.zeros(vectors.shape[1], vectors.device)
            elif any(moment is known and name not in together for name, moment in self.inputs.items()):
                known = SecondMoment(known.total.clone(), known.count)
            known.add(vectors)
            self.inputs |= dict.fromkeys(together, known)

    def _add_rows(self, name: str, rows: Tensor) -> None:
        """Add up the importance of rows."""
        self.rows[name] = self.rows[name] + rows if name in self.rows else rows

    def count_tokens(self, counts: Tensor) -> None:
        """Let rows of the embeddings of tokens be looked up as often as counts say, in proportion.

        Raises:
            DataError: counts of another vocabulary, or none that is positive.
        """
        table = embeddings_of(self.model, "input_embeddings")
        for name, layer in self.layers.items():
            if name not in self.rows or table is None or getattr(layer, "weight", None) is not table.weight:
                continue
            seen, known = self.rows[name], counts.to(self.rows[name])
            if len(known) != len(seen) or not bool((known >= 0).all()) or float(known.sum()) == 0:
                raise DataError(
                    f"token_counts holds {len(known)} numbers with the sum {float(known.sum()):g}, and layer '{name}' "
                    f"has {len(seen)} rows: give one count for each, none negative and some positive"
                )
            self.rows[name] = known * (seen.sum() / known.sum())

    def _without_padding(self, path: str, x: Tensor, positions: torch.Size) -> Tensor:
        """Vectors, or indices, of real tokens, in one row."""
        return real_tokens(self.model, path, self._batch, x, positions)

    def statistics(self) -> dict[str, LayerStatistics]:
        """What was measured, by layer, without those that were not reached."""
        found = {name: self._statistics_of(name) for name in self.layers if name in self.reached}
        for name, measured in found.items():
            moments = [moment.total for moment in (measured.inputs, measured.outputs) if moment is not None]
            if not all(bool(values.isfinite().all()) for values in (*moments, measured.rows) if values is not None):
                raise DataError(f"layer '{name}' sees NaN or infinite values on the calibration data")
        return found

    def _statistics_of(self, name: str) -> LayerStatistics:
        """What was measured of a layer."""
        rows = self.rows.get(name)
        return LayerStatistics(self.inputs.get(name), None if rows is None else granted(rows))


@contextlib.contextmanager
def _with_names(model: nn.Module) -> Iterator[None]:
    """Outputs by name, also of models that return tuples otherwise."""
    config = getattr(model, "config", None)
    given = getattr(config, "return_dict", True)
    try:
        if not given:
            setattr(config, "return_dict", True)  # noqa: B010  # of any configuration
        yield
    finally:
        if not given:
            setattr(config, "return_dict", given)  # noqa: B010


def granted(rows: Tensor) -> Tensor:
    """Look-ups, where words that calibration never saw will be met: each counts as a tenth of the mean word."""
    return rows + UNSEEN * rows.mean()
