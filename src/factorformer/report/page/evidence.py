"""What a report tells: of each matrix, of the whole model, and of what was measured; read from directories."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factorformer.bench.candidates import load, parse
from factorformer.bench.comparison import Comparison, Shape, compare
from factorformer.errors import FactorformerError
from factorformer.files import RESULT_FILE, read_result
from factorformer.hf.source import find, load_model
from factorformer.layers.dense import dense_shape, dense_weight
from factorformer.layers.matrix import Cost
from factorformer.layers.nn import FactorizedMatrix
from factorformer.planning import Entry, Plan
from factorformer.progress import Progress, silent
from factorformer.report.groups import PLACE
from factorformer.report.inventory import inventory
from factorformer.report.machine import machine
from factorformer.report.result import versions
from factorformer.structures import Dense
from factorformer.training.rank_history import RankHistory

CLOSE = 0.02
"""How far two ratios may be apart that are taken for one."""

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
        layer: that number, or those, as in `3.7`; None for what is no part of a layer.
        shape: `(out, in)`.
        form: how it is stored.
        shares: the matrix whose dictionary it uses, which is counted there.
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
    layer: str | None
    shape: tuple[int, int]
    form: str
    shares: str | None
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
    layer: str | None
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
        before: cost of the original; of the same layers dense, where there is none to compare with.
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
    before: Cost
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
            "bytes": {"original": self.before.bytes, "compressed": self.plan.compressed.bytes},
            "flops_per_token": {"original": self.before.flops, "compressed": self.plan.compressed.flops},
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
    history = RankHistory.load(path)
    record, notes = _usable(read_result(path))
    loaded = load_model(path, device="cpu")
    kind, plan = type(loaded).__name__, inventory(loaded, "all")
    before = plan.original
    spectra: list[Spectrum] = []
    errors: dict[str, float] = {}
    if against is not None:
        original = load_model(find(against), device="cpu")
        before = inventory(original, "all").original
        errors, spectra, missing = _compared(loaded, plan, original, progress)
        notes += missing
        del original
    else:
        notes.append("Errors of weights, singular values and times need the original: --against.")
        ratio = (record.get("bytes") or {}).get("ratio")
        if record.get("scope") == "all" and ratio and abs(ratio / plan.ratio - 1) > CLOSE:
            notes.append(f"Tokens or layers were dropped, which bytes before do not count: {ratio:.2f}x with these.")
    del loaded  # what follows loads it again
    weights = [_weight(entry, record.get("fits") or {}, errors) for entry in plan.entries]
    comparisons: list[Comparison] = []
    if against is not None and time:
        try:
            comparisons = _timed(against, model, progress)
        except FactorformerError as error:
            notes.append(f"Not timed: {error}.")
    return Evidence(
        model,
        against,
        kind,
        plan,
        before,
        weights,
        record,
        history,
        spectra,
        comparisons,
        notes,
    )


def _usable(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a page can show of a record, which another version may have written, or a hand; and what is left out."""
    known = json.loads(json.dumps(record), parse_constant=lambda _: None)
    kinds: dict[str, type] = {"metrics": dict, "fits": dict, "seconds": dict, "versions": dict, "bytes": dict}
    kinds |= {"curve": list, "method": str, "command": str, "scope": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(known.get(name), (kind, type(None)))]
    points = known.get("curve")
    if isinstance(points, list) and not all(
        isinstance(point, dict) and {"step", "seconds"} <= point.keys() == points[0].keys() for point in points
    ):
        wrong.append("curve")
    for name in wrong:
        known.pop(name, None)
    if isinstance(known.get("fits"), dict):
        known["fits"] = {name: fit for name, fit in known["fits"].items() if isinstance(fit, dict)}
    for name in ("metrics", "seconds"):
        if known.get(name):
            known[name] = {key: value for key, value in known[name].items() if isinstance(value, (int, float))}
    return known, [f"Not shown, for {RESULT_FILE} holds it in another form: {', '.join(wrong)}."] if wrong else []


def _weight(entry: Entry, fits: Mapping[str, Any], errors: Mapping[str, float]) -> Weight:
    name = entry.matrix.name
    known = fits.get(name, {})
    return Weight(
        name,
        entry.matrix.aliases,
        PLACE.sub("*", name),
        _layer(name),
        entry.matrix.shape,
        entry.form,
        entry.shares,
        None if entry.spec is None or isinstance(entry.spec, Dense) else entry.spec.units,
        entry.reason or str(known.get("reason") or ""),
        entry.original.bytes,
        entry.compressed.bytes,
        entry.original.flops,
        entry.compressed.flops,
        errors.get(name),
        known.get("error"),
        known.get("rise"),
    )


def _dense(module: nn.Module) -> Tensor | None:
    """The weight of a layer that can be factorized, or is, `(out, in)`; None of others."""
    if isinstance(module, FactorizedMatrix):
        return module.to_dense().detach()
    return dense_weight(module).detach() if dense_shape(module) is not None else None


def _layer(name: str) -> str | None:
    return ".".join(PLACE.findall(name)) or None


def _compared(
    model: PreTrainedModel, plan: Plan, original: PreTrainedModel, progress: Progress
) -> tuple[dict[str, float], list[Spectrum], list[str]]:
    """Errors by name, singular values of some, and what could not be compared."""
    mine, others = f"{model.base_model_prefix}.", f"{original.base_model_prefix}."
    theirs = {name.removeprefix(others): module for name, module in original.named_modules()}
    ours = {name.removeprefix(mine): module for name, module in model.named_modules()}
    errors: dict[str, float] = {}
    spectra: list[Spectrum] = []
    changed: list[str] = []
    drawn = _drawn(plan.entries)
    for number, entry in enumerate(plan.entries, 1):
        name = entry.matrix.name
        place = name.removeprefix(mine)  # which neither may have: a bare parameter, such as fused experts
        before, now = (_dense(modules[place]) if place in modules else None for modules in (theirs, ours))
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
    # Other structures have ranks that are not those of the matrix.
    cut = getattr(entry.spec, "rank", None) if entry.spec is not None and entry.spec.starts_dense else None
    places = {round(place) for part in parts for place in (count**part, 1 + (count - 1) * part)}
    places = sorted(places if cut is None else {*places, cut})
    left_out = None if cut is None else float(energies[cut:].sum() / energies.sum().clamp_min(1e-300))
    return Spectrum(
        entry.matrix.name,
        PLACE.sub("*", entry.matrix.name),
        _layer(entry.matrix.name),
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
