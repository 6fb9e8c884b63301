"""Products with a sparse matrix equal those with the dense one, in parts too, and their derivatives are right."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_support import positions

from factorformer.errors import ModelError
from factorformer.kernels import cpu, sparse, sparse_product, support
from factorformer.kernels import dense as dense_kernels

CASES = [(24, 16, 3), (24, 16, 7), (24, 300, 5)]
"""Rows, atoms, nonzeros."""


def a_matrix(case: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, packed support, and the dense matrix."""
    rows, atoms, nonzeros = case
    where = positions(rows, atoms, nonzeros)
    values = torch.randn(rows, nonzeros, dtype=torch.float64)
    dense = torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, where, values)
    return values, support.pack(where, atoms), dense


@pytest.fixture(params=[2**19, 70, 1], ids=["whole", "parts", "rows"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "WORKSPACE", request.param)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_equal_the_dense_ones(case: tuple[int, ...]) -> None:
    values, packed, dense = a_matrix(case)
    atoms = case[1]
    assert torch.equal(sparse.build(values, packed, atoms), dense)
    for leading in ((), (3,), (0,), (2, 3)):
        x, y = (torch.randn(*leading, width, dtype=torch.float64) for width in (atoms, len(dense)))
        torch.testing.assert_close(sparse_product(x, values, packed, atoms), x @ dense.T)
        torch.testing.assert_close(sparse_product(y, values, packed, atoms, transposed=True), y @ dense)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_derivatives(case: tuple[int, ...]) -> None:
    values, packed, dense = a_matrix(case)
    values.requires_grad_()
    for transposed in (False, True):
        x = torch.randn(3, len(dense) if transposed else case[1], dtype=torch.float64, requires_grad=True)
        product = sparse_product(x, values, packed, case[1], transposed=transposed)
        gradient = torch.randn_like(product)
        found = torch.autograd.grad(product, (x, values), gradient)
        torch.testing.assert_close(found[0], gradient @ (dense.T if transposed else dense))
        outer = x.detach().T @ gradient if transposed else gradient.T @ x.detach()
        torch.testing.assert_close(found[1], outer[dense != 0].view_as(values))


def test_a_support_that_is_not_of_bytes_is_never_read_as_such() -> None:
    """Compiled kernels see an address: anything but bytes on the CPU has to be refused, or multiplied by torch."""
    values, packed, dense = a_matrix(CASES[0])
    values, dense, x = values.float(), dense.float(), torch.randn(3, 16)
    for wrong in (packed.float(), packed.int(), packed.view(torch.int8), packed.bool()):
        with pytest.raises(ModelError, match=r"uint8, got torch\."):
            sparse_product(x, values, wrong, 16)
        assert not cpu.serves(x, values, support=wrong)
    assert not cpu.serves(x, values, support=packed.to("meta"))
    assert not dense_kernels.served(x, values, support=packed.to("meta"))
    strided = torch.stack((packed, packed), 2)[:, :, 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(sparse_product(x, values, strided, 16), x @ dense.T)
    with pytest.raises(ModelError, match=r"support is on meta, .* cpu"):
        sparse_product(x, values, packed.to("meta"), 16)


@pytest.mark.parametrize("operator", ["sparse_matmul", "sparse_matmul_transposed"])
def test_operators_keep_the_promises_that_torch_needs(operator: str) -> None:
    values, packed, dense = a_matrix(CASES[2])
    x = torch.randn(3, case_width(operator, dense), dtype=torch.float64, requires_grad=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        getattr(torch.ops.factorformer, operator).default,
        (x, values.requires_grad_(), packed, CASES[2][1]),
        test_utils=checks,
    )


def case_width(operator: str, dense: torch.Tensor) -> int:
    return len(dense) if operator.endswith("transposed") else dense.shape[1]
