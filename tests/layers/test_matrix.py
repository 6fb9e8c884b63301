"""What a matrix costs."""

from __future__ import annotations

import pytest
import torch

from factorformer.kernels import support
from factorformer.layers.matrix import Cost, Matrix, total
from factorformer.structures import DenseSparse, KroneckerSum, LowRank


def test_costs_add_up() -> None:
    assert total([]) == Cost()
    assert total([Cost(1, 2, 3), Cost(10, 20, 30)]) == Cost(11, 22, 33)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("float64", 8)])
def test_bytes_follow_the_type(dtype: str, size: int) -> None:
    matrix = Matrix("m", (64, 32), dtype)
    assert matrix.cost(None) == Cost(64 * 32, 64 * 32 * size, 2 * 64 * 32)
    assert matrix.cost(LowRank(4)) == Cost(4 * 96, 4 * 96 * size, 2 * 4 * 96)
    assert matrix.cost(LowRank(4)).bytes == LowRank(4).bytes((64, 32), getattr(torch, dtype))


def test_flops_count_every_use() -> None:
    assert Matrix("shared", (64, 32), products=3).cost(None).flops == 3 * 2 * 64 * 32
    assert Matrix("shared", (64, 32), products=3).cost(LowRank(4)).flops == 3 * 2 * 4 * 96
    embedding = Matrix("words", (64, 32), products=0, lookups=1)
    assert embedding.cost(None).flops == 0
    assert embedding.cost(LowRank(4)).flops == 2 * 4 * 32
    tied = Matrix("words", (64, 32), products=1, lookups=1)
    assert tied.cost(LowRank(4)).flops == 2 * 4 * 96 + 2 * 4 * 32


def test_stored_once_however_often_it_is_used() -> None:
    assert Matrix("m", (64, 32), products=12, aliases=("other",)).cost(None).bytes == 64 * 32 * 4


def test_a_sum_of_kronecker_products() -> None:
    spec = KroneckerSum(3, (16, 4), (4, 8))
    # Right factors first: 4 rows of 8 become 4 rows of 3 x 4, and 4 columns of 3 x 4 become 4 columns of 16.
    product, row = 2 * (4 * 8 * 12 + 4 * 12 * 16), 2 * 3 * 4 * 8 * 4
    assert Matrix("m", (64, 32)).cost(spec) == Cost(3 * (64 + 32), 3 * (64 + 32) * 4, product)
    assert Matrix("words", (64, 32), "float16", 0, 1).cost(spec) == Cost(3 * 96, 3 * 96 * 2, row)
    assert Matrix("words", (64, 32), products=1, lookups=1).cost(spec).flops == product + row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_costs_a_byte_for_each_value_and_a_scale_for_each_row(dtype: str) -> None:
    matrix, spec = Matrix("m", (64, 32), dtype, bits=8), DenseSparse(16, 4)
    scale = getattr(torch, dtype).itemsize
    assert matrix.values == torch.int8
    assert matrix.cost(LowRank(4)) == Cost(4 * 96, 4 * 96 + scale * (64 + 4), 2 * 4 * 96)
    assert matrix.cost(spec).bytes == (64 * 4 + 16 * 32) + scale * (64 + 16) + 64 * support.row_bytes(16, 4)
    assert matrix.cost(spec, without=["dictionary"]).bytes == matrix.cost(spec).bytes - 16 * 32 - scale * 16
    # A matrix that stays dense keeps its type.
    assert matrix.cost(None) == Matrix("m", (64, 32), dtype).cost(None)
