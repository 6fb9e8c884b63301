"""Compiled graphs equal eager, in a process of its own: compilers cannot trace checked annotations."""

from __future__ import annotations

import torch

from factorformer import DenseSparse, KroneckerSum, LowRank
from factorformer.layers.nn import FactorizedLinear

SHAPE = (24, 20)
STRUCTURES = [
    LowRank(rank=3),
    KroneckerSum(rank=2, left=(4, 4), right=(6, 5)),
    DenseSparse(atoms=12, nonzeros=3),
    DenseSparse(atoms=12, nonzeros=4, side="columns"),
]


def check(layer: FactorizedLinear) -> None:
    torch._dynamo.reset()
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, SHAPE[1])
    with torch.inference_mode():
        torch.testing.assert_close(graph(x), layer(x), rtol=1e-4, atol=3e-2 if layer.quantized else 1e-5)
    x.requires_grad_()
    found, expected = (torch.autograd.grad(product(x).square().sum(), x)[0] for product in (graph, layer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def main() -> None:
    for spec in STRUCTURES:
        for quantized in (False, True):
            torch.manual_seed(0)
            layer = FactorizedLinear(spec, SHAPE, bias=torch.randn(SHAPE[0]))
            if quantized:
                layer.quantize()
            check(layer.eval())
