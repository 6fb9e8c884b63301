"""Errors read from one decomposition are those that fits have; those of other structures come near."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.tiny import MODELS, text

from factorformer.errors import ModelError
from factorformer.fitting import Metric
from factorformer.fitting.linalg import truncation_errors
from factorformer.fitting.matrices import fit_matrix
from factorformer.fitting.statistics import collect
from factorformer.layers.surgery import find_matrices
from factorformer.planning.evidence.curves import measure_curves
from factorformer.structures import Dense, DenseSparse, KroneckerSum, LowRank
from factorformer.structures.integers import Bits, Rounded

EVERY = (LowRank, KroneckerSum, DenseSparse)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5)])
def test_errors_of_all_ranks_at_once(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(matrix.double()).square()
    errors = truncation_errors(matrix)
    assert len(errors) == min(shape) + 1
    for rank, error in enumerate(errors):
        assert error == pytest.approx(float(values[rank:].sum() / values.sum()), abs=1e-12)


def test_a_matrix_that_is_not_finite_has_no_errors() -> None:
    with pytest.raises(ModelError, match="NaN"):
        truncation_errors(torch.full((3, 4), float("nan")))
    assert truncation_errors(torch.zeros(3, 4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-tied", "albert", "t5"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_low_rank_is_exact_in_the_metric_of_the_fit(name: str, calibrated: bool) -> None:
    model = MODELS[name].build()
    matrices = [m for m in find_matrices(model, "all")[0] if m.dense is None]
    names = [m.name for m in matrices]
    statistics = collect(model, names, [MODELS[name].inputs()], "input_moment") if calibrated else {}
    curves = measure_curves(model, matrices, lambda _: [LowRank], statistics, 2)
    assert list(curves) == names
    for matrix in matrices[::3]:
        curve = curves[matrix.name]
        for spec in list(curve.specs)[::4]:
            error = fit_matrix(model, matrix, spec, statistics)[1]
            assert curve.squared_error(spec) ** 0.5 == pytest.approx(error, abs=1e-4)
        assert curve.squared_error(None) == 0


def test_plain_kronecker_sums_are_exact() -> None:
    model = MODELS["bert"].build()
    matrices = [m for m in find_matrices(model)[0] if m.dense is None]
    curves = measure_curves(model, matrices, lambda _: [KroneckerSum], {}, 2)
    for matrix in matrices[::2]:
        for spec in list(curves[matrix.name].specs)[::5]:
            error = fit_matrix(model, matrix, spec, {})[1]
            assert curves[matrix.name].squared_error(spec) ** 0.5 == pytest.approx(error, abs=1e-4)


@pytest.mark.parametrize("structure", [KroneckerSum, DenseSparse])
@pytest.mark.parametrize("calibrated", [False, True])
def test_other_errors_come_near_those_of_fits(structure: type, calibrated: bool) -> None:
    model = MODELS["bert"].build()
    matrices = [m for m in find_matrices(model)[0] if m.dense is None]
    batch = text(16, 20)
    statistics = collect(model, [m.name for m in matrices], [batch], "input_moment") if calibrated else {}
    curves = measure_curves(model, matrices, lambda _: [structure], statistics, 2)
    for matrix in matrices[::3]:
        curve = curves[matrix.name]
        middle = [s for s in curve.specs if 0.4 < s.bytes(matrix.shape) / matrix.cost(None).bytes < 0.6]
        for spec in middle[:: max(len(middle) // 2, 1)]:
            error = fit_matrix(model, matrix, spec, statistics)[1]
            assert curve.squared_error(spec) ** 0.5 == pytest.approx(error, rel=0.25)


def test_errors_fall_as_sizes_grow() -> None:
    model = MODELS["bert"].build()
    matrices = [m for m in find_matrices(model)[0] if m.dense is None]
    for curve in measure_curves(model, matrices, lambda _: EVERY, {}, 3).values():
        assert set(curve.sizes) == {structure.kind for structure in EVERY}
        for sizes in curve.sizes.values():
            parts = [spec.bytes(curve.matrix.shape) for spec in sizes]
            assert parts == sorted(set(parts))
            errors = [curve.squared_error(spec) for spec in sizes]
            assert all(0 <= after <= before <= 1 for before, after in itertools.pairwise(errors))
            for spec in sizes:
                spec.check(curve.matrix.shape)


def test_fits_are_few() -> None:
    model, seen = MODELS["bert"].build(), []
    matrices = [m for m in find_matrices(model)[0] if m.dense is None]
    measure_curves(model, matrices, lambda _: [LowRank], {}, 2, seen.append)
    assert seen == list(range(1, len(matrices) + 1))  # one decomposition each, and no fit
    measure_curves(model, matrices, lambda _: EVERY, {}, 2, seen.append)
    assert len(seen) < 8 * len(matrices)


def test_weights_that_are_not_there_have_usual_curves() -> None:
    with torch.device("meta"):
        model = MODELS["bert"].make()
    matrices = [m for m in find_matrices(model)[0] if m.dense is None]
    for curve in measure_curves(model, matrices, lambda _: EVERY, {}, 2).values():
        assert set(curve.sizes) == {structure.kind for structure in EVERY}
        assert all(0 < curve.squared_error(spec) <= 1 for spec in curve.specs)


def test_weights_of_low_rank_leave_finite_errors() -> None:
    model = MODELS["bert"].build()
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.weight.data = torch.randn(64, 2) @ torch.randn(2, 32)
        layer.output.dense.weight.data.zero_()
    matrices = [m for m in find_matrices(model)[0] if m.dense is None]
    for name, curve in measure_curves(model, matrices, lambda _: EVERY, {}, 2).items():
        assert all(0 <= curve.squared_error(spec) <= 1 for spec in curve.specs)
        if name.endswith("intermediate.dense"):
            assert curve.squared_error(LowRank(2)) < 1e-9


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = MODELS["bert"].build()
    name = "bert.encoder.layer.1.output.dense"
    model.get_submodule(name).weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=f"'{name}'.*NaN"):
        measure_curves(model, find_matrices(model, include=["*.dense"])[0], lambda _: [LowRank], {}, 2)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_integers_add_their_rounding(bits: Bits) -> None:
    model = MODELS["bert"].build()
    matrices = [m for m in find_matrices(model, bits=bits)[0] if m.dense is None]
    statistics = collect(model, [m.name for m in matrices], [text(16, 20)], "fisher")
    curves = measure_curves(model, matrices, lambda _: EVERY, statistics, 6)
    for matrix in matrices[::3]:
        curve, metric = curves[matrix.name], Metric.of(statistics[matrix.name])
        weight = model.get_submodule(matrix.name).weight.detach()
        for kind in ("low_rank", "dense"):
            spec = Dense() if kind == "dense" else curve.sizes[kind][-1]
            factors, error = fit_matrix(model, matrix, spec, statistics, stored=True)
            stored = spec.to_dense(matrix.shape, Rounded(factors, bits))
            rounded = metric.relative_error(weight, stored) ** 2
            assert curve.squared_error(spec) == pytest.approx(rounded, rel=0.5)
            assert kind == "dense" or rounded > error**2


def test_a_matrix_in_floats_has_no_rounding() -> None:
    model = MODELS["bert"].build()
    matrices = [m for m in find_matrices(model)[0] if m.dense is None][:1]
    (curve,) = measure_curves(model, matrices, lambda _: [LowRank], {}, 2).values()
    assert curve.rounding == {}
