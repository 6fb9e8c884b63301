"""A plan: which matrix becomes what. Frozen, JSON, readable as a table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from factorformer.errors import FactorformerError, MethodError
from factorformer.planning.cost import Cost, Matrix, total
from factorformer.structures import Structure, from_dict

Scope = Literal["blocks", "all"]
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One matrix of the plan: its structure, or None to keep it dense, and why."""

    matrix: Matrix
    spec: Structure | None
    reason: str

    @property
    def original(self) -> Cost:
        """Cost of the dense matrix."""
        return self.matrix.cost(None)

    @property
    def compressed(self) -> Cost:
        """Cost of what replaces it."""
        return self.matrix.cost(self.spec)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `compress` will do to every matrix in scope.

    Args:
        method: a name of `recipes.RECIPES`; None takes the data-aware default where there is calibration data, and the
            plain fit where there is none.
        scope: `blocks` counts and changes the Transformer blocks only, `all` the whole model.
        target: the ratio of bytes that was asked for.
        entries: one for each matrix in scope.
        rest: cost of the other tensors in scope (biases, norms, ...), which stay as they are.
    """

    method: str | None
    scope: Scope
    target: float
    entries: tuple[Entry, ...]
    rest: Cost

    @property
    def original(self) -> Cost:
        """Cost of everything in scope before."""
        return total(entry.original for entry in self.entries) + self.rest

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
        """The entries that do not stay dense."""
        return tuple(entry for entry in self.entries if entry.spec is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {
            "format": FORMAT,
            "method": self.method,
            "scope": self.scope,
            "target": self.target,
            "rest": dataclasses.asdict(self.rest),
            "entries": [
                {
                    **dataclasses.asdict(entry.matrix),
                    "spec": None if entry.spec is None else entry.spec.to_dict(),
                    "reason": entry.reason,
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Plan:
        """Read back what `to_dict` wrote.

        Raises:
            MethodError: another format version, or content that is not a plan.
        """
        if content.get("format") != FORMAT:
            raise MethodError(f"not a plan of format {FORMAT}: 'format' is {content.get('format')!r}")
        try:
            return cls(
                method=content["method"],
                scope=content["scope"],
                target=content["target"],
                entries=tuple(_entry(item) for item in content["entries"]),
                rest=Cost(**content["rest"]),
            )
        except (KeyError, TypeError) as error:
            raise MethodError(f"the plan is malformed: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            MethodError: the file is missing, unreadable, or not a plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MethodError(f"cannot read a plan from '{path}': {error}") from error
        if not isinstance(content, dict):
            raise MethodError(f"'{path}' is not a plan")
        return cls.from_dict(content)

    def __str__(self) -> str:
        lines = [
            f"{'matrix':<52} {'shape':>12} {'becomes':<22} {'parameters':>12} {'bytes':>12} {'FLOPs/token':>12}  reason"
        ]
        for entry in self.entries:
            cost, shape = entry.compressed, "x".join(map(str, entry.matrix.shape))
            lines.append(
                f"{entry.matrix.name:<52} {shape:>12} {entry.spec or 'dense'!s:<22} {cost.parameters:>12,} "
                f"{cost.bytes:>12,} {cost.flops:>12,}  {entry.reason}"
            )
        before, after = self.original, self.compressed
        lines.append(
            f"scope {self.scope}: {before.bytes:,} -> {after.bytes:,} bytes ({self.ratio:.2f}x), "
            f"{before.parameters:,} -> {after.parameters:,} parameters, {before.flops:,} -> {after.flops:,} FLOPs/token"
        )
        return "\n".join(lines)


def _entry(item: Mapping[str, Any]) -> Entry:
    fields = {field.name: item[field.name] for field in dataclasses.fields(Matrix)}
    fields |= {"shape": tuple(fields["shape"]), "aliases": tuple(fields["aliases"])}
    try:
        spec = None if item["spec"] is None else from_dict(item["spec"])
        if spec is not None:
            spec.check(fields["shape"])
    except FactorformerError as error:
        raise MethodError(f"plan entry '{item['name']}': {error}") from error
    return Entry(Matrix(**fields), spec, item["reason"])
