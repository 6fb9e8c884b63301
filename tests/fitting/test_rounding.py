"""Rounding to few bits: errors that make up for each other, of all structures, types and sizes."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import MODELS, text
from torch import Tensor

import factorformer
from factorformer.errors import ModelError
from factorformer.fitting import ROUNDERS, Metric, fit, matrices, round_factors, rounding
from factorformer.fitting.rounding import compensated
from factorformer.kernels.cpu import GROUP
from factorformer.layers.nn import FactorizedLinear, FactorizedMatrix
from factorformer.layers.surgery import find_matrices
from factorformer.structures import Dense, DenseSparse, KroneckerSum, LowRank, Structure, integers

SHAPE = (48, 200)
SPECS = [Dense(), LowRank(20), DenseSparse(32, 12), DenseSparse(32, 12, side="columns"), DenseSparse(40, 20)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FEW: list[integers.Bits] = [4, 3]


@functools.cache
def root(width: int, seed: int = 0) -> Tensor:
    """Of the moment of inputs that are much alike, as those of Transformers are."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    inputs *= torch.logspace(0, -1.5, width, dtype=torch.float64)
    inputs @= torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.cholesky(inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(width))


def stored(factors: Mapping[str, Tensor], bits: integers.Bits = 4) -> dict[str, Tensor]:
    """What products read of factors once they are integers."""
    return {name: integers.rounded(t, bits) if t.is_floating_point() else t for name, t in factors.items()}


def matrix(shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8).to(dtype)


def added(spec: Structure, weight: Tensor, metric: Metric, bits: integers.Bits = 4) -> tuple[float, float]:
    """What rounding adds to the squared error of the fit: to the nearest, and made up for."""
    factors, error = fit(weight, spec, metric)
    rounded = round_factors(weight, spec, factors, metric, bits)
    assert {name: (t.shape, t.dtype) for name, t in rounded.items()} == {
        name: (t.shape, t.dtype) for name, t in factors.items()
    }
    nearest, found = (
        metric.relative_error(weight, spec.to_dense(SHAPE, stored(known, bits))) ** 2 - error**2
        for known in (factors, rounded)
    )
    return nearest, found


def side_by_side(spec: Structure) -> Metric:
    """Of the side in which entries of a factor lie next to each other."""
    on_rows = isinstance(spec, DenseSparse) and spec.side == "columns"
    return Metric(root(SHAPE[0]).T.contiguous(), None) if on_rows else Metric(None, root(SHAPE[1]))


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_errors_make_up_for_each_other(spec: Structure, dtype: torch.dtype, bits: integers.Bits) -> None:
    nearest, found = added(spec, matrix(dtype=dtype), side_by_side(spec), bits)
    assert found < (0.5 if isinstance(spec, Dense) else 0.8) * nearest


def test_components_of_any_size_matter_alike() -> None:
    """Few large ones beside many small ones would all have an error in proportion to their size."""
    left, right = (torch.linalg.qr(matrix((width, 40), seed=seed))[0] for seed, width in enumerate(SHAPE))
    weight = left * torch.logspace(0, -3, 40) @ right.T
    spec, metric = LowRank(30), Metric()
    nearest, found = added(spec, weight, metric)
    assert found < 0.5 * nearest


@pytest.mark.parametrize("rows", ["none", "weights", "coupled"])
@pytest.mark.parametrize("columns", ["none", "coupled"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_under_any_metric(spec: Structure, columns: str, rows: str) -> None:
    """Never further away than the nearest codes are, but for what these owe to luck."""
    above = {"none": None, "weights": torch.rand(SHAPE[0]).double() + 0.1, "coupled": root(SHAPE[0], 2).T.contiguous()}
    nearest, found = added(spec, matrix(), Metric(above[rows], None if columns == "none" else root(SHAPE[1])))
    assert found < 1.05 * nearest


def example(kind: str, dtype: torch.dtype) -> Tensor:
    values = matrix((16, 200), dtype)
    if kind == "zeros":
        values[3], values[:, 32:64] = 0, 0
    elif kind == "outlier":  # beside which most exponents are the last
        values[5] *= 1e-6
        values[0, 0] = 3e4
    elif kind == "small":
        values *= 0.05
    return values


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("kind", ["plain", "zeros", "outlier", "small"])
@pytest.mark.parametrize("dtype", TYPES)
def test_integers_hold_the_codes_that_were_chosen(
    kind: str, dtype: torch.dtype, bits: integers.Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, reads, plain = example(kind, dtype), [], rounding._Grid.nearest

    def nearest(grid: rounding._Grid, column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        near, read = plain(grid, column, place)
        reads.append(read.clone())
        return near, read

    monkeypatch.setattr(rounding._Grid, "nearest", nearest)
    found = compensated(values, root(200), bits)
    chosen = torch.empty_like(values, dtype=torch.float32)
    chosen[:, rounding._chain(root(200))[0]] = torch.stack(reads, 1)
    read = integers.rounded(found, bits).float()
    least = read.abs().max() * 2 ** (-integers.LAST / integers.STEPS)  # of groups beside which others are huge
    coarse = read.abs().amax(1, keepdim=True).clamp_min(least) / 127
    # Another code would be off by a seventh at least of the largest of its group; narrow types by a step of 8 bits.
    off, narrow = (read - chosen).abs(), dtype in (torch.bfloat16, torch.float16)
    assert bool((off <= 1.1 * coarse + read.abs() * torch.finfo(dtype).eps).all())
    # Half of the largest value of a row lies between two steps of 8 bits, and may become either.
    place = (chosen.abs() / coarse.clamp_min(1e-30)).round() * (coarse > 0)
    between = (place == 63) | (place == 64)
    assert narrow or float((off * ~between).max()) < 1e-6 * float(values.abs().max())


def test_values_lie_within_the_cells_of_their_codes() -> None:
    """Not in the middle, from where training would take long to move them."""
    values = compensated(matrix(), root(SHAPE[1]), 4)
    reach = integers.group_reach(integers.extremes(integers.in_groups(values)), values.dtype)
    parts = values / reach.repeat_interleave(GROUP, 1)[:, : SHAPE[1]]
    codes = integers.nearest(parts, 4)
    inner = (codes > -7) & (codes < 8)
    level, higher, lower = (integers.levels_of(codes[inner] + step, 4, parts.dtype) for step in (0, 1, -1))
    way = 2 * (parts[inner] - level) / (torch.where(parts[inner] > level, higher, lower) - level)
    assert 0.35 < float(way.mean()) < 0.55
    assert float(way.max()) < 0.91


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_steps_outlast_the_first_of_training(spec: Structure, dtype: torch.dtype, bits: integers.Bits) -> None:
    """The largest values of groups may grow or shrink by 1 %: no code changes, and nothing but the scale does."""
    metric = side_by_side(spec)
    factors, _ = fit(matrix(dtype=dtype), spec, metric)
    for name, values in round_factors(matrix(dtype=dtype), spec, factors, metric, bits).items():
        check_settled(name, values, bits)


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("spec", [*SPECS, KroneckerSum(2, (6, 20), (8, 10))], ids=str)
def test_nor_do_steps_without_a_metric(spec: Structure, bits: integers.Bits) -> None:
    factors, _ = fit(matrix(), spec, Metric())
    for name, values in round_factors(matrix(), spec, factors, Metric(), bits).items():
        check_settled(name, values, bits, chosen=False)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", FEW)
def test_what_was_stored_is_settled_before_it_is_trained(dtype: torch.dtype, bits: integers.Bits) -> None:
    layer = FactorizedLinear(Dense(), SHAPE, dtype=dtype)
    layer.fake_quantize(bits)
    layer.quantize()
    codes = {name: tensor.clone() for name, tensor in layer.factors.items()}
    layer.hold_floats()
    values = layer.factors["weight"].detach()
    if dtype != torch.bfloat16:  # whose values are 0.4 % off
        check_settled("weight", values, bits)
    assert float((integers.settled(values, bits) / values).sub(1).abs().nan_to_num().max()) < 0.01
    layer.quantize()
    assert all(torch.equal(tensor, codes[name]) for name, tensor in layer.factors.items())


def check_settled(name: str, values: torch.Tensor, bits: integers.Bits, *, chosen: bool = True) -> None:
    """The largest values of groups may grow or shrink by 1 %; nor do codes change that have a margin."""
    if values.is_floating_point():
        values = values.flatten(1)
        grouped = F.pad(values, (0, -values.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)).flatten(0, -3)
        largest = grouped == grouped.abs().amax(2, keepdim=True) * grouped.sign()
        codes, exponents, _ = integers._by_group(values, bits)
        below = (exponents.flatten() & integers.LAST) > 0
        assert float(below.float().mean()) > 0.5, name
        for change in (0.99, 1.01):
            moved = torch.where(largest & (grouped.abs() < values.abs().max()), grouped * change, grouped)
            moved = moved.flatten(1)[:, : values.shape[-1]].reshape(values.shape)
            again, others, _ = integers._by_group(moved, bits)
            assert torch.equal(others.flatten()[below], exponents.flatten()[below]), name
            if chosen:
                assert torch.equal(again.flatten(0, 1)[below], codes.flatten(0, 1)[below]), name


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows do not depend on each other, nor on how many are rounded at the same time."""
    for spec in SPECS:
        metric = Metric(torch.rand(SHAPE[0]).double() + 0.1, root(SHAPE[1]))
        factors, _ = fit(matrix(), spec, metric)
        whole = round_factors(matrix(), spec, factors, metric, 4)
        with monkeypatch.context() as patch:
            patch.setattr(rounding, "ENTRIES", 1000)
            parts = round_factors(matrix(), spec, factors, metric, 4)
        for name, factor in stored(whole).items():
            # Sums in another order may make another code of what lies between two.
            assert float((stored(parts)[name] != factor).float().mean()) < 0.02, (spec, name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_matrix_of_zeros_stays_one(spec: Structure) -> None:
    weight = torch.zeros(SHAPE)
    for metric in (Metric(), Metric(None, root(SHAPE[1]))):
        factors, _ = fit(weight, spec, metric)
        found = spec.to_dense(SHAPE, stored(round_factors(weight, spec, factors, metric, 4)))
        assert float(found.abs().max()) < 1e-6


def test_other_structures_keep_their_codes() -> None:
    spec = KroneckerSum(rank=2, left=(6, 10), right=(8, 20))
    assert type(spec) not in ROUNDERS
    factors, _ = fit(matrix(), spec, Metric())
    found = round_factors(matrix(), spec, factors, Metric(), 4)
    assert all(torch.equal(factor, stored(factors)[name]) for name, factor in stored(found).items())


def test_values_that_are_not_finite_are_refused() -> None:
    weight = matrix()
    weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN"):
        fit(weight, Dense(), Metric())


@pytest.mark.parametrize(("name", "method"), [("bert", "whitened"), ("bert", "fisher"), ("gpt2", "dense_sparse")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_lose_less(name: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a report tells what dense matrices in 4 bits lose."""
    batch, lost, plan = text(32, 20), {}, None
    for compensates in (True, False):
        model = MODELS[name].build().to(dtype)
        dense = {m.name: model.get_submodule(m.name) for m in find_matrices(model)[0]}
        dense = {known: (m.weight.T if name == "gpt2" else m.weight).detach().clone() for known, m in dense.items()}
        with monkeypatch.context() as patch:
            if not compensates:
                patch.setattr(matrices, "round_factors", lambda weight, spec, factors, *rest: factors)
            plan = plan or factorformer.plan(model, method, 8.5, calibration=[batch], int4=True)
            report = factorformer.compress(model, plan, [batch], keep_statistics=True)
        errors = {}
        for known, layer in model.named_modules():
            if isinstance(layer, FactorizedMatrix):
                metric = Metric.of(report.statistics[known])
                errors[known] = metric.relative_error(dense[known], layer.spec.to_dense(layer.shape, layer.floats()))
                if layer.spec == Dense() and method != "fisher":  # which fits to what others have made of the inputs
                    assert report.errors[known] == pytest.approx(errors[known], rel=0.05)
        lost[compensates] = sum(error**2 for error in errors.values())
    assert lost[True] < (0.97 if dtype == torch.float32 else 1.0) * lost[False]


def test_what_trains_straight_through_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products read it as it is."""
    model, batch = MODELS["bert"].build(), text(16, 20)
    plan = factorformer.plan(model, "dsformer", 9, calibration=[batch], int4=True)
    monkeypatch.setattr(matrices, "round_factors", lambda *_: pytest.fail("rounded"))
    report = factorformer.compress(model, plan, [batch], hold_floats=True)
    assert report.errors
