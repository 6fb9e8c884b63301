"""The figures of a report, as plotly reads them: `{"data": [...], "layout": {...}}`.

A trace is of a group (`meta`), of which one is seen at a time; colours that begin with `--` are variables of the page's
style, which differ in light and dark. Names come from a model and are escaped, for plotly reads them as HTML.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from factorformer.report.page.evidence import Spectrum, Weight
from factorformer.training.rank_history import RankHistory

Figure = dict[str, Any]

OUTSIDE = "outside"
"""The column of what is no part of a layer."""

MEASURES = {
    "kept": ("bytes kept", "of the dense matrix", "%"),
    "bytes": ("bytes stored", "", ""),
    "error": ("relative error", "of the weights, against the original", "%"),
    "rise": ("predicted rise", "of the objective, before any training", ""),
}
"""What colours of the picture of a model can show: label, more, unit."""

BAR, MARGIN = 30, 90
"""Pixels of a row, and around all of them."""


def escape(name: str) -> str:
    """A name that plotly shows as it is."""
    return html.escape(name, quote=False)


def short_roles(roles: Sequence[str]) -> dict[str, str]:
    """Roles without what comes before the number of the layer, where that leaves them different.

    >>> short_roles(["encoder.layer.*.up", "encoder.layer.*.down", "pooler.dense"])
    {'encoder.layer.*.up': 'up', 'encoder.layer.*.down': 'down', 'pooler.dense': 'pooler.dense'}
    """
    short = {role: role.partition("*.")[2] or role for role in roles}
    alike = [name for name in short.values() if list(short.values()).count(name) > 1]
    return {role: role if name in alike else name for role, name in short.items()}


def measured(weight: Weight) -> dict[str, float | None]:
    """What colours can show of a matrix."""
    return {
        "kept": 100 * weight.after / weight.before if weight.before else None,
        "bytes": float(weight.after),
        "error": None if weight.error is None else 100 * weight.error,
        "rise": weight.rise,
    }


def model_map(weights: Sequence[Weight]) -> tuple[Figure, list[str]]:
    """The model as a map, roles by layers; and the measures of which anything is known."""
    roles = list(dict.fromkeys(weight.role for weight in weights))
    layers = {weight.layer for weight in weights if weight.layer is not None}
    ordered = sorted(layers, key=lambda layer: [int(number) for number in layer.split(".")])
    columns = [*([OUTSIDE] if any(w.layer is None for w in weights) else []), *ordered]
    place = {(w.role, w.layer or OUTSIDE): w for w in weights}
    known = [name for name in MEASURES if any(measured(weight)[name] is not None for weight in weights)]
    names, data = short_roles(roles), []
    for name in known:
        label, _, unit = MEASURES[name]
        cells = [[place.get((role, column)) for column in columns] for role in roles]
        data.append(
            {
                "type": "heatmap",
                "meta": name,
                "visible": name == known[0],
                "x": columns,
                "y": [escape(names[role]) for role in roles],
                "z": [[None if w is None else measured(w)[name] for w in row] for row in cells],
                "customdata": [["" if w is None else hover(w) for w in row] for row in cells],
                "hovertemplate": "%{customdata}<extra></extra>",
                "hoverongaps": False,
                "colorscale": "Viridis",
                "xgap": 2,
                "ygap": 2,
                "colorbar": {
                    "title": {"text": label + (f", {unit}" if unit else ""), "side": "right"},
                    "thickness": 12,
                },
            }
        )
    layout = {
        "height": MARGIN + BAR * len(roles),
        "xaxis": {"title": {"text": "layer"}, "type": "category"},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return {"data": data, "layout": layout}, known


def hover(weight: Weight) -> str:
    """What is known of a matrix, in lines."""
    lines = [
        f"<b>{escape(weight.name)}</b>",
        f"{weight.shape[0]:,} x {weight.shape[1]:,}: {escape(weight.form)}",
        f"{weight.before:,} to {weight.after:,} bytes",
    ]
    if weight.shares is not None:
        lines.append(f"its dictionary is that of {escape(weight.shares)}, and counted there")
    if weight.note:
        lines.append(escape(weight.note))
    if weight.error is not None:
        lines.append(f"relative error {weight.error:.1%}")
    if weight.fit_error is not None:
        lines.append(f"of the fit, under its metric, {weight.fit_error:.1%}")
    if weight.rise is not None:
        lines.append(f"predicted rise {weight.rise:.2g}")
    return "<br>".join(lines)


def by_role(weights: Sequence[Weight]) -> list[tuple[str, int, int, int, int]]:
    """Of each role: bytes before and after, FLOPs before and after."""
    roles: dict[str, list[Weight]] = {}
    for weight in weights:
        roles.setdefault(weight.role, []).append(weight)
    return [
        (
            role,
            sum(w.before for w in several),
            sum(w.after for w in several),
            sum(w.flops_before for w in several),
            sum(w.flops_after for w in several),
        )
        for role, several in roles.items()
    ]


def costs(weights: Sequence[Weight]) -> Figure:
    """Where bytes and FLOPs were, and where they are."""
    rows = by_role(weights)
    names = short_roles([row[0] for row in rows])
    data = []
    for group, first, unit in (("bytes", 1, "bytes"), ("flops", 3, "FLOPs a token")):
        for label, column, colour in (("before", first, "--before"), ("after", first + 1, "--after")):
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "meta": group,
                    "visible": group == "bytes",
                    "name": label,
                    "y": [escape(names[row[0]]) for row in rows],
                    "x": [row[column] for row in rows],
                    "marker": {"color": colour},
                    "hovertemplate": f"%{{y}}, {label}: %{{x:,}} {unit}<extra></extra>",
                }
            )
    layout = {
        "height": MARGIN + 1.4 * BAR * len(rows),
        "barmode": "group",
        "yaxis": {"autorange": "reversed", "automargin": True},
        "xaxis": {"tickformat": ".2s"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    }
    return {"data": data, "layout": layout}


def spectra(found: Sequence[Spectrum]) -> Figure:
    """Singular values by role, and where low rank cuts them."""
    roles = list(dict.fromkeys(spectrum.role for spectrum in found))
    data = []
    for role in roles:
        several = [spectrum for spectrum in found if spectrum.role == role]
        for number, spectrum in enumerate(several):
            colour = f"hsl({200 + 140 * number // max(len(several), 1)}, 60%, 52%)"
            label = "" if spectrum.layer is None else f"layer {spectrum.layer}"
            common = {"meta": role, "visible": role == roles[0], "name": label or escape(spectrum.name)}
            data.append(
                {
                    **common,
                    "type": "scatter",
                    "mode": "lines",
                    "x": spectrum.places,
                    "y": spectrum.values,
                    "line": {"color": colour, "width": 2},
                    "hovertemplate": f"{escape(spectrum.name)}<br>value %{{x:,}}: %{{y:.3g}}<extra></extra>",
                }
            )
            if spectrum.cut is None:
                continue
            data.append(
                {
                    **common,
                    "type": "scatter",
                    "mode": "markers",
                    "showlegend": False,
                    "x": [spectrum.cut],
                    "y": [spectrum.values[spectrum.places.index(spectrum.cut)]],
                    "marker": {
                        "color": colour,
                        "size": 11,
                        "symbol": "diamond",
                        "line": {"width": 1, "color": "--text"},
                    },
                    "hovertemplate": f"{escape(spectrum.name)}<br>cut at rank {spectrum.cut:,}, "
                    f"{spectrum.left_out or 0:.1%} of the energy beyond<extra></extra>",
                }
            )
    layout = {
        "height": 380,
        "xaxis": {"title": {"text": "singular value"}},
        "yaxis": {"title": {"text": "relative to the largest"}, "type": "log", "exponentformat": "power"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    }
    return {"data": data, "layout": layout}


def ranks(history: RankHistory) -> Figure:
    """The part of its units that each matrix has left, over the steps of the training."""
    names = [escape(name) for name in history.layers]
    steps = [0, *history.steps]
    rows = [[1.0] * len(names), *([u / f for u, f in zip(row, history.full, strict=True)] for row in history.ranks)]
    cells = [[100 * row[place] for row in rows] for place in range(len(names))]
    return {
        "data": [
            {
                "type": "heatmap",
                "meta": "ranks",
                "x": [str(step) for step in steps],
                "y": names,
                "z": cells,
                "zmin": 0,
                "zmax": 100,
                "colorscale": "Viridis",
                "hovertemplate": "%{y}<br>after step %{x}: %{z:.0f} % of its units<extra></extra>",
                "colorbar": {"title": {"text": "units left, %", "side": "right"}, "thickness": 12},
            }
        ],
        "layout": {
            "height": MARGIN + 18 * len(names),
            "xaxis": {"title": {"text": "optimizer step"}, "type": "category", "nticks": 12},
            "yaxis": {"autorange": "reversed", "automargin": True, "tickfont": {"size": 9}},
        },
    }


def curve(points: Sequence[Mapping[str, float | None]]) -> tuple[Figure, list[str]]:
    """What a model that learned without labels was on the way; and the names of its metrics."""
    names = [name for name in points[0] if name not in ("step", "seconds")]
    ordered = sorted(points, key=lambda point: point["seconds"] or 0)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "meta": name,
            "visible": name == names[0],
            "x": [(point["seconds"] or 0) / 60 for point in ordered],
            "y": [point.get(name) for point in ordered],
            "line": {"color": "--after", "width": 2},
            "hovertemplate": f"after %{{x:.1f}} minutes: %{{y:.4f}}<extra>{escape(name.replace('_', ' '))}</extra>",
        }
        for name in names
    ]
    layout = {"height": 320, "showlegend": False, "xaxis": {"title": {"text": "minutes of training"}}, "yaxis": {}}
    return {"data": data, "layout": layout}, names


def latency(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Medians of forward passes, with quartiles."""
    data = []
    for who, colour in (("original", "--before"), ("compressed", "--after")):
        spreads = [row[who]["milliseconds"] for row in rows]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "meta": "latency",
                "name": who,
                "y": [f"{row['shape']} tokens" for row in rows],
                "x": [spread["median"] for spread in spreads],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [spread["high"] - spread["median"] for spread in spreads],
                    "arrayminus": [spread["median"] - spread["low"] for spread in spreads],
                    "color": "--text",
                    "thickness": 1.5,
                },
                "marker": {"color": colour},
                "hovertemplate": f"{who}, %{{y}}: %{{x:.2f}} ms<extra></extra>",
            }
        )
    layout = {
        "height": MARGIN + 2 * BAR * len(rows) + 40,
        "barmode": "group",
        "xaxis": {"title": {"text": "milliseconds, median and quartiles"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    }
    return {"data": data, "layout": layout}
