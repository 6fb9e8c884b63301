"""How fast factorized layers are on this CPU, against the dense layer and the limits of the machine.

    python benchmarks/products.py

For each shape and number of input rows, interleaved (A B C A B C, the median counts): the dense layer (`F.linear`),
each structure in float32 and int8 as layers run it, the same structure by torch alone, dense-sparse with a materialized
`S`, and where they are installed torchao's int8 layer and tensorly-torch's layer of as many parameters.

Every way is a ratio to the dense layer of the same run. `of ideal` divides that ratio by the ratio of FLOPs, which is
what a kernel as efficient as the dense one would reach. Peaks are measured too: the most FLOPs that any of our float32
products made, the bytes that a copy moves, and a roofline is drawn from them. One line of JSON for each cell.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import HERE, append_line, machine, options, read_lines, start
from torch import Tensor, nn

from factorformer import DenseSparse, KroneckerSum, LowRank, Structure
from factorformer.kernels import cpu
from factorformer.layers.nn import FactorizedLinear
from factorformer.planning.evidence.times import interleaved
from factorformer.structures import integers

SHAPES = [(768, 768), (3072, 768), (768, 3072)]
ROWS = [1, 16, 128, 1024]
ROOFLINE = HERE.parent / "docs" / "images" / "roofline.svg"
TARGETS = {"dense_sparse": 0.6, "low_rank": 0.85, "kronecker": 0.5}
"""What part of the FLOP-ideal speedup is asked for, from 16 rows on."""


def specs(shape: tuple[int, int], rank: int, atoms: int, nonzeros: int) -> dict[str, Structure]:
    """One size of each structure."""
    return {
        "low_rank": LowRank(rank),
        "dense_sparse": DenseSparse.of(shape, atoms, nonzeros),
        "kronecker": KroneckerSum.of(shape, rank),
    }


def by_torch(layer: FactorizedLinear) -> Callable[[Tensor], Tensor]:
    """The layer without the compiled kernels."""

    def run(x: Tensor) -> Tensor:
        available, cpu.AVAILABLE = cpu.AVAILABLE, False
        try:
            return layer(x)
        finally:
            cpu.AVAILABLE = available

    return run


def materialized(layer: FactorizedLinear) -> Callable[[Tensor], Tensor]:
    """A dense-sparse layer with `S` materialized ahead of time, which no product has to wait for."""
    spec, factors = layer.spec, layer.factors
    assert isinstance(spec, DenseSparse)
    wide, dictionary = spec.coefficients(factors).detach(), factors["dictionary"].detach()
    if spec.side == "rows":
        return lambda x: F.linear(F.linear(x, dictionary), wide, layer.bias)
    turned = dictionary.T
    return lambda x: F.linear(x @ wide, turned, layer.bias)


def peers(shape: tuple[int, int], rank: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Layers of other packages, those that are installed."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = nn.Sequential(nn.Linear(shape[1], shape[0]))
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        found["torchao int8"] = layer
    if importlib.util.find_spec("tltorch"):
        import tltorch

        def halves(side: int) -> tuple[int, int]:
            first = next(d for d in range(math.isqrt(side), 0, -1) if side % d == 0)
            return side // first, first

        wanted = rank * sum(shape)
        found["tensorly-torch"] = tltorch.FactorizedLinear(
            halves(shape[1]), halves(shape[0]), factorization="blocktt", rank=wanted / math.prod(shape)
        )
    return found


def cell(shape: tuple[int, int], rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """All ways to multiply one shape by so many rows of input."""
    out, inner = shape
    x, dense = torch.randn(rows, inner), nn.Linear(inner, out)
    runs: dict[str, Callable[[Tensor], Tensor]] = {"dense": dense}
    costs: dict[str, tuple[int, int]] = {"dense": (2 * out * inner, 4 * out * inner)}
    for name, spec in specs(shape, args.rank, args.atoms, args.nonzeros).items():
        layer = FactorizedLinear(spec, shape, bias=torch.randn(out))
        expected = F.linear(x.double(), layer.to_dense().detach().double(), layer.bias.double())
        runs[name], runs[f"{name} torch"] = layer, by_torch(layer)
        if name == "dense_sparse":
            runs["dense_sparse materialized"] = materialized(layer)
        small = FactorizedLinear(spec, shape, integers.quantize(layer.factors, 8), layer.bias, bits=8)
        runs[f"{name} int8"] = small
        with torch.inference_mode():
            for way, bound in ((layer, 1e-4), (small, 5e-2)):
                error = float((way(x) - expected).norm() / expected.norm())
                assert error < bound, f"{name} of {shape} is off by {error:.2g}"
        flops = spec.flops(shape)
        for way in (name, f"{name} torch", "dense_sparse materialized"):
            costs.setdefault(way, (flops, spec.bytes(shape)))
        costs[f"{name} int8"] = flops, spec.bytes(shape, torch.int8)
    runs |= peers(shape, args.rank)
    names = list(runs)
    calls = [lambda name=name: runs[name](x) for name in names]
    interleaved(calls, 3, settle=1)
    times = interleaved(calls, args.rounds, seconds=args.seconds, settle=1)
    columns = dict(zip(names, zip(*times, strict=True), strict=True))
    ways = {}
    for name in names:
        ratios = [d / t for d, t in zip(columns["dense"], columns[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = statistics.median(columns[name])
        ways[name] = {"milliseconds": milliseconds, "ratio": middle, "quartiles": [low, high]}
        if name in costs:
            flops, size = costs[name]
            ways[name] |= {
                "gflops": rows * flops / milliseconds / 1e6,
                "of_ideal": middle * flops / (2 * out * inner),
                "intensity": rows * flops / (size + 4 * rows * (out + inner)),
            }
    return {"shape": list(shape), "rows": rows, "rounds": len(times), "ways": ways}


def peaks() -> dict[str, float]:
    """The most that a large float32 product of torch and of ours makes, in GFLOP/s, and GB/s that a copy moves."""
    side = 1536
    x, weight, big = torch.randn(side, side), torch.randn(side, side), torch.randn(2**25)
    target = torch.empty_like(big)
    runs = [
        lambda: F.linear(x, weight),
        lambda: cpu.chain(x, [weight], [None], [False], None) if cpu.AVAILABLE else F.linear(x, weight),
        lambda: target.copy_(big),
    ]
    interleaved(runs, 3)
    torch_ms, ours_ms, copy_ms = (min(column) for column in zip(*interleaved(runs, 15), strict=True))
    flops = 2 * side**3 / 1e6
    return {"torch_gflops": flops / torch_ms, "our_gflops": flops / ours_ms, "copy_gbs": 8 * 2**25 / copy_ms / 1e6}


def roofline(rows: list[dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """GFLOP/s over FLOPs for each byte of weights, input and output."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "products"  # the same file from the same figures
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    ways = ("dense", "low_rank", "low_rank int8", "dense_sparse", "kronecker")
    for way, marker in zip(ways, "osvD^", strict=True):
        points = [row["ways"][way] for row in rows if way in row["ways"]]
        axis.scatter([p["intensity"] for p in points], [p["gflops"] for p in points], marker=marker, s=28, label=way)
    intensities = [2.0**power for power in range(-3, 12)]
    for name, style in (("our_gflops", "-"), ("torch_gflops", "--")):
        roof = [min(limits[name], limits["copy_gbs"] * intensity) for intensity in intensities]
        axis.plot(intensities, roof, style, color="gray", label=f"{name.split('_')[0]} float32 peak, memory of a copy")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs for each byte", ylabel="GFLOP/s")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__, "products.jsonl")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--atoms", type=int, default=192)
    parser.add_argument("--nonzeros", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw the roofline here")
    parser.add_argument("--draw-only", action="store_true", help="draw the results that are there, and measure nothing")
    args = start(parser)
    if args.draw_only:
        rows = read_lines(args.output)
        roofline(rows, rows[0]["peaks"], args.plot or ROOFLINE)
        return
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    limits = peaks()
    print(f"kernels: {cpu.variant()}, threads: {args.threads}, " + ", ".join(f"{k} {v:.0f}" for k, v in limits.items()))
    args.output.unlink(missing_ok=True)
    rows = []
    for shape in SHAPES:
        for count in ROWS:
            row = cell(shape, count, args)
            rows.append(row)
            sizes = {"rank": args.rank, "atoms": args.atoms, "nonzeros": args.nonzeros, "seed": args.seed}
            append_line(args.output, {**row, **sizes, "peaks": limits, "kernels": cpu.variant(), "machine": machine()})
            print(f"\n{shape[0]}x{shape[1]}, {count} rows: dense {row['ways']['dense']['milliseconds']:.3f} ms")
            for name, way in row["ways"].items():
                ideal = f"{way['of_ideal']:5.2f} of ideal" if "of_ideal" in way else ""
                missed = count >= 16 and way.get("of_ideal", 1.0) < TARGETS.get(name, 0.0)
                print(f"  {name:<24} {way['ratio']:6.2f}x {ideal}{'  below its target' if missed else ''}")
    if args.plot:
        roofline(rows, limits, args.plot)


if __name__ == "__main__":
    main()
