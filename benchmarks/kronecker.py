"""How fast products with sums of Kronecker products are, against the ways there are to do without them.

    pip install tensorly tensorly-torch opt-einsum
    python benchmarks/kronecker.py

At ten times fewer parameters (`--fewer`), forward and forward with backward, over widths and rows of input:

- `kron`: a `KroneckerSum` layer of the default factor shapes;
- `dense`: `nn.Linear`;
- `build`: the same Kronecker sum materialized by `torch.einsum`, then `F.linear`;
- `tt`: the factorized linear layer of tensorly-torch with a block tensor train of no fewer parameters than fit, in its
  own tensorized shapes: three modes (the default of `from_linear`), contracted from left to right, as it is installed;
- `tt2`, `tt3`: the same of two and of three modes where opt_einsum is installed, which lets `torch.einsum` look for the
  cheapest order of contraction. tensorly-torch does not ask for it, but it is far faster with it;
- `lowrank`: a plain low-rank layer of as many parameters, for information: it has less to say at the same size.

All are interleaved, A B C A B C. The table shows the median time of `dense`, what the others take in units of `kron`
(above 1: `kron` is faster), the part of the ideal that `kron` reaches (the time of the dense layer scaled by the ratio
of FLOPs) and its GFLOP/s beside those of a large GEMM. Before it is timed, each competitor's output and input gradient
are compared with those of its own dense matrix. `-` is a competitor that was left out, because a run of it would take
longer than `--patience` or more memory than `--memory`.

The second table: rows of a factorized embedding against `nn.Embedding`, and the output head that is tied to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, options, start, write
from torch import Tensor, nn

from factorformer import FactorizedEmbedding, FactorizedLinear, KroneckerSum, LowRank, Structure

try:
    import tltorch
    from tltorch.utils import get_tensorized_shape
except ImportError:
    tltorch = get_tensorized_shape = None

Shape = tuple[int, int]
MODES = ("forward", "backward")
SHAPES: list[Shape] = [(w, w) for w in (512, 1024, 2048, 4096)]
SHAPES += [(2048, 512), (512, 2048), (4096, 1024), (1024, 4096)]
ROWS = [128, 1024, 4096]
TABLES: list[Shape] = [(8000, 512), (30522, 384)]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECKED_ROWS = 64
SYNCHRONIZE = {"cpu": lambda: None, "cuda": torch.cuda.synchronize}
PACKAGES = ("tensorly", "tensorly-torch", "opt-einsum")


@dataclasses.dataclass
class Competitor:
    """One way to multiply: a function of the input, what it learns, its matrix, and its largest intermediate tensor."""

    name: str
    forward: Callable[[Tensor], Tensor]
    learned: list[Tensor]
    matrix: Callable[[], Tensor]
    elements_per_row: int = 0

    def run(self, x: Tensor, gradient: Tensor, mode: str) -> None:
        if mode == "forward":
            with torch.inference_mode():
                self.forward(x)
        else:
            inputs = [x] if x.requires_grad else []
            torch.autograd.grad(self.forward(x), [*inputs, *self.learned], gradient)

    def error(self, x: Tensor, gradient: Tensor) -> float:
        """Largest relative error of output and input gradient against the product with the dense matrix."""
        x, gradient = x[:CHECKED_ROWS].detach().requires_grad_(), gradient[:CHECKED_ROWS]
        matrix = self.matrix().detach().double()
        output = self.forward(x)
        (actual,) = torch.autograd.grad(output, x, gradient)
        with torch.no_grad():
            pairs = (output, x.double() @ matrix.T), (actual, gradient.double() @ matrix)
            return max(relative_error(one, other) for one, other in pairs)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def largest_below(structure: type[Structure], shape: Shape, values: float) -> Structure:
    """The largest spec of a kind that stores at most so many values."""
    return [s for s in structure.candidates(shape, torch.float32) if s.parameters(shape) <= values][-1]


def factorized(name: str, spec: Structure, shape: Shape, dtype: torch.dtype) -> Competitor:
    layer = FactorizedLinear(spec, shape, dtype=dtype)
    return Competitor(name, layer, list(layer.parameters()), layer.to_dense)


def multiplied_out(kron: Competitor, shape: Shape, spec: KroneckerSum) -> Competitor:
    """The factors of `kron`, contracted to the matrix whenever it is needed."""
    left, right = kron.learned
    rows, columns = spec.left[0] * spec.right[0], spec.left[1] * spec.right[1]

    def build() -> Tensor:
        return torch.einsum("ijk,akb->iajb", left, right).reshape(rows, columns)[: shape[0], : shape[1]]

    return Competitor("build", lambda x: F.linear(x, build()), kron.learned, kron.matrix)


def block_tt(name: str, modes: int, values: int, shape: Shape, dtype: torch.dtype, *, ordered: bool) -> Competitor:
    """tensorly-torch's layer at the largest rank that stores at most so many values."""
    assert tltorch is not None
    assert get_tensorized_shape is not None
    inner, out = get_tensorized_shape(shape[1], shape[0], order=modes, verbose=False)
    sizes = [i * o for i, o in zip(inner, out, strict=True)]

    def stored(rank: int) -> int:
        return rank * (sizes[0] + sizes[-1]) + rank**2 * sum(sizes[1:-1])

    rank = next(rank for rank in itertools.count(1) if stored(rank + 1) > values)
    ranks: Any = (1, *[rank] * (modes - 1), 1)
    layer = tltorch.FactorizedLinear(inner, out, bias=False, factorization="BlockTT", rank=ranks, dtype=dtype)
    layer.weight.normal_(0, shape[1] ** -0.5)
    assert sum(p.numel() for p in layer.parameters()) == stored(rank)

    def forward(x: Tensor) -> Tensor:
        torch.backends.opt_einsum.enabled = ordered
        return layer(x)

    # From left to right: each contraction turns a mode of the input into one of the output, and has a rank beside them.
    widest = max(math.prod(out[: k + 1]) * math.prod(inner[k + 1 :]) for k in range(modes - 1)) * rank
    return Competitor(name, forward, list(layer.parameters()), layer.weight.to_matrix, 0 if ordered else widest)


def competitors(
    shape: Shape, fewer: float, dtype: torch.dtype, *, compiled: bool
) -> tuple[Structure, list[Competitor]]:
    """All ways to multiply by a matrix of this shape, `kron` first; each knows its own matrix."""
    spec = largest_below(KroneckerSum, shape, math.prod(shape) / fewer)
    assert isinstance(spec, KroneckerSum)
    values = spec.parameters(shape)
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    kron = factorized("kron", spec, shape, dtype)
    found = [
        kron,
        Competitor("dense", dense, [dense.weight], lambda: dense.weight),
        multiplied_out(kron, shape, spec),
        factorized("lowrank", largest_below(LowRank, shape, values), shape, dtype),
    ]
    if compiled:
        torch._dynamo.reset()  # one function compiled for many specs is recompiled only so often
        found.append(dataclasses.replace(kron, name="compiled", forward=torch.compile(kron.forward)))
    if tltorch is not None:
        found.append(block_tt("tt", 3, values, shape, dtype, ordered=False))
        if torch.backends.opt_einsum.is_available():
            found += [block_tt(f"tt{modes}", modes, values, shape, dtype, ordered=True) for modes in (2, 3)]
    return spec, found


class Clock:
    """Interleaved timing of competitors.

    Args:
        device: `cpu` or `cuda`.
        budget: seconds for all rounds of one cell; at least `least` rounds are run.
        least, most: number of rounds.
    """

    def __init__(self, device: str, budget: float, least: int, most: int) -> None:
        self.wait, self.budget, self.least, self.most = SYNCHRONIZE[device], budget, least, most

    def once(self, run: Callable[[], None]) -> float:
        self.wait()
        started = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - started

    def rounds(self, runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        """Seconds of each run in each round, after one that does not count."""
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        started = time.perf_counter()
        for done in range(self.most):
            if done >= self.least and time.perf_counter() - started > self.budget:
                break
            for name, run in runs.items():
                times[name].append(self.once(run))
        return times


def gemm_peak(clock: Clock, dtype: torch.dtype) -> float:
    """GFLOP/s of a large square product."""
    one, other = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)

    def multiply() -> None:
        torch.mm(one, other)

    return 2 * 2048**3 / statistics.median(clock.rounds({"gemm": multiply})["gemm"]) / 1e9


def linear_cells(args: argparse.Namespace, clock: Clock, peak: float) -> Iterator[dict[str, Any]]:
    """One row of results for each shape, number of input rows, and mode."""
    for shape in args.shapes:
        spec, all_ways = competitors(shape, args.fewer, args.dtype, compiled=args.compile)
        per_row: dict[tuple[str, str], float] = {}
        for rows in args.rows:
            x = torch.randn(rows, shape[1], dtype=args.dtype, requires_grad=True)
            gradient = torch.randn(rows, shape[0], dtype=args.dtype)
            for mode in MODES:
                ways = [
                    way
                    for way in all_ways
                    if way.name in ("kron", "dense")
                    or (
                        per_row.get((way.name, mode), 0) * rows <= args.patience
                        and 3 * rows * way.elements_per_row * args.dtype.itemsize <= args.memory * 2**30
                    )
                ]
                errors = {way.name: way.error(x, gradient) for way in ways}
                wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[args.dtype]}
                if wrong:
                    raise SystemExit(f"{shape}, {rows} rows: products differ from those of the dense matrix: {wrong}")
                # Bound as defaults: the runs are over before the names change.
                runs = {w.name: (lambda w=w, m=mode, x=x, g=gradient: w.run(x, g, m)) for w in ways}
                times = clock.rounds(runs)
                median = {name: statistics.median(values) for name, values in times.items()}
                for name, seconds in median.items():
                    per_row[name, mode] = seconds / rows
                passes = 1 if mode == "forward" else 3
                flops = passes * rows * spec.flops(shape)
                dense_flops = passes * rows * 2 * math.prod(shape)
                cell = {
                    "shape": shape,
                    "rows": rows,
                    "mode": mode,
                    "spec": spec.to_dict(),
                    **measured(ways, times, median),
                    "flops_ratio": dense_flops / flops,
                    "share_of_ideal": median["dense"] / median["kron"] * flops / dense_flops,
                    "gflops": flops / median["kron"] / 1e9,
                    "share_of_gemm": flops / median["kron"] / 1e9 / peak,
                    "errors": errors,
                }
                yield {**cell, "missed": missed(cell)}


def measured(ways: list[Competitor], times: dict[str, list[float]], median: dict[str, float]) -> dict[str, Any]:
    """What the timing of a cell gave, and the sizes of what was timed."""
    return {
        "parameters": {way.name: sum(p.numel() for p in way.learned) for way in ways},
        "rounds": len(times["kron"]),
        "seconds": median,
        "slower_than_kron": {name: seconds / median["kron"] for name, seconds in median.items()},
    }


def missed(cell: dict[str, Any]) -> list[str]:
    """The targets that a cell does not reach: 2x the dense speed from width 1024 on and 1x below, 2x tensorly-torch."""
    factors = cell["slower_than_kron"]
    target = 2.0 if min(cell["shape"]) >= 1024 else 1.0
    found = [f"{factors['dense']:.2f}x dense, target {target:g}x"] if factors["dense"] < target else []
    return found + [f"{factors[tt]:.2f}x {tt}, target 2x" for tt in ("tt", "tt2", "tt3") if factors.get(tt, 2) < 2]


def table_cells(args: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Rows of embeddings, and heads tied to them."""
    for shape in args.tables:
        spec = largest_below(KroneckerSum, shape, math.prod(shape) / args.fewer)
        kron, dense = FactorizedEmbedding(spec, shape, dtype=args.dtype), nn.Embedding(*shape, dtype=args.dtype)
        matrix = kron.to_dense().detach()
        for rows in args.rows:
            index = torch.randint(0, shape[0], (rows,))
            x = torch.randn(rows, shape[1], dtype=args.dtype, requires_grad=True)
            uses = {
                "rows": (index, kron, dense, matrix[index]),
                "head": (x, kron.matmul, lambda x, dense=dense: F.linear(x, dense.weight), x.detach() @ matrix.T),
            }
            for use, (given, fast, slow, expected) in uses.items():
                if use == "head" and rows > 1024:
                    continue  # the logits alone would take half a GiB
                with torch.no_grad():
                    error = relative_error(fast(given), expected)
                if not error <= TOLERANCE[args.dtype]:
                    raise SystemExit(f"{use} of {shape} differ from those of the dense matrix by {error}")
                gradient = torch.randn(rows, shape[1] if use == "rows" else shape[0], dtype=args.dtype)
                ways = [
                    Competitor("kron", fast, list(kron.parameters()), kron.to_dense),
                    Competitor("dense", slow, [dense.weight], lambda dense=dense: dense.weight),
                ]
                for mode in MODES:
                    runs = {w.name: (lambda w=w, m=mode, x=given, g=gradient: w.run(x, g, m)) for w in ways}
                    times = clock.rounds(runs)
                    median = {name: statistics.median(values) for name, values in times.items()}
                    yield {
                        "shape": shape,
                        "use": use,
                        "rows": rows,
                        "mode": mode,
                        "spec": spec.to_dict(),
                        **measured(ways, times, median),
                        "error": error,
                    }


def describe(spec: dict[str, Any]) -> str:
    (m1, n1), (m2, n2) = spec["left"], spec["right"]
    return f"{spec['rank']} x {m1}x{n1} (x) {m2}x{n2}"


def label(cell: dict[str, Any]) -> str:
    return f"{cell['shape'][0]}x{cell['shape'][1]}, {cell['rows']} rows, {cell['mode']}"


def parse() -> argparse.Namespace:
    parser = options(__doc__, "kronecker.json")
    parser.add_argument("--fewer", type=float, default=10, help="times fewer parameters than the dense matrix")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=list(SYNCHRONIZE), default="cpu")
    parser.add_argument("--widths", nargs="+", type=int, help="square matrices of these widths only")
    parser.add_argument("--rows", nargs="+", type=int, help="rows of input")
    parser.add_argument("--compile", action="store_true", help="also the layer under torch.compile")
    parser.add_argument("--quick", action="store_true", help="a few small cells, to see that it works; keeps no file")
    parser.add_argument(
        "--budget", type=float, default=1.5, help="seconds for a cell; three rounds are run in any case"
    )
    parser.add_argument("--patience", type=float, default=6, help="leave out what would take so many seconds for a run")
    parser.add_argument("--memory", type=float, default=8, help="leave out what would take so many GiB")
    parser.add_argument("--seed", type=int, default=0)
    args = start(parser)
    args.shapes, args.tables, args.rows = SHAPES, TABLES, args.rows or (ROWS[:2] if args.quick else ROWS)
    if args.quick:
        args.shapes, args.tables, args.budget = SHAPES[:2], TABLES[:1], 0.3
    if args.widths:
        args.shapes = [(width, width) for width in args.widths]
    args.dtype = getattr(torch, args.dtype)
    return args


def main() -> None:
    args = parse()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    clock = Clock(args.device, args.budget, least=3, most=50)
    if tltorch is None:
        print("tensorly-torch is not installed: pip install tensorly tensorly-torch opt-einsum")
    peak = gemm_peak(clock, args.dtype)
    print(f"GEMM: {peak:.0f} GFLOP/s in {args.dtype}, {torch.get_num_threads()} threads")
    names = ["dense", "build", "tt", "tt2", "tt3", "lowrank", *(["compiled"] if args.compile else [])]
    print(
        f"{'matrix':<10} {'rows':>5} {'mode':<9} {'Kronecker sum':<28} {'dense ms':>9} {'kron ms':>9}"
        + "".join(f" {f'{name}/kron':>{max(10, len(name) + 5)}}" for name in names)
        + f" {'of ideal':>9} {'GFLOP/s':>8}"
    )
    cells = []
    for cell in linear_cells(args, clock, peak):
        cells.append(cell)
        shape, ratios = cell["shape"], cell["slower_than_kron"]
        columns = (f" {f'{ratios[name]:.2f}' if name in ratios else '-':>{max(10, len(name) + 5)}}" for name in names)
        print(
            f"{f'{shape[0]}x{shape[1]}':<10} {cell['rows']:>5} {cell['mode']:<9} {describe(cell['spec']):<28} "
            f"{1e3 * cell['seconds']['dense']:>9.2f} {1e3 * cell['seconds']['kron']:>9.2f}{''.join(columns)} "
            f"{cell['share_of_ideal']:>9.0%} {cell['gflops']:>8.0f}{' <' if cell['missed'] else ''}",
            flush=True,
        )
    print(f"\n{'table':<10} {'use':<5} {'rows':>5} {'mode':<9} {'dense ms':>9} {'kron ms':>9} {'dense/kron':>11}")
    tables = []
    for cell in table_cells(args, clock):
        tables.append(cell)
        shape, seconds = cell["shape"], cell["seconds"]
        print(
            f"{f'{shape[0]}x{shape[1]}':<10} {cell['use']:<5} {cell['rows']:>5} {cell['mode']:<9} "
            f"{1e3 * seconds['dense']:>9.2f} {1e3 * seconds['kron']:>9.2f} {cell['slower_than_kron']['dense']:>11.2f}",
            flush=True,
        )
    failing = [cell for cell in cells if cell["missed"]]
    print(f"\n{len(cells) - len(failing)} of {len(cells)} cells reach their targets; below target (<):")
    for cell in failing:
        print(f"  {label(cell)}: {'; '.join(cell['missed'])}")
    if not failing:
        print("  none")
    print(f"{time.perf_counter() - started:.0f} s")
    if args.quick:
        return
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if tltorch is not None}
    content = {
        "seed": args.seed,
        "fewer": args.fewer,
        "dtype": str(args.dtype).removeprefix("torch."),
        "gemm_gflops": peak,
        "cells": cells,
        "tables": tables,
        "machine": {**machine(), **installed},
    }
    write(args.output, content)


if __name__ == "__main__":
    main()
