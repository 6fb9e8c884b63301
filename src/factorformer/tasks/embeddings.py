"""What sentence embeddings are good for: kept similarities and neighbours, classes and pairs of texts.

Everything is measured of two models side by side, on the same rows, and intervals are those of a bootstrap over rows
(texts, or pairs), paired: both models and their difference are computed on the same resamples.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from factorformer.errors import DataError

NEIGHBOURS = 10
"""Nearest neighbours whose overlap is counted; at most half of the other texts."""

RESAMPLES = 1000
"""Of the bootstrap."""

LEVEL = 0.95
"""Of intervals."""

PAIRS = 200_000
"""Pairs of texts, drawn at random where there are more, whose similarities are ranked."""

FOLDS = 5
"""Of the cross-validation of classifiers."""

CHUNK = 2**24
"""Similarities that are held at a time."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, and the interval in which it would lie on other rows like these.

    Args:
        value: on all rows.
        low, high: the interval of level `LEVEL`, by percentiles of the bootstrap.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Use:
    """One measure of what embeddings are good for.

    Args:
        original, compressed: of both models; `original` is None for what compares the two.
        difference: of the second to the first; None likewise.
    """

    compressed: Estimate
    original: Estimate | None = None
    difference: Estimate | None = None


def kept(
    original: Float[Tensor, "rows width"], compressed: Float[Tensor, "rows other"], seed: int = 0
) -> dict[str, Use]:
    """How far the second embeddings say what the first do.

    Returns:
        `embedding_cosine`: mean cosine of the two embeddings of a text, if they are of one width;
        `similarity_spearman`: rank correlation of the cosines between texts, over all pairs or `PAIRS` of them;
        `neighbour_recall`: of the `NEIGHBOURS` texts that are nearest to a text by the first, the part that is by the
        second.
    """
    first, second = unit(original), unit(compressed)
    rows = len(first)
    found: dict[str, Use] = {}
    if first.shape == second.shape:
        found["embedding_cosine"] = Use(_mean((first * second).sum(1).numpy(), seed))
    one, other = _pairs(rows, seed)
    before, after = (_places((e[one] * e[other]).sum(1).numpy()) for e in (first, second))

    def correlation(counts: np.ndarray) -> float:
        # Two texts that are drawn twice make four pairs.
        return _weighted_spearman(before, after, counts[one] * counts[other])

    found["similarity_spearman"] = Use(_bootstrap(correlation, rows, seed))
    found["neighbour_recall"] = Use(_mean(neighbour_recall(first, second), seed))
    return found


def neighbour_recall(original: Tensor, compressed: Tensor, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """For each text, which part of its nearest by the first embeddings is among the nearest by the second."""
    count = max(1, min(neighbours, (len(original) - 1) // 2))
    parts = [
        torch.eq(one[:, :, None], other[:, None, :]).any(dim=2).float().mean(1)
        for one, other in zip(_nearest(original, count), _nearest(compressed, count), strict=True)
    ]
    return torch.cat(parts).numpy()


def classes(original: Tensor, compressed: Tensor, labels: Sequence[Any], seed: int = 0) -> dict[str, Use]:
    """How well embeddings tell classes apart.

    Returns:
        `nearest_neighbour_accuracy`: a text has the class of the one that is nearest to it;
        `logistic_regression_accuracy`: of logistic regression on embeddings of norm 1, cross-validated on `FOLDS`
        parts, the same for both models.

    Raises:
        DataError: fewer than two classes of as many texts as there are parts.
    """
    check_classes(labels)
    ids = np.unique(np.asarray([str(label) for label in labels]), return_inverse=True)[1]
    right: dict[str, list[np.ndarray]] = {"nearest_neighbour_accuracy": [], "logistic_regression_accuracy": []}
    for embeddings in (unit(original), unit(compressed)):
        nearest = torch.cat(list(_nearest(embeddings, 1)))[:, 0].numpy()
        right["nearest_neighbour_accuracy"].append(ids[nearest] == ids)
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", "The least populated class")  # which is wrong in some part
            predicted = cross_val_predict(LogisticRegression(C=10, max_iter=200), embeddings.numpy(), ids, cv=folds)
        right["logistic_regression_accuracy"].append(predicted == ids)
    return {name: _both(*(r.astype(np.float64) for r in pair), seed=seed) for name, pair in right.items()}


def check_classes(labels: Sequence[Any]) -> None:
    """Raise `DataError` for labels by which classes cannot be told apart: fewer than two of as many texts as parts."""
    sizes = Counter(str(label) for label in labels)
    large = sum(size >= FOLDS for size in sizes.values())
    if large < 2:
        raise DataError(
            f"of {len(sizes)} classes of {len(labels)} texts, {large} have {FOLDS} or more: classes are told apart by "
            f"{FOLDS}-fold cross-validation, which needs two of that size"
        )


def check_pairs(labels: Sequence[Any]) -> None:
    """Raise `DataError` for labels of pairs that are neither two classes nor scores."""
    _scores(labels)


def pairs(
    original: tuple[Tensor, Tensor], compressed: tuple[Tensor, Tensor], labels: Sequence[Any], seed: int = 0
) -> dict[str, Use]:
    """How well the cosine of two texts says whether, or how far, they mean the same.

    Args:
        original, compressed: embeddings of the first and of the second texts.
        labels: two classes, of which `same_class` says that they do; or scores.
        seed: of the bootstrap.

    Returns:
        `pair_spearman`: the rank correlation of the cosine with scores, or with classes; with these `pair_auc` as well,
        the area under its curve.

    Raises:
        DataError: labels that are neither.
    """
    wanted = _scores(labels)
    # Pairs of one text twice are to be ties, whatever their cosines round to.
    given = [_places((unit(one) * unit(other)).sum(1).numpy().round(6)) for one, other in (original, compressed)]
    wanted = _places(wanted)
    measures: dict[str, Callable[..., float]] = {"pair_spearman": _weighted_spearman}
    if len(np.unique(wanted)) == 2:
        measures["pair_auc"] = _weighted_auc
    return {
        name: _paired(lambda cosines, counts, of=of: of(cosines, wanted, counts), given, seed)
        for name, of in measures.items()
    }


DENIAL = re.compile(r"(no|non|not)(\b|_)|un|dis|irr|differ|neutral|contra")
"""What names of classes begin with that say that two texts do not mean the same."""


def same_class(labels: Sequence[Any]) -> Any | None:
    """Of two classes of pairs, the one that says that both texts mean the same; None if they are scores.

    Of numbers it is the larger one. Of names it is the one that does not deny the other, as `not_equivalent`,
    `unrelated` and `different` do, and else the one that sorts last (`yes`, `same`, `true`).

    >>> same_class(["unrelated", "paraphrase"]), same_class(["no", "yes"]), same_class([0, 1])
    ('paraphrase', 'yes', 1)
    """
    values = sorted(set(labels), key=lambda label: (_number(label) is None, _number(label), str(label).casefold()))
    if len(values) != 2:
        return None
    first, last = (str(value).casefold() for value in values)
    named = _number(values[1]) is None
    denies = [
        bool(DENIAL.match(name)) or (name.endswith(other) and len(name) > len(other))
        for name, other in ((first, last), (last, first))
    ]
    return values[0] if named and denies == [False, True] else values[1]


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def unit(embeddings: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """At norm 1, in float32 on the CPU."""
    return F.normalize(embeddings.float().cpu(), dim=1)


def _scores(labels: Sequence[Any]) -> np.ndarray:
    if (same := same_class(labels)) is not None:
        return np.asarray([float(label == same) for label in labels])
    numbers = [_number(label) for label in labels]
    if None in numbers:
        names = sorted({str(label) for label in labels})
        raise DataError(
            f"labels of pairs are scores, or two classes: these are {len(names)} names, such as '{names[0]}'"
        )
    values = np.asarray(numbers, np.float64)
    if len(np.unique(values)) < 2 or not np.isfinite(values).all():
        raise DataError("labels of pairs are scores, or two classes: these are all the same, or not finite")
    return values


def _nearest(embeddings: Tensor, count: int) -> Iterator[Tensor]:
    """The numbers of the texts nearest to each, itself left out, for some texts at a time: `(some, count)`."""
    some = max(1, CHUNK // len(embeddings))
    for first in range(0, len(embeddings), some):
        part = embeddings[first : first + some]
        cosines = part @ embeddings.T
        own = torch.arange(first, first + len(part))
        cosines[own - first, own] = -2
        yield cosines.topk(count, dim=1).indices


def _pairs(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of different texts, or some of them."""
    if rows * (rows - 1) // 2 <= PAIRS:
        one, other = np.triu_indices(rows, 1)
        return one, other
    generator = np.random.default_rng(seed)
    one = generator.integers(rows, size=PAIRS)
    return one, (one + generator.integers(1, rows, size=PAIRS)) % rows


def _places(values: np.ndarray) -> np.ndarray:
    """In the place of each value, how many different ones are smaller."""
    return rankdata(values, method="dense").astype(np.int64) - 1


def _weighted_spearman(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """Spearman's correlation of rows, given by `_places`, that count as often as their weights say."""
    first, second = _weighted_ranks(a, weights), _weighted_ranks(b, weights)
    total = weights.sum()
    if total == 0:  # one text, drawn as often as there are texts, makes no pair
        return float("nan")
    first, second = first - weights @ first / total, second - weights @ second / total
    scale = np.sqrt((weights @ first**2) * (weights @ second**2))
    return float(weights @ (first * second) / scale) if scale > 0 else float("nan")


def _weighted_ranks(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-ranks in a sample in which each value is repeated."""
    each = np.bincount(places, weights)
    return (np.cumsum(each) - each / 2)[places]


def _weighted_auc(cosines: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> float:
    """The probability that a pair of the class 1, not 0, has the larger cosine (Mann and Whitney, 1947)."""
    yes = np.bincount(cosines, weights * wanted)
    no = np.bincount(cosines, weights * (1 - wanted))
    total = yes.sum() * no.sum()
    return float((yes * (np.cumsum(no) - no / 2)).sum() / total) if total > 0 else float("nan")


def _mean(values: np.ndarray, seed: int) -> Estimate:
    return _bootstrap(lambda counts: float(counts @ values / counts.sum()), len(values), seed)


def _both(original: np.ndarray, compressed: np.ndarray, seed: int) -> Use:
    return _paired(lambda values, counts: float(counts @ values / counts.sum()), [original, compressed], seed)


def _paired(statistic: Callable[[np.ndarray, np.ndarray], float], values: Sequence[np.ndarray], seed: int) -> Use:
    """A statistic of both models, and its difference, on the same resamples."""
    first, second = values
    rows = len(first)
    drawn = [(statistic(first, counts), statistic(second, counts)) for counts in _resamples(rows, seed)]
    every = np.ones(rows)
    whole = statistic(first, every), statistic(second, every)
    columns = np.asarray(drawn)
    return Use(
        _interval(whole[1], columns[:, 1]),
        _interval(whole[0], columns[:, 0]),
        _interval(whole[1] - whole[0], columns[:, 1] - columns[:, 0]),
    )


def _bootstrap(statistic: Callable[[np.ndarray], float], rows: int, seed: int) -> Estimate:
    drawn = np.asarray([statistic(counts) for counts in _resamples(rows, seed)])
    return _interval(statistic(np.ones(rows)), drawn)


def _resamples(rows: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn."""
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.bincount(generator.integers(rows, size=rows), minlength=rows).astype(np.float64)


def _interval(value: float, drawn: np.ndarray) -> Estimate:
    tail = (1 - LEVEL) / 2
    finite = drawn[np.isfinite(drawn)]
    low, high = np.quantile(finite, [tail, 1 - tail]) if len(finite) else (value, value)
    return Estimate(float(value), float(low), float(high))
