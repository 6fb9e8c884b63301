"""Error of a matrix as a function of its size, for every structure, before the final fit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy
import torch
from torch import nn

from factorformer import processes
from factorformer.fitting import QUICK, Metric
from factorformer.fitting.linalg import truncation_errors
from factorformer.fitting.matrices import as_stored, fit_weight, for_storage, metric_of, naming
from factorformer.fitting.moments import LayerStatistics
from factorformer.fitting.sampling import sampled
from factorformer.layers.dense import dense_weight
from factorformer.layers.matrix import Matrix
from factorformer.planning import Entry, choose_families
from factorformer.structures import Dense, Structure
from factorformer.structures.integers import Bits

ROUNDS = 8
"""Rounds of the fits that errors are read from; the squared errors of full fits are a little smaller."""

SPREAD = 1.6
"""Dictionaries are fitted at the common size times and divided by this, and errors interpolated between."""

FLATTENING = 1 / 3
"""Below the smaller of the two sizes, dictionaries lose their lead over low rank at this part of the slope between: on
MiniLM's feed-forward outputs they have 0.19 of its squared error at a half of the bytes, 0.53 at a fifth, and 0.74 at a
twelfth."""

SMALL = 2**18
"""Entries up to which three matrices of a kind are fitted, the first, the middle and the last; of larger ones one."""

ROUNDING: dict[Bits, float] = {8: 1e-4, 4: 2e-2, 3: 1e-1}
"""Squared relative error that integers of so many bits add, where weights are not there to tell."""

StructuresOf = Callable[[Matrix], Sequence[type[Structure]]]
"""What a matrix can become."""

ROUNDED = 0.54
"""Part of what rounding adds under the metric that it adds to the loss: fits in order make up for more of it, and the
errors of different tokens are independent. Ours, of MiniLM's blocks dense in int8 and all of it dense in 4 bits."""

LEAST = 1e-12
"""Squared errors below this count as this, so that they have a logarithm."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The squared relative error that a matrix has under every spec, in the metric of a method, and what it costs.

    Where a structure has a closed form (low rank: the tail of singular values) it is exact. Others are priced by their
    bytes: `relative` says by what factor their squared error differs from that of low rank of as many bytes,
    interpolated between logarithms.

    Args:
        matrix: which one.
        energy: what a squared relative error of 1, a matrix of zeros, adds to the loss.
        low_rank: squared relative errors of ranks 0, 1, ...
        exact: by structure, where a closed form is the optimum, the same of 0, 1, ... units.
        relative: by structure, `(part of the dense bytes, factor)`, largest part first; bytes of the type in which the
            matrix is stored.
        sizes: the specs to choose among, by structure, in growing bytes.
        rounding: by structure, what storing factors in integers adds under the metric, of those matrices that are to be
            so; `ROUNDED` of it counts.
    """

    matrix: Matrix
    energy: float
    low_rank: torch.Tensor
    exact: Mapping[str, torch.Tensor]
    relative: Mapping[str, tuple[tuple[float, float], ...]]
    sizes: Mapping[str, tuple[Structure, ...]]
    rounding: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def specs(self) -> Iterator[Structure]:
        """Everything that the matrix can become, but for dense."""
        for sizes in self.sizes.values():
            yield from sizes

    def loss(self, spec: Structure | None) -> float:
        """Predicted rise of the loss under a spec; 0 for dense."""
        if spec is None:
            return 0.0
        rounding = ROUNDED * self.rounding.get(spec.kind, 0.0)
        return self.energy * (rounding + (0.0 if isinstance(spec, Dense) else self.of_structure(spec)))

    def squared_error(self, spec: Structure | None) -> float:
        """Under a spec, in the metric; 0 for dense in floats."""
        if spec is None:
            return 0.0
        return self.rounding.get(spec.kind, 0.0) + (0.0 if isinstance(spec, Dense) else self.of_structure(spec))

    def of_structure(self, spec: Structure) -> float:
        """The squared error before factors are rounded."""
        if spec.kind in self.exact:
            errors = self.exact[spec.kind]
            return float(errors[min(spec.units, len(errors) - 1)])
        part = _part(self.matrix, spec)
        return min(self.of_low_rank(part) * math.exp(_relative(self.relative[spec.kind], part)), 1.0)

    def of_low_rank(self, part: float) -> float:
        """The squared error of low rank of a part of the dense values, a fraction of a rank included."""
        rank = part * math.prod(self.matrix.shape) / sum(self.matrix.shape)
        below = min(int(rank), len(self.low_rank) - 2)
        first, second = (math.log(max(float(self.low_rank[i]), LEAST)) for i in (below, below + 1))
        return math.exp(first + (second - first) * min(rank - below, 1.0))


@dataclasses.dataclass(frozen=True)
class _Fit:
    """Factors of a matrix, or of rows of one, and their relative error under a metric."""

    matrix: Matrix
    weight: torch.Tensor
    spec: Structure
    metric: Metric
    factors: Mapping[str, torch.Tensor]
    error: float

    def rounded_error(self) -> float:
        """Of the factors as they are stored."""
        factors = for_storage(self.matrix, self.weight, self.spec, dict(self.factors), self.metric)
        return self.metric.relative_error(self.weight, as_stored(self.matrix, self.spec, factors))


def measure_curves(
    model: nn.Module,
    matrices: Sequence[Matrix],
    structures: StructuresOf,
    statistics: Mapping[str, LayerStatistics],
    ratio: float,
    progress: Callable[[int], None] | None = None,
    known: Mapping[str, Curve] | None = None,
) -> dict[str, Curve]:
    """Error curves of matrices: one decomposition of each, and a few quick fits for each kind of matrix.

    Low rank takes the singular values of the weight under the metric (`R W L`), a plain sum of Kronecker products
    those of the rearranged weight (Van Loan and Pitsianis, 1993): both are the exact errors of the fit. Under other
    metrics the closed form for Kronecker sums is a start only, whose squared error is 1.5 to 12 times that of the fit
    on MiniLM; and for dictionaries there is none. But relative to low rank of as many bytes their squared errors are
    nearly the same for all matrices of one shape and role, and so measured on one to three of them by fits of few
    rounds: a sum of Kronecker products at the common size, and a dictionary at two sizes, each with the division of
    its bytes that fits best.

    Args:
        model: not changed.
        matrices: those that can be factorized.
        structures: what each can become.
        statistics: what the metric knows of each layer; without, errors are plain ones of the weights.
        ratio: dense bytes over the bytes that matrices have on average, around which the curves should be right.
        progress: called with the number of matrices and fits done.
        known: curves of the same matrices in other integers: they need not be decomposed again.

    Returns:
        Curves by name. Where weights are on the meta device, a usual curve stands for every matrix.

    Raises:
        ModelError: a weight that is not finite; the message names the layer.
    """
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done)

    @functools.cache
    def metric(name: str) -> Metric:
        return metric_of(name, statistics)

    @functools.cache
    def weight(name: str, tall: bool) -> tuple[torch.Tensor, Metric]:
        whole = dense_weight(model.get_submodule(name)), metric(name)
        return (sampled(*whole) if tall else None) or whole

    def fitted(matrix: Matrix, spec: Structure, rounds: int | None) -> _Fit:
        # Each row of these has codes of its own, and few tell as much of the errors of all; a dictionary that serves
        # only these has a part of them less, about its atoms over their number.
        values, found = weight(matrix.name, spec.codes_rows)
        rows = dataclasses.replace(matrix, shape=(values.shape[0], values.shape[1]))
        return _Fit(rows, values, spec, found, *fit_weight(rows, values, spec, found, rounds))

    @functools.cache
    def rounded_dense(matrix: Matrix) -> float:
        # How far errors make up for each other is up to the inputs of each matrix.
        dense = dense_weight(model.get_submodule(matrix.name))
        return fit_weight(matrix, dense, Dense(), metric_of(matrix.name, statistics))[1] ** 2

    def error(matrix: Matrix, spec: Structure, rounds: int = QUICK) -> float:
        found = fitted(matrix, spec, rounds).error
        step()
        return found

    if known is None:
        mine = processes.own(matrices, lambda matrix: math.prod(matrix.shape) * min(matrix.shape))
        bare = processes.merged({m.name: _bare_curve(model, m, structures, statistics) for m in mine})
    else:
        bare = {matrix.name: dataclasses.replace(known[matrix.name], matrix=matrix) for matrix in matrices}
    for _ in bare:
        step()
    alike: dict[object, list[Matrix]] = {}
    for matrix in matrices:
        alike.setdefault((matrix.shape, matrix.dtype, matrix.role, tuple(structures(matrix))), []).append(matrix)
    curves: dict[str, Curve] = {}
    for members in processes.own(list(alike.values()), lambda members: math.prod(members[0].shape) * len(members)):
        metric.cache_clear()  # of a kind few matrices are fitted, each many times
        weight.cache_clear()
        relative, sizes = _of_kind(model, members, structures, bare, ratio, error)
        rounding = _rounding(model, bare[members[len(members) // 2].name], sizes, fitted, rounded_dense, ratio)
        for matrix in members:
            own = rounding
            if (
                matrix.bits not in (None, 8)
                and rounding[Dense.kind] > 0
                and not dense_weight(model.get_submodule(matrix.name)).is_meta
            ):
                part = rounded_dense(matrix) / rounding[Dense.kind]
                own = {kind: part * added for kind, added in rounding.items()}
            curves[matrix.name] = dataclasses.replace(bare[matrix.name], relative=relative, sizes=sizes, rounding=own)
    curves = processes.merged(curves)
    return {matrix.name: curves[matrix.name] for matrix in matrices}


def _of_kind(
    model: nn.Module,
    members: Sequence[Matrix],
    structures: StructuresOf,
    bare: Mapping[str, Curve],
    ratio: float,
    error: Callable[[Matrix, Structure, int], float],
) -> tuple[dict[str, tuple[tuple[float, float], ...]], dict[str, tuple[Structure, ...]]]:
    """What matrices of one shape and role have in common: `relative` and `sizes` of their curves."""
    relative: dict[str, tuple[tuple[float, float], ...]] = {}
    sizes: dict[str, tuple[Structure, ...]] = {}
    first = members[0]
    on_meta = dense_weight(model.get_submodule(first.name)).is_meta
    for structure in structures(first):
        kind, candidates = structure.kind, _candidates(structure, first)
        anchors: list[tuple[Structure, float]] = []
        if kind not in bare[first.name].exact and not on_meta:
            samples = [bare[matrix.name] for matrix in _samples(members)]
            anchors = _anchors(structure, samples, candidates, ratio, error)
            if not anchors:
                continue
        measured = tuple((_part(first, spec), factor) for spec, factor in anchors)
        relative[kind] = measured or structure.relative_errors
        sizes[kind] = _ladder(first, candidates, [spec for spec, _ in anchors])
    return relative, sizes


def _rounding(
    model: nn.Module,
    bare: Curve,
    sizes: Mapping[str, Sequence[Structure]],
    fitted: Callable[[Matrix, Structure, int | None], _Fit],
    rounded_dense: Callable[[Matrix], float],
    ratio: float,
) -> dict[str, float]:
    """What integers add to the squared error of each structure, near the common size, and to the dense matrix."""
    matrix = bare.matrix
    if matrix.bits is None:
        return {}
    weight = dense_weight(model.get_submodule(matrix.name))
    if weight.is_meta:
        return dict.fromkeys([*sizes, Dense.kind], ROUNDING[matrix.bits])
    found = {Dense.kind: rounded_dense(matrix)}
    for kind, specs in sizes.items():
        if specs:
            spec = min(specs, key=lambda spec: abs(_part(matrix, spec) - _usual(matrix, ratio)))
            fit = fitted(matrix, spec, None if kind in bare.exact else QUICK)
            found[kind] = max(fit.rounded_error() ** 2 - fit.error**2, 0.0)
    return found


def _bare_curve(
    model: nn.Module,
    matrix: Matrix,
    structures: StructuresOf,
    statistics: Mapping[str, LayerStatistics],
) -> Curve:
    """What decompositions tell."""
    weight = dense_weight(model.get_submodule(matrix.name))
    if weight.is_meta:
        # So the squared errors of MiniLM's matrices fall with the part of the bytes, near the middle of the range.
        ranks = torch.arange(min(matrix.shape) + 1, dtype=torch.float64)
        usual = torch.exp(-4 * ranks * sum(matrix.shape) / math.prod(matrix.shape))
        closed = [s.kind for s in structures(matrix) if s.truncated(weight, weight, plain=True) is weight]
        return Curve(matrix, 0.0, usual, dict.fromkeys(closed, usual), {}, {})
    metric = metric_of(matrix.name, statistics)
    exact: dict[str, torch.Tensor] = {}
    with naming(matrix.name):
        scaled = metric.apply(weight)
        low_rank = truncation_errors(scaled).cpu()
        for structure in structures(matrix):
            if next(structure.candidates(matrix.shape, weight.dtype), None) is None:
                continue
            same = structure.truncated(weight, scaled, plain=metric.rows is None and metric.columns is None)
            if same is not None:
                exact[structure.kind] = low_rank if same is scaled else truncation_errors(same).cpu()
    energy = metric.scale * float(torch.linalg.vector_norm(scaled, dtype=torch.float64).square())
    return Curve(matrix, energy, low_rank, exact, {}, {})


def _candidates(structure: type[Structure], matrix: Matrix) -> list[Structure]:
    return sorted(structure.candidates(matrix.shape, matrix.values), key=matrix.bytes)


def _samples(members: Sequence[Matrix]) -> list[Matrix]:
    middle = len(members) // 2
    few = math.prod(members[0].shape) <= SMALL
    return [members[i] for i in sorted({0, middle, len(members) - 1} if few else {middle})]


def _part(matrix: Matrix, spec: Structure) -> float:
    """Bytes of a spec as a part of those of the dense matrix in the same integers or floats."""
    return matrix.bytes(spec) / matrix.bytes(matrix.whole)


def _usual(matrix: Matrix, ratio: float) -> float:
    """The part that a matrix has where all are so many times smaller than dense in floats."""
    return matrix.bytes(None) / matrix.bytes(matrix.whole) / ratio


def _anchors(
    structure: type[Structure],
    samples: Sequence[Curve],
    candidates: Sequence[Structure],
    ratio: float,
    error: Callable[[Matrix, Structure, int], float],
) -> list[tuple[Structure, float]]:
    """Specs that were fitted, and by what factor their squared errors differ from low rank's, the largest first."""
    middle = samples[len(samples) // 2].matrix
    usual = _usual(middle, ratio)
    parts = [usual * SPREAD, usual / SPREAD] if len(structure.relative_errors) > 1 else [usual]
    found: list[tuple[Structure, float]] = []
    for part in parts:
        within = [spec for spec in candidates if _part(middle, spec) <= min(part, 0.8)] or list(candidates[:1])
        if not within:
            break
        spec = within[-1]
        choice = choose_families([Entry(middle, spec, "")], lambda matrix, spec: error(matrix, spec, QUICK))
        for chosen in choice.values():
            spec = [spec for spec in chosen.ladder if _part(middle, spec) <= _part(middle, within[-1])][-1]
        if spec not in [other for other, _ in found]:
            logarithms = [
                math.log(max(error(curve.matrix, spec, ROUNDS) ** 2, LEAST) / curve.of_low_rank(_part(middle, spec)))
                for curve in samples
            ]
            # Weights that are of low rank exactly would send the factor anywhere.
            found.append((spec, math.exp(min(max(sum(logarithms) / len(samples), -5), 5))))
    return found


def _interpolate(anchors: Sequence[tuple[float, float]], part: float) -> float:
    """A logarithm, linear in that of the part; constant beyond the anchors."""
    known = sorted(anchors)
    return float(numpy.interp(math.log(part), [math.log(p) for p, _ in known], [math.log(f) for _, f in known]))


def _relative(anchors: Sequence[tuple[float, float]], part: float) -> float:
    """The logarithm of a factor: between anchors interpolated, below them at a part of the slope and up to 0."""
    found = _interpolate(anchors, part)
    known = sorted((math.log(p), math.log(f)) for p, f in anchors)
    if len(known) > 1 and math.log(part) < known[0][0]:
        slope = (known[1][1] - known[0][1]) / (known[1][0] - known[0][0])
        beyond = found + FLATTENING * slope * (math.log(part) - known[0][0])
        found = max(found, min(beyond, 0.0))
    return found


def _ladder(matrix: Matrix, candidates: Sequence[Structure], anchors: Sequence[Structure]) -> tuple[Structure, ...]:
    """The sizes of a structure: where its bytes can be divided in many ways, those that divide them as the anchors do.

    The part of the bytes that is not the factor `weight` (the dictionary) is interpolated between anchors.
    """
    families = type(candidates[0]).families(matrix.shape, matrix.values) if candidates else ()
    if len(families) < 2 or not anchors:
        return tuple(candidates)

    def share(spec: Structure) -> float:
        sizes = spec.tensors(matrix.shape)
        return 1 - math.prod(sizes["weight"].size) / spec.parameters(matrix.shape)

    shares = [(_part(matrix, spec), share(spec)) for spec in anchors]
    width = families[1][0].units / families[0][0].units
    near = [
        spec
        for family in families
        for spec in family
        if abs(math.log(share(spec)) - _interpolate(shares, _part(matrix, spec))) <= math.log(width) / 2
    ]
    if not near:
        return tuple(candidates)
    # Sizes below the smallest dictionary that families know are those of the candidates.
    parts = {_part(matrix, spec): spec for spec in near}
    least = min(parts)
    parts |= {_part(matrix, spec): spec for spec in candidates if _part(matrix, spec) < least}
    return tuple(parts[part] for part in sorted(parts))
