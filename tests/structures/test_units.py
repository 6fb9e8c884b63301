"""What is particular to the units of each structure."""

from __future__ import annotations

import pytest
import torch

from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedLinear
from factorformer.structures import DenseSparse, KroneckerSum, LowRank, Structure

SHAPE = (24, 20)
KEPT = torch.tensor([0, 2, 3])


def layer_of(spec: Structure) -> FactorizedLinear:
    return FactorizedLinear(spec, SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("spec", [LowRank(6), KroneckerSum.of(SHAPE, 6)], ids=str)
def test_a_sum_loses_the_units_that_are_removed(spec: Structure) -> None:
    layer = layer_of(spec)
    gone = torch.tensor([1, 4, 5])
    parts = []
    for chosen in (KEPT, gone):
        selection = spec.select(layer.factors, chosen, spec.with_units(3))
        factors = {name: cut(layer.factors[name]) for name, cut in selection.cut.items()}
        parts.append(selection.spec.to_dense(SHAPE, factors))
    torch.testing.assert_close(parts[0] + parts[1], layer.to_dense())


@pytest.mark.parametrize("spec", [DenseSparse(9, 3), DenseSparse(9, 3, "columns")], ids=str)
def test_rows_keep_their_most_energetic_entries_among_the_atoms_that_stay(spec: DenseSparse) -> None:
    layer = layer_of(spec)
    codes = spec.coefficients(layer.factors).detach()
    dictionary = layer.get_parameter("dictionary").detach()
    kept = torch.tensor([0, 2, 3, 5, 6, 8])
    energy = (codes * dictionary.norm(dim=1)).square()[:, kept]
    smaller = spec.with_units(6)
    assert (smaller.atoms, smaller.nonzeros) == (6, 2)
    layer.keep(spec.select(layer.factors, kept, smaller))
    layer.check_factors()
    now = smaller.coefficients(layer.factors).detach()
    assert torch.equal(layer.get_parameter("dictionary"), dictionary[kept])
    assert ((now == 0) | (now == codes[:, kept])).all()
    lost = energy * (now != codes[:, kept])
    best = energy.topk(2).values.sum()
    torch.testing.assert_close(energy.sum() - lost.sum(), best)


def test_atoms_keep_their_nonzeros_in_proportion() -> None:
    spec = DenseSparse(100, 20)
    assert [spec.with_units(n).nonzeros for n in (99, 50, 7, 2)] == [20, 10, 1, 1]
    with pytest.raises(ModelError, match=r"nonzeros.*at least 1"):
        spec.with_units(1)


def test_units_of_shared_factors_are_not_removed() -> None:
    spec = DenseSparse(9, 3)
    first = layer_of(spec)
    second = FactorizedLinear(spec, SHAPE, first.factors, shared=("dictionary",), dtype=torch.float64)
    with pytest.raises(ModelError, match=r"other layers.*dictionary"):
        second.keep(spec.select(second.factors, KEPT, spec.with_units(3)))
