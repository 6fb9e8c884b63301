"""Sensitivity of a model's output to an error in one of its matrices, measured without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorformer.errors import DataError
from factorformer.fitting.batches import Batch
from factorformer.layers.dense import is_transposed
from factorformer.layers.modes import evaluating

ROWS = 48
"""Rows of calibration data that every matrix is measured on. On MiniLM 32 put matrices in nearly the order of 128: rank
correlations are 0.94 and 0.99 on two tasks."""

LOGITS = 2**25
"""Logits kept for the comparison (128 MiB). Those of a large vocabulary are compared at evenly spaced tokens only."""

STATES = "states"

LARGEST = 1e30
"""Output values beyond this, such as logits of minus infinity, stand for "never", and are not compared."""


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
    output is the last hidden states; where the model gives logits, for rows or for tokens, it is both, and sensitivity
    the mean of the two. This project's choice, from MiniLM on two tasks: hidden states alone do not know what the task
    needs, and logits alone under-weight the last layers, which breaks the model at large ratios.

    Args:
        model: not changed: other weights are put in its place for single calls only.
        names: of the matrices.
        replacement: a matrix `(out, in)` to stand in for the one of this name, and its squared relative error.
        batches: keyword arguments of the model; about `ROWS` rows from all over them are used.
        progress: called with the number of matrices done.

    Returns:
        Sensitivities by name; 0 where nothing was measured: the output does not depend on the matrix, or the
        replacement has no error.

    Raises:
        DataError: no batches, or an output without floating-point values.
    """
    device = next(model.parameters()).device
    few = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in b.items()} for b in _some(batches, ROWS)]
    found: dict[str, float] = {}
    with evaluating(model), torch.no_grad():
        expected = [_outputs(model, batch, LOGITS // len(few)) for batch in few]
        spreads = {name: _spread(torch.cat([outputs[name] for outputs in expected])) for name in expected[0]}

        def moved(instead: Mapping[str, Tensor]) -> float:
            total = 0.0
            for batch, outputs in zip(few, expected, strict=True):
                for key, output in _outputs(model, batch, LOGITS // len(few), instead).items():
                    squared = float((output - outputs[key]).double().square().sum())
                    total += _part(key, spreads) * squared / spreads[key]
            return total

        for done, name in enumerate(names, 1):
            weight, squared = replacement(name)
            layer = model.get_submodule(name)
            weight = weight.T if is_transposed(layer) else weight
            deviation = moved({f"{name}.weight": weight.to(layer.get_parameter("weight").dtype)})
            found[name] = deviation / squared if squared > 0 else 0.0
            if progress is not None:
                progress(done)
    return found


def _some(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    """So many rows from all over the batches, which may be sorted by length."""
    sizes = [next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()) for batch in batches]
    if not sum(sizes):
        raise DataError("calibration data is empty: give at least one batch")
    step = max(sum(sizes) // rows, 1)
    first = 0
    for batch, size in zip(batches, sizes, strict=True):
        if first < size:
            yield {k: v[first::step] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
        first = (first - size) % step


def _outputs(
    model: nn.Module, batch: Batch, most: int, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What is compared, by name, without padding.

    States are `(tokens, width)`, logits `(tokens, classes)` or `(rows, classes)`.

    Args:
        model: called once.
        batch: its keyword arguments.
        most: logits that are kept.
        weights: in place of the model's own.
    """
    hidden = {"output_hidden_states": True} if isinstance(model, PreTrainedModel) else {}
    # Tied modules see the same weight, and an error leaves the model's own in place.
    result = torch.func.functional_call(model, dict(weights or {}), (), {**batch, **hidden}, tie_weights=True)
    named = dict(result) if isinstance(result, Mapping) else {"output": result}
    mask, states = batch.get("attention_mask"), named.get("hidden_states")
    if named.get("decoder_hidden_states"):
        mask, states = batch.get("decoder_attention_mask"), named["decoder_hidden_states"]
    found: dict[str, Tensor] = {STATES: _real(states[-1], mask)} if states else {}
    for name, values in named.items():
        if (name.startswith("logits") or name.endswith("_logits")) and _comparable(values):
            rows = name == "logits" and values.dim() == 2  # one vector for each row, however many tokens it has
            if rows and mask is not None and values.shape == mask.shape:  # or one number for each token, as ELECTRA's
                rows = values.shape[1] == getattr(getattr(model, "config", None), "num_labels", None)
            flat = _real(values if rows or values.dim() > 2 else values[:, :, None], None if rows else mask)
            found[name] = flat[:: max(math.ceil(flat.numel() / most), 1)]
    if not found:
        tensors = [values for values in named.values() if _comparable(values)]
        if not tensors:
            raise DataError(f"{type(model).__name__} returned no tensor of its own to compare")
        found["output"] = _real(tensors[0], mask)
    return {name: torch.where(values.abs() < LARGEST, values, 0) for name, values in found.items()}


def _part(name: str, compared: Collection[str]) -> float:
    """The weight of one output in the comparison: hidden states and logits have a half each where there are both."""
    if STATES not in compared or len(compared) == 1:
        return 1 / len(compared)
    return 0.5 if name == STATES else 0.5 / (len(compared) - 1)


def _comparable(values: object) -> bool:
    return isinstance(values, Tensor) and values.is_floating_point() and values.dim() > 1


def _spread(output: Tensor) -> float:
    """Squared norm of what differs between tokens; where they are all the same, of all of it."""
    output = output.double()
    spread, norm = (output - output.mean(0)).square().sum(), output.square().sum()
    spread = torch.where(spread > torch.finfo(torch.float32).eps ** 2 * norm, spread, norm)
    return float(spread.clamp_min(torch.finfo(torch.float64).tiny))


def _real(states: Tensor, mask: Tensor | None) -> Tensor:
    """`(tokens, width)` without padding."""
    if mask is not None and mask.shape == states.shape[:2] and states.dim() > 2:
        return states[mask.bool()].flatten(0, -2).float()
    return states.flatten(0, -2).float()
