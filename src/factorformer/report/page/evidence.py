"""What a report tells: of each matrix, of the whole model, and of what was measured; read from directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factorformer.bench.candidates import load, parse
from factorformer.bench.comparison import Comparison, Shape, compare
from factorformer.errors import FactorformerError
from factorformer.files import read_result
from factorformer.hf.source import find, load_model
from factorformer.layers.dense import dense_shape, dense_weight
from factorformer.layers.nn import FactorizedMatrix
from factorformer.planning import Entry, Plan
from factorformer.progress import Progress, silent
from factorformer.report.groups import PLACE
from factorformer.report.inventory import inventory
from factorformer.report.machine import machine
from factorformer.report.result import versions
from factorformer.structures import Dense
from factorformer.training.rank_history import RankHistory

SHAPES = ("1x32", "8x64")
"""Texts and tokens that both models are timed on."""

WIDEST = 2048
"""The shorter side of matrices whose singular values are found, at most: beyond, that takes minutes each."""

DRAWN = 6
"""Layers of a role whose singular values are found: the first, the last, and others at equal distances."""

POINTS = 64
"""Singular values that are drawn of each at equal distances, and as many more at equal ratios."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """What became of one matrix.

    Args:
        name: of the module that owns it; `tied` modules use it as well.
        role: the name with `*` for the number of the layer.
        layer: that number; None for what is no part of a layer.
        shape: `(out, in)`.
        form: how it is stored.
        units: its rank, or the number of its atoms or terms; None of a dense one.
        note: why.
        before, after: bytes.
        flops_before, flops_after: for each token.
        error: `||W - W'||_F / ||W||_F` against the original as both are now.
        fit_error: of the fit, under its metric.
        rise: predicted, of the objective.
    """

    name: str
    tied: tuple[str, ...]
    role: str
    layer: int | None
    shape: tuple[int, int]
    form: str
    units: int | None
    note: str
    before: int
    after: int
    flops_before: int
    flops_after: int
    error: float | None
    fit_error: float | None
    rise: float | None


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of an original matrix.

    Args:
        name, role, layer: as of a `Weight`.
        places: which of them these are, from 1 on.
        values: relative to the largest.
        cut: how many the compressed matrix has, where it has a rank.
        left_out: the part of the energy beyond that.
    """

    name: str
    role: str
    layer: int | None
    places: list[int]
    values: list[float]
    cut: int | None
    left_out: float | None


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Everything that a report tells.

    Args:
        name: of the model.
        against: of the original, if there is one to compare with.
        kind: the class of the model.
        plan: the inventory of the whole model.
        weights: of all matrices.
        record: what `compress` wrote beside the model; empty where nothing did.
        history: how ranks moved.
        spectra: of some matrices, with an original.
        comparisons: times of the original and the model, in this order.
        notes: what is missing, and why.
    """

    name: str
    against: str | None
    kind: str
    plan: Plan
    weights: Sequence[Weight]
    record: Mapping[str, Any]
    history: RankHistory | None
    spectra: Sequence[Spectrum]
    comparisons: Sequence[Comparison]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {
            "model": self.name,
            "against": self.against,
            "kind": self.kind,
            "bytes": {"original": self.plan.original.bytes, "compressed": self.plan.compressed.bytes},
            "flops_per_token": {"original": self.plan.original.flops, "compressed": self.plan.compressed.flops},
            "weights": [dataclasses.asdict(weight) for weight in self.weights],
            "record": dict(self.record),
            "rank_history": None if self.history is None else self.history.to_dict(),
            "spectra": [dataclasses.asdict(spectrum) for spectrum in self.spectra],
            "latency": [
                {
                    "shape": str(comparison.shape),
                    "rounds": comparison.rounds,
                    **{
                        who: {name: dataclasses.asdict(getattr(timing, name)) for name in ("milliseconds", "speedup")}
                        for who, timing in zip(("original", "compressed"), comparison.timings, strict=True)
                    },
                }
                for comparison in self.comparisons
            ],
            "notes": list(self.notes),
            "machine": machine(),
            "versions": versions(),
        }


def gather(model: str, against: str | None, *, time: bool = True, progress: Progress = silent) -> Evidence:
    """Read, and measure, what a report tells.

    Args:
        model: a directory, compressed or not.
        against: the original: a directory, a name on the Hub, or `minilm`.
        time: whether both are timed.
        progress: progress callback.

    Raises:
        ModelError: no such model.
        CheckpointError: one that cannot be loaded.
    """
    path = find(model)
    loaded = load_model(path, device="cpu")
    plan, notes = inventory(loaded, "all"), []
    record = read_result(path)
    original = None if against is None else load_model(find(against), device="cpu")
    spectra: list[Spectrum] = []
    errors: dict[str, float] = {}
    if original is not None:
        dense = _dense_weights(original)
        prefixes = (f"{loaded.base_model_prefix}.", f"{original.base_model_prefix}.")
        errors, spectra, missing = _compared(loaded, plan, dense, prefixes, progress)
        notes += missing
    else:
        notes.append("Errors of weights, singular values and times need the original: --against.")
    weights = [_weight(entry, record.get("fits") or {}, errors) for entry in plan.entries]
    comparisons: list[Comparison] = []
    del original
    if against is not None and time:
        try:
            comparisons = _timed(against, model, progress)
        except FactorformerError as error:
            notes.append(f"Not timed: {error}.")
    return Evidence(
        model,
        against,
        type(loaded).__name__,
        plan,
        weights,
        record,
        RankHistory.load(path),
        spectra,
        comparisons,
        notes,
    )


def _weight(entry: Entry, fits: Mapping[str, Any], errors: Mapping[str, float]) -> Weight:
    name = entry.matrix.name
    numbers = PLACE.findall(name)
    known = fits.get(name) or {}
    return Weight(
        name,
        entry.matrix.aliases,
        PLACE.sub("*", name),
        int(numbers[0]) if numbers else None,
        entry.matrix.shape,
        entry.form,
        None if entry.spec is None or isinstance(entry.spec, Dense) else entry.spec.units,
        entry.reason,
        entry.original.bytes,
        entry.compressed.bytes,
        entry.original.flops,
        entry.compressed.flops,
        errors.get(name),
        known.get("error"),
        known.get("rise"),
    )


def _dense_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of all layers that could be factorized, `(out, in)`; compressed ones are built."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedMatrix):
            found[name] = module.to_dense().detach()
        elif dense_shape(module) is not None:
            found[name] = dense_weight(module).detach()
    return found


def _compared(
    model: PreTrainedModel, plan: Plan, dense: Mapping[str, Tensor], prefixes: tuple[str, str], progress: Progress
) -> tuple[dict[str, float], list[Spectrum], list[str]]:
    """Errors by name, singular values of some, and what could not be compared."""
    mine, others = prefixes
    known = {name.removeprefix(others): weight for name, weight in dense.items()}
    errors: dict[str, float] = {}
    spectra: list[Spectrum] = []
    changed: list[str] = []
    drawn = _drawn(plan.entries)
    for number, entry in enumerate(plan.entries, 1):
        name = entry.matrix.name
        before = known.get(name.removeprefix(mine))
        now = _now(model, name)
        if before is not None and now is not None:
            if before.shape == now.shape:
                errors[name] = _relative_error(before, now)
            else:
                changed.append(name)
        if name in drawn and before is not None:
            spectra.append(_spectrum(entry, before))
        progress("compare", number, len(plan.entries))
    notes = []
    if changed:
        notes.append(f"Of other shapes in the original, and not compared with it: {', '.join(changed)}.")
    wide = [entry for entry in plan.entries if min(entry.matrix.shape) > WIDEST]
    if wide:
        notes.append(f"Singular values are not drawn of matrices wider than {WIDEST:,}: {len(wide)} here.")
    return errors, spectra, notes


def _now(model: PreTrainedModel, name: str) -> Tensor | None:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # a bare parameter, such as fused experts
        return None
    if isinstance(module, FactorizedMatrix):
        return module.to_dense().detach()
    return dense_weight(module).detach() if dense_shape(module) is not None else None


def _relative_error(before: Tensor, now: Tensor) -> float:
    size = float(torch.linalg.vector_norm(before.float()))
    return float(torch.linalg.vector_norm(before.float() - now.float())) / size if size > 0 else 0.0


def _drawn(entries: Sequence[Entry]) -> set[str]:
    """Names of matrices whose singular values are found: of each role, layers at equal distances."""
    roles: dict[str, list[str]] = {}
    for entry in entries:
        if min(entry.matrix.shape) <= WIDEST:
            roles.setdefault(PLACE.sub("*", entry.matrix.name), []).append(entry.matrix.name)
    found = set()
    for names in roles.values():
        count = min(DRAWN, len(names))
        found |= {names[round(place * (len(names) - 1) / max(count - 1, 1))] for place in range(count)}
    return found


def _spectrum(entry: Entry, weight: Tensor) -> Spectrum:
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    energies = torch.linalg.eigvalsh(wide @ wide.T).flip(0).clamp_min(0)
    values = energies.sqrt() / energies[0].sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    count = len(values)
    parts = [step / (POINTS - 1) for step in range(POINTS)]
    places = sorted({round(place) for part in parts for place in (count**part, 1 + (count - 1) * part)})
    cut = getattr(entry.spec, "rank", None) if entry.spec is not None and entry.spec.kind == "low_rank" else None
    left_out = None if cut is None else float(energies[cut:].sum() / energies.sum().clamp_min(1e-300))
    numbers = PLACE.findall(entry.matrix.name)
    return Spectrum(
        entry.matrix.name,
        PLACE.sub("*", entry.matrix.name),
        int(numbers[0]) if numbers else None,
        places,
        [float(values[place - 1]) for place in places],
        cut,
        left_out,
    )


def _timed(against: str, model: str, progress: Progress) -> list[Comparison]:
    candidates = [parse(against), parse(model)]
    runners = [load(candidate, torch.get_num_threads(), torch.device("cpu")) for candidate in candidates]
    shapes = [Shape.parse(text) for text in SHAPES]
    least = min((runner.positions or shapes[-1].tokens) for runner in runners)
    shapes = [shape for shape in shapes if shape.tokens <= least] or [Shape(1, least)]
    return compare(candidates, runners, shapes, seconds=5.0, progress=progress)
