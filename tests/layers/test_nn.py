"""Layers: which states they can be in, and what reaches their tensors from outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from factorformer.errors import ModelError
from factorformer.kernels import support
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix, Form, Mode
from factorformer.structures import DenseSparse, LowRank, Structure

SHAPE = (24, 20)


class Doubled:
    """A form that multiplies by twice the matrix."""

    def __init__(self, matrix: FactorizedMatrix) -> None:
        self.matrix = matrix

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * self.matrix.spec.matmul(self.matrix.shape, self.matrix.factors, x, bias)

    def rows(self, index: Tensor) -> Tensor:
        return 2 * self.matrix.spec.rows(self.matrix.shape, self.matrix.factors, index)

    def pack(self) -> None:
        """The factors are as they were."""


def layer_in(mode: Mode, spec: Structure | None = None) -> FactorizedLinear:
    layer = FactorizedLinear(spec or LowRank(4), SHAPE)
    if mode is Mode.QUANTIZED:
        layer.quantize()
    elif mode is Mode.FAKE_QUANTIZED:
        layer.fake_quantize()
    assert layer.mode is mode
    return layer


def test_every_change_of_state_is_one_of_the_table_or_refused() -> None:
    """All modes, with a form and without, by all methods."""
    methods = {
        "fake_quantize": ({Mode.FLOATS, Mode.FAKE_QUANTIZED}, Mode.FAKE_QUANTIZED),
        "quantize": ({Mode.FLOATS, Mode.FAKE_QUANTIZED}, Mode.QUANTIZED),
        "hold_floats": ({Mode.QUANTIZED}, Mode.FAKE_QUANTIZED),
    }
    for mode in Mode:
        for name, (allowed, after) in methods.items():
            layer = layer_in(mode)
            if mode in allowed:
                getattr(layer, name)()
                assert (layer.mode, layer.form) == (after, None)
            else:
                with pytest.raises(ModelError, match="already"):
                    getattr(layer, name)()
                assert layer.mode is mode
            layer = layer_in(mode)
            form = Doubled(layer)
            assert isinstance(form, Form)
            layer.substitute(form)
            before = {key: tensor.clone() for key, tensor in layer.factors.items()}
            with pytest.raises(ModelError, match=r"Doubled.*finish\(\)"):
                getattr(layer, name)()
            assert (layer.mode, layer.form) == (mode, form)
            assert all(torch.equal(tensor, before[key]) for key, tensor in layer.factors.items())
        selection = LowRank(4).select(layer_in(Mode.FLOATS).factors, torch.arange(2), LowRank(2))
        layer = layer_in(mode)
        if mode is Mode.QUANTIZED:
            with pytest.raises(ModelError, match="int8"):
                layer.keep(selection)
        else:
            layer.keep(selection)
            assert (layer.spec, layer.mode) == (LowRank(2), mode)
        layer = layer_in(mode)
        layer.substitute(Doubled(layer))
        with pytest.raises(ModelError, match="Doubled"):
            layer.keep(selection)
    assert [layer_in(mode).quantized for mode in Mode] == [False, False, True]
    assert [layer_in(mode).fake_quantized for mode in Mode] == [False, True, False]


def test_a_form_multiplies_in_place_of_the_factors_until_it_is_taken_away() -> None:
    layer, x, index = layer_in(Mode.FLOATS), torch.randn(3, SHAPE[1]), torch.tensor([0, 5])
    product, rows = layer(x), layer.rows(index)
    layer.substitute(Doubled(layer))
    torch.testing.assert_close(layer(x), 2 * product)
    torch.testing.assert_close(layer.rows(index), 2 * rows)
    with pytest.raises(ModelError, match="Doubled"):
        layer.substitute(Doubled(layer))
    layer.restore()
    assert torch.equal(layer(x), product)
    assert torch.equal(layer.rows(index), rows)


def test_modes_survive_copies() -> None:
    for mode in Mode:
        layer, x = layer_in(mode), torch.randn(3, SHAPE[1])
        other = copy.deepcopy(layer)
        assert other.mode is mode
        assert torch.equal(other(x), layer(x))


# What comes in


@pytest.mark.parametrize("quantized", [False, True])
def test_a_support_is_checked_whatever_else_does_not_fit(quantized: bool) -> None:
    """torch copies each tensor of the right size before it raises for the others."""
    spec = DenseSparse(12, 3)
    layer = layer_in(Mode.QUANTIZED if quantized else Mode.FLOATS, spec)
    assert support.code_of(12, 3) == "bitmap"
    before = layer.support.clone()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["support"][3] = 255
    for name in ("weight", "dictionary"):
        for wrong in (state[name][:-1], state[name].to("meta"), None):
            given = {key: wrong if key == name else value for key, value in state.items()}
            given = {key: value for key, value in given.items() if value is not None}
            with pytest.raises(ModelError, match="marks"):
                layer.load_state_dict(given, strict=False)
            assert torch.equal(layer.support, before)
    misshapen = {**state, "support": state["support"][:-1]}  # not copied, so torch may say it
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(misshapen)
    with pytest.raises(ModelError, match=r"'outer\.support'.*torch\.float32.*torch\.uint8"):
        nn.ModuleDict({"outer": layer}).load_state_dict({"outer.support": state["support"].float()}, strict=False)
    assert torch.equal(layer.support, before)


def test_padding_is_a_row() -> None:
    for index in (24, -25):
        with pytest.raises(ModelError, match=f"padding_idx {index}.*24 rows"):
            FactorizedEmbedding(LowRank(4), SHAPE, padding_idx=index)
    assert FactorizedEmbedding(LowRank(4), SHAPE, padding_idx=-1).padding_idx == 23
