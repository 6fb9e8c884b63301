"""Rows that stand for all those of a tall matrix."""

from __future__ import annotations

import pytest
import torch

from factorformer.fitting import Metric, dictionary, fit, sampling
from factorformer.fitting.linalg import square_root
from factorformer.fitting.sampling import FEWEST, WORTH, sampled
from factorformer.structures import DenseSparse

ROWS = 3 * WORTH * FEWEST
WIDTH = 24


def tall(seed: int = 0) -> tuple[torch.Tensor, Metric]:
    """A table of combinations of few atoms and noise, rows as frequent as tokens, columns of a moment."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(32, WIDTH, generator=generator)
    codes = torch.randn(ROWS, 32, generator=generator) * (torch.rand(ROWS, 32, generator=generator) < 0.15)
    weight = codes @ atoms + 0.3 * torch.randn(ROWS, WIDTH, generator=generator)
    often = 1 / torch.arange(1, ROWS + 1, dtype=torch.float64)[torch.randperm(ROWS, generator=generator)]
    mixed = torch.randn(3 * WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return weight, Metric(often.sqrt(), square_root(mixed.T @ mixed))


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_a_sample_are_those_of_all_rows(weighted: bool) -> None:
    weight, metric = tall()
    metric = metric if weighted else Metric()
    found = sampled(weight, metric)
    assert found is not None
    rows, few = found
    assert 0.9 * FEWEST < len(rows) < 1.1 * FEWEST
    assert few.rows is not None
    # Energies are exact where every row has a chance in proportion; errors of something else are right on average.
    energy = metric.apply(weight).square().sum(dtype=torch.float64)
    assert float(few.apply(rows).square().sum(dtype=torch.float64) / energy) == pytest.approx(1, abs=0.05)
    change = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH
    whole = metric.relative_error(weight, weight @ change)
    assert few.relative_error(rows, rows @ change) == pytest.approx(whole, rel=0.03)


def test_the_draw_is_always_the_same() -> None:
    first, second = sampled(*tall()), sampled(*tall())
    assert first is not None
    assert second is not None
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].rows, second[1].rows)  # type: ignore[arg-type]


def test_what_stands_for_itself_is_not_sampled() -> None:
    weight, metric = tall()
    assert sampled(weight[: WORTH * FEWEST - 1], Metric()) is None
    assert sampled(torch.zeros_like(weight), metric) is None
    assert sampled(weight * torch.nan, metric) is None
    coupled = torch.eye(8, dtype=torch.float64)
    assert sampled(torch.ones(8, 4), Metric(coupled)) is None


def test_rows_with_much_of_the_energy_are_always_kept() -> None:
    weight = tall()[0]
    weight[5000:5100] *= 1000
    found = sampled(weight, Metric())
    assert found is not None
    assert found[1].rows is not None
    large = found[0].norm(dim=1) > 500
    assert torch.equal(found[0][large], weight[5000:5100])
    assert bool((found[1].rows[large] == 1).all())


def test_where_few_rows_matter_all_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(ROWS, WIDTH)
    weight[5000:5010] = torch.randn(10, WIDTH)
    assert sampled(weight, Metric()) is None
    monkeypatch.setattr(dictionary, "MANY", ROWS - 1)
    _, error = fit(weight, DenseSparse(32, 6), rounds=2)
    assert error < 0.5


def test_a_dictionary_of_a_sample_serves_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, metric = tall()
    spec = DenseSparse(32, 6)
    monkeypatch.setattr(dictionary, "MANY", ROWS - 1)
    quick, error = fit(weight, spec, metric, rounds=8)
    assert metric.relative_error(weight, spec.to_dense((ROWS, WIDTH), quick)) == pytest.approx(error, rel=1e-4)
    monkeypatch.setattr(dictionary, "MANY", ROWS)
    _, full = fit(weight, spec, metric, rounds=8)
    assert error < 1.05 * full


def test_atoms_that_no_sampled_row_uses_serve_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "MANY", 1000)
    monkeypatch.setattr(sampling, "FEWEST", 256)
    monkeypatch.setattr(sampling, "FOR_EACH", 1)
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(30, 16, generator=generator)
    weight = few[torch.randint(30, (4000,), generator=generator)]
    factors, error = fit(weight, DenseSparse(48, 1), Metric())
    assert error < 0.01
    assert bool((factors["weight"] != 0).all())
