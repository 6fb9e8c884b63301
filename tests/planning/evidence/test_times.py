"""Times are measured for shapes, not for matrices, and grow with sizes."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
import torch
from tests.clock import Clock
from torch import Tensor

from factorformer.layers.matrix import Matrix
from factorformer.planning.evidence import times as timing
from factorformer.planning.evidence.times import measure_times
from factorformer.structures import DenseSparse, Factors, KroneckerSum, LowRank, Shape, Structure

CPU = torch.device("cpu")


def all_sizes(matrix: Matrix) -> list[Structure]:
    kinds = (LowRank, KroneckerSum, DenseSparse)
    return [spec for kind in kinds for spec in kind.candidates(matrix.shape, getattr(torch, matrix.dtype))]


def test_each_shape_is_measured_once() -> None:
    matrices = [Matrix("a", (48, 32)), Matrix("b", (48, 32)), Matrix("c", (32, 48)), Matrix("d", (32, 32), dense="x")]
    done: list[int] = []
    timer = measure_times(matrices, {m.name: [] if m.dense else all_sizes(m) for m in matrices}, CPU, 8, done.append)
    assert done == [1, 2, 3]
    assert timer.rows == 8
    assert timer.milliseconds(matrices[0], None) == timer.milliseconds(matrices[1], None) > 0
    assert timer.milliseconds(matrices[3], None) > 0
    for matrix in matrices[:3]:
        for spec in all_sizes(matrix):
            assert timer.milliseconds(matrix, spec) > 0
    assert all(1 < len(points) <= timing.SIZES for points in timer.measured.values())
    assert len(timer.measured) == 2 * 3


def test_products_and_look_ups_are_what_a_forward_pass_does() -> None:
    once = Matrix("once", (64, 32), products=1, lookups=0)
    twice = Matrix("twice", (64, 32), products=2, lookups=0)
    words = Matrix("words", (64, 32), products=0, lookups=1, role="embedding")
    matrices = [once, twice, words]
    timer = measure_times(matrices, {m.name: all_sizes(m) for m in matrices}, CPU, 8)
    spec = LowRank(4)
    assert timer.milliseconds(twice, spec) == pytest.approx(2 * timer.milliseconds(once, spec))
    assert timer.milliseconds(words, spec) > 0
    tied = Matrix("tied", (64, 32), products=1, lookups=1, role="embedding")
    both = timer.milliseconds(once, None) + timer.milliseconds(words, None)
    assert timer.milliseconds(tied, None) == pytest.approx(both)


def test_what_is_only_looked_up_is_not_multiplied() -> None:
    words = Matrix("words", (64, 32), products=0, lookups=1, role="embedding")
    timer = measure_times([words], {"words": []}, CPU, 8)
    assert timer.dense[((64, 32), "float32", None)][0] == 0 < timer.milliseconds(words, None)


def test_the_fastest_run_of_each_size_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product takes as many milliseconds as its rank; every turn but the eighth, something else takes as many."""
    turns = Counter[int]()

    def seconds(spec: LowRank, *_: object) -> float:
        turns[spec.rank] += 1
        return 1e-3 * spec.rank * (1 if turns[spec.rank] == 8 else 2)

    monkeypatch.setattr(LowRank, "matmul", clock.taking(seconds, LowRank.matmul))
    matrix = Matrix("a", (64, 64))
    specs = list(LowRank.candidates(matrix.shape, torch.float32))
    timer = measure_times([matrix], {"a": specs}, CPU, 8)
    assert set(turns.values()) == {timing.REPEATS}
    assert [timer.milliseconds(matrix, spec) for spec in specs] == pytest.approx([spec.rank for spec in specs])
    assert timer.milliseconds(matrix, None) == pytest.approx(1)


def test_sizes_between_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_timed", lambda *_: [(9.0, 0.0), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0)])
    monkeypatch.setattr(timing, "SIZES", 3)
    matrix = Matrix("a", (64, 64))
    timer = measure_times([matrix], {"a": [LowRank(r) for r in range(1, 22)]}, CPU)
    assert [timer.milliseconds(matrix, LowRank(r)) for r in (1, 6, 11, 21)] == [1, 1.5, 2, 3]
    assert timer.milliseconds(matrix, None) == 9


class Seen(LowRank):
    """Low rank that notes the type of the factors by which it multiplies."""

    types: ClassVar[set[torch.dtype]] = set()

    def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.types.add(factors["weight"].dtype)
        return super().matmul(shape, factors, x, bias)


def test_factors_in_int8_are_timed_as_such_and_found_by_their_bytes() -> None:
    matrix, stored = Matrix("a", (64, 48)), Matrix("b", (64, 48), bits=8)
    specs = [Seen(rank) for rank in (2, 8, 16)]
    for one, expected in ((matrix, torch.float32), (stored, torch.int8)):
        Seen.types.clear()
        timer = measure_times([one], {one.name: specs}, CPU, 8)
        assert Seen.types == {expected}
        ((_, points),) = timer.measured.items()
        assert [point[0] for point in points] == [spec.bytes(one.shape, expected) for spec in specs]
        assert [timer.milliseconds(one, spec) for spec in specs] == [point[1] for point in points]
    both = measure_times([matrix, stored], {"a": specs, "b": specs}, CPU, 8)
    assert len(both.measured) == len(both.dense) == 2


def test_all_structures_are_timed_in_int8() -> None:
    matrix = Matrix("a", (64, 48), lookups=1, bits=8)
    specs = [spec for kind in (LowRank, KroneckerSum, DenseSparse) for spec in kind.candidates((64, 48), torch.int8)]
    timer = measure_times([matrix], {"a": specs}, CPU, 8)
    assert len(timer.measured) == 3
    assert all(timer.milliseconds(matrix, spec) > 0 for spec in specs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    matrix = Matrix("a", (64, 32), "float16")
    timer = measure_times([matrix], {"a": all_sizes(matrix)}, torch.device("cuda"), 8)
    assert timer.milliseconds(matrix, LowRank(4)) > 0
