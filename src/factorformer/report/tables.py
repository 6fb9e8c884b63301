"""Results as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from factorformer.files import BEFORE, DIFFERENCE, INTERVAL
from factorformer.layers.matrix import Scope
from factorformer.report.groups import Group, alone, grouped
from factorformer.report.ranks import ranks_table
from factorformer.report.result import Result

SCOPES: dict[Scope, str] = {"blocks": "the Transformer blocks", "all": "the whole model, embeddings included"}
AMOUNTS = ("latency", "file_bytes")
"""Prefixes of metrics that are amounts, of which a ratio is meaningful."""


MANY = 100
"""Matrices from which on those of the same role are one line, unless each is asked for."""


def show(result: Result, console: Console, *, each: bool = False) -> None:
    """Print a result as tables; of many matrices those of the same role are one line unless `each` has its own."""
    if result.layers is not None:
        by_role = len(result.layers) > MANY and not each
        console.print(_matrices((grouped if by_role else alone)(result.layers), by_role=by_role))
    if result.history is not None:
        console.print(ranks_table(result.history))
    console.print(_summary(result))
    if result.seconds:
        console.print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items()))
    if result.output is not None:
        console.print(f"result: [bold]{escape(result.output)}[/bold]", soft_wrap=True)


def _summary(result: Result) -> Table:
    before, after = result.original, result.compressed
    dense = before == after and not any(name.startswith((DIFFERENCE, BEFORE)) for name in result.metrics)
    table = Table(box=box.SIMPLE_HEAD, title=f"Cost of {SCOPES[result.scope]}", title_justify="left")
    table.add_column(f"method {result.method}" if result.method else "")
    for column in ["dense"] if dense else ["original", "compressed", "ratio"]:
        table.add_column(column, justify="right")
    for name, old, new in (
        ("bytes", before.bytes, after.bytes),
        ("parameters", before.parameters, after.parameters),
        ("FLOPs per token", before.flops, after.flops),
    ):
        table.add_row(name, *([f"{old:,}"] if dense else [f"{old:,}", f"{new:,}", _ratio(old, new)]))
    table.add_section()
    metrics = result.metrics
    ends = {name + end for name in metrics for end in INTERVAL if all(name + other in metrics for other in INTERVAL)}
    names = (name.removeprefix(BEFORE).removeprefix(DIFFERENCE) for name in metrics if name not in ends)
    for name in dict.fromkeys(names):
        old, new = metrics.get(BEFORE + name), metrics.get(name)
        ratio = _ratio(old, new) if old and new and name.startswith(AMOUNTS) else ""
        change = _estimate(metrics, DIFFERENCE + name) if DIFFERENCE + name in metrics else ratio
        label = name.replace("_", " ") + (" (before training)" if name.startswith("predicted") else "")
        values = [_estimate(metrics, BEFORE + name), _estimate(metrics, name), change]
        table.add_row(label, *(values[1:2] if dense else values))
    return table


def _estimate(metrics: Mapping[str, float], name: str) -> str:
    """A metric, with its interval if it has one."""
    low, high = (metrics.get(name + end) for end in INTERVAL)
    between = "" if low is None or high is None else f" [{_number(low)}, {_number(high)}]"
    return _number(metrics.get(name)) + escape(between)


def _matrices(groups: Iterable[Group], *, by_role: bool) -> Table:
    title = "Weight matrices" + (" by role (--each lists every one)" if by_role else "")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("matrices" if by_role else "matrix", overflow="fold")
    numbers = ["number"] if by_role else []
    for column in (*numbers, "shape", "stored as", "parameters", "bytes", "ratio", "FLOPs per token"):
        table.add_column(column, justify="right")
    table.add_column("note", overflow="fold")
    for group in groups:
        cost = group.compressed
        table.add_row(
            escape(group.name),
            *([f"{group.count:,}"] if by_role else []),
            "x".join(map(str, group.shape)),
            group.form,
            f"{cost.parameters:,}",
            f"{cost.bytes:,}",
            _ratio(group.original.bytes, cost.bytes),
            f"{cost.flops:,}",
            escape(group.note),
        )
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return "undefined"
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else ""
