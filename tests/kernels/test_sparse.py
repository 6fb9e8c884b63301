"""Products with a sparse matrix equal those with the dense one, in parts too, and their derivatives are right."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_support import positions

from factorformer.kernels import sparse, sparse_product, support

CASES = [(24, 16, 3, 1, 1), (24, 16, 7, 1, 1), (24, 300, 5, 1, 1), (24, 32, 8, 4, 1), (24, 32, 8, 2, 4)]
"""Rows, atoms, nonzeros, rows that share a support, blocks."""


def a_matrix(case: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, packed support, and the dense matrix."""
    rows, atoms, nonzeros, group, blocks = case
    where = positions(rows // group, atoms, nonzeros, blocks)
    values = torch.randn(rows, nonzeros, dtype=torch.float64)
    dense = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, where.repeat_interleave(group, 0), values)
    return values, support.pack(where, atoms, blocks), dense


@pytest.fixture(params=[2**19, 70, 1], ids=["whole", "parts", "rows"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "WORKSPACE", request.param)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_the_dense_ones(case: tuple[int, ...]) -> None:
    values, packed, dense = a_matrix(case)
    atoms, blocks = case[1], case[4]
    assert torch.equal(sparse.build(values, packed, atoms, blocks), dense)
    for leading in ((), (3,), (0,), (2, 3)):
        x, y = (torch.randn(*leading, width, dtype=torch.float64) for width in (atoms, len(dense)))
        torch.testing.assert_close(sparse_product(x, values, packed, atoms, blocks), x @ dense.T)
        torch.testing.assert_close(sparse_product(y, values, packed, atoms, blocks, transposed=True), y @ dense)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case: tuple[int, ...], transposed: bool) -> None:
    values, packed, dense = a_matrix(case)
    x = torch.randn(3, len(dense) if transposed else case[1], dtype=torch.float64, requires_grad=True)
    product = sparse_product(x, values.requires_grad_(), packed, case[1], case[4], transposed=transposed)
    gradient = torch.randn_like(product)
    found = torch.autograd.grad(product, (x, values), gradient)
    torch.testing.assert_close(found[0], gradient @ (dense.T if transposed else dense))
    outer = x.detach().T @ gradient if transposed else gradient.T @ x.detach()
    torch.testing.assert_close(found[1], outer[dense != 0].view_as(values))


@pytest.mark.parametrize("operator", ["sparse_matmul", "sparse_matmul_transposed"])
def test_operators_keep_the_promises_that_torch_needs(operator: str) -> None:
    values, packed, dense = a_matrix(CASES[3])
    x = torch.randn(3, case_width(operator, dense), dtype=torch.float64, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        getattr(torch.ops.factorformer, operator).default,
        (x, values.requires_grad_(), packed, CASES[3][1], CASES[3][4]),
        test_utils=checks,
    )


def case_width(operator: str, dense: torch.Tensor) -> int:
    return len(dense) if operator.endswith("transposed") else dense.shape[1]
