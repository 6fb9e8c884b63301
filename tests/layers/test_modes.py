"""Products by oneDNN are those of float32, and the setting that chooses them is left as it was."""

from __future__ import annotations

import pytest
import torch

from factorformer.layers.modes import fast_float32

CPU = torch.device("cpu")


def test_products_are_those_of_float32() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(300, 500), torch.randn(500, 200)
    with fast_float32(CPU):
        found = left @ right
    torch.testing.assert_close(found.double(), left.double() @ right.double(), rtol=1e-4, atol=1e-4)


def test_the_setting_is_left_as_it_was() -> None:
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), fast_float32(CPU, rounding=True):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert products.fp32_precision == before
    with fast_float32(CPU, rounding=True):
        assert products.fp32_precision == "bf16"
    with fast_float32(torch.device("meta"), rounding=True):
        assert products.fp32_precision == before
    try:
        products.fp32_precision = "ieee"  # a setting of the user's
        with fast_float32(CPU, rounding=True):
            assert products.fp32_precision == "bf16"
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before
