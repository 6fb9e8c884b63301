"""How fast factors multiply a single row, as generation does, against the time in which their bytes can be read.

    python benchmarks/one_row.py

For each shape and structure, and for dense matrices: as many different layers as fill `--megabytes`, more than caches
hold, called one after another, in float32 and in int8. Rounds are interleaved with a copy of as many bytes. The floor
is the time in which memory moves the layers' bytes at the rate of the copy, which reads each byte and writes it. Small
matrices take longer than that to be called from Python at all: `call_milliseconds` are those of a layer of the same
structure that has next to nothing to multiply, and `times_floor_inside` is what is left without them.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import append_line, machine, options, start
from torch import Tensor, nn

from factorformer import DenseSparse, KroneckerSum, LowRank, Structure
from factorformer.layers.nn import FactorizedLinear
from factorformer.planning.evidence.times import interleaved
from factorformer.structures.dense import Dense
from factorformer.structures.integers import Bits, quantize

WIDTHS: tuple[Bits | None, ...] = (None, 8)

MOST = 2**13
"""Layers, at most; those of so few bytes that caches hold as many are Kronecker sums, which reading does not limit."""

TERMS = 16
"""Kronecker products in a sum, at most: with more of them it is their multiply-adds that take the time."""

SHAPES = [(576, 576), (1536, 576), (768, 3072), (4096, 4096), (11008, 4096)]
"""Of SmolLM2-135M, of BERT, and of models of seven billion parameters."""


def specs(shape: tuple[int, int]) -> dict[str, Structure]:
    """A size of each structure that has a third of the values of the matrix; Kronecker sums have fewer."""
    out, inner = shape
    third = out * inner / 3
    side = min(shape)
    nonzeros = round(third / 4 / max(shape) / 8) * 8
    atoms = round((third - nonzeros * max(shape)) / side / 8) * 8
    one = KroneckerSum.of(shape, 1).parameters(shape)
    return {
        "low_rank": LowRank(round(third / (out + inner))),
        "dense_sparse": DenseSparse.of(shape, atoms, nonzeros),
        "kronecker_sum": KroneckerSum.of(shape, min(round(third / one), TERMS)),
    }


def layers_of(
    spec: Structure | None, shape: tuple[int, int], bits: Bits | None, total: int
) -> tuple[list[Callable[[Tensor], Tensor]], int]:
    """Layers of the same values in different places of memory, and the bytes of one."""
    if spec is None and bits is None:
        dense = nn.Linear(shape[1], shape[0])
        size = dense.weight.nbytes
        return [copy.deepcopy(dense) for _ in range(-(-total // size))], size
    layer = FactorizedLinear(spec or Dense(), shape, bias=torch.randn(shape[0]))
    factors = layer.factors if bits is None else quantize(layer.factors, bits)
    size = sum(tensor.nbytes for tensor in factors.values())
    made: list[Callable[[Tensor], Tensor]] = []
    for _ in range(min(-(-total // size), MOST)):
        own = {name: tensor.detach().clone() for name, tensor in factors.items()}
        made.append(FactorizedLinear(spec or Dense(), shape, own, layer.bias, bits=bits))
    return made, size


def cell(shape: tuple[int, int], name: str, spec: Structure | None, bits: Bits | None, args: Any) -> dict[str, Any]:
    """Milliseconds of a layer, and how many times those in which memory moves its bytes."""
    layers, size = layers_of(spec, shape, bits, args.megabytes * 10**6)
    x, whole = torch.randn(1, shape[1]), torch.rand(len(layers) * size // 4)
    target = torch.empty_like(whole)

    def run() -> None:
        for layer in layers:
            layer(x)

    call = call_milliseconds(spec, bits)
    calls = [run, lambda: target.copy_(whole)]
    interleaved(calls, 1, settle=1)
    rounds = interleaved(calls, args.rounds, settle=1)
    milliseconds = statistics.median(ours for ours, _ in rounds) / len(layers)
    # A copy moves each byte twice, which a product reads once.
    floors = sorted(ours / (copied / 2) for ours, copied in rounds)
    inside = sorted((ours - call * len(layers)) / (copied / 2) for ours, copied in rounds)
    return {
        "shape": list(shape),
        "structure": name,
        "bits": bits,
        "bytes": size,
        "layers": len(layers),
        "milliseconds": round(milliseconds, 5),
        "call_milliseconds": round(call, 5),
        "times_floor": [round(q, 3) for q in statistics.quantiles(floors, n=4)],
        "times_floor_inside": [round(q, 3) for q in statistics.quantiles(inside, n=4)],
        "copy_gigabytes_per_second": round(
            2 * len(layers) * size / statistics.median(copied for _, copied in rounds) / 1e6, 2
        ),
    }


def call_milliseconds(spec: Structure | None, bits: Bits | None) -> float:
    """Of a layer of the same structure that has next to nothing to multiply."""
    sizes = {
        LowRank: LowRank(1),
        DenseSparse: DenseSparse.of((16, 16), 4, 1),
        KroneckerSum: KroneckerSum.of((16, 16), 1),
    }
    (small, *_), _ = layers_of(None if spec is None else sizes[type(spec)], (16, 16), bits, 1)
    x = torch.randn(1, 16)
    interleaved([lambda: small(x)], 10, settle=1)
    return statistics.median(t for (t,) in interleaved([lambda: small(x)], 500, settle=1))


def main() -> None:
    parser = options(__doc__, "one_row.jsonl")
    parser.add_argument("--megabytes", type=int, default=256, help="of layers that are called one after another")
    parser.add_argument("--rounds", type=int, default=15)
    args = start(parser)
    args.output.unlink(missing_ok=True)
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in SHAPES:
            for name, spec in {"dense": None, **specs(shape)}.items():
                for bits in WIDTHS:
                    row = cell(shape, name, spec, bits, args)
                    print(json.dumps(row), flush=True)
                    append_line(args.output, {**row, "machine": machine()})


if __name__ == "__main__":
    main()
