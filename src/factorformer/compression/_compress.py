"""The verb `compress`: factors fitted to the weights of a trained model."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorformer import planning, processes, recipes
from factorformer.compression._replacement import check_fits, replace_matrices, replace_weights
from factorformer.compression._report import Report
from factorformer.errors import DataError, ModelError
from factorformer.fitting import MetricName
from factorformer.fitting import statistics as calibrate
from factorformer.fitting.batches import Calibration, as_batches, placed
from factorformer.fitting.matrices import Factors, as_stored, fit_group, fit_matrix, fit_target, measure
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.sequential import fit_sequentially
from factorformer.layers.dense import dense_weight, is_transposed
from factorformer.layers.dummies import accepted
from factorformer.layers.matrix import Matrix
from factorformer.layers.modes import evaluating
from factorformer.layers.quantization import quantize
from factorformer.layers.surgery import find_blocks, unchanged_on_error
from factorformer.planning import Entry, Plan, left_dense
from factorformer.progress import Progress, silent
from factorformer.structures import Dense, Structure


def compress(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration | None = None,
    progress: Progress = silent,
    *,
    keep_statistics: bool = False,
    hold_floats: bool = False,
    new_head: bool = False,
    token_counts: Tensor | None = None,
) -> Report:
    """Replace the planned matrices by fitted factors, in place. A Hugging Face model then saves as a compressed one.

    A model around one, such as a `SentenceTransformer`, saves as one too. Pass the model that is going to be saved: one
    that is compressed from inside, through its `base_model`, does not know of it.

    Under `fisher` and `auto`, matrices of the plan that stay dense get new weights as well, which make up for errors of
    the matrices before them; the report says how many. To keep one as it is, exclude it from the plan.

    All factors are fitted before the first layer is replaced, and the result has to run on what the dense model has run
    on: an error leaves the model as it was. Matrices that the calibration data does not reach stay dense, and the
    report says so.

    Args:
        model: the dense model that the plan was made for.
        plan: from `plan` or `Plan.load`. What it holds of statistics (`keep_statistics`) is not measured again.
        calibration: batches of keyword arguments for the model, with labels if the method needs them; one batch alone
            or a tokenized `datasets.Dataset` serves too.
        progress: progress callback.
        keep_statistics: leave what calibration measured in the report; a moment takes as much memory as a square matrix
            of float32 as wide as the layer's input or output.
        hold_floats: leave factors that the plan wants in integers as floats that products round, to train on;
            `quantize` ends that.
        new_head: whether the model's head has learned nothing yet, so that it tells nothing of the curvature.
        token_counts: as for `plan`.

    Raises:
        DataError: the method needs calibration data (or labels) that was not given.
        ModelError: the plan does not fit the model, the model does not run with factors, or a weight is not finite; the
            message names the layer.
    """
    method = plan.method or recipes.default_method(calibrated=calibration is not None)
    recipe = recipes.get(method)
    check_fits(plan, model)
    started = time.perf_counter()
    measured: Mapping[str, LayerStatistics] = {}
    notes: tuple[str, ...] = ()
    batches: list[dict[str, Any]] = []
    trial: Mapping[str, Any] | None = accepted(model) if recipe.metric == "plain" else None
    if recipe.metric != "plain":
        if calibration is None:
            raise DataError(
                f"method '{method}' needs calibration data ({recipe.needs}): pass calibration batches, or use 'svd'"
            )
        data = as_batches(model, calibration)
        batches = list(data) if recipe.sequential else []
        trial, calibration = _first(iter(batches) if recipe.sequential else data)
        names = [entry.matrix.name for entry in plan.factorized]
        measured = plan.statistics or measure(
            model, names, recipe.metric, calibration, progress, new_head, token_counts
        )
        plan = dataclasses.replace(plan, statistics={})
        plan, notes = _without_unreached(plan, measured, recipe.metric)
        few = calibrate.too_few_tokens(measured)
        notes += () if few is None else (few,)
    # Factors that train straight through are multiplied as they are, and rounded once, at the end.
    stored = not (hold_floats and recipe.training == "straight-through")
    calibrated = time.perf_counter()
    fitted, errors, refitted = {}, {}, {}
    if batches:
        blocks = tuple(f"{block}." for block in find_blocks(model))
        fitted, errors, refitted = _fit_in_order(model, plan, measured, batches, blocks, progress, stored=stored)
        notes += _out_of_order(plan, [name for name in fitted if name.startswith(blocks)])
        if refitted:
            notes += (
                f"{len(refitted)} matrices that stay dense, such as '{next(iter(refitted))}', have new weights, which "
                "make up for errors of the matrices before them",
            )
    fitted, errors = _fit(model, plan, measured, progress, fitted, errors, stored=stored)
    with unchanged_on_error(model):
        replace_matrices(model, plan, fitted)
        replace_weights(model, refitted)
        if not hold_floats:
            quantize(model)
        if trial is not None:
            _check_runs(model, trial)
    seconds = {"calibrate": calibrated - started, "fit": time.perf_counter() - calibrated}
    kept = measured if keep_statistics else {}
    return Report(method, plan.scope, plan.original, plan.compressed, errors, seconds, plan, notes, kept)


def _fit_in_order(
    model: nn.Module,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    batches: Sequence[Mapping[str, Any]],
    blocks: tuple[str, ...],
    progress: Progress,
    *,
    stored: bool,
) -> tuple[dict[str, Factors], dict[str, float], dict[str, Tensor]]:
    """Factors and errors of matrices in blocks, each fitted to what the model compressed so far gives it to read.

    What is no part of a block, such as embeddings, comes first. Matrices that stay dense make up for the errors before
    them too: their new weights come third.
    """
    fitted: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    refitted: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    entries = {
        entry.matrix.name: entry
        for entry in plan.entries
        if entry.matrix.dense is None and entry.cause is not planning.Cause.UNMEASURED
    }
    outside = [
        (name, entry.matrix, entry.spec)
        for name, entry in entries.items()
        if entry.spec is not None and not (name.startswith(blocks) or name in plan.sharing or entry.shares is not None)
    ]
    first: dict[str, tuple[Factors, float]] = {}
    for name, matrix, spec in processes.own(outside, lambda each: _effort(each[1])):
        first[name] = fit_matrix(model, matrix, spec, statistics, stored=stored)
        progress("fit", len(first), len(plan.factorized))
    first = processes.merged(first)
    for name, matrix, spec in outside:
        dense = as_stored(matrix, spec, first[name][0])
        replaced[f"{name}.weight"] = dense.T if is_transposed(model.get_submodule(name)) else dense
    begun = bool(first)

    def fit(name: str, target: Tensor | None, root: Tensor | None) -> Tensor | None:
        nonlocal begun
        matrix, spec, before = entries[name].matrix, entries[name].spec, begun
        begun |= spec is not None
        if target is None or root is None:  # another process does it
            return None
        target = target.to(model.get_submodule(name).get_parameter("weight").dtype)
        if spec is None:
            if not before:  # nothing before it has an error
                return dense_weight(model.get_submodule(name))
            refitted[name] = target
            return target
        fitted[name], errors[name], dense = fit_target(matrix, target, root, spec, statistics[name], stored=stored)
        progress("fit", len(first) + len(fitted), len(plan.factorized))
        return dense

    fit_sequentially(model, entries, batches, fit, replaced)
    fitted, errors, refitted = (processes.merged(fitted), processes.merged(errors), processes.merged(refitted))
    fitted |= {name: factors for name, (factors, _) in first.items()}
    errors |= {name: error for name, (_, error) in first.items()}
    return fitted, errors, refitted


def _effort(matrix: Matrix) -> float:
    """What the fit of a matrix takes, beside that of others."""
    return math.prod(matrix.shape) * min(matrix.shape)


def _out_of_order(plan: Plan, fitted: Collection[str]) -> tuple[str, ...]:
    """A line about matrices that were not fitted to what they read in the compressed model, if there are any."""
    able = [
        entry.matrix.name
        for entry in plan.factorized
        if entry.matrix.role != "embedding" and entry.shares is None and not isinstance(entry.spec, Dense)
    ]
    others = [name for name in able if name not in fitted and name not in plan.sharing]
    if not others:
        return ()
    return (
        f"fitted to inputs of the dense model, not of the compressed one: {len(others)} of {len(able)} matrices, such "
        f"as '{others[0]}' (blocks of this model cannot be run one after the other, or not on all tokens)",
    )


def _fit(
    model: nn.Module,
    plan: Plan,
    statistics: Mapping[str, LayerStatistics],
    progress: Progress,
    fitted: dict[str, Factors],
    errors: dict[str, float],
    *,
    stored: bool,
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Factors and error of every matrix that a plan factorizes; those that share some are fitted together."""
    sharing = plan.sharing
    left = [
        entry
        for entry in plan.factorized
        if entry.matrix.name not in fitted and (entry.matrix.name in sharing or entry.shares is None)
    ]
    made: dict[str, tuple[Factors, float]] = {}
    for entry in processes.own(left, lambda entry: _effort(entry.matrix)):
        name = entry.matrix.name
        if name in sharing:
            made |= fit_group(model, _planned(sharing[name]), statistics, stored=stored)
        else:
            assert entry.spec is not None
            made[name] = fit_matrix(model, entry.matrix, entry.spec, statistics, stored=stored)
        progress("fit", len(fitted) + len(made), len(plan.factorized))
    made = processes.merged(made)
    fitted |= {name: factors for name, (factors, _) in made.items()}
    errors |= {name: error for name, (_, error) in made.items()}
    return fitted, {entry.matrix.name: errors[entry.matrix.name] for entry in plan.factorized}


def _first(batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any] | None, Iterator[dict[str, Any]]]:
    """The first batch, and all of them."""
    first = next(batches, None)
    return first, batches if first is None else itertools.chain([first], batches)


def _check_runs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise `ModelError` if a compressed model does not run on what its dense self has run on."""
    try:
        with evaluating(model), torch.no_grad():
            model(**placed(batch, next(model.parameters()).device))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with factors in the place of its matrices, and was left as it was: "
            f"{type(error).__name__}: {error}. Exclude the layers of that part"
        ) from error


def _without_unreached(
    plan: Plan, statistics: Mapping[str, LayerStatistics], metric: MetricName
) -> tuple[Plan, tuple[str, ...]]:
    """The plan with what calibration did not measure left dense, groups that share factors as a whole, and notes.

    Matrices that are to be dense in integers need no measurements.
    """
    planned = {entry.matrix.name for entry in plan.factorized if not isinstance(entry.spec, Dense)}
    missing = planned - statistics.keys()
    for entries in plan.sharing.values():
        members = {entry.matrix.name for entry in entries}
        missing |= members if members & missing else set()
    if not missing:
        return plan, ()
    measured = [name for name in statistics if name not in missing]
    reasons = calibrate.unreached_parts([e.matrix.name for e in plan.factorized if e.matrix.name in missing], measured)
    if metric == "fisher":  # reached by the data, perhaps, but by no gradient
        reasons = dict.fromkeys(reasons, calibrate.UNSHOWN)
    entries = tuple(
        dataclasses.replace(
            entry, spec=None, shares=None, reason=reasons[entry.matrix.name], cause=planning.Cause.UNMEASURED
        )
        if entry.matrix.name in missing
        else entry
        for entry in plan.entries
    )
    left = [entry for entry in entries if entry.matrix.name in missing]
    lines = left_dense(left, plan.original.bytes, least=0)
    return dataclasses.replace(plan, entries=entries), tuple(f"left dense: {line}" for line in lines)


def _planned(entries: Sequence[Entry]) -> list[tuple[Matrix, Structure]]:
    return [(entry.matrix, entry.spec) for entry in entries if entry.spec is not None]
