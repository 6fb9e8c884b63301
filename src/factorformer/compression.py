"""The main verbs: plan a compression, and carry it out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from factorformer import calibration as calibrate
from factorformer import planning, recipes
from factorformer.errors import DataError, FactorformerError, ModelError
from factorformer.fitting import Metric, fit
from factorformer.hf.plugin import attach
from factorformer.nn import new_factors
from factorformer.planning import Cost, Plan, Scope
from factorformer.progress import Progress, silent
from factorformer.surgery import dense_weight, factorize, find_matrices


@dataclasses.dataclass(frozen=True)
class Report:
    """What `compress` or `initialize` did.

    Args:
        method: the method that was carried out.
        scope: what `original` and `compressed` count.
        original, compressed: cost of everything in scope, before and after.
        errors: relative error of each factorized matrix, under the metric of the fit; empty where nothing was fitted.
        seconds: wall time of calibration and fit, or of initialization.
    """

    method: str
    scope: Scope
    original: Cost
    compressed: Cost
    errors: dict[str, float]
    seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """Original bytes over compressed bytes, in scope."""
        return self.original.bytes / self.compressed.bytes


def plan(
    model: nn.Module,
    method: str | None = None,
    ratio: float = 3.0,
    scope: Scope | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Plan:
    """Decide what every weight matrix becomes, without changing anything.

    Args:
        model: a Transformer; its weights are not read.
        method: a name that `factorformer methods` lists; None leaves the choice to `compress`: data-aware with
            calibration data, plain without.
        ratio: bytes of the original tensors in scope over the bytes of what replaces them.
        scope: `blocks` for the linear layers of the Transformer blocks, `all` for the whole model with embeddings; None
            for what the method is made for, which is `all` for `shapeshifter` and `blocks` for the others.
        include, exclude: shell patterns of module names, e.g. `*.attention.*`.

    Raises:
        MethodError: an unknown method.
        BudgetError: a ratio that cannot be met within 1 %; the message names the nearest that can.
        ModelError: no matrix to factorize, or a pattern that matches nothing.

    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(hidden_size=64, num_attention_heads=4, intermediate_size=128, vocab_size=50))
    >>> f"{plan(model, 'svd', ratio=2.5).ratio:.2f}"
    '2.50'
    """
    recipe = recipes.get(method or recipes.default_method(calibrated=True))
    scope = scope or recipe.scope
    matrices, rest = find_matrices(model, scope, include, exclude)
    entries = planning.ALLOCATIONS[recipe.allocation](matrices, recipe.structure, ratio, rest)
    return Plan(method, scope, ratio, entries, rest)


def compress(
    model: nn.Module,
    plan: Plan,
    calibration: Iterable[calibrate.Batch] | None = None,
    progress: Progress = silent,
) -> Report:
    """Replace the planned matrices by fitted factors, in place. A Hugging Face model then saves as a compressed one.

    A model around one, such as a `SentenceTransformer`, saves as one too. Pass the model that is going to be saved: one
    that is compressed from inside, through its `base_model`, does not know of it.

    All factors are fitted before the first layer is replaced: an error leaves the model as it was.

    Args:
        model: the dense model that the plan was made for.
        plan: from `plan` or `Plan.load`.
        calibration: batches of keyword arguments for the model, with labels if the method needs them.
        progress: told how far the work is.

    Raises:
        DataError: the method needs calibration data (or labels) that was not given.
        ModelError: the plan does not fit the model, or a weight is not finite; the message names the layer.
    """
    method = plan.method or recipes.default_method(calibrated=calibration is not None)
    recipe = recipes.get(method)
    _check_fits(plan, model)
    started = time.perf_counter()
    statistics: dict[str, calibrate.LayerStatistics] = {}
    names = [entry.matrix.name for entry in plan.factorized]
    if recipe.metric != "plain":
        if calibration is None:
            raise DataError(
                f"method '{method}' needs calibration data ({recipe.needs}): pass calibration batches, or use 'svd'"
            )
        statistics = calibrate.collect(
            model,
            names,
            calibration,
            moments=recipe.metric == "input_moment",
            fisher=recipe.metric == "fisher_rows",
            progress=lambda done: progress("calibrate", done, None),
        )
    calibrated = time.perf_counter()
    fitted, errors = {}, {}
    for done, entry in enumerate(plan.factorized):
        name = entry.matrix.name
        weight = dense_weight(model.get_submodule(name))
        try:
            metric = Metric.of(statistics.get(name))
            fitted[name], errors[name] = fit(weight, entry.spec, metric)  # pyright: ignore[reportArgumentType]
        except FactorformerError as error:
            raise type(error)(f"layer '{name}': {error}") from error
        progress("fit", done + 1, len(names))
    _replace(model, plan, fitted)
    seconds = {"calibrate": calibrated - started, "fit": time.perf_counter() - calibrated}
    return Report(method, plan.scope, plan.original, plan.compressed, errors, seconds)


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
    fresh: dict[str, dict[str, Tensor]] = {}
    for entry in plan.factorized:
        name, shape, spec = entry.matrix.name, entry.matrix.shape, entry.spec
        weight = dense_weight(model.get_submodule(name))
        std = 0.0 if weight.is_meta else float(weight.float().square().mean().sqrt())
        if not 0 < std < math.inf:
            raise ModelError(f"layer '{name}': its weight has no initial values to match; build it with from_config")
        assert spec is not None
        fresh[name] = new_factors(spec, shape, weight.device, weight.dtype)
        spec.initialize(fresh[name], std)
    _replace(model, plan, fresh)
    method = plan.method or recipes.default_method(calibrated=False)
    seconds = {"initialize": time.perf_counter() - started}
    return Report(method, plan.scope, plan.original, plan.compressed, {}, seconds)


def _replace(model: nn.Module, plan: Plan, factors: dict[str, dict[str, Tensor]]) -> None:
    """Put the factors in the place of their matrices; the dictionary is emptied, so that each copy is freed at once."""
    for entry in plan.factorized:
        factorize(model, entry.matrix, entry.spec, factors.pop(entry.matrix.name))  # pyright: ignore[reportArgumentType]
    for pretrained in _pretrained_models(model):
        attach(pretrained)


def _pretrained_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The model itself, or those inside of it: a `SentenceTransformer` wraps one."""
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _pretrained_models(child)


def _check_fits(plan: Plan, model: nn.Module) -> None:
    if not plan.factorized:
        raise ModelError("the plan keeps every matrix dense: there is nothing to compress")
    matrices = {matrix.name: matrix for matrix in find_matrices(model, "all")[0]}
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
