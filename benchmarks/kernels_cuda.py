"""How fast dense-sparse layers are on a GPU, against the dense layer and against building `S` before each product.

    pip install triton  # if torch did not bring it
    python benchmarks/kernels_cuda.py

Needs CUDA. Over shapes, rows of input and types, forward and forward with backward (gradients of the input and of all
that is learned):

- `dense`: `F.linear` with a matrix of the layer's shape;
- `sparse`: the layer `S D` through the operators `factorformer::sparse_matmul` and so on, that is the Triton kernels;
- `build`: the same layer with `S` scattered into a dense matrix in each call, then `F.linear`; its positions are
  unpacked ahead, which the time does not count.

All run in turns, A B C A B C. `device` is the time of a call inside of a CUDA graph, which is what the GPU takes;
`eager` that of calls from Python, which for small layers is what Python and the launches take. Inputs are in the
caches of the GPU, as they are after the layer before. Before it is timed, each product is compared with the dense one
in float64. One line of JSON for each cell, with the name of the device, is added to the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, append_line, machine
from torch import Tensor

from factorformer import DenseSparse
from factorformer.kernels import cuda, sparse_product, support

SHAPES = [(768, 768), (3072, 768), (768, 3072)]
ROWS = [16, 128, 1024, 8192]
MODES = ("forward", "backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
MILLISECONDS = 2.0
"""What is timed at once takes about so long."""


@dataclasses.dataclass
class Way:
    """One way to multiply: a function of the input, and what it learns."""

    name: str
    forward: Callable[[Tensor], Tensor]
    learned: list[Tensor]

    def run(self, x: Tensor, gradient: Tensor, mode: str) -> None:
        if mode == "forward":
            with torch.no_grad():
                self.forward(x)
        else:
            torch.autograd.grad(self.forward(x), [x, *self.learned], gradient)


def ways(spec: DenseSparse, shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[list[Way], Tensor]:
    """The ways to multiply by matrices of a shape, and the matrix of `sparse` and `build` in float64."""
    long, short = spec.sides(shape)
    positions = torch.rand(long, spec.atoms, device=device).topk(spec.nonzeros, dim=1).indices.sort(1).values
    packed = support.pack(positions, spec.atoms)
    values = torch.randn(long, spec.nonzeros, device=device) / spec.nonzeros**0.5
    dictionary = torch.randn(spec.atoms, short, device=device) / short**0.5
    weight = torch.randn(shape, device=device) / shape[1] ** 0.5
    values, dictionary, weight = (tensor.to(dtype).requires_grad_() for tensor in (values, dictionary, weight))

    def build() -> Tensor:
        return values.new_zeros(long, spec.atoms).scatter(1, positions, values)

    def multiply(x: Tensor) -> Tensor:
        if spec.side == "rows":
            return sparse_product(F.linear(x, dictionary), values, packed, spec.atoms)
        product = sparse_product(x, values, packed, spec.atoms, transposed=True)
        return F.linear(product, dictionary.T)

    def through_dense(x: Tensor) -> Tensor:
        if spec.side == "rows":
            return F.linear(F.linear(x, dictionary), build())
        return F.linear(F.linear(x, build().T), dictionary.T)

    with torch.no_grad():
        matrix = build().double() @ dictionary.double()
    found = [
        Way("dense", lambda x: F.linear(x, weight), [weight]),
        Way("sparse", multiply, [values, dictionary]),
        Way("build", through_dense, [values, dictionary]),
    ]
    return found, matrix if spec.side == "rows" else matrix.T


def check(found: list[Way], matrix: Tensor, x: Tensor, gradient: Tensor) -> dict[str, float]:
    """Largest relative error of output and input gradient of the factorized ways."""
    errors = {}
    for way in found[1:]:
        output = way.forward(x)
        (back,) = torch.autograd.grad(output, x, gradient)
        pairs = (output.detach(), x.detach().double() @ matrix.T), (back, gradient.double() @ matrix)
        errors[way.name] = max(float((a.double() - e).norm() / e.norm()) for a, e in pairs)
    return errors


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], None], calls: int) -> float:
    """Time of a call, of so many in a row."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(calls):
        run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / calls


def in_turns(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each, in each round."""
    calls = {}
    for name, run in runs.items():
        milliseconds(run, 3)
        calls[name] = max(1, math.ceil(MILLISECONDS / milliseconds(run, 3)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, calls[name]))
    return times


def cell(spec: DenseSparse, shape: tuple[int, int], n: int, dtype: torch.dtype, args: argparse.Namespace) -> Any:
    """All measurements of one shape, number of rows, and type: one result for each mode."""
    found, matrix = ways(spec, shape, dtype, "cuda")
    x = torch.randn(n, shape[1], device="cuda").to(dtype).requires_grad_()
    gradient = torch.randn(n, shape[0], device="cuda").to(dtype)
    errors = check(found, matrix, x, gradient)
    tolerance = TOLERANCE[torch.float16 if args.tf32 and dtype == torch.float32 else dtype]  # as many bits
    if not max(errors.values()) <= tolerance:
        raise SystemExit(f"{shape}, {n} rows of {dtype}: products differ from those of the dense matrix: {errors}")
    for mode in MODES:
        runs = {way.name: (lambda way=way, mode=mode: way.run(x, gradient, mode)) for way in found}
        times = {
            "device": in_turns({name: captured(run) for name, run in runs.items()}, args.repeats),
            "eager": in_turns(runs, args.repeats),
        }
        yield {
            "shape": shape,
            "rows": n,
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode,
            "spec": spec.to_dict(),
            "milliseconds": {
                kind: {name: statistics.median(values) for name, values in each.items()} for kind, each in times.items()
            },
            "spread": {
                kind: {name: [min(values), max(values)] for name, values in each.items()}
                for kind, each in times.items()
            },
            "flops_ratio": 2 * math.prod(shape) / spec.flops(shape),
            "errors": errors,
            "tf32": args.tf32,
        }


def columns(row: dict[str, Any]) -> str:
    texts = (
        f"{taken:.4f} ({times['dense'] / taken:.2f}x)"
        for times in row["milliseconds"].values()
        for taken in times.values()
    )
    return "".join(f" {text:>20}" for text in texts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, default=192)
    parser.add_argument("--nonzeros", type=int, default=64, help="in each row of S")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of input")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--tf32", action="store_true", help="let products of float32 round to TF32")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of A B C")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels_cuda.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"this benchmark needs a GPU with CUDA, and torch {torch.__version__} finds none here; "
            "run it on a machine that has one, with a CUDA build of torch"
        )
    if not cuda.available(torch.device("cuda", torch.cuda.current_device())):
        raise SystemExit(
            "the Triton kernels cannot run here: they need the package triton (pip install triton), a C compiler, and "
            f"a GPU of compute capability {cuda.OLDEST[0]}.{cuda.OLDEST[1]} or newer"
        )
    cuda.register()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    here = machine()
    print(f"{here['device']}, torch {here['torch']}; milliseconds, and how many times faster than dense")
    kinds = [f"{kind} {name}" for kind in ("device", "eager") for name in ("dense", "sparse", "build")]
    print(f"{'matrix':<10} {'rows':>5} {'type':<9} {'mode':<9} {'ideal':>6}" + "".join(f" {k:>20}" for k in kinds))
    for shape, dtype, n in [(shape, dtype, n) for shape in SHAPES for dtype in args.dtypes for n in args.rows]:
        spec = DenseSparse.of(shape, args.atoms, args.nonzeros)
        for row in cell(spec, shape, n, DTYPES[dtype], args):
            append_line(args.output, {**here, "seed": args.seed, **row})
            print(
                f"{f'{shape[0]}x{shape[1]}':<10} {row['rows']:>5} {dtype:<9} {row['mode']:<9} "
                f"{row['flops_ratio']:>5.1f}x{columns(row)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
