"""Break-even is read off measured ratios; advice names what is slower and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pytest
import torch
from tests.clock import Clock
from tests.tiny import MODELS
from torch import Tensor

import factorformer
from factorformer.bench import layers
from factorformer.bench.comparison import Spread
from factorformer.bench.layers import LayerComparison, LayerTiming, slower_than_dense, time_layers
from factorformer.errors import ModelError
from factorformer.layers.matrix import Matrix
from factorformer.layers.nn import FactorizedLinear
from factorformer.planning import Entry
from factorformer.structures import Factors, KroneckerSum, LowRank, Shape

CPU = torch.device("cpu")


def timings(*ratios: float) -> LayerComparison:
    one = Spread(1, 1, 1)
    found = tuple(
        LayerTiming(tokens, Spread(ratio, ratio, ratio), one, one)
        for tokens, ratio in zip((1, 16, 128, 1024), ratios, strict=True)
    )
    return LayerComparison(("a", "b"), (64, 32), LowRank(4), "float32", found)


@pytest.mark.parametrize(
    ("ratios", "break_even", "pays", "verdict"),
    [
        ((2, 2, 2, 2), 1, [1, 16, 128, 1024], "always"),
        ((0.5, 0.5, 0.9, 0.99), None, [], "never"),
        ((0.5, 0.9, 1, 2), 128, [128, 1024], "from 128 tokens"),
        ((2, 1, 0.9, 0.5), None, [1, 16], "up to 16 tokens"),
        ((2, 0.9, 1.5, 1.5), 128, [1, 128, 1024], "at 1, 128, 1024 tokens"),
    ],
)
def test_break_even(ratios: Sequence[float], break_even: int | None, pays: list[int], verdict: str) -> None:
    found = timings(*ratios)
    assert (found.break_even, found.pays, found.verdict) == (break_even, pays, verdict)
    assert found.ideal == 64 * 32 / (4 * 96)


def test_every_distinct_layer_is_timed_once() -> None:
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", 2))
    found = time_layers(model, tokens=(8, 2, 8), seconds=0.01)
    names = [name for layer in found for name in layer.names]
    assert sorted(names) == sorted(entry.matrix.name for entry in factorformer.plan(MODELS["bert"].build()).factorized)
    assert len({(layer.shape, layer.spec) for layer in found}) == len(found) >= 3
    for layer in found:
        assert [timing.tokens for timing in layer.timings] == [2, 8]
        assert all(min(timing.dense.low, timing.factors.low, timing.speedup.low) > 0 for timing in layer.timings)


def test_layers_in_int8_are_timed_apart() -> None:
    model = MODELS["bert"].build()
    factorformer.compress(model, factorformer.plan(model, "svd", 2))
    alike = next(layer for layer in time_layers(model, tokens=(2,), seconds=0.01) if len(layer.names) > 1)
    stored = model.get_submodule(alike.names[0])
    assert isinstance(stored, FactorizedLinear)
    stored.quantize()
    found = time_layers(model, tokens=(2,), seconds=0.01)
    names = {x.dtype: x.names for x in found if (x.shape, x.spec) == (alike.shape, alike.spec)}
    assert names == {"int8": alike.names[:1], "float32": alike.names[1:]}


def test_a_dense_model_has_no_factors_to_time() -> None:
    with pytest.raises(ModelError, match="factorized"):
        time_layers(MODELS["bert"].build())


def entry(name: str, spec: object, side: int = 512, dtype: str = "float32", products: int = 1) -> Entry:
    return Entry(Matrix(name, (side, side), dtype, products=products), spec, "")  # type: ignore[arg-type]


class Slow(LowRank):
    """Takes three times as long as the dense matrix."""


SLOW, FAST = Slow(8), LowRank(8)


@pytest.fixture
def paces(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two, by a clock that nothing else moves."""
    matmul = LowRank.matmul
    monkeypatch.setattr(Slow, "matmul", clock.taking(lambda *_: 3e-3, matmul))
    monkeypatch.setattr(LowRank, "matmul", clock.taking(lambda *_: 0.3e-3, matmul))


@pytest.mark.usefixtures("paces")
def test_what_is_slower_is_named_with_its_remedy() -> None:
    entries = [
        *(entry(f"layer.{i}.query", SLOW) for i in range(3)),
        entry("layer.0.key", SLOW),
        *(entry(f"layer.{i}.key", FAST) for i in (1, 2)),
        entry("layer.0.dense", None),
    ]
    (line,) = slower_than_dense(entries, CPU)
    assert line.startswith("4 512x512 matrices as low_rank take 3.0x ")
    assert " 128 tokens" in line
    patterns = re.findall("--exclude '(.*?)'", line)
    assert patterns == ["layer.*.query", "layer.0.key"]
    kept = {e.matrix.name for e in entries if any(fnmatchcase(e.matrix.name, p) for p in patterns)}
    assert kept == {e.matrix.name for e in entries if e.spec == SLOW}


@pytest.mark.usefixtures("paces")
def test_where_no_factors_pay_another_method_is_advised() -> None:
    (line,) = slower_than_dense([entry("layer.0.query", SLOW)], CPU)
    assert line.startswith("1 512x512 matrix as low_rank takes 3.0x ")
    assert "another method or a larger ratio" in line


@pytest.mark.usefixtures("paces")
def test_silence_where_all_is_well_or_nothing_can_be_measured() -> None:
    assert slower_than_dense([entry("a", FAST)], CPU) == []
    assert slower_than_dense([entry("a", SLOW, dtype="bfloat16")], CPU) == []
    assert slower_than_dense([entry("a", SLOW, products=0)], CPU) == []
    assert slower_than_dense([entry("a", SLOW)], torch.device("meta")) == []
    assert slower_than_dense([entry("a", SLOW)], CPU, seconds=-1.0) == []
    assert slower_than_dense([entry("a", None)], CPU) == []


def test_factors_in_int8_are_judged_as_such() -> None:
    types: list[torch.dtype] = []

    class Seen(LowRank):
        def matmul(self, shape: Shape, factors: Factors, x: Tensor, bias: Tensor | None = None) -> Tensor:
            types.append(factors["weight"].dtype)
            return super().matmul(shape, factors, x, bias)

    plain, spec = entry("a", Seen(8), 64), Seen(8)
    stored = Entry(Matrix("b", (64, 64), bits=8), spec, "")
    slower_than_dense([stored], CPU)
    assert set(types) == {torch.int8}
    types.clear()
    slower_than_dense([plain, stored], CPU)
    assert set(types) == {torch.int8, torch.float32}


def test_each_size_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[object, ...]] = []
    real = layers._time

    def counted(*arguments: object, **options: object) -> LayerTiming:
        timed.append(arguments[:2])
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "_time", counted)
    spec = next(KroneckerSum.candidates((64, 64), torch.float32))
    slower_than_dense([entry(f"layer.{i}.{n}", s, 64) for i in range(4) for n, s in (("q", FAST), ("k", spec))], CPU)
    assert timed == [((64, 64), FAST), ((64, 64), spec)]
