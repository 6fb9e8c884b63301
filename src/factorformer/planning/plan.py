"""A plan: which matrix becomes what. Frozen, JSON, readable as a table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch

from factorformer.errors import FactorformerError, MethodError, one_of
from factorformer.files import whole_file
from factorformer.fitting.moments import LayerStatistics
from factorformer.layers.matrix import Cost, LeftOut, Matrix, Scope, total
from factorformer.planning.json_fields import read_fields
from factorformer.structures import Dense, Structure, from_dict

Unit = Literal["bytes", "flops", "milliseconds"]
"""What a budget counts."""

FORMAT = 3


class Cause(str, Enum):
    """What decided about a matrix; `Entry.reason` says it in words."""

    BUDGET = "budget"
    """Its part of the budget: a size, or staying dense as no smaller size is worth its loss."""
    PATTERNS = "patterns"
    """The caller's patterns of names leave it out."""
    UNABLE = "unable"
    """It cannot be factorized, or no size of the structure is smaller."""
    UNMEASURED = "unmeasured"
    """The calibration data does not show what an error in it would do, so it is not made smaller."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One matrix of the plan: its structure, or None to keep it dense, and why.

    Args:
        matrix: what it is now.
        spec: what it becomes; None leaves it dense.
        reason: human-readable.
        shares: the matrix whose shareable factors it uses, such as a dictionary; None for one that has its own, whether
            others use them or not.
        cause: what decided.
        rise: what it is expected to add to the objective of the plan, before any training; None where nothing was
            predicted.
    """

    matrix: Matrix
    spec: Structure | None
    reason: str
    shares: str | None = None
    cause: Cause = Cause.BUDGET
    rise: float | None = None

    @classmethod
    def whole(cls, matrix: Matrix, reason: str = "", cause: Cause = Cause.BUDGET) -> Entry:
        """A matrix that is not factorized: dense as it is, or in integers if the plan wants that.

        Args:
            matrix: which one; `matrix.dense` is reason and cause where it has one.
            reason, cause: otherwise.
        """
        if matrix.dense is not None:
            chosen = any(matrix.dense == reason for reason in LeftOut)
            return cls(matrix, None, matrix.dense, cause=Cause.PATTERNS if chosen else Cause.UNABLE)
        return cls(matrix, matrix.whole, reason, cause=cause)

    @property
    def original(self) -> Cost:
        """Cost of the dense matrix."""
        return self.matrix.cost(None)

    @property
    def compressed(self) -> Cost:
        """Cost of what replaces it; shared factors are counted once, where they are owned."""
        shared = () if self.shares is None or self.spec is None else self.spec.shareable
        return self.matrix.cost(self.spec, shared)

    @property
    def values(self) -> str:
        """The type in which its values are stored: `int8`, `int4`, `int3`, or a floating type such as `float32`."""
        bits = None if self.spec is None else self.matrix.bits
        return self.matrix.dtype if bits is None else f"int{bits}"

    @property
    def form(self) -> str:
        """How it is stored, human-readable: its structure or `dense`, and in which integers, if in any."""
        return f"{self.spec or 'dense'}" + (f", {self.values}" if self.values != self.matrix.dtype else "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `compress` will do to every matrix in scope.

    Args:
        method: a name of `recipes.RECIPES`; None takes `fisher` where there is calibration data, and `svd` where there
            is none.
        scope: `blocks` counts and changes the Transformer blocks only, `all` the whole model.
        target: the ratio that was asked for, in the unit of the budget.
        entries: one for each matrix in scope.
        rest: cost of the other tensors in scope (biases, norms, ...), which stay as they are.
        budget: what `target` counts.
        predicted: by how much the objective is expected to rise before any training; None where nothing was predicted.
        objective: what `predicted` is in: the `loss` in nats, `1 - cosine` of embeddings, or the mean squared `error of
            the weights` where there was no calibration data.
        milliseconds: of all products in scope, dense and as planned, where the budget is one of time.
        before: cost of everything in scope before tokens were dropped or layers tied, if any were: what ratios of bytes
            are relative to.
        statistics: what calibration measured of each layer, if it was to be kept; not part of what is saved.

    Raises:
        MethodError: an entry whose structure its matrix cannot have, or that cannot share factors as it says.
    """

    method: str | None
    scope: Scope
    target: float
    entries: tuple[Entry, ...]
    rest: Cost
    budget: Unit = "bytes"
    predicted: float | None = None
    objective: str | None = None
    milliseconds: tuple[float, float] | None = None
    before: Cost | None = None
    statistics: Mapping[str, LayerStatistics] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_sharing(self)

    @property
    def original(self) -> Cost:
        """Cost of everything in scope before."""
        return self.before or total(entry.original for entry in self.entries) + self.rest

    @property
    def compressed(self) -> Cost:
        """Cost of everything in scope after."""
        return total(entry.compressed for entry in self.entries) + self.rest

    @property
    def ratio(self) -> float:
        """Bytes of the original tensors in scope, divided by the bytes of what replaces them."""
        return self.original.bytes / self.compressed.bytes

    @property
    def factorized(self) -> tuple[Entry, ...]:
        """The entries that do not stay as they are: factorized ones, and dense ones in integers."""
        return tuple(entry for entry in self.entries if entry.spec is not None)

    @property
    def sharing(self) -> dict[str, tuple[Entry, ...]]:
        """By the name of the matrix that owns the factors: the entries that share them, the owner first."""
        found: dict[str, list[Entry]] = {entry.shares: [] for entry in self.entries if entry.shares is not None}
        for entry in self.entries:
            if entry.matrix.name in found:
                found[entry.matrix.name].insert(0, entry)
            elif entry.shares is not None:
                found[entry.shares].append(entry)
        return {owner: tuple(entries) for owner, entries in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {
            "format": FORMAT,
            "method": self.method,
            "scope": self.scope,
            "target": self.target,
            "budget": self.budget,
            "predicted": self.predicted,
            "objective": self.objective,
            "milliseconds": None if self.milliseconds is None else list(self.milliseconds),
            "predicted_for": self._fingerprint(),
            "rest": dataclasses.asdict(self.rest),
            "before": None if self.before is None else dataclasses.asdict(self.before),
            "entries": [
                {
                    **dataclasses.asdict(entry.matrix),
                    "spec": None if entry.spec is None else entry.spec.to_dict(),
                    "reason": entry.reason,
                    "shares": entry.shares,
                    "cause": entry.cause.value,
                    "rise": entry.rise,
                }
                for entry in self.entries
            ],
        }

    def _fingerprint(self) -> str:
        """Another one if a matrix becomes something else."""
        specs = {e.matrix.name: e.spec and {**e.spec.to_dict(), "bits": e.matrix.bits} for e in self.entries}
        return hashlib.sha256(json.dumps([self.method, specs], sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """Read back what `to_dict` wrote; without its prediction if it was edited since.

        Raises:
            MethodError: another format version, or content that is not a plan.
        """
        if content.get("format") != FORMAT:
            raise MethodError(
                f"not a plan of format {FORMAT}: 'format' is {content.get('format')!r}; plan again with this version"
            )
        fields = read_fields(cls, content, "the plan", entries=list, rest=dict, before=dict | None, statistics=None)
        for name in ("rest", "before"):
            if fields[name] is not None:
                fields[name] = Cost(**read_fields(Cost, fields[name], "the plan"))
        fields["entries"] = tuple(_entry(item) for item in fields["entries"])
        plan = cls(**fields)
        edited = content.get("predicted_for") != plan._fingerprint()
        return plan.without_prediction() if edited else plan

    def without_prediction(self) -> Plan:
        """The same, where what was predicted is not so."""
        entries = tuple(dataclasses.replace(entry, rise=None) for entry in self.entries)
        return dataclasses.replace(self, entries=entries, predicted=None, objective=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all.

        Raises:
            OutputError: it cannot be written there.
        """
        with whole_file(path, "the plan") as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            MethodError: the file is missing, unreadable, or not a plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
        except (OSError, ValueError) as error:
            raise MethodError(f"cannot read a plan from '{path}': {error}") from error
        if not isinstance(content, dict):
            raise MethodError(f"'{path}' is not a plan")
        return cls.from_dict(content)

    def __str__(self) -> str:
        lines = [
            f"{'matrix':<52} {'shape':>12} {'becomes':<28} {'parameters':>12} {'bytes':>12} {'FLOPs/token':>12}  reason"
        ]
        for entry in self.entries:
            cost, shape = entry.compressed, "x".join(map(str, entry.matrix.shape))
            lines.append(
                f"{entry.matrix.name:<52} {shape:>12} {entry.form:<28} {cost.parameters:>12,} "
                f"{cost.bytes:>12,} {cost.flops:>12,}  {entry.reason}"
                + ("" if entry.shares is None else f"; {_shared(entry)} of {entry.shares}")
            )
        before, after = self.original, self.compressed
        lines.append(
            f"scope {self.scope}: {before.bytes:,} -> {after.bytes:,} bytes ({self.ratio:.2f}x), "
            f"{before.parameters:,} -> {after.parameters:,} parameters, {before.flops:,} -> {after.flops:,} FLOPs/token"
        )
        if self.milliseconds is not None:
            lines.append("products: {:.1f} -> {:.1f} ms".format(*self.milliseconds))
        if self.predicted is not None:
            lines.append(f"predicted rise before training: {self.predicted:.3g} ({self.objective})")
        return "\n".join(lines)


def left_dense(entries: Iterable[Entry], total_bytes: int, least: float = 0.01) -> list[str]:
    """What stays whole although neither patterns nor the budget ask for it: a line for each reason.

    Args:
        entries: of a plan.
        total_bytes: in scope.
        least: part of them below which a reason is not worth a line.

    >>> left_dense([Entry.whole(Matrix("experts", (64, 32), dense="a reason, left dense"))], 9000)
    ['a reason: 1 matrix, 8,192 of 9,000 bytes in scope']
    """
    found: dict[str, list[int]] = {}
    for entry in entries:
        if entry.cause is Cause.UNMEASURED or (entry.cause is Cause.UNABLE and entry.spec is None):
            found.setdefault(entry.reason.removesuffix(", left dense"), []).append(entry.original.bytes)
    return [
        f"{reason}: {len(sizes)} {'matrix' if len(sizes) == 1 else 'matrices'}, "
        f"{sum(sizes):,} of {total_bytes:,} bytes in scope"
        for reason, sizes in found.items()
        if sum(sizes) > least * total_bytes
    ]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _entry(item: object) -> Entry:
    if not isinstance(item, dict):
        raise MethodError(f"the plan is malformed: an entry is {item!r}")
    where = f"plan entry '{item.get('name')}'"
    matrix = Matrix(**read_fields(Matrix, item, where))
    if min(matrix.shape) < 1 or not isinstance(getattr(torch, matrix.dtype, None), torch.dtype):
        raise MethodError(f"{where} is malformed: 'shape' is {matrix.shape}, 'dtype' '{matrix.dtype}'")
    fields = read_fields(Entry, {"rise": None, **item}, where, matrix=None, spec=dict | None, cause=str)
    if fields["cause"] not in list(Cause):
        raise MethodError(f"{where}: unknown cause {one_of(fields['cause'], [cause.value for cause in Cause])}")
    fields["cause"] = Cause(fields["cause"])
    try:
        spec = None if fields["spec"] is None else from_dict(fields["spec"])
    except (FactorformerError, TypeError) as error:
        raise MethodError(f"{where}: {error}") from error
    return Entry(matrix, **{**fields, "spec": spec})


def _check_sharing(plan: Plan) -> None:
    """Every spec fits its matrix, and matrices that share factors are of one kind and size."""
    sharing = plan.sharing
    for entry in plan.factorized:
        assert entry.spec is not None
        shared = entry.spec.shareable if entry.shares is not None or entry.matrix.name in sharing else ()
        if isinstance(entry.spec, Dense) and entry.matrix.bits is None:
            raise MethodError(f"plan entry '{entry.matrix.name}': {entry.spec} as a structure is for integers alone")
        try:
            entry.spec.check(entry.matrix.shape, shared)
        except FactorformerError as error:
            raise MethodError(f"plan entry '{entry.matrix.name}': {error}") from error
    entries = {entry.matrix.name: entry for entry in plan.entries}
    for entry in plan.entries:
        if entry.shares is not None:
            problem = _cannot_share(entry, entries.get(entry.shares))
            if problem is not None:
                raise MethodError(
                    f"plan entry '{entry.matrix.name}' cannot share factors with '{entry.shares}': {problem}"
                )


def _cannot_share(entry: Entry, owner: Entry | None) -> str | None:
    """Why a matrix cannot use the factors of another one; None if it can."""
    if owner is None:
        return "the plan has no such entry"
    if owner.shares is not None:
        return f"that one has none of its own, but those of '{owner.shares}'"
    if entry.spec is None or owner.spec is None:
        return "both have to be factorized, and one stays dense"
    if not entry.spec.shareable:
        return f"{entry.spec.kind} has no factors that could be shared"
    specs = [
        (type(e.spec), {k: v for k, v in e.spec.to_dict().items() if k != "side"}) for e in (entry, owner) if e.spec
    ]
    if specs[0] != specs[1]:
        return f"they are {entry.spec} and {owner.spec}, which may differ in their sides only"
    if entry.matrix.dtype != owner.matrix.dtype:
        return f"they are of types {entry.matrix.dtype} and {owner.matrix.dtype}"
    if entry.matrix.bits != owner.matrix.bits:
        return f"they are to be stored in {entry.values} and {owner.values}"
    sizes = [
        {name: e.spec.tensors(e.matrix.shape)[name].size for name in e.spec.shareable} for e in (entry, owner) if e.spec
    ]
    return None if sizes[0] == sizes[1] else f"theirs would be of sizes {sizes[0]} and {sizes[1]}"


def _shared(entry: Entry) -> str:
    return "" if entry.spec is None else " and ".join(entry.spec.shareable)
