"""Look-ups in tables of factors: by the compiled kernels in inference, by torch wherever else is looked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factorformer import DenseSparse, KroneckerSum, LowRank
from factorformer.kernels import cpu
from factorformer.layers.nn import FactorizedEmbedding
from factorformer.structures import Dense
from factorformer.structures.integers import Bits

SHAPE = (60, 24)
SPECS = [
    LowRank(5),
    KroneckerSum(3, (8, 2), (8, 12)),
    DenseSparse(16, 3, "rows"),
    DenseSparse(12, 4, "columns"),
    DenseSparse(16, 9, "rows"),
    Dense(),
]
KERNELS = {KroneckerSum: "kronecker_rows", DenseSparse: "sparse_rows", LowRank: "dense_rows", Dense: "dense_rows"}


def table(spec: Any, bits: Bits | None, dtype: torch.dtype = torch.float32) -> FactorizedEmbedding:
    torch.manual_seed(0)
    layer = FactorizedEmbedding(spec, SHAPE, dtype=dtype)
    if bits is not None:
        layer.fake_quantize(bits)
        layer.quantize()
    return layer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled kernels that were called."""
    found: list[str] = []
    for name in set(KERNELS.values()):
        kernel = getattr(cpu, name)

        def counting(*args: Any, name: str = name, kernel: Any = kernel) -> torch.Tensor:
            found.append(name)
            return kernel(*args)

        monkeypatch.setattr(cpu, name, counting)
    return found


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_those_of_the_dense_table(spec: Any, bits: Bits | None, calls: list[str]) -> None:
    layer = table(spec, bits)
    dense = layer.to_dense().detach()
    index = torch.randint(SHAPE[0], (3, 7))
    many = torch.randint(SHAPE[0], (3, 40))  # more than rows
    for given in (index, index.T, index[:, ::2], index.int(), index[:0], index[0, 0], many):
        with torch.inference_mode():
            rows = layer(given)
        assert rows.shape == (*given.shape, SHAPE[1])
        # Chains round their inputs to 8 bits where their factors are integers.
        allowed = 0.02 if bits and isinstance(spec, LowRank) else 1e-5
        assert (rows - dense[given.long()]).norm() <= allowed * dense.norm()
    gathers = not (isinstance(spec, DenseSparse) and spec.side == "columns")
    assert len(calls) == (7 if gathers and cpu.AVAILABLE else 0)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_no_row_is_refused(spec: Any, bits: Bits | None) -> None:
    layer = table(spec, bits)
    for wrong in (SHAPE[0], -1, 63):
        with pytest.raises(IndexError), torch.inference_mode():
            layer(torch.tensor([3, wrong]))


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_torch_looks_up_where_the_kernels_do_not(spec: Any, calls: list[str]) -> None:
    index = torch.tensor([5, 5, 0])
    layer = table(spec, None)
    expected = layer.to_dense().detach()[index]
    rows = layer(index)
    rows.sum().backward()
    assert layer.get_parameter("weight").grad is not None
    torch.testing.assert_close(rows.detach(), expected)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(index), expected, rtol=0.02, atol=0.02)
    with torch.inference_mode():
        wide = table(spec, None, torch.float64)
        torch.testing.assert_close(wide(index), wide.to_dense()[index])
        layer.fake_quantize(4)
        torch.testing.assert_close(layer(index), layer.to_dense()[index])
    assert calls == []


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_an_index_is_of_whole_numbers(kind: torch.dtype) -> None:
    for spec in SPECS:
        with pytest.raises((RuntimeError, IndexError)), torch.inference_mode():
            table(spec, None)(torch.tensor([1, 2]).to(kind))
