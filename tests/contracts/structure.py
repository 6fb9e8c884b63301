"""What every structure promises, whatever it is: the suite that `test_structures.py` runs over all of them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from factorformer.errors import CheckpointError, FactorformerError, ModelError
from factorformer.layers.nn import FactorizedEmbedding, FactorizedLinear, FactorizedMatrix
from factorformer.structures import STRUCTURES, Shape, Structure, from_dict
from factorformer.structures.integers import Bits

LEADING = [(), (1,), (5,), (2, 3), (2, 1, 3)]
Layer = TypeVar("Layer", bound=FactorizedMatrix)
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One structure on one shape.

    Args:
        spec: what the matrix is.
        shape: `(out, in)`.
        listed: whether it is among the candidates for its shape; sizes that only a caller would choose are not.
    """

    spec: Structure
    shape: Shape
    listed: bool = True

    def __str__(self) -> str:
        return f"{self.spec}-{self.shape[0]}x{self.shape[1]}"

    def linear(self, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> FactorizedLinear:
        layer = FactorizedLinear(self.spec, self.shape, bias=bias, dtype=dtype)
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
        return layer

    def embedding(self, dtype: torch.dtype = torch.float64) -> FactorizedEmbedding:
        return FactorizedEmbedding(self.spec, self.shape, dtype=dtype)

    def input(self, *leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*leading, self.shape[1], dtype=dtype)

    def index(self, *leading: int) -> Tensor:
        return torch.randint(0, self.shape[0], leading)


def quantized(layer: Layer, bits: Bits = 8) -> Layer:
    """The layer, with its factors in integers."""
    layer.fake_quantize(bits)
    layer.quantize()
    return layer


class LargestResult(TorchDispatchMode):
    """Remember the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.detach().abs().max().clamp_min(1e-30).item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale, check_dtype=False)


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call of `to_dense`, of the layer or of its structure, fails the test."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("something densified implicitly")

    for owner in (FactorizedMatrix, *STRUCTURES.values()):
        monkeypatch.setattr(owner, "to_dense", refuse)


class StructureContract:
    """Inherit, and parametrize `case`."""

    # The product

    def test_matmul_equals_the_dense_product(self, case: Case) -> None:
        for bias in (True, False):
            layer = case.linear(bias=bias)
            dense, added = layer.to_dense(), layer.bias if bias else 0
            for leading in LEADING:
                x = case.input(*leading)
                assert layer(x).shape == (*leading, case.shape[0]), leading
                assert_close(layer(x), x @ dense.T + added, 1e-12)
            assert layer(case.input(0)).shape == (0, case.shape[0])

    def test_gradients_equal_the_dense_ones(self, case: Case) -> None:
        layer, x = case.linear(), case.input(2, 3).requires_grad_()
        target = torch.randn(2, 3, case.shape[0], dtype=torch.float64)
        sources = (x, *layer.parameters())
        dense = x @ layer.to_dense().T + layer.bias
        expected = gradients((dense * target).sum(), *sources)
        actual = gradients((layer(x) * target).sum(), *sources)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, 1e-12)

    def test_gradients_are_derivatives(self, case: Case) -> None:
        layer, x = case.linear(), case.input(2).requires_grad_()
        names = [name for name, _ in layer.named_parameters()]

        def forward(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        values = [value.detach().requires_grad_() for value in layer.parameters()]
        assert torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)

    # Units

    def test_factors_agree_on_the_first_order_change(self, case: Case) -> None:
        """`p . g` of a unit is the same in each factor, so it is the derivative along the unit's own scale."""
        layer, x = case.linear(bias=False), case.input(4)
        target = torch.randn(4, case.shape[0], dtype=torch.float64)
        (layer(x) * target).sum().backward()
        products = {name: p.detach() * p.grad for name, p in layer.named_parameters() if p.grad is not None}
        rows = case.spec.by_unit(layer.factors, products)
        assert all(len(row) == case.spec.units for row in rows.values())
        assert set(rows) == set(products)
        first, *others = (row.sum(1) for row in rows.values())
        for other in others:
            assert_close(other, first, 1e-12)
        assert_close(first.sum(), (layer(x) * target).sum(), 1e-12)

    def test_all_units_are_the_matrix(self, case: Case) -> None:
        layer = case.linear()
        before = {name: tensor.detach().clone() for name, tensor in layer.factors.items()}
        layer.keep(case.spec.select(layer.factors, torch.arange(case.spec.units), case.spec))
        assert layer.spec == case.spec
        for name, tensor in layer.factors.items():
            assert torch.equal(tensor, before[name])

    def test_some_units_are_a_smaller_matrix(self, case: Case) -> None:
        if case.spec.units < 3:
            pytest.skip("there is nothing to remove")
        layer, x = case.linear(), case.input(3)
        kept = torch.arange(case.spec.units)[1:]
        smaller = case.spec.with_units(len(kept))
        dense = layer.to_dense().detach()
        layer.get_parameter("weight").requires_grad_(False)
        layer.keep(case.spec.select(layer.factors, kept, smaller))
        assert layer.spec == smaller
        assert smaller.units == len(kept)
        assert not layer.get_parameter("weight").requires_grad
        assert not torch.equal(layer.to_dense(), dense)
        assert_close(layer(x), x @ layer.to_dense().T + layer.bias, 1e-12)
        assert smaller.bytes(case.shape) < case.spec.bytes(case.shape)

    # Rows

    def test_rows_equal_the_rows_of_the_dense_matrix(self, case: Case) -> None:
        layer = case.embedding()
        dense = layer.to_dense()
        for leading in LEADING:
            index = case.index(*leading)
            assert layer(index).shape == (*leading, case.shape[1]), leading
            assert_close(layer(index), dense[index], 1e-12)

    def test_gradients_of_the_padding_row_are_masked(self, case: Case) -> None:
        """As in `nn.Embedding`: its row counts for nothing in the backward pass, and is looked up all the same."""
        plain, index = case.embedding(), torch.tensor([[0, 1], [1, 2]])
        layer = FactorizedEmbedding(case.spec, case.shape, plain.factors, padding_idx=1 - case.shape[0])
        assert layer.padding_idx == 1
        assert torch.equal(layer(index), plain(index))
        target = torch.randn(2, 2, case.shape[1], dtype=torch.float64)
        (layer(index) * target).sum().backward()
        found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        (plain(index) * target * (index != 1)[..., None]).sum().backward()
        for one, parameter in zip(found, plain.parameters(), strict=True):
            assert_close(one, parameter.grad, 1e-12)  # type: ignore[arg-type]

    def test_gradients_of_repeated_rows_add_up(self, case: Case) -> None:
        layer, index = case.embedding(), torch.tensor([0, 1, 0])
        target = torch.randn(3, case.shape[1], dtype=torch.float64)
        factors = tuple(layer.parameters())
        expected = gradients((layer.to_dense()[index] * target).sum(), *factors)
        for one, other in zip(gradients((layer(index) * target).sum(), *factors), expected, strict=True):
            assert_close(one, other, 1e-12)

    # Nothing densifies

    @pytest.mark.usefixtures("never_dense")
    def test_only_to_dense_builds_the_matrix(self, case: Case) -> None:
        for training in (True, False):
            linear, embedding = case.linear().train(training), case.embedding().train(training)
            with LargestResult() as largest:
                (linear(case.input(1)).sum() + embedding(case.index(1)).sum()).backward()
            assert all(p.grad is not None for p in [*linear.parameters(), *embedding.parameters()])
            assert largest.elements < case.shape[0] * case.shape[1]

    # What is stored

    def test_counts_are_what_is_stored(self, case: Case) -> None:
        for dtype in TYPES:
            state = case.linear(dtype, bias=False).state_dict()
            floating = [t for t in state.values() if t.is_floating_point()]
            assert {t.dtype for t in floating} == {dtype}
            assert case.spec.parameters(case.shape) == sum(t.numel() for t in floating)
            assert case.spec.bytes(case.shape, dtype) == sum(t.numel() * t.element_size() for t in state.values())
            assert case.spec.bytes(case.shape, dtype) < case.shape[0] * case.shape[1] * dtype.itemsize
            assert {name: t.size for name, t in case.spec.tensors(case.shape).items()} == {
                name: tuple(t.shape) for name, t in state.items()
            }

    def test_has_a_weight_that_no_dense_layer_would_take(self, case: Case) -> None:
        size = case.spec.tensors(case.shape)["weight"].size
        assert size not in (case.shape, case.shape[::-1])
        assert case.spec.tensors(case.shape)["weight"].dtype is None

    def test_names_survive_the_renaming_of_old_checkpoints(self, case: Case) -> None:
        assert not {"weight_g", "weight_v", "gamma", "beta", "bias"} & set(case.spec.tensors(case.shape))

    def test_flops_are_those_of_the_products(self, case: Case) -> None:
        for layer, x, flops in (
            (case.linear(bias=False), case.input(8), case.spec.flops(case.shape)),
            (case.embedding(), case.index(8), case.spec.row_flops(case.shape)),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(x)
            assert counter.get_total_flops() == 8 * flops
        assert 0 < case.spec.row_flops(case.shape) <= case.spec.flops(case.shape)

    def test_state_survives_a_file_bit_for_bit(self, case: Case, tmp_path: Path) -> None:
        for dtype in TYPES:
            layer, other = case.linear(dtype), case.linear(dtype)
            save_file(layer.state_dict(), tmp_path / "layer.safetensors")
            other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name])
            x = case.input(2, 3, dtype=dtype)
            assert torch.equal(layer(x), other(x))

    def test_factors_are_taken_as_they_are(self, case: Case) -> None:
        layer = case.linear()
        other = FactorizedLinear(case.spec, case.shape, layer.factors, layer.bias)
        assert all(other.factors[name] is tensor for name, tensor in layer.factors.items())
        assert other.bias is layer.bias

    # Precision

    def test_low_precision_stays_close(self, case: Case) -> None:
        exact, x, index = case.linear(), case.input(4), case.index(4)
        expected, rows = exact(x), exact.rows(index)
        for dtype in TYPES[1:]:
            layer = copy.deepcopy(exact).to(dtype)
            assert layer(x.to(dtype)).dtype == layer.rows(index).dtype == dtype
            assert_close(layer(x.to(dtype)).double(), expected, TOLERANCE[dtype])
            assert_close(layer.rows(index).double(), rows, TOLERANCE[dtype])

    def test_every_cast_leaves_integers_alone(self, case: Case) -> None:
        """`Module.type` casts them as well, and a kernel would read numbers for bytes."""
        for layer in (case.linear(), quantized(case.linear())):
            expected = {name: tensor.clone() for name, tensor in layer.factors.items()}
            layer.type(torch.float32)
            for name, tensor in layer.factors.items():
                whole = layer.tensors[name].dtype
                assert tensor.dtype == (whole or torch.float32)
                assert whole is None or torch.equal(tensor, expected[name])
            x = case.input(3, dtype=torch.float32)
            assert_close(layer(x), x @ layer.to_dense().T + layer.bias, 2e-2 if layer.quantized else 1e-5)

    def test_autocast(self, case: Case) -> None:
        layer, x = case.linear(torch.float32), case.input(4, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = layer(x)
        assert mixed.dtype == torch.bfloat16
        assert_close(mixed.float(), layer(x), TOLERANCE[torch.bfloat16])

    def test_rows_under_autocast_are_of_the_type_of_the_factors(self, case: Case) -> None:
        layer, index = case.embedding(torch.float32), case.index(4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(index).dtype == torch.float32  # as from `nn.Embedding`

    # Export

    def test_exported_products_are_the_same(self, case: Case) -> None:
        layer, x, index = case.linear(bias=False), case.input(3), case.index(2, 2)
        chain = case.spec.dense_factors(layer.factors)
        if chain:
            product = x
            for factor in chain:
                product = product @ factor.T
            assert_close(product, layer(x), 1e-12)
        assert_close(case.spec.exported_rows(case.shape, layer.factors, index), layer.rows(index), 1e-12)

    # Descriptions

    def test_is_among_the_candidates_or_not(self, case: Case) -> None:
        assert (case.spec in list(type(case.spec).candidates(case.shape, torch.float32))) == case.listed

    def test_description_survives_json(self, case: Case) -> None:
        description = json.loads(json.dumps(case.spec.to_dict()))
        assert from_dict(description) == case.spec
        assert hash(from_dict(description)) == hash(case.spec)
        assert (
            description["structure"] == case.spec.kind == next(k for k, v in STRUCTURES.items() if v is type(case.spec))
        )

    def test_description_with_other_fields_is_refused(self, case: Case) -> None:
        description = case.spec.to_dict()
        with pytest.raises(CheckpointError, match="fields"):
            from_dict({**description, "colour": 1})
        field = next(f.name for f in dataclasses.fields(case.spec))
        with pytest.raises(CheckpointError, match=field):
            from_dict({key: value for key, value in description.items() if key != field})

    def test_sizes_that_are_none_are_refused(self, case: Case, no_shape_checks: None) -> None:
        for value in (0, -1, 1.5, True, "3"):
            for field in dataclasses.fields(case.spec):
                whole = field.type in ("int", int)
                with pytest.raises(FactorformerError, match=field.name):
                    dataclasses.replace(case.spec, **{field.name: value if whole else (value, 4)})

    def test_is_frozen_and_readable(self, case: Case) -> None:
        field = dataclasses.fields(case.spec)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(case.spec, field, 1)
        assert str(case.spec).startswith(f"{case.spec.kind}(")
        assert str(case.spec) in repr(case.linear())

    # As a module among others

    def test_copies(self, case: Case) -> None:
        layer, x = case.linear(), case.input(3)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
            assert other.spec == layer.spec
            assert all(a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True))

    def test_meta_device(self, case: Case) -> None:
        with torch.device("meta"):
            layer = FactorizedLinear(case.spec, case.shape, bias=True)
        assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
        assert layer(case.input(3, dtype=torch.float32).to("meta")).shape == (3, case.shape[0])

    def test_default_type(self, case: Case) -> None:
        previous = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.bfloat16)
            layer = FactorizedLinear(case.spec, case.shape, bias=True)
        finally:
            torch.set_default_dtype(previous)
        assert {t.dtype for t in layer.state_dict().values() if t.is_floating_point()} == {torch.bfloat16}

    # Errors

    def test_wrong_factors_are_named(self, case: Case) -> None:
        factors = {name: t.detach() for name, t in case.linear().factors.items()}
        for name, tensor in factors.items():
            wrong = {**factors, name: tensor.new_zeros(tuple(size + 1 for size in tensor.shape))}
            without = {key: value for key, value in factors.items() if key != name}
            for given in (wrong, without, {**factors, "extra": tensor}):
                with pytest.raises(ModelError) as caught:
                    FactorizedLinear(case.spec, case.shape, given)
                for size in (*(tuple(t.shape) for t in given.values()), tuple(tensor.shape)):
                    assert str(size) in str(caught.value)
                assert f"{case.shape[0]}x{case.shape[1]}" in str(caught.value)

    def test_a_shape_without_gain_is_refused(self, case: Case) -> None:
        with pytest.raises(ModelError, match="dense"):
            FactorizedLinear(case.spec, (2, 2))


class KindContract:
    """What does not depend on sizes. Inherit, and parametrize `structure`."""

    def test_candidates_grow_and_stay_below_the_dense_matrix(self, structure: type[Structure]) -> None:
        for shape in ((24, 16), (16, 24), (5, 7), (48, 20)):
            for dtype in TYPES[1:]:
                candidates = list(structure.candidates(shape, dtype))
                sizes = [candidate.bytes(shape, dtype) for candidate in candidates]
                assert sizes == sorted(sizes)
                assert sizes[-1] < shape[0] * shape[1] * dtype.itemsize
                for candidate in candidates:
                    candidate.check(shape)
        assert list(structure.candidates((1, 1), torch.float32)) == []

    def test_families_grow_as_well(self, structure: type[Structure]) -> None:
        shape = (96, 48)
        families = structure.families(shape, torch.float32)
        assert families
        for family in families:
            sizes = [spec.bytes(shape) for spec in family]
            assert sizes == sorted(sizes)
            for spec in family:
                spec.check(shape)

    def test_new_layers_start_like_dense_ones(self, structure: type[Structure]) -> None:
        shape = (400, 300)
        spec = next(s for s in structure.candidates(shape, torch.float64) if s.bytes(shape) > 4 * 16 * sum(shape))
        layer = FactorizedLinear(spec, shape, dtype=torch.float64)
        assert layer.to_dense().std().item() == pytest.approx(nn.Linear(300, 400).weight.std().item(), rel=0.05)
        spec.initialize({name: t.detach() for name, t in layer.factors.items()}, std=0.3)
        dense = layer.to_dense()
        assert dense.std().item() == pytest.approx(0.3, rel=0.05)
        assert dense.mean().abs().item() < 0.01

    def test_usual_errors_are_ordered(self, structure: type[Structure]) -> None:
        parts = [part for part, _ in structure.relative_errors]
        assert parts == sorted(parts, reverse=True)
        assert all(0 < part < 1 and factor > 0 for part, factor in structure.relative_errors)


def check_graphs_elsewhere(cases: str) -> None:
    """`check_graphs` in a new process, whose compiler meets no checks of annotations.

    Args:
        cases: lines of Python that define `cases`.
    """
    code = f"from tests.contracts.structure import check_graphs\n{cases}\nfor case in cases: check_graphs(case)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_graphs(case: Case) -> None:
    """Capture layers as one graph each. The wrappers that check annotations hide the code from `torch.compile`, so this
    runs in a process without them."""
    for layer, x in (
        (case.linear(torch.float32), case.input(3, dtype=torch.float32)),
        (case.embedding(), case.index(3)),
        (quantized(case.linear(torch.float32)), case.input(3, dtype=torch.float32)),
    ):
        torch._dynamo.reset()  # one function compiled for many specs is recompiled only so often
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        # Close, not equal: a library of products may sum in another order where tensors lie elsewhere in memory, and of
        # few tokens some products in int8 take 16 bits.
        assert_close(compiled(x), layer(x), 1e-4)
        exported = torch.export.export(layer.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        for rows in (3, 5):
            # Where a derivative is wanted, no kernel rounds the input.
            floating = x.is_floating_point()
            more = case.input(rows, dtype=torch.float32).requires_grad_() if floating else case.index(rows)
            torch.testing.assert_close(exported.module()(more), layer(more))
