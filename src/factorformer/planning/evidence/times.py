"""Measured times of products on this machine, for budgets in milliseconds."""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy
import torch

from factorformer.layers.matrix import Matrix
from factorformer.layers.nn import new_factors
from factorformer.structures import Structure, integers

ROWS = 512
"""Rows of input, such as 4 texts of 128 tokens, for which products are measured."""

SIZES = 5
"""Sizes of a structure that are measured for each shape: the smallest, the largest, and some between."""

REPEATS = 15
"""Products of each size; the fastest counts, for whatever else the machine does only makes others slower."""


@dataclasses.dataclass(frozen=True)
class Timer:
    """Milliseconds that a matrix takes in one forward pass over so many rows, by structure and size.

    Args:
        rows: of input.
        dense: by shape, type, and bits in which factors are stored: `(product, look-up)` in milliseconds.
        measured: by structure before these: `(bytes, product, look-up)` in growing bytes.
    """

    rows: int
    dense: Mapping[tuple[object, ...], tuple[float, float]]
    measured: Mapping[tuple[object, ...], Sequence[tuple[float, float, float]]]

    def milliseconds(self, matrix: Matrix, spec: Structure | None) -> float:
        """Of all products and look-ups of a matrix; between measured sizes, interpolated by bytes."""
        place = _place(matrix)
        if spec is None:
            product, lookup = self.dense[place]
        else:
            points = self.measured[(spec.kind, *place)]
            size = matrix.bytes(spec)
            known = [point[0] for point in points]
            product, lookup = (float(numpy.interp(size, known, [point[i] for point in points])) for i in (1, 2))
        return matrix.products * product + (lookup if matrix.lookups else 0.0)


def measure_times(
    matrices: Sequence[Matrix],
    sizes: Mapping[str, Sequence[Structure]],
    device: torch.device,
    rows: int = ROWS,
    progress: Callable[[int], None] | None = None,
) -> Timer:
    """Time the products that a plan can choose among.

    Runs of all sizes of one shape, dense among them, are interleaved in rotating order, so that whatever else the
    machine does meanwhile meets all of them alike, and the fastest run of each counts. Weights are random: no product
    here depends on values.

    Args:
        matrices: whose shapes are measured, each once.
        sizes: by name of the matrix, all specs that it can become.
        device: where to measure.
        rows: of input.
        progress: called with the number of shapes done.
    """
    dense: dict[tuple[object, ...], tuple[float, float]] = {}
    measured: dict[tuple[object, ...], list[tuple[float, float, float]]] = {}
    for matrix in matrices:
        place = _place(matrix)
        if place in dense:
            continue
        chosen: list[Structure] = []
        same = [other for other in matrices if _place(other) == place]
        # Some of them may have to stay dense, and have no sizes.
        known = max((sizes[other.name] for other in same), key=len)
        for kind in dict.fromkeys(spec.kind for spec in known):
            chosen += _spaced([spec for spec in known if spec.kind == kind], matrix)
        wanted = any(other.products for other in same), any(other.lookups for other in same)
        times = _timed(matrix, chosen, device, rows, wanted)
        dense[place] = times[0]
        for spec, (product, lookup) in zip(chosen, times[1:], strict=True):
            measured.setdefault((spec.kind, *place), []).append((matrix.bytes(spec), product, lookup))
        if progress is not None:
            progress(len(dense))
    return Timer(rows, dense, {key: sorted(points) for key, points in measured.items()})


def _place(matrix: Matrix) -> tuple[object, ...]:
    """What matrices have in common whose products take the same time."""
    return matrix.shape, matrix.dtype, matrix.bits


def _spaced(specs: Sequence[Structure], matrix: Matrix) -> list[Structure]:
    """A few of them, in equal steps of bytes."""
    ordered = sorted(specs, key=matrix.bytes)
    sizes = [matrix.bytes(spec) for spec in ordered]
    wanted = numpy.linspace(sizes[0], sizes[-1], SIZES)
    places = {min(bisect.bisect_left(sizes, math.floor(size)), len(sizes) - 1) for size in wanted}
    return [ordered[place] for place in sorted(places)]


def _timed(
    matrix: Matrix,
    specs: Sequence[Structure],
    device: torch.device,
    rows: int,
    wanted: tuple[bool, bool],
) -> list[tuple[float, float]]:
    """Milliseconds of a product and of look-ups, those that are wanted: of the dense matrix, and of each spec."""
    shape, dtype = matrix.shape, getattr(torch, matrix.dtype)
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    index = torch.randint(shape[0], (rows,), device=device)
    weight = torch.randn(shape, device=device, dtype=dtype)
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(x, weight)]
    lookups: list[Callable[[], object]] = [lambda: torch.nn.functional.embedding(index, weight)]
    for spec in specs:
        factors = new_factors(spec, shape, device, dtype)
        spec.initialize(factors, 1.0)
        factors = factors if matrix.bits is None else integers.quantize(factors, 8)
        products.append(lambda spec=spec, factors=factors: spec.matmul(shape, factors, x))
        lookups.append(lambda spec=spec, factors=factors: spec.rows(shape, factors, index))
    times = interleaved([*(products if wanted[0] else ()), *(lookups if wanted[1] else ())], REPEATS, device=device)
    fastest = iter([min(column) for column in zip(*times, strict=True)])
    best = [[next(fastest) if use else 0.0 for _ in products] for use in wanted]
    return list(zip(*best, strict=True))


def interleaved(
    runs: Sequence[Callable[[], object]],
    rounds: int,
    *,
    seconds: float = math.inf,
    least: int = 3,
    settle: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Interleaved milliseconds of every run in every round, `(rounds, runs)`.

    Runs are interleaved in rotating order: each has one turn in every round, so that whatever else the machine does
    meanwhile meets all of them alike, and the one that was first in a round is last in the next.

    Args:
        runs: what is timed, without gradients.
        rounds: at most so many.
        seconds: no round begins later than this, once there are `least`.
        least: rounds that are made in any case.
        settle: uncounted calls at the start of each turn. They bring the weights of the run back into the caches, and
            outlast the threads of another library that go on spinning for a moment after their work.
        device: where the runs compute, if not on the CPU.
        progress: called with the number of rounds done.
    """
    order = list(range(len(runs)))
    times: list[list[float]] = []
    begun = time.perf_counter()
    with torch.inference_mode():
        while len(times) < rounds and (len(times) < least or time.perf_counter() - begun < seconds):
            row = [0.0] * len(runs)
            for place in order:
                for _ in range(settle):
                    runs[place]()
                synchronize(device)
                started = time.perf_counter()
                runs[place]()
                synchronize(device)
                row[place] = 1000 * (time.perf_counter() - started)
            times.append(row)
            order = [*order[1:], *order[:1]]
            if progress is not None:
                progress(len(times))
    return times


def synchronize(device: torch.device | None) -> None:
    """Wait until a GPU has done all that it was asked for."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
