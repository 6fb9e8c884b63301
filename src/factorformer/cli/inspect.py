"""`factorformer inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorformer.cli._options import MODELS, AsJson, Each, Overwrite, ScopeChoice, emit
from factorformer.errors import MethodError
from factorformer.files import check_file

Inspected = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
InspectedScope = Annotated[
    ScopeChoice, typer.Option("--scope", help="What to list: the Transformer blocks only, or the whole model.")
]
RanksImage = Annotated[
    Path | None,
    typer.Option(
        "--ranks",
        metavar="FILE",
        help="Draw how ranks moved in training as a heat map: an SVG, PNG or PDF. Needs matplotlib.",
    ),
]


def inspect(
    model: Inspected,
    scope: InspectedScope = ScopeChoice.all,
    ranks: RanksImage = None,
    each: Each = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what is inside a model, compressed or not: every weight matrix, how it is stored, and what it costs.

    'bytes' are those that are stored; 'ratio' compares with the same matrix stored dense. Tied matrices count once.
    FLOPs per token count a multiply-add as two, and look-ups of dense embeddings as none.

    Of a model whose ranks were found in training, their history is shown too: what each matrix had left after some of
    the steps, and the mean importance of that in the end. The whole of it is under 'rank_history' in the JSON.

    \b
    [bold]Examples[/bold]
      factorformer inspect small/
      factorformer inspect small/ --scope blocks --json
      factorformer inspect small/ --ranks ranks.svg
    """
    if ranks is not None:
        check_file(ranks, overwrite=overwrite, inputs=(model,))
    from factorformer.hf.source import find, load_model
    from factorformer.report import Result, inventory
    from factorformer.report.ranks import check_image, heat_map
    from factorformer.training.rank_history import RankHistory

    if ranks is not None:
        check_image(ranks)
    path = find(model)
    history = RankHistory.load(path)
    if ranks is not None and history is None:
        raise MethodError(f"'{model}' has no history of ranks: they were not found in training")
    found = inventory(load_model(path, device="cpu"), scope.value)
    if ranks is not None and history is not None:
        heat_map(history, ranks)
    output = None if ranks is None else str(ranks)
    emit(Result.of(found, layers=found.entries, history=history, output=output), as_json=as_json, each=each)
