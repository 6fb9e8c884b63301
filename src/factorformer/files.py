"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
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


@contextlib.contextmanager
def output_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A directory that appears under its name only when the block ends without an error.

    Everything is written to a hidden neighbour first, then renamed: an interruption at any moment leaves no directory
    or a complete one. What is overwritten stays in a hidden neighbour until the new content is in place.

    Args:
        path: the directory to make.
        overwrite: replace what is there; the old content is deleted after the new one is in place.

    Raises:
        OutputError: the path exists and `overwrite` is off, or it cannot be written.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write to '{target.parent}': {error}") from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes private directories
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent)) / "content"
        try:
            if target.exists():
                target.rename(old)
            partial.rename(target)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(old.parent, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"could not write '{target}': {error}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Fail early, before any work is done, where `output_directory` would fail late.

    Raises:
        OutputError: the path exists and `overwrite` is off, or a file stands there.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file: give a directory name that is free")
    if target.exists() and not overwrite:
        raise OutputError(f"'{target}' exists already: choose another name or allow --overwrite")
