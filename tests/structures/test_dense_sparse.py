"""What is particular to dense-sparse matrices."""

from __future__ import annotations

import itertools

import pytest
import torch

from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedLinear
from factorformer.structures import DenseSparse, largest_rank


def test_rows_are_combinations_of_few_atoms() -> None:
    spec = DenseSparse(12, 3)
    layer = FactorizedLinear(spec, (40, 16), dtype=torch.float64)
    codes = spec.coefficients(layer.factors)
    assert (codes != 0).sum(1).tolist() == [3] * 40
    torch.testing.assert_close(codes @ layer.dictionary, layer.to_dense())


def test_the_transposed_form_is_the_transpose() -> None:
    layer = FactorizedLinear(DenseSparse(12, 3), (40, 16), dtype=torch.float64)
    other = FactorizedLinear(DenseSparse(12, 3, "columns"), (16, 40), layer.factors)
    assert torch.equal(other.to_dense(), layer.to_dense().T)


@pytest.mark.parametrize(("shape", "side"), [((40, 16), "rows"), ((16, 40), "columns"), ((16, 16), "columns")])
def test_atoms_live_in_the_shorter_dimension(shape: tuple[int, int], side: str) -> None:
    spec = DenseSparse.of(shape, 6, 2)
    assert spec.side == side
    assert spec.sides(shape) == (max(shape), min(shape))
    assert spec.tensors(shape)["dictionary"].size == (6, min(shape))


def test_packing_keeps_the_largest() -> None:
    spec = DenseSparse(12, 6)
    codes = torch.randn(8, 12)
    kept = spec.coefficients(spec.pack(codes))
    mask = kept != 0
    assert torch.equal(kept, codes * mask)
    assert (mask.sum(1) == 6).all()
    sizes = codes.square()
    assert (sizes.masked_fill(~mask, 99).amin(1) >= sizes.masked_fill(mask, 0).amax(1)).all()


def test_a_full_rank_matrix_in_fewer_bytes_than_low_rank_could() -> None:
    layer = FactorizedLinear(DenseSparse(16, 6), (64, 16), dtype=torch.float64)
    assert torch.linalg.matrix_rank(layer.to_dense()) == 16 > largest_rank((64, 16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"atoms": 4, "nonzeros": 4}, "nonzeros.* 4 atoms"),
        ({"atoms": 70_000, "nonzeros": 4}, "at most 65536"),
        ({"atoms": 8, "nonzeros": 3, "side": "row"}, "side 'row' .*'rows'"),
    ],
)
def test_sizes_that_contradict_each_other(fields: dict, message: str, no_shape_checks: None) -> None:
    with pytest.raises(ModelError, match=message):
        DenseSparse(**fields)


def test_what_is_shared_does_not_count_for_the_gain() -> None:
    spec = DenseSparse(24, 4)
    with pytest.raises(ModelError, match=r"no less.*dense"):
        spec.check((16, 32))
    spec.check((16, 32), ("dictionary",))
    with pytest.raises(ModelError, match=r"no less.*dense"):
        DenseSparse(40, 32).check((16, 32), ("dictionary",))  # its values alone are as many


def test_sizes_by_default_grow_in_small_steps() -> None:
    for shape in ((384, 384), (1536, 384), (768, 3072)):
        sizes = [spec.bytes(shape) for spec in DenseSparse.candidates(shape, torch.float32)]
        dense = 4 * shape[0] * shape[1]
        steps = [b - a for a, b in itertools.pairwise(sizes)]
        assert max(steps) < 0.015 * dense
        assert sizes[0] < 0.03 * dense
        assert sizes[-1] > 0.95 * dense


def test_numbers_of_atoms_to_choose_among() -> None:
    families = DenseSparse.families((1536, 384), torch.float32)
    numbers = [family[0].atoms for family in families]
    assert numbers[0] == 48
    assert numbers[-1] == 576
    assert len(numbers) == 12
    assert all(number % 8 == 0 for number in numbers)
