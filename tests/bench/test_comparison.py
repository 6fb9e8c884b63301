"""What times say is exact arithmetic; passes are interleaved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factorformer.bench.candidates import Candidate, Runner, draw
from factorformer.bench.comparison import LEAST, SETTLE, WARM_UP, Shape, Spread, compare, summarize
from factorformer.errors import DataError, ModelError
from factorformer.planning.evidence.times import interleaved


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x4", "4x0", "8x64x2", "8*64", " 8x64", "-1x4", "8x6.5"])
def test_a_shape_is_two_positive_numbers(text: str) -> None:
    with pytest.raises(DataError, match="write BATCHxTOKENS"):
        Shape.parse(text)
    assert str(Shape.parse("8x64")) == "8x64"


def test_quartiles() -> None:
    assert Spread.of([7]) == Spread(7, 7, 7)
    assert Spread.of([1, 2]) == Spread(1.25, 1.5, 1.75)
    assert Spread.of([9, 1, 5, 3, 7]) == Spread(3, 5, 7)


def test_a_speed_up_is_taken_within_each_round() -> None:
    # The machine is twice as slow in the second round: both times vary, and their ratio does not.
    dense, small = summarize([[10.0, 4.0], [20.0, 8.0], [11.0, 4.4]], first=[50.0, 60.0])
    assert dense.speedup == Spread(1, 1, 1)
    assert small.speedup.low == pytest.approx(2.5)
    assert small.speedup.high == pytest.approx(2.5)
    assert dense.milliseconds == Spread(10.5, 11, 15.5)
    assert (dense.first, small.first) == (50, 60)


def test_the_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    _, other = summarize([[1.0, 1.0], [2.0, 1.0], [3.0, 6.0]])
    assert other.speedup.median == 1
    assert other.milliseconds.median == 1


def test_turns_rotate_and_each_settles_first() -> None:
    calls: list[str] = []
    runs = [lambda name=name: calls.append(name) for name in "abc"]
    times = interleaved(runs, 4, settle=1)
    assert "".join(calls) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"
    assert [len(row) for row in times] == [3] * 4


def test_time_ends_a_comparison_after_the_least_rounds() -> None:
    done: list[int] = []
    assert len(interleaved([lambda: None], 50, seconds=0, least=4, progress=done.append)) == 4
    assert done == [1, 2, 3, 4]
    assert len(interleaved([lambda: None], 2, seconds=0, least=4)) == 2


def candidate(name: str) -> Candidate:
    return Candidate(name, Path(name))


def runner(calls: list[str], name: str, positions: int | None = None, vocabulary: int = 20) -> Runner:
    def prepare(ids: torch.Tensor) -> object:
        return lambda: calls.append(f"{name}{ids.shape[0]}x{ids.shape[1]}")

    return Runner(prepare, vocabulary, 0, positions)  # type: ignore[arg-type]


def test_models_warm_up_and_then_take_turns() -> None:
    calls: list[str] = []
    models = [candidate("a"), candidate("b")]
    shapes = [Shape(1, 3), Shape(2, 5)]
    comparisons = compare(models, [runner(calls, "a"), runner(calls, "b")], shapes, rounds=2)
    turn = 1 + SETTLE
    for shape, comparison in zip(shapes, comparisons, strict=True):
        a, b = f"a{shape}", f"b{shape}"
        expected = [a] * WARM_UP + [b] * WARM_UP + [a] * turn + [b] * turn + [b] * turn + [a] * turn
        assert calls[: len(expected)] == expected
        del calls[: len(expected)]
        assert (comparison.shape, comparison.rounds, len(comparison.timings)) == (shape, 2, 2)
        assert all(timing.milliseconds.median > 0 and timing.first > 0 for timing in comparison.timings)
    assert not calls
    assert compare(models[:1], [runner(calls, "a")], shapes[:1], seconds=0.0)[0].rounds == LEAST


def test_a_model_that_is_too_short_or_fails_is_named() -> None:
    short = [candidate("long"), candidate("short")], [runner([], "long"), runner([], "short", positions=8)]
    with pytest.raises(DataError, match=r"4x9.*'short'.*at most 4x8"):
        compare(*short, [Shape(4, 8), Shape(4, 9)], rounds=1)

    def fail() -> None:
        raise RuntimeError("first line\nsecond line")

    with pytest.raises(ModelError, match=r"'broken'.*1x2: first line second line"):
        compare([candidate("broken")], [Runner(lambda ids: fail, 5, None, None)], [Shape(1, 2)], rounds=1)


def test_words_are_known_to_all_and_are_not_padding() -> None:
    models = [runner([], "a", vocabulary=9), Runner(lambda ids: lambda: None, 30, 4, None)]
    ids = draw(models, 50, 40, seed=3)
    assert ids.unique().tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(ids, draw(models, 50, 40, seed=3))
    assert not torch.equal(ids, draw(models, 50, 40, seed=4))
