"""Whether models may bring Python code of their own, which is then executed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

VARIABLE = "FACTORFORMER_TRUST_REMOTE_CODE"
"""Set for as long as a command that was told to trust runs: its child processes load the same model."""


def trusted() -> bool:
    """Whether the command that is running was told to trust."""
    return os.environ.get(VARIABLE) == "1"


@contextlib.contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Let models bring their own code while the block runs, if asked to."""
    before = os.environ.get(VARIABLE)
    if trust:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if trust and before is None:
            os.environ.pop(VARIABLE, None)
