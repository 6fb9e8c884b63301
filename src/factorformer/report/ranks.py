"""The history of ranks in a training, as a table and as a heat map."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from factorformer.errors import OutputError
from factorformer.files import whole_file
from factorformer.training.rank_history import RankHistory

COLUMNS = 6
"""Number of steps that the table shows."""

FORMATS = (".svg", ".png", ".pdf")


def ranks_table(history: RankHistory) -> Table:
    """Units of every matrix at some steps on the way, and the mean importance of those that were left at the end."""
    count = len(history.steps)
    shown = sorted({round(place * (count - 1) / (COLUMNS - 1)) for place in range(COLUMNS)}) if count else []
    table = Table(box=box.SIMPLE_HEAD, title="Units left after so many steps", title_justify="left")
    table.add_column("matrix", overflow="fold")
    for column in ("start", *(str(history.steps[place]) for place in shown), "of start", "score"):
        table.add_column(column, justify="right")
    for row, (name, full) in enumerate(zip(history.layers, history.full, strict=True)):
        ranks = [str(history.ranks[place][row]) for place in shown]
        score = f"{history.scores[-1][row]:.2g}" if count else ""
        table.add_row(escape(name), str(full), *ranks, f"{history.final[row] / full:.0%}", score)
    return table


def check_image(path: Path) -> None:
    """Raise `OutputError` if a heat map cannot be written there."""
    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"'{path}' is not the name of an image: let it end in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OutputError(
            "images are drawn by matplotlib, which is not installed: pip install 'factorformer[plot]'"
        ) from None


def heat_map(history: RankHistory, path: Path) -> None:
    """Draw the part of its units that each matrix has left, over the steps of the training.

    Args:
        history: of the training.
        path: an image to make; it appears whole or not at all.

    Raises:
        OutputError: it cannot be written, or matplotlib is not installed.
    """
    check_image(path)
    from matplotlib.figure import Figure

    steps = [0, *history.steps]
    rows = [[units / full for units, full in zip(row, history.full, strict=True)] for row in history.ranks]
    columns = [[1.0] * len(history.full), *rows]
    figure = Figure(figsize=(8, 1.2 + 0.18 * len(history.layers)), layout="constrained")
    axis = figure.subplots()
    # Each column lasts until the next removal; the last one is as wide as the one before.
    edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
    values = [list(row) for row in zip(*columns, strict=True)]
    image = axis.pcolormesh(edges, range(len(values) + 1), values, vmin=0, vmax=1, cmap="viridis", rasterized=True)
    axis.set_yticks([row + 0.5 for row in range(len(values))], history.layers, fontsize=6)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", title="units left, of those at the start")
    figure.colorbar(image)
    kind = path.suffix.lower().removeprefix(".")
    with whole_file(path, "the image") as partial:
        figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
