"""`factorformer report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from factorformer.cli._options import MODELS, AsJson, Overwrite, emit_json, note
from factorformer.files import check_file

Reported = Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=MODELS)]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        metavar="ORIGINAL",
        help="The original: with it come errors of weights, singular values, and times of both.",
    ),
]
ReportFile = Annotated[Path, typer.Option("--output", metavar="FILE", help="The HTML file to make.")]
Time = Annotated[bool, typer.Option("--time/--no-time", help="Whether both models are timed, for ten seconds or so.")]


def report(
    model: Reported,
    against: Against = None,
    output: ReportFile = Path("report.html"),
    time: Time = True,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show in one HTML file what became of a model: matrix by matrix, in bytes, FLOPs, quality and speed.

    The file needs nothing beside itself and no network. It tells what each matrix became and why, what was measured
    when the model was made (from its factorformer.json), and how ranks moved in training, if they did. With --against
    weights are compared, singular values found, and both models timed on this machine.

    \b
    [bold]Examples[/bold]
      factorformer report small/ --against minilm
      factorformer report small/ --output small.html --overwrite
    """
    check_file(output, overwrite=overwrite, inputs=(model, against))
    from factorformer.progress import bars
    from factorformer.report.page import check_packages, gather, write

    check_packages()
    with bars() as progress:
        found = gather(model, against, time=time, progress=progress)
    write(found, output)
    if as_json:
        emit_json({**found.to_dict(), "output": str(output)})
        return
    for line in found.notes:
        note(line)
    note(f"report: {output}")
