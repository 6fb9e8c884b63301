"""Which products the compiled kernels do, and that all the others are torch's and right too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.kernels.graph_worker import SHAPE, STRUCTURES
from tests.kernels.test_support import positions
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from factorformer import DenseSparse, LowRank
from factorformer.kernels import Dense, chain, cpu, dense, sparse_product, support
from factorformer.layers.nn import FactorizedLinear

compiled = pytest.mark.skipif(not cpu.AVAILABLE, reason="the kernels are not compiled here")


@pytest.fixture(params=[(spec, whole) for spec in STRUCTURES for whole in (False, True)], ids=str)
def layer(request: pytest.FixtureRequest) -> FactorizedLinear:
    spec, quantized = request.param
    layer = FactorizedLinear(spec, SHAPE, bias=torch.randn(SHAPE[0]))
    if quantized:
        layer.quantize()
    return layer.eval()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the compiled kernels that ran."""
    ran: list[str] = []

    def counting(name: str, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: object) -> Tensor:
            ran.append(name)
            return kernel(*arguments)

        return run

    monkeypatch.setattr(cpu, "chain", counting("chain", cpu.chain))
    return ran


def product(layer: FactorizedLinear, x: Tensor) -> Tensor:
    """The layer's product in float64."""
    assert layer.bias is not None
    return x.double() @ layer.to_dense().double().T + layer.bias.double()


@pytest.mark.parametrize("n", [1, 40])
def test_inference(layer: FactorizedLinear, n: int) -> None:
    x = torch.randn(2, n, SHAPE[1])
    with torch.inference_mode():
        expected = product(layer, x)
        # Of few tokens, a sparse matrix in int8 takes 16 bits.
        part = (2e-2 if n > 4 else 3e-5) if layer.quantized else 0.0
        allowed = max(part * float(expected.abs().max()), 1e-5)
        torch.testing.assert_close(layer(x).double(), expected, atol=allowed, rtol=0)


def test_derivatives_are_those_of_the_dense_layer(layer: FactorizedLinear) -> None:
    x = torch.randn(7, SHAPE[1], requires_grad=True)
    other = x.detach().double().requires_grad_()
    gradient = torch.randn(7, SHAPE[0])
    layer(x).backward(gradient)
    factors = {name: tensor.detach().clone() for name, tensor in layer.factors.items()}
    twin = FactorizedLinear(layer.spec, SHAPE, factors, bits=8 if layer.quantized else None).double()
    with torch.enable_grad():
        (other @ twin.to_dense().T).backward(gradient.double())
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in layer.named_parameters():
        if name != "bias" and parameter.requires_grad:
            assert parameter.grad is not None
            wanted = twin.get_parameter(name).grad
            assert wanted is not None
            torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@compiled
def test_who_multiplies(counted: list[str]) -> None:
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    expected = x @ weight.T

    def ran(of: Tensor, by: Tensor = weight) -> int:
        counted.clear()
        torch.testing.assert_close(chain(of, (Dense(by),)).to(torch.float32), expected, atol=0.03, rtol=0.02)
        return len(counted)

    assert ran(x) == 1
    assert ran(x.T.contiguous().T) == 1
    assert ran(x, weight.T.contiguous().T) == 0
    assert ran(x.clone().requires_grad_()) == 0
    assert ran(x, nn.Parameter(weight)) == 0
    with torch.no_grad():
        assert ran(x, nn.Parameter(weight)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(x) == 0
        assert chain(x, (Dense(weight),)).dtype == torch.bfloat16
    assert ran(x.double().float()) == 1
    counted.clear()
    assert chain(x.double(), (Dense(weight.double()),)).dtype == torch.float64
    assert chain(x.to("meta"), (Dense(weight.to("meta")),)).shape == (6, 4)

    class Wrapped(Tensor):
        """Its values may lie anywhere."""

    chain(x.as_subclass(Wrapped), (Dense(weight),))
    assert not counted
    with FlopCounterMode(display=False) as counter:
        chain(x, (Dense(weight),))
    assert counter.get_total_flops() == 2 * 6 * 5 * 4
    assert not counted


@compiled
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch itself
def test_transforms_go_through_torch(layer: FactorizedLinear) -> None:
    x, tangent = torch.randn(3, SHAPE[1]), torch.randn(3, SHAPE[1])
    with torch.no_grad():
        expected, rate = product(layer, x).float(), (tangent.double() @ layer.to_dense().double().T).float()
        if not isinstance(layer.spec, DenseSparse):  # its operators have derivatives in reverse alone
            torch.testing.assert_close(torch.func.vmap(layer)(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], rate, rtol=1e-4, atol=1e-5)
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
                torch.testing.assert_close(dual.tangent, rate, rtol=1e-4, atol=1e-5)


@compiled
def test_traces_hold_the_product_and_not_its_result() -> None:
    layer = FactorizedLinear(LowRank(rank=3), SHAPE).eval().requires_grad_(False)
    with torch.no_grad(), pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(layer, torch.randn(3, SHAPE[1]))
    x = torch.randn(5, SHAPE[1])
    torch.testing.assert_close(traced(x), layer(x))


def test_exports_hold_no_kernel_of_chains(layer: FactorizedLinear) -> None:
    x = torch.randn(2, 5, SHAPE[1])
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        allowed = 2e-2 if layer.quantized else 1e-5
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=allowed)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("factorformer.chain" in target for target in targets)
    assert any("factorformer.sparse" in target for target in targets) == isinstance(layer.spec, DenseSparse)


@compiled
@pytest.mark.parametrize("quantized", [False, True])
def test_the_operator_keeps_the_promises_that_torch_needs(quantized: bool) -> None:
    x, scales = torch.randn(6, 5), [torch.rand(4), None] if quantized else [None, None]
    first = torch.randint(-9, 9, (4, 5), dtype=torch.int8) if quantized else torch.randn(4, 5)
    arguments = (x, [first, torch.randn(4, 7)], scales, [False, True], torch.randn(7))
    torch.library.opcheck(torch.ops.factorformer.chain.default, arguments)


def test_sparse_derivatives_in_float32() -> None:
    where = positions(40, 33, 7)
    values, packed = torch.randn(40, 7), support.pack(where, 33)
    dense = torch.zeros(40, 33, dtype=torch.float64).scatter(1, where, values.double())
    values.requires_grad_()
    for transposed in (False, True):
        x = torch.randn(6, 40 if transposed else 33, requires_grad=True)
        made = sparse_product(x, values, packed, 33, transposed=transposed)
        gradient = torch.randn_like(made)
        for_x, for_values = torch.autograd.grad(made, (x, values), gradient)
        g, a = gradient.double(), x.detach().double()
        torch.testing.assert_close(for_x.double(), g @ (dense.T if transposed else dense), rtol=1e-5, atol=1e-5)
        outer = a.T @ g if transposed else g.T @ a
        torch.testing.assert_close(for_values.double(), outer.gather(1, where), rtol=1e-5, atol=1e-5)


def test_served_needs_no_derivative_and_no_cast() -> None:
    x = torch.randn(3, 4)
    assert dense.served(x) == cpu.AVAILABLE
    assert not dense.served(x.half())
    assert not dense.served(x, x.T)
    assert not dense.served(x.requires_grad_())
