"""What every structure promises when its factors are stored in integers of few bits."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.structure import TOLERANCE, TYPES, Case, LargestResult, Layer, assert_close, quantized
from torch import Tensor

from factorformer.errors import ModelError
from factorformer.layers.nn import FactorizedLinear, FactorizedMatrix
from factorformer.structures import integers
from factorformer.structures.integers import Bits

INPUTS = [1, 5, 40]
"""Rows of input. From a few on, the compiled kernels round inputs to 8 bits as well, which inference alone meets."""


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class IntegersContract:
    """Inherit, parametrize `case`, and say of how many bits the integers are."""

    bits: Bits = 8

    def quantized(self, layer: Layer) -> Layer:
        return quantized(layer, self.bits)

    @property
    def little(self) -> float:
        """What a matrix may lose."""
        return {8: 0.02, 4: 0.25, 3: 0.6}[self.bits]

    # The values

    def test_matmul_equals_the_dense_product(self, case: Case) -> None:
        layer = self.quantized(case.linear())
        for rows in (0, *INPUTS):
            x = case.input(rows)
            assert layer(x).shape == (rows, case.shape[0])
            if rows:
                assert_close(layer(x), x @ layer.to_dense().T + layer.bias, 1e-12)

    def test_inference_stays_close(self, case: Case) -> None:
        layer = self.quantized(case.linear(torch.float32))
        for rows in INPUTS:
            x = case.input(rows, dtype=torch.float32)
            expected = x @ layer.to_dense().T + layer.bias
            assert_close(layer(x.requires_grad_()), expected, 1e-5)
            with torch.inference_mode():
                assert relative(layer(x.detach()), expected) < 0.02

    def test_rows_equal_the_rows_of_the_dense_matrix(self, case: Case) -> None:
        layer, index = self.quantized(case.embedding()), case.index(2, 3)
        assert_close(layer(index), layer.to_dense()[index], 1e-12)

    def test_little_is_lost(self, case: Case) -> None:
        layer = case.linear()
        before = layer.to_dense().detach()
        assert relative(self.quantized(layer).to_dense(), before) < self.little

    def test_nothing_densifies(self, case: Case, never_dense: None) -> None:
        for training in (True, False):
            linear, embedding = (self.quantized(layer).train(training) for layer in (case.linear(), case.embedding()))
            for layer in (linear, embedding):
                layer.multiplied  # of 4 bits, once  # noqa: B018
            with LargestResult() as largest:
                linear(case.input(1))
                embedding(case.index(1))
            assert largest.elements < case.shape[0] * case.shape[1]

    # What is stored

    def test_bytes_are_what_is_stored(self, case: Case) -> None:
        layer = self.quantized(case.linear(torch.float32, bias=False))
        state = layer.state_dict()
        assert case.spec.bytes(case.shape, integers.TYPES[self.bits]) == sum(
            t.numel() * t.element_size() for t in state.values()
        )
        assert {name: (t.size, t.dtype or torch.float32) for name, t in layer.tensors.items()} == {
            name: (tuple(t.shape), t.dtype) for name, t in state.items()
        }
        assert {name for name in state if name.endswith(integers.SCALE)} == {
            name for name, _ in layer.named_parameters()
        }
        assert set(layer.sharing) == {f + end for f in case.spec.shareable for end in integers.ENDS[self.bits]}

    def test_state_survives_a_file_bit_for_bit(self, case: Case, tmp_path: Path) -> None:
        for dtype in TYPES:
            layer = self.quantized(case.linear(dtype))
            other = FactorizedLinear(case.spec, case.shape, bias=True, bits=self.bits, dtype=dtype)
            save_file(layer.state_dict(), tmp_path / "layer.safetensors")
            other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
            assert other.state_dict().keys() == layer.state_dict().keys()
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name])
            x = case.input(2, 3, dtype=dtype)
            assert torch.equal(layer(x), other(x))

    def test_floats_are_not_taken_for_codes(self, case: Case) -> None:
        layer, other = self.quantized(case.linear()), case.linear()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(ModelError, match=r"torch\.float64.*torch\.int8"):
            layer.load_state_dict(other.state_dict(), strict=False)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())

    # Precision

    def test_types_are_those_of_the_scales(self, case: Case) -> None:
        exact, x, index = self.quantized(case.linear()), case.input(4), case.index(4)
        expected, rows = exact(x), exact.rows(index)
        for dtype in TYPES[1:]:
            layer = copy.deepcopy(exact).to(dtype)
            for name, tensor in layer.factors.items():
                whole = layer.tensors[name].dtype
                assert tensor.dtype == (whole or dtype)
                assert whole is None or torch.equal(tensor, exact.factors[name])
            assert layer.values.dtype == layer(x.to(dtype)).dtype == layer.rows(index).dtype == dtype
            # Values near the middle of two codes; of few tokens, some products in int8 take 16 bits.
            tolerance = max(TOLERANCE[dtype], 1e-4) if self.bits == 8 else 0.05
            assert_close(layer(x.to(dtype)).double(), expected, tolerance)
            assert_close(layer.rows(index).double(), rows, tolerance)

    def test_autocast(self, case: Case) -> None:
        layer, x = self.quantized(case.linear(torch.float32)), case.input(4, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = layer(x)
        assert mixed.dtype == torch.bfloat16
        assert_close(mixed.float(), layer(x), TOLERANCE[torch.bfloat16])

    # Training

    def test_a_fake_quantized_matrix_is_what_it_will_be(self, case: Case) -> None:
        x, index = case.input(3), case.index(3)
        for dtype in (torch.float64, torch.bfloat16):
            layer = case.linear(dtype)
            layer.fake_quantize(self.bits)
            before = layer(x.to(dtype)), layer.rows(index), layer.to_dense()
            layer.quantize()
            assert not layer.fake_quantized
            for one, other in zip(before, (layer(x.to(dtype)), layer.rows(index), layer.to_dense()), strict=True):
                assert torch.equal(one, other)

    def test_gradients_of_a_fake_quantized_matrix_are_those_at_the_rounded_values(self, case: Case) -> None:
        layer, x = case.linear(), case.input(4)
        at = copy.deepcopy(layer)
        at = integers.floats(self.quantized(at).multiplied)
        other = FactorizedLinear(case.spec, case.shape, at, layer.bias)
        layer.fake_quantize(self.bits)
        for one in (layer, other):
            (one(x).square().sum() + one.rows(case.index(3).fill_(0)).sum()).backward()
        for name, parameter in other.named_parameters():
            assert_close(layer.get_parameter(name).grad, parameter.grad, 1e-12)  # type: ignore[arg-type]

    def test_codes_and_scales_are_not_trained(self, case: Case) -> None:
        made = self.quantized(case.linear())
        loaded = FactorizedLinear(case.spec, case.shape, bias=True, bits=self.bits, dtype=torch.float64)
        loaded.load_state_dict(made.state_dict())
        for layer in (made, loaded):
            x = case.input(3).requires_grad_()
            layer(x).sum().backward()
            assert x.grad is not None
            assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
            assert_close(x.grad, layer.to_dense().sum(0).expand(3, -1), 1e-12)

    # Changes

    def test_what_is_stored_in_int8_stays_as_it_is(self, case: Case) -> None:
        exact = case.linear()
        layer = self.quantized(copy.deepcopy(exact))
        with pytest.raises(ModelError, match=f"int{self.bits} already"):
            layer.quantize()
        selection = case.spec.select(exact.factors, torch.arange(case.spec.units), case.spec)
        with pytest.raises(ModelError, match=f"int{self.bits} already"):
            layer.keep(selection)
        assert layer.spec == case.spec
        assert f", int{self.bits}" in repr(layer)

    # As a module among others

    def test_copies(self, case: Case) -> None:
        layer, x = self.quantized(case.linear()), case.input(3)
        layer(x)  # of 4 bits, products make something that is no part of it
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
            assert other.quantized
            assert other.spec == layer.spec
            assert all(other.factors[name] is not tensor for name, tensor in layer.factors.items())

    def test_meta_device(self, case: Case) -> None:
        with torch.device("meta"):
            layer = FactorizedMatrix(case.spec, case.shape, bits=self.bits)
        assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
        assert layer.matmul(case.input(3, dtype=torch.float32).to("meta")).shape == (3, case.shape[0])
        made = FactorizedMatrix(case.spec, case.shape, device="meta")
        made.fake_quantize(self.bits)
        made.quantize()
        assert {n: (t.shape, t.dtype) for n, t in made.factors.items()} == {
            n: (t.shape, t.dtype) for n, t in layer.factors.items()
        }
