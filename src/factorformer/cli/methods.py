"""`factorformer methods`."""

from __future__ import annotations

from factorformer.cli._options import AsJson, console, emit_json


def methods(as_json: AsJson = False) -> None:
    """List the methods that `compress --method` knows, what data each needs, and the paper it comes from.

    A method is four choices: what a weight matrix becomes (structure), what error the fit minimizes (metric), who gets
    how much of the budget (allocation), and how the factors learn afterwards (training).

    'needs' is what the fit wants to see: nothing, text (--calibration or --train), or labelled text (with --label, and
    a model that is fine-tuned for those labels).
    """
    from factorformer import recipes

    if as_json:
        emit_json(
            [
                {
                    "name": name,
                    "summary": recipe.summary,
                    "structure": recipe.kind,
                    "metric": recipe.metric,
                    "allocation": recipe.allocation,
                    "training": recipe.training,
                    "needs": recipe.needs,
                    "paper": recipe.paper,
                }
                for name, recipe in recipes.RECIPES.items()
            ]
        )
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_lines=True)
    table.add_column("method", no_wrap=True)
    for column in ("what it does", "needs", "paper"):
        table.add_column(column)
    for name, recipe in recipes.RECIPES.items():
        table.add_row(f"[bold]{name}[/bold]", escape(recipe.summary), recipe.needs, escape(recipe.paper))
    console().print(table)
