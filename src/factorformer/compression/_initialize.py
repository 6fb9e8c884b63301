"""The verb `initialize`: new factors, to train from scratch; and such that wait for those of a checkpoint."""

from __future__ import annotations

import math
import time

from torch import nn

from factorformer import recipes
from factorformer.compression._replacement import check_fits, replace_matrices
from factorformer.compression._report import Report
from factorformer.errors import ModelError
from factorformer.fitting.matrices import Factors
from factorformer.layers.dense import dense_weight
from factorformer.layers.nn import new_factors
from factorformer.layers.surgery import unchanged_on_error
from factorformer.planning import Plan


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
    >>> from factorformer import plan
    >>> sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> model = BertModel(BertConfig(**sizes))
    >>> round(initialize(model, plan(model, "shapeshifter", ratio=10)).ratio, 1)
    10.0
    """
    check_fits(plan, model)
    started = time.perf_counter()
    fresh = _unset(model, plan)
    spread: dict[str, float] = {}
    for entry in plan.factorized:
        name, spec = entry.matrix.name, entry.spec
        weight = dense_weight(model.get_submodule(name))
        std = 0.0 if weight.is_meta else float(weight.float().square().mean().sqrt())
        if not 0 < std < math.inf:
            raise ModelError(f"layer '{name}': its weight has no initial values to match; build it with from_config")
        assert spec is not None
        spec.initialize(fresh[name], std)
        spread[name] = std
    for owner, entries in plan.sharing.items():
        for entry in entries:
            # Entries of W spread as the product of the factors: what the common one lacks, the own one makes up for.
            fresh[entry.matrix.name]["weight"] *= (spread[entry.matrix.name] / spread[owner]) ** 0.5
    _put(model, plan, fresh)
    method = plan.method or recipes.default_method(calibrated=False)
    seconds = {"initialize": time.perf_counter() - started}
    return Report(method, plan.scope, plan.original, plan.compressed, {}, seconds, plan)


def outline(model: nn.Module, plan: Plan) -> None:
    """Replace the planned matrices by factors of any values, in place, for a checkpoint that holds those of a fit.

    Args:
        model: that the plan was made for.
        plan: as it was carried out.

    Raises:
        ModelError: the plan does not fit the model.
    """
    check_fits(plan, model)
    fresh = _unset(model, plan)
    for entry in plan.factorized:
        assert entry.spec is not None
        entry.spec.initialize(fresh[entry.matrix.name], 1.0)
    _put(model, plan, fresh)


def _unset(model: nn.Module, plan: Plan) -> dict[str, Factors]:
    """Memory for the factors of all planned matrices."""
    fresh: dict[str, Factors] = {}
    for entry in plan.factorized:
        assert entry.spec is not None
        weight = dense_weight(model.get_submodule(entry.matrix.name))
        fresh[entry.matrix.name] = new_factors(entry.spec, entry.matrix.shape, weight.device, weight.dtype)
    return fresh


def _put(model: nn.Module, plan: Plan, fresh: dict[str, Factors]) -> None:
    """Let matrices that share factors hold the same ones, and all factors take the place of their matrices."""
    for owner, entries in plan.sharing.items():
        for entry in entries:
            assert entry.spec is not None
            for factor in entry.spec.shareable:
                common = fresh[owner][factor]
                fresh[owner][factor] = common if isinstance(common, nn.Parameter) else nn.Parameter(common)
                fresh[entry.matrix.name][factor] = fresh[owner][factor]
    with unchanged_on_error(model):
        replace_matrices(model, plan, fresh)
