"""Interleaved forward passes of several models, and the statistics of their times."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from factorformer.bench.candidates import Candidate, Runner, draw
from factorformer.errors import DataError, ModelError, one_line
from factorformer.planning.evidence.times import interleaved
from factorformer.progress import Progress, silent

WARM_UP = 3
"""Passes of each model over each shape before the first that counts."""

SETTLE = 1
"""Uncounted passes before each pass that counts: see `interleaved`."""

LEAST, MOST = 5, 300
"""Rounds of a shape, whatever the time limit."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of the input: texts, and tokens in each.

    >>> Shape.parse("8x64")
    Shape(batch=8, tokens=64)
    """

    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `BATCHxTOKENS`.

        Raises:
            DataError: it is written otherwise.
        """
        match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
        if match is None:
            raise DataError(f"'{text}' is not a shape: write BATCHxTOKENS, such as 8x64 for 8 texts of 64 tokens")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, interpolated linearly.

    >>> Spread.of([4, 1, 3, 2, 5])
    Spread(low=2.0, median=3.0, high=4.0)
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of one value or more."""
        values = [float(value) for value in values]
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(*quartiles)


@dataclasses.dataclass(frozen=True)
class Timing:
    """The speed of one candidate at one shape.

    Args:
        speedup: how many times faster than the baseline in the same round.
        milliseconds: of a forward pass.
        first: milliseconds of the very first pass at this shape, in which a compiler compiles.
    """

    speedup: Spread
    milliseconds: Spread
    first: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All candidates at one shape, the baseline first.

    Args:
        shape: of the input.
        rounds: that counted.
        timings: one for each candidate.
    """

    shape: Shape
    rounds: int
    timings: tuple[Timing, ...]


def summarize(times: Sequence[Sequence[float]], first: Sequence[float] | None = None) -> tuple[Timing, ...]:
    """Speed-ups and times of each candidate.

    A speed-up is taken within each round, so that what slows the machine for a while does not blur it: its median and
    quartiles are those of these ratios, not the ratio of medians.

    Args:
        times: milliseconds, `(rounds, candidates)`, the baseline in front.
        first: milliseconds of the first passes.

    >>> summarize([[10.0, 5.0], [30.0, 10.0]])[1].speedup.median
    2.5
    """
    return tuple(
        Timing(
            Spread.of(row[0] / row[place] for row in times),
            Spread.of(row[place] for row in times),
            first[place] if first is not None else times[0][place],
        )
        for place in range(len(times[0]))
    )


def compare(
    candidates: Sequence[Candidate],
    runners: Sequence[Runner],
    shapes: Sequence[Shape],
    *,
    rounds: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> list[Comparison]:
    """Time forward passes over random words, with no padding.

    Args:
        candidates, runners: the same models in the same order, the baseline first.
        shapes: of the input.
        rounds: of each shape; None for as many as fit into the seconds, but 5 at least and 300 at most.
        seconds: for each shape.
        seed: of the words.
        device: where torch's models run.
        progress: progress callback.

    Raises:
        DataError: a shape with more tokens than a model has positions.
        ModelError: a model that cannot run.
    """
    for shape in shapes:
        for candidate, runner in zip(candidates, runners, strict=True):
            if runner.positions is not None and shape.tokens > runner.positions:
                raise DataError(
                    f"shape {shape} has {shape.tokens} tokens, and '{candidate.name}' has {runner.positions} "
                    f"positions: ask for at most {shape.batch}x{runner.positions}"
                )
    comparisons: list[Comparison] = []
    for shape in shapes:
        ids = draw(runners, shape.batch, shape.tokens, seed)
        phase = f"passes over {shape}"
        progress(phase, 0, rounds)
        runs: list[Callable[[], object]] = [runner.prepare(ids) for runner in runners]
        first = [_warm(c, shape, run) for c, run in zip(candidates, runs, strict=True)]
        times = interleaved(
            runs,
            rounds or MOST,
            seconds=seconds if rounds is None else float("inf"),
            least=LEAST,
            settle=SETTLE,
            device=device,
            progress=lambda done, phase=phase: progress(phase, done, rounds),
        )
        progress(phase, len(times), len(times))
        comparisons.append(Comparison(shape, len(times), summarize(times, first)))
    return comparisons


def _warm(candidate: Candidate, shape: Shape, run: Callable[[], object]) -> float:
    """Milliseconds of the first of the uncounted passes."""
    began, first = time.perf_counter(), 0.0
    try:
        with torch.inference_mode():
            for i in range(WARM_UP):
                run()
                first = first if i else 1000 * (time.perf_counter() - began)
    except Exception as error:  # torch, its compiler and ONNX Runtime raise many types
        raise ModelError(f"'{candidate.name}' cannot run at shape {shape}: {one_line(error)}") from error
    return first
