"""Progress reporting for long-running steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from factorformer import processes

Progress = Callable[[str, int, int | None], None]
"""Called with the name of a phase, the steps done, and their total if it is known."""


def silent(phase: str, done: int, total: int | None) -> None:
    """Report nothing."""


@contextlib.contextmanager
def bars(*, enabled: bool = True) -> Iterator[Progress]:
    """One progress bar for each phase, on standard error so that results stay alone on standard output."""
    if not enabled or not processes.is_first():
        yield silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as display:
        tasks = {}

        def report(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = display.add_task(phase, total=total)
            display.update(tasks[phase], completed=done, total=total)

        yield report
