"""Options that were given on the command line, and those of them that a command has no use for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from factorformer.cli._options import note

_GIVEN: ContextVar[Mapping[str, str] | None] = ContextVar("given", default=None)


@contextlib.contextmanager
def given(options: Mapping[str, str]) -> Iterator[None]:
    """Remember, for a while, the parameters that were given, and how a user writes each."""
    token = _GIVEN.set(options)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def note_unused(reason: str, *names: str) -> None:
    """Print a note that names those of these parameters that were given, although nothing reads them."""
    options = _GIVEN.get() or {}
    unused = [options[name] for name in names if name in options]
    if unused:
        note(f"not used {reason}: {', '.join(unused)}")
