"""What carries out a plan, fitted or new: checking that it is of the model, and putting factors into their places."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from factorformer import registration
from factorformer.errors import ModelError
from factorformer.fitting.matrices import Factors
from factorformer.layers.dense import is_transposed
from factorformer.layers.surgery import factorize, find_matrices
from factorformer.planning import Plan
from factorformer.structures.integers import Bits


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Raise `ModelError` unless a plan is of this model, and changes it."""
    if not plan.factorized:
        raise ModelError(
            f"the plan, for a ratio of {plan.target:g}, keeps every matrix dense: there is nothing to compress; plan "
            "for a larger ratio"
        )
    bits: Bits | None = next((e.matrix.bits for e in plan.factorized if e.matrix.bits is not None), None)
    matrices = {matrix.name: matrix for matrix in find_matrices(model, "all", bits=bits)[0]}
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


def replace_matrices(model: nn.Module, plan: Plan, factors: dict[str, Factors]) -> None:
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


def replace_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give layers that stay dense other weights, as new parameters: the old ones are left as they were."""
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        trained = layer.get_parameter("weight").requires_grad
        weight = weight.T.contiguous() if is_transposed(layer) else weight
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=trained))
