"""What embeddings are good for: measures against libraries and brute force, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from factorformer.errors import DataError
from factorformer.tasks import embeddings
from factorformer.tasks.embeddings import classes, kept, neighbour_recall, pairs, unit


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def rotated(given: Tensor) -> Tensor:
    return given @ torch.linalg.qr(normal(given.shape[1], given.shape[1], seed=9))[0]


def test_weighted_statistics_are_those_of_repeated_rows() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(9, size=60) / 9, generator.integers(7, size=60) / 7
    wanted = generator.integers(2, size=60).astype(float)
    one, other, classes = (embeddings._places(values) for values in (a, b, wanted))
    for counts in (np.ones(60), np.bincount(generator.integers(60, size=60), minlength=60).astype(float)):
        first, second, labels = (np.repeat(values, counts.astype(int)) for values in (a, b, wanted))
        assert embeddings._weighted_spearman(one, other, counts) == pytest.approx(spearmanr(first, second).statistic)
        assert embeddings._weighted_auc(one, classes, counts) == pytest.approx(roc_auc_score(labels, first))


@pytest.mark.parametrize("rows", [3, 12, 40, 700])
def test_neighbours_against_brute_force(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", 5000)
    first, second = unit(normal(rows, 6)), unit(normal(rows, 6) + 0.3 * normal(rows, 6, seed=1))
    count = min(10, (rows - 1) // 2)
    found = neighbour_recall(first, second)
    for row in range(0, rows, 7):
        nearest = []
        for given in (first, second):
            cosines = (given[row] @ given.T).tolist()
            others = sorted((other for other in range(rows) if other != row), key=lambda o: -cosines[o])
            nearest.append(set(others[:count]))
        assert found[row] == pytest.approx(len(nearest[0] & nearest[1]) / count)


def test_what_is_kept_does_not_depend_on_the_basis() -> None:
    first = normal(60, 8)
    same, turned = kept(first, first), kept(first, rotated(first))
    assert {name: use.compressed.value for name, use in same.items()} == pytest.approx(dict.fromkeys(same, 1.0))
    assert turned["embedding_cosine"].compressed.value < 0.7
    assert turned["similarity_spearman"].compressed.value == pytest.approx(1, abs=1e-4)
    assert turned["neighbour_recall"].compressed.value > 0.99
    narrower = kept(first, first[:, :3])
    assert "embedding_cosine" not in narrower
    assert 0.2 < narrower["neighbour_recall"].compressed.value < 0.8


def test_pairs_that_are_drawn_estimate_all(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = normal(300, 8), normal(300, 8) + 0.5 * normal(300, 8, seed=1)
    whole = kept(first, second)["similarity_spearman"].compressed
    monkeypatch.setattr(embeddings, "PAIRS", 20_000)
    drawn = kept(first, second)["similarity_spearman"].compressed
    assert drawn.value == pytest.approx(whole.value, abs=0.02)
    assert whole.low < whole.value < whole.high
    assert whole.high - whole.low < 0.1


def test_classes_are_told_apart_by_neighbours_and_by_planes() -> None:
    ids = [row % 3 for row in range(90)]
    apart = 4 * torch.eye(3)[ids] + 0.3 * normal(90, 3)
    names = ["abc"[i] for i in ids]
    found = classes(apart, normal(90, 3, seed=2), names)
    for use in found.values():
        assert use.original is not None
        assert use.difference is not None
        assert use.original.value == 1
        assert 0.1 < use.compressed.value < 0.6
        assert use.difference.value == pytest.approx(use.compressed.value - 1)
        assert use.difference.low < use.difference.value < use.difference.high < 0
    # One text of a class is wrong by any measure, and the rest is as it was.
    rare = classes(torch.cat([apart, -apart[:1]]), torch.cat([apart, -apart[:1]]), [*names, "z"])
    assert [use.compressed.value for use in rare.values()] == pytest.approx([90 / 91, 90 / 91])
    for labels in (["a"] * 90, ["a"] * 88 + ["b", "c"]):
        with pytest.raises(DataError, match=r"classes of 90 texts, 1 have 5 or more"):
            classes(apart, apart, labels)


def test_pairs_by_classes_and_by_scores() -> None:
    one, noise = normal(200, 16), normal(200, 16, seed=1)
    scores = torch.linspace(0, 5, 200)
    other = scores[:, None] * one + 3 * noise
    by_scores = pairs((one, other), (one, noise), scores.tolist())["pair_spearman"]
    assert by_scores.original is not None
    cosines = (unit(one) * unit(other)).sum(1).numpy()
    assert by_scores.original.value == pytest.approx(spearmanr(cosines, scores.numpy()).statistic, abs=1e-6)
    assert abs(by_scores.compressed.value) < 0.3
    same = ["yes" if score > 2.5 else "no" for score in scores]
    by_class = pairs((one, other), (one, noise), same)["pair_auc"]
    assert by_class.original is not None
    assert by_class.original.value == pytest.approx(roc_auc_score([s == "yes" for s in same], cosines))
    for labels, message in ((["a", "b", "c"] * 66 + ["a", "b"], "3 names"), ([1] * 200, "all the same")):
        with pytest.raises(DataError, match=message):
            pairs((one, other), (one, noise), labels)


@pytest.mark.parametrize(
    ("same", "other"),
    [
        ("yes", "no"),
        ("equivalent", "not_equivalent"),
        ("duplicate", "Not duplicate"),
        ("paraphrase", "non-paraphrase"),
        ("related", "unrelated"),
        ("same", "different"),
        ("Same", "different"),
        ("equivalent", "Not equivalent"),
        ("similar", "dissimilar"),
        ("normal", "abnormal"),
        (True, False),
        (1, 0),
        ("10", "9"),
        ("notable", "minor"),
        ("similar", "unrelated"),
        ("entailment", "neutral"),
        ("duplicate", "unique"),
        ("match", "not a match"),
    ],
)
def test_which_class_means_the_same(same: object, other: object) -> None:
    for labels in ([same, other, other], [other, same]):
        assert embeddings.same_class(labels) == same
    one = torch.eye(4)
    two = torch.tensor([0, 1, 3, 2])
    found = pairs((one, one[two]), (one, one), [same, same, other, other])["pair_auc"]
    assert found.original is not None
    assert found.original.value == 1
    assert found.compressed.value == 0.5


def test_intervals_are_those_of_the_mean_and_pairing_makes_them_narrow() -> None:
    generator = np.random.default_rng(0)
    first = (generator.random(2000) < 0.8).astype(float)
    second = np.where(generator.random(2000) < 0.02, 1 - first, first)
    use = embeddings._both(first, second, seed=0)
    assert use.original is not None
    assert use.difference is not None
    half = 1.96 * (first.mean() * (1 - first.mean()) / 2000) ** 0.5
    assert use.original.high - use.original.low == pytest.approx(2 * half, rel=0.1)
    assert use.difference.high - use.difference.low < 0.6 * (use.original.high - use.original.low)
