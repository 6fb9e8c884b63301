"""A report as one HTML file: text, tables and figures, and the library that draws these."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factorformer.errors import OutputError
from factorformer.files import BEFORE, DIFFERENCE, FITTED, INTERVAL, NO_QUALITY, whole_file
from factorformer.planning import Entry
from factorformer.report.page import figures
from factorformer.report.page.evidence import Evidence
from factorformer.structures import Dense

TEMPLATE = "report.html"
COLUMNS = ("original", "before training", "compressed")
"""Models that a metric may be known of."""


def check_packages() -> None:
    """Raise `OutputError` if a package that reports are made with is missing."""
    missing = [name for name in ("jinja2", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise OutputError(
            f"reports are made with {' and '.join(missing)}, which is not installed: pip install 'factorformer[report]'"
        )


def write(evidence: Evidence, path: str | os.PathLike[str]) -> None:
    """Write a report; the file appears whole or not at all.

    Args:
        evidence: what it tells.
        path: of the file.

    Raises:
        OutputError: it cannot be written, or a package is missing.
    """
    check_packages()
    with whole_file(Path(path), "the report") as partial:
        partial.write_text(html(evidence), encoding="utf-8")


def html(evidence: Evidence) -> str:
    """The page."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("factorformer.report.page", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "percent": percent, "size": size}
    found, drawn = evidence.to_dict(), {}
    drawn["map"], measures = figures.model_map(evidence.weights)
    drawn["costs"] = figures.costs(evidence.weights)
    names: list[str] = []
    if evidence.spectra:
        drawn["spectra"] = figures.spectra(evidence.spectra)
    if evidence.history is not None:
        drawn["ranks"] = figures.ranks(evidence.history)
    points = evidence.record.get("curve") or []
    if points:
        drawn["curve"], names = figures.curve(points)
    if found["latency"]:
        drawn["latency"] = figures.latency(found["latency"])
    metrics = _metrics(evidence.record.get("metrics") or {})
    library = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    return environment.get_template(TEMPLATE).render(
        title=Path(evidence.name).resolve().name if Path(evidence.name).is_dir() else evidence.name,
        rise=_objective(evidence.record.get("metrics") or {}),
        evidence=evidence,
        found=found,
        roles=[(role, costs) for role, *costs in figures.by_role(evidence.weights)],
        measures={name: figures.MEASURES[name] for name in measures},
        kinds=_kinds(evidence.plan.entries),
        metrics=metrics,
        columns=[name for name in COLUMNS if any(row[name] is not None for row in metrics)],
        points=points,
        curve_metrics=names,
        # Nothing in a script may end it.
        figures=json.dumps(drawn, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026"),
        library=library,
    )


def _objective(metrics: Mapping[str, Any]) -> str:
    """What predicted rises are of."""
    kinds = {"predicted_loss_rise": "loss, in nats", "predicted_cosine_loss": "1 - cosine of embeddings"}
    kinds["predicted_weight_error"] = "mean error of the weights"
    return next((kind for name, kind in kinds.items() if name in metrics), "objective")


def _kinds(entries: Sequence[Entry]) -> dict[str, int]:
    """How many matrices are in factors, and how many dense in integers."""
    dense = sum(isinstance(entry.spec, Dense) for entry in entries)
    return {"factors": sum(entry.spec is not None for entry in entries) - dense, "integers": dense}


def _metrics(metrics: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """A row for each metric: of the original, of the model before training, of the model, and the ends of its
    interval."""
    ends = {name + end for name in metrics for end in INTERVAL if all(name + other in metrics for other in INTERVAL)}
    bases = []
    for name in metrics:
        base = name
        for prefix in (BEFORE, FITTED, DIFFERENCE):
            base = base.removeprefix(prefix)
        if name not in ends and not base.startswith(NO_QUALITY) and base not in bases:
            bases.append(base)
    return [
        {
            "name": base.replace("_", " "),
            "original": metrics.get(BEFORE + base),
            "before training": metrics.get(FITTED + base),
            "compressed": metrics.get(base),
            "ends": [metrics.get(base + end) for end in INTERVAL] if base + INTERVAL[0] in metrics else None,
        }
        for base in bases
    ]


def number(value: float | None) -> str:
    """Four digits that count.

    >>> number(0.98765432), number(12345.678), number(None)
    ('0.9877', '12,346', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A part in percent.

    >>> percent(0.1234), percent(None)
    ('12.3 %', '')
    """
    return "" if value is None else f"{100 * value:.1f} %"


def size(value: float) -> str:
    """A number of bytes, or of FLOPs, with a unit that leaves three digits.

    >>> size(90852864), size(999_600_000), size(512)
    ('90.9 M', '1 G', '512 ')
    """
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} "
