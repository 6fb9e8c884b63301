"""Warnings of this package as notes on standard error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from factorformer.cli._options import note
from factorformer.errors import FactorformerWarning


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Print each `FactorformerWarning` as one line, once; what becomes of other warnings stays as it is."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=FactorformerWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, FactorformerWarning):
                shown(message, category, *place)
            elif str(message) not in said:
                said.add(str(message))
                note(f"note: {message}")

        warnings.showwarning = show
        yield
