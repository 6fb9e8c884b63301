"""How much a model's output changes when one of its matrices has an error: measured, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorformer.errors import DataError
from factorformer.fitting.statistics import Batch
from factorformer.layers.modes import evaluating
from factorformer.layers.surgery import is_transposed

ROWS = 48
"""Rows of calibration data that every matrix is measured on. On MiniLM 32 put matrices in nearly the order of 128: rank
correlations are 0.94 and 0.99 on two tasks."""


def measure_sensitivities(
    model: nn.Module,
    names: Sequence[str],
    replacement: Callable[[str], tuple[Tensor, float]],
    batches: Sequence[Batch],
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """How far the output moves for each unit of squared relative error in a matrix, one matrix at a time.

    With `h` the output of the model as it is and `h'` that with a matrix of squared relative error `e^2` in one place,

        sensitivity = (||h' - h||^2 / ||h - mean(h)||^2) / e^2

    over all real tokens of the batches. To first order deviations of several matrices add up as squares if they have
    nothing to do with each other, so that `sum_i sensitivity_i * e_i^2` predicts the squared deviation of a plan. The
    output is the last hidden states; where the model gives one vector of logits for a whole row (classifiers), it is
    both, and sensitivity the mean of the two. Ours, from MiniLM on two tasks: hidden states alone do not know what the
    task needs, and logits alone starve the last layers, which breaks the model at large ratios.

    Args:
        model: not changed: other weights are put in its place for single calls only.
        names: of the matrices.
        replacement: a matrix `(out, in)` to stand in for the one of this name, and its squared relative error.
        batches: keyword arguments of the model; about `ROWS` rows from all over them are used.
        progress: called with the number of matrices done.

    Returns:
        Sensitivities by name; 0 where the replacement has no error.

    Raises:
        DataError: no batches, or an output without floating-point values.
    """
    device = next(model.parameters()).device
    few = [{key: value.to(device) for key, value in batch.items()} for batch in _some(batches, ROWS)]
    found: dict[str, float] = {}
    with evaluating(model), torch.no_grad():
        expected = [_outputs(model, batch) for batch in few]
        spreads = [_spread(torch.cat(parts)) for parts in zip(*expected, strict=True)]
        for done, name in enumerate(names, 1):
            weight, squared = replacement(name)
            layer = model.get_submodule(name)
            weight = weight.T if is_transposed(layer) else weight
            instead = {f"{name}.weight": weight.to(layer.get_parameter("weight").dtype)}
            moved = [0.0] * len(spreads)
            for batch, outputs in zip(few, expected, strict=True):
                for place, output in enumerate(_outputs(model, batch, instead)):
                    moved[place] += float((output - outputs[place]).double().square().sum())
            deviation = sum(part / spread for part, spread in zip(moved, spreads, strict=True)) / len(spreads)
            found[name] = deviation / squared if squared > 0 else 0.0
            if progress is not None:
                progress(done)
    return found


def _some(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    """So many rows from all over the batches, which may be sorted by length."""
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    if not sum(sizes):
        raise DataError("calibration data is empty: give at least one batch")
    step = max(sum(sizes) // rows, 1)
    first = 0
    for batch, size in zip(batches, sizes, strict=True):
        if first < size:
            yield {key: value[first::step] for key, value in batch.items()}
        first = (first - size) % step


def _outputs(model: nn.Module, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """What the model makes of the real tokens of a batch, `(tokens, width)`, and of its rows, `(rows, classes)`."""
    hidden = {"output_hidden_states": True} if isinstance(model, PreTrainedModel) else {}
    # Tied modules see the same weight, and an error leaves the model's own in place.
    result = torch.func.functional_call(model, dict(weights or {}), (), {**batch, **hidden}, tie_weights=True)
    found: list[Tensor] = []
    for name, mask in (("decoder_hidden_states", "decoder_attention_mask"), ("hidden_states", "attention_mask")):
        states = getattr(result, name, None)
        if states and not found:
            found.append(_real(states[-1], batch.get(mask)))
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor) and logits.dim() == 2:
        found.append(logits.float())
    if not found:
        values = result.values() if isinstance(result, Mapping) else [result]
        tensors = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1]
        if not tensors:
            raise DataError(f"{type(model).__name__} returned no tensor of its own to compare")
        found.append(_real(tensors[0], batch.get("attention_mask")))
    return found


def _spread(output: Tensor) -> float:
    spread = (output.double() - output.double().mean(0)).square().sum()
    return float(spread.clamp_min(torch.finfo(torch.float64).tiny))


def _real(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and mask.shape == states.shape[:-1]:
        return states[mask.bool()].float()
    return states.flatten(0, -2).float()
