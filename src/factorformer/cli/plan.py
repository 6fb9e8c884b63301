"""`factorformer plan`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from factorformer.cli.common import AsJson, Exclude, Include, Method, Model, Overwrite, Ratio, Scope, Share, emit
from factorformer.errors import OutputError

PlanFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the plan as JSON, for `factorformer compress --plan`."),
]


def plan(
    model: Model,
    method: Method = None,
    ratio: Ratio = None,
    scope: Scope = None,
    include: Include = None,
    exclude: Exclude = None,
    share: Share = None,
    output: PlanFile = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what `compress` would make of every weight matrix, without changing anything.

    The table tells for each matrix what it becomes, the bytes that this takes, and why it has its size or stays dense.
    The plan can be written to a file, edited, and carried out with `compress --plan`.

    A dictionary and its nonzeros can divide their bytes in many ways: a few cheap fits of the weights decide, which
    takes some seconds. `compress` decides by the output on its calibration text instead.

    \b
    [bold]Examples[/bold]
      factorformer plan minilm --ratio 2.8
      factorformer plan minilm --ratio 2 --scope all --output plan.json
      factorformer plan minilm --exclude '*.output.dense'
    """
    if output is not None and output.exists() and not overwrite:
        raise OutputError(f"'{output}' exists already: choose another name or allow --overwrite")
    from factorformer import compression
    from factorformer.hf.source import find, load_model
    from factorformer.report import Result

    started = time.perf_counter()
    made = compression.plan(
        load_model(find(model)),
        method,
        3.0 if ratio is None else ratio,
        "blocks" if scope is None else scope.value,
        include,
        exclude,
        share=None if share is None else share.value,
    )
    if output is not None:
        made.save(output)
    result = Result.of(
        made,
        method=made.method,
        seconds={"plan": time.perf_counter() - started},
        output=None if output is None else str(output),
        layers=made.entries,
    )
    emit(result, as_json=as_json)
