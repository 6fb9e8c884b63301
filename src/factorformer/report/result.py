"""The result of every command, under one schema.

```
{
  "bytes":           {"original": int, "compressed": int, "ratio": float},
  "parameters":      {"original": int, "compressed": int, "ratio": float},
  "flops_per_token": {"original": int, "compressed": int, "ratio": float},
  "scope":           "blocks" or "all": what these three count,
  "method":          name of the method, or null for a model that was not compressed just now,
  "metrics":         {name: number}; "original_..." is the same metric of the model before compression,
                                     "difference_..." how far it is from that, "..._low" and "..._high" the
                                     ends of an interval of 95 %,
  "seconds":         {phase: number},
  "seed":            int or null,
  "versions":        {"factorformer", "torch", "transformers", "python": str},
  "output":          path of what was written, or null,
  "warnings":        [notes that belong to the numbers]
}
```

A number that is not finite is null. `plan` and `inspect` add `layers`, a list with one object for each weight matrix:
`name`, `tied`, `shape` (out, in), `structure` (null if dense), `values` (the type in which they are stored: "int8",
"int4", "int3", or a floating one), `note`, and the same three costs. Where ranks were found in training, `inspect` adds
`rank_history`: `layers`, their `structures` and `full` ranks, the `steps` after which units were removed, and for each
of these the `ranks` and the mean `scores` of what was left in each layer. Where a layer has so many left that factors
would be larger than the matrix, it is dense.

What `compress` writes has three more: `command`, the command line that made it; `fits`, by the name of each matrix the
relative `error` of its fit under the metric of that, the `rise` of the objective that was predicted of it (null where
nothing was fitted, or predicted), and the `reason` for what it became; and, of a model that learned without labels, its
`curve`: points with `step`, `seconds` and metrics, the first before any training. Metrics under `fitted_...` are those
of the model between its fit and its training.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from factorformer import __version__
from factorformer.compression import Report
from factorformer.layers.matrix import Cost, Scope
from factorformer.planning import Entry, Plan
from factorformer.training.rank_history import RankHistory


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a command; see the module's description for its JSON form.

    Args:
        original, compressed: cost of everything in scope; equal for a dense model.
        scope: what they count.
        method: how the model was compressed; None if it was not.
        metrics: by name; `original_accuracy` stands beside `accuracy` where both models were measured.
        seconds: wall time by phase.
        seed: of training and sampling; None where nothing is random.
        output: where the command wrote.
        warnings: notes that belong to the numbers.
        layers: one entry for each matrix, where the command is about them.
        history: how ranks moved in training, where they did.
        command: that made a model.
        fits: of each matrix the `error` of its fit, its predicted `rise` of the objective, and the `reason` for what it
            became.
        curve: points of a training without labels.
        streamed: whether the model was compressed block by block, for memory does not hold it; not part of the JSON.

    >>> Result(Cost(8, 32, 16), Cost(4, 16, 8), "blocks").to_dict()["bytes"]
    {'original': 32, 'compressed': 16, 'ratio': 2.0}
    """

    original: Cost
    compressed: Cost
    scope: Scope
    method: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    output: str | None = None
    warnings: Sequence[str] = ()
    layers: Sequence[Entry] | None = None
    history: RankHistory | None = None
    command: str | None = None
    fits: Mapping[str, Mapping[str, float | str | None]] | None = None
    curve: Sequence[Mapping[str, float]] | None = None
    streamed: bool = False

    @classmethod
    def of(cls, costs: Plan | Report, **others: Any) -> Result:
        """A result with the costs of a plan, an inventory, or a report of `compress`."""
        return cls(costs.original, costs.compressed, costs.scope, **others)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        content: dict[str, Any] = {
            **_costs(self.original, self.compressed),
            "scope": self.scope,
            "method": self.method,
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "seed": self.seed,
            "versions": versions(),
            "output": self.output,
            "warnings": list(self.warnings),
        }
        if self.layers is not None:
            content["layers"] = [_layer(entry) for entry in self.layers]
        if self.history is not None:
            content["rank_history"] = self.history.to_dict()
        if self.command is not None:
            content["command"] = self.command
        if self.fits is not None:
            content["fits"] = {name: _finite_all(values) for name, values in self.fits.items()}
        if self.curve is not None:
            content["curve"] = [_finite_all(point) for point in self.curve]
        return content


def versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {
        "factorformer": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _costs(original: Cost, compressed: Cost) -> dict[str, dict[str, float | None]]:
    return {
        name: {"original": before, "compressed": after, "ratio": before / after if after else None}
        for name, before, after in (
            ("bytes", original.bytes, compressed.bytes),
            ("parameters", original.parameters, compressed.parameters),
            ("flops_per_token", original.flops, compressed.flops),
        )
    }


def _layer(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.matrix.name,
        "tied": list(entry.matrix.aliases),
        "shape": list(entry.matrix.shape),
        "structure": None if entry.spec is None else entry.spec.to_dict(),
        "values": entry.values,
        "note": entry.reason,
        **_costs(entry.original, entry.compressed),
    }


def fits(plan: Plan, errors: Mapping[str, float]) -> dict[str, dict[str, float | str | None]]:
    """What is known of each matrix of a plan that was carried out.

    Args:
        plan: with what was predicted of it.
        errors: of fits, by the name of the matrix.
    """
    return {
        entry.matrix.name: {"error": errors.get(entry.matrix.name), "rise": entry.rise, "reason": entry.reason}
        for entry in plan.entries
    }


def _finite_all(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) if isinstance(value, float) else value for name, value in values.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
