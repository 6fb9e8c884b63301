"""The main verbs: plan a compression, and carry it out."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from factorformer import planning, recipes, registration
from factorformer.errors import BudgetError, DataError, MethodError, ModelError, one_of
from factorformer.fitting import QUICK
from factorformer.fitting import statistics as calibrate
from factorformer.fitting.matrices import Factors, fit_group, fit_matrix, fit_stack, measure
from factorformer.fitting.statistics import LayerStatistics
from factorformer.layers.bypass import accepted
from factorformer.layers.matrix import Cost, Matrix, Member, Scope
from factorformer.layers.modes import evaluating
from factorformer.layers.nn import new_factors
from factorformer.layers.quantization import quantize
from factorformer.layers.surgery import dense_weight, factorize, find_matrices, unchanged_on_error
from factorformer.planning import Entry, Plan, Share, Unit, left_dense
from factorformer.planning.evidence.prediction import plan_by_loss
from factorformer.progress import Progress, silent
from factorformer.structures import Structure

DEFAULT_RATIO, DEFAULT_RATIO_INT8 = 3.0, 10.0
"""Compression ratio if none is given."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `compress` or `initialize`.

    Args:
        method: the method that was carried out.
        scope: what `original` and `compressed` count.
        original, compressed: cost of everything in scope, before and after.
        errors: relative error of each factorized matrix, under the metric of the fit; empty where nothing was fitted.
        seconds: wall time of calibration and fit, or of initialization.
        plan: what was carried out: the plan given, without what calibration data does not reach.
        notes: what a user should know of it, a line each.
        statistics: what calibration measured of each layer, if it was to be kept, for training that goes on in the
            metric of the fit.
    """

    method: str
    scope: Scope
    original: Cost
    compressed: Cost
    errors: dict[str, float]
    seconds: dict[str, float]
    plan: Plan
    notes: tuple[str, ...] = ()
    statistics: Mapping[str, calibrate.LayerStatistics] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def ratio(self) -> float:
        """Original bytes over compressed bytes, in scope."""
        return self.original.bytes / self.compressed.bytes


def plan(
    model: nn.Module,
    method: str | None = None,
    ratio: float | None = None,
    scope: Scope | None = None,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    *,
    share: Share | None = None,
    budget: Unit = "bytes",
    int8: bool = False,
    calibration: calibrate.Calibration | None = None,
    progress: Progress = silent,
) -> Plan:
    """Decide what every weight matrix becomes, without changing anything.

    Where the bytes of a matrix can be spent in more than one way (on atoms or on nonzeros), a few cheap fits decide. A
    model without weights, on the meta device, gets sizes that are good on average. Methods that allocate by loss, such
    as `auto`, weigh the error curves of all matrices against each other, and predict the error of the whole.

    Args:
        model: a Transformer.
        method: a name that `factorformer methods` lists; None leaves the choice to `compress`: data-aware with
            calibration data, plain without.
        ratio: bytes of the original tensors in scope over the bytes of what replaces them, or another cost if `budget`
            says so; by default 3, and 10 in int8, which by itself gives 4.
        scope: `blocks` for the linear layers of the Transformer blocks, `all` for the whole model with embeddings; None
            for what the method is made for, which is `all` for `shapeshifter` and `blocks` for the others.
        include, exclude: shell patterns of module names, e.g. `*.attention.*`; one alone may be given as it is.
        share: which matrices share one dictionary: with `inputs` those of a block that read the same tensor (query, key
            and value; gate and up) and the output of attention, with `layers` the same matrix of all blocks; None for
            none.
        budget: what the ratio counts: bytes, FLOPs of the products for a token, or milliseconds that those of 512 rows
            take on this machine, measured now. Others than bytes are for methods that allocate by loss.
        int8: store all matrices that `include` and `exclude` leave, factorized or dense, in int8 with a scale for each
            row, and count them so. Dense ones take a quarter of the bytes of float32: smaller ratios are exceeded.
        calibration: batches as for `compress`; with them the cheap fits minimize the error that the method minimizes,
            and without them the plain error of the weights. With them allocation by loss measures how sensitive the
            model is to each matrix, and what they do not reach stays dense.
        progress: progress callback.

    Raises:
        MethodError: an unknown method or budget, a budget that the method does not count, or a method whose matrices
            have nothing to share.
        BudgetError: a ratio that cannot be met within 1 %; the message names the nearest that can.
        ModelError: a pattern that matches nothing, or a weight that is not finite.
        DataError: calibration data that the model cannot run on, or that lacks labels if the method needs them.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=50))
    >>> f"{plan(model, 'svd', ratio=2.5).ratio:.2f}"
    '2.50'
    """
    name = method or recipes.default_method(calibrated=True)
    ratio = (DEFAULT_RATIO_INT8 if int8 else DEFAULT_RATIO) if ratio is None else ratio
    check_options(name, ratio, share, budget)
    recipe = recipes.get(name)
    scope = scope or recipe.scope
    data = None if calibration is None else list(calibrate.as_batches(model, calibration))
    matrices, rest = find_matrices(model, scope, include, exclude, int8=int8, batch=data[0] if data else None)
    if data is not None and recipe.metric != "plain":
        able = [matrix.name for matrix in matrices if matrix.dense is None]
        unreached = calibrate.unreached(model, able, data)
        matrices = [dataclasses.replace(m, dense=unreached.get(m.name, m.dense)) for m in matrices]
    _check_any(matrices, include is not None)
    allocate, candidates = planning.ALLOCATIONS[recipe.allocation], planning.candidates_of(recipe.structure)
    if allocate is None:
        draft = Plan(method, scope, ratio, (), rest, budget)
        return plan_by_loss(model, recipe.structures, recipe.metric, draft, matrices, data, progress)
    groups = planning.find_groups(matrices, share)
    stacks = planning.stacked(matrices, groups)
    entries = allocate(stacks, candidates, ratio, rest)
    if recipe.training != "from scratch" and _can_choose(model, entries):
        names = [member.name for entry in entries if entry.spec for member in _members(entry.matrix, groups)]
        statistics = {} if data is None else measure(model, names, recipe.metric, data, progress)

        def error(matrix: Matrix, spec: Structure) -> float:
            members = groups.get(matrix.name)
            if members is None:
                return fit_matrix(model, matrix.name, spec, statistics, QUICK)[1]
            return fit_stack(model, members, spec, statistics, QUICK)[1]

        choices = planning.choose_families(entries, error, lambda done: progress("choose", done, None))
        try:
            entries = allocate(
                stacks, lambda m: choices[m.name].ladder if m.name in choices else candidates(m), ratio, rest
            )
        except BudgetError:
            # Few and small matrices: with a given number of atoms, no combination of nonzeros meets the budget.
            choices = {}
        entries = [_explained(entry, choices) for entry in entries]
    return Plan(method, scope, ratio, planning.expand(matrices, groups, entries), rest)


def _check_any(matrices: Sequence[Matrix], included: bool) -> None:
    """Raise `BudgetError` if every matrix has to stay dense, with the reasons."""
    if any(matrix.dense is None for matrix in matrices):
        return
    kept: dict[str, list[str]] = {}
    for matrix in matrices:
        kept.setdefault((matrix.dense or "").removesuffix(", left dense"), []).append(matrix.name)
    reasons = "; ".join(f"{reason}: {len(names)}, such as '{names[0]}'" for reason, names in kept.items())
    raise BudgetError(
        f"no matrix in scope can be factorized ({reasons or 'there is none'}); widen "
        + ("include and scope" if included else "the scope")
    )


def check_options(method: str, ratio: float | None, share: Share | None, budget: Unit) -> None:
    """Refuse what `plan` refuses of any model, before there is one.

    Raises:
        MethodError: an unknown method or budget, a budget that the method does not count, or a method whose matrices
            have nothing to share.
        BudgetError: a ratio that no model can meet.
    """
    _check_share(share, method, recipes.get(method).structure)
    _check_budget(budget, method)
    if ratio is not None and not 1 <= ratio < math.inf:
        raise BudgetError(f"ratio must be at least 1 (original bytes / compressed bytes), and finite; got {ratio}")


def _check_budget(budget: Unit, method: str) -> None:
    if budget not in get_args(Unit):
        raise MethodError(f"unknown budget {one_of(str(budget), get_args(Unit))}")
    if budget != "bytes" and planning.ALLOCATIONS[recipes.get(method).allocation] is not None:
        able = [name for name, recipe in recipes.RECIPES.items() if planning.ALLOCATIONS[recipe.allocation] is None]
        raise MethodError(
            f"a budget in {budget} needs a method that weighs sizes by what they cost and lose, and '{method}' gives "
            f"every matrix its part of the bytes; methods that do: {', '.join(able)}"
        )


def _check_share(share: Share | None, method: str, structure: type[Structure]) -> None:
    if share is None:
        return
    if share not in get_args(Share):
        raise MethodError(f"unknown share {one_of(str(share), get_args(Share))}")
    if not structure.shareable:
        able = [name for name, recipe in recipes.RECIPES.items() if recipe.structure.shareable]
        makes = (
            "matrices of any structure, most of which"
            if structure is Structure
            else f"{structure.kind} matrices, which"
        )
        raise MethodError(
            f"share='{share}' needs factors that matrices can share, and '{method}' makes {makes} "
            f"have none; methods that do: {', '.join(able) or 'none'}"
        )


def _can_choose(model: nn.Module, entries: Sequence[Entry]) -> bool:
    """Whether any matrix could be stored in more than one way, and the weights to tell which are there."""
    planned = [entry for entry in entries if entry.spec is not None]
    return not any(dense_weight(model.get_submodule(entry.matrix.name)).is_meta for entry in planned) and any(
        len(entry.spec.families(entry.matrix.shape, entry.matrix.values)) > 1 for entry in planned if entry.spec
    )


def _members(matrix: Matrix, groups: Mapping[str, Sequence[Member]]) -> list[Matrix]:
    return [member.matrix for member in groups[matrix.name]] if matrix.name in groups else [matrix]


def _explained(entry: Entry, choices: Mapping[str, planning.Choice]) -> Entry:
    if entry.spec is None or entry.matrix.name not in choices:
        return entry
    return dataclasses.replace(entry, reason=f"{entry.reason}; {choices[entry.matrix.name].reason}")


def compress(
    model: nn.Module,
    plan: Plan,
    calibration: calibrate.Calibration | None = None,
    progress: Progress = silent,
    *,
    keep_statistics: bool = False,
    hold_floats: bool = False,
) -> Report:
    """Replace the planned matrices by fitted factors, in place. A Hugging Face model then saves as a compressed one.

    A model around one, such as a `SentenceTransformer`, saves as one too. Pass the model that is going to be saved: one
    that is compressed from inside, through its `base_model`, does not know of it.

    All factors are fitted before the first layer is replaced, and the result has to run on what the dense model has run
    on: an error leaves the model as it was. Matrices that the calibration data does not reach stay dense, and the
    report says so.

    Args:
        model: the dense model that the plan was made for.
        plan: from `plan` or `Plan.load`.
        calibration: batches of keyword arguments for the model, with labels if the method needs them; one batch alone
            or a tokenized `datasets.Dataset` serves too.
        progress: progress callback.
        hold_floats: leave factors that the plan wants in int8 as floats that products round, to train on; `quantize`
            ends that.
        keep_statistics: leave what calibration measured in the report; a moment takes as much memory as a square matrix
            of float64 as wide as the layer's input.

    Raises:
        DataError: the method needs calibration data (or labels) that was not given.
        ModelError: the plan does not fit the model, the model does not run with factors, or a weight is not finite; the
            message names the layer.
    """
    method = plan.method or recipes.default_method(calibrated=calibration is not None)
    recipe = recipes.get(method)
    _check_fits(plan, model)
    started = time.perf_counter()
    statistics: dict[str, LayerStatistics] = {}
    notes: tuple[str, ...] = ()
    trial = accepted(model) if recipe.metric == "plain" else None
    names = [entry.matrix.name for entry in plan.factorized]
    if recipe.metric != "plain":
        if calibration is None:
            raise DataError(
                f"method '{method}' needs calibration data ({recipe.needs}): pass calibration batches, or use 'svd'"
            )
        trial, calibration = _first(calibrate.as_batches(model, calibration))
        statistics = measure(model, names, recipe.metric, calibration, progress)
        plan, notes = _without_unreached(plan, statistics)
    calibrated = time.perf_counter()
    fitted: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    sharing = plan.sharing
    for entry in plan.factorized:
        name = entry.matrix.name
        if name in sharing:
            for member, (factors, error) in fit_group(model, _planned(sharing[name]), statistics).items():
                fitted[member], errors[member] = factors, error
        elif entry.shares is None:
            assert entry.spec is not None
            fitted[name], errors[name] = fit_matrix(model, name, entry.spec, statistics)
        else:
            continue
        progress("fit", len(fitted), len(names))
    errors = {entry.matrix.name: errors[entry.matrix.name] for entry in plan.factorized}
    with unchanged_on_error(model):
        _replace(model, plan, fitted)
        if not hold_floats:
            quantize(model)
        if trial is not None:
            _check_runs(model, trial)
    seconds = {"calibrate": calibrated - started, "fit": time.perf_counter() - calibrated}
    kept = statistics if keep_statistics else {}
    return Report(method, plan.scope, plan.original, plan.compressed, errors, seconds, plan, notes, kept)


def _first(batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any] | None, Iterator[dict[str, Any]]]:
    """The first batch, and all of them."""
    first = next(batches, None)
    return first, batches if first is None else itertools.chain([first], batches)


def _check_runs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise `ModelError` if a compressed model does not run on what its dense self has run on."""
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with factors in the place of its matrices, and was left as it was: "
            f"{type(error).__name__}: {error}. Exclude the layers of that part"
        ) from error


def _without_unreached(plan: Plan, statistics: Mapping[str, LayerStatistics]) -> tuple[Plan, tuple[str, ...]]:
    """The plan with what calibration did not measure left dense, groups that share factors as a whole, and notes."""
    missing = {entry.matrix.name for entry in plan.factorized} - statistics.keys()
    for entries in plan.sharing.values():
        members = {entry.matrix.name for entry in entries}
        missing |= members if members & missing else set()
    if not missing:
        return plan, ()
    measured = [name for name in statistics if name not in missing]
    reasons = calibrate.unreached_parts([e.matrix.name for e in plan.factorized if e.matrix.name in missing], measured)
    entries = tuple(
        dataclasses.replace(
            entry, spec=None, shares=None, reason=reasons[entry.matrix.name], cause=planning.Cause.UNMEASURED
        )
        if entry.matrix.name in missing
        else entry
        for entry in plan.entries
    )
    left = [entry for entry in entries if entry.matrix.name in missing]
    return dataclasses.replace(plan, entries=entries), tuple(left_dense(left, plan.original.bytes, least=0))


def initialize(model: nn.Module, plan: Plan) -> Report:
    """Replace the planned matrices by new factors to train from scratch, in place; the weights they had are dropped.

    Every matrix keeps the mean square that the model gave it at its birth, so signals and gradients start as large as
    in the dense model.

    Args:
        model: a new model, such as `AutoModel.from_config(config)`.
        plan: from `plan` or `Plan.load`.

    Raises:
        ModelError: the plan does not fit the model, or a weight has no values yet, or none but zeros.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = BertModel(BertConfig(**sizes))
    >>> round(initialize(model, plan(model, "shapeshifter", ratio=10)).ratio, 1)
    10.0
    """
    _check_fits(plan, model)
    started = time.perf_counter()
    fresh: dict[str, Factors] = {}
    spread: dict[str, float] = {}
    for entry in plan.factorized:
        name, shape, spec = entry.matrix.name, entry.matrix.shape, entry.spec
        weight = dense_weight(model.get_submodule(name))
        std = 0.0 if weight.is_meta else float(weight.float().square().mean().sqrt())
        if not 0 < std < math.inf:
            raise ModelError(f"layer '{name}': its weight has no initial values to match; build it with from_config")
        assert spec is not None
        fresh[name], spread[name] = new_factors(spec, shape, weight.device, weight.dtype), std
        spec.initialize(fresh[name], std)
    for owner, entries in plan.sharing.items():
        for entry in entries:
            assert entry.spec is not None
            name = entry.matrix.name
            # Entries of W spread as the product of the factors: what the common one lacks, the own one makes up for.
            fresh[name]["weight"] *= (spread[name] / spread[owner]) ** 0.5
            for factor in entry.spec.shareable:
                common = fresh[owner][factor]
                fresh[owner][factor] = common if isinstance(common, nn.Parameter) else nn.Parameter(common)
                fresh[name][factor] = fresh[owner][factor]
    with unchanged_on_error(model):
        _replace(model, plan, fresh)
    method = plan.method or recipes.default_method(calibrated=False)
    seconds = {"initialize": time.perf_counter() - started}
    return Report(method, plan.scope, plan.original, plan.compressed, {}, seconds, plan)


def _replace(model: nn.Module, plan: Plan, factors: dict[str, Factors]) -> None:
    """Put the factors in the place of their matrices; the dictionary is emptied, so that each copy is freed at once."""
    sharing = plan.sharing
    trained = {name: model.get_submodule(name).get_parameter("weight").requires_grad for name in factors}
    for owner, entries in sharing.items():
        for factor in entries[0].spec.shareable if entries[0].spec else ():
            factors[owner][factor].requires_grad_(any(trained[entry.matrix.name] for entry in entries))
    for entry in plan.factorized:
        name = entry.matrix.name
        assert entry.spec is not None
        shared = entry.spec.shareable if entry.shares is not None or name in sharing else ()
        factorize(model, entry.matrix, entry.spec, factors.pop(name), shared)
    registration.attach(model)


def _planned(entries: Sequence[Entry]) -> list[tuple[Matrix, Structure]]:
    return [(entry.matrix, entry.spec) for entry in entries if entry.spec is not None]


def _check_fits(plan: Plan, model: nn.Module) -> None:
    if not plan.factorized:
        raise ModelError("the plan keeps every matrix dense: there is nothing to compress")
    int8 = any(entry.matrix.int8 for entry in plan.factorized)
    matrices = {matrix.name: matrix for matrix in find_matrices(model, "all", int8=int8)[0]}
    for entry in plan.factorized:
        found = matrices.get(entry.matrix.name)
        if found is None or found.shape != entry.matrix.shape or found.aliases != entry.matrix.aliases:
            has = "has no such matrix" if found is None else f"has {found.shape} tied to {list(found.aliases)}"
            raise ModelError(
                f"the plan does not fit the model: it expects '{entry.matrix.name}' of shape {entry.matrix.shape} "
                f"tied to {list(entry.matrix.aliases)}, and the model {has}"
            )
        if found.dense is not None:
            raise ModelError(f"the plan factorizes '{found.name}', which cannot be: {found.dense}")
