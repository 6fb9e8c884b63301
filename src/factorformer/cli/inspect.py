"""`factorformer inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from factorformer.cli.common import MODELS, AsJson, ScopeChoice, emit

Inspected = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
InspectedScope = Annotated[
    ScopeChoice, typer.Option("--scope", help="What to list: the Transformer blocks only, or the whole model.")
]


def inspect(model: Inspected, scope: InspectedScope = ScopeChoice.all, as_json: AsJson = False) -> None:
    """Show what is inside a model, compressed or not: every weight matrix, how it is stored, and what it costs.

    'bytes' are those that are stored; 'ratio' compares with the same matrix stored dense. Tied matrices count once.
    FLOPs per token count a multiply-add as two, and look-ups of dense embeddings as none.

    \b
    [bold]Examples[/bold]
      factorformer inspect small/
      factorformer inspect small/ --scope blocks --json
    """
    from factorformer.hf.source import find, load_model
    from factorformer.report import Result, inventory

    found = inventory(load_model(find(model)), scope.value)
    emit(Result.of(found, layers=found.entries), as_json=as_json)
