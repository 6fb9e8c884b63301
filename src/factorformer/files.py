"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from factorformer.errors import OutputError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """A name beside `path` to write to, `.NAME.partial`; what was written there takes the name `path` at the end.

    After an error, whatever stood at `path` is as it was.

    Args:
        path: the file to make or to replace.
        what: it is, for the message.

    Raises:
        OutputError: it cannot be written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder, "plan.json"), "the plan") as partial:
    ...         _ = partial.write_text("{}")
    ...     [file.name for file in Path(folder).iterdir()]
    ['plan.json']
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        try:
            yield partial
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        # A full disk is an OSError from Python, and a SafetensorError from the writer of weights.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"cannot write {what} to '{path}': {reason}") from error
