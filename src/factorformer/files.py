"""Output files and directories: checked before the work, and complete or absent after it."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from factorformer.errors import OutputError

Name = str | os.PathLike[str]

RESULT_FILE = "factorformer.json"
"""The result of the command that made a directory lies in it under this name."""

BEFORE, FITTED, DIFFERENCE = "original_", "fitted_", "difference_"
"""Prefixes of metrics: of the model before compression, of the one between its fit and its training, and of how far a
metric is from that of the original."""

INTERVAL = ("_low", "_high")
"""Ends of the names of the ends of intervals."""

NO_QUALITY = (
    *("predicted_", DIFFERENCE, "tokens", "window", "stride", "file_bytes", "latency_products", "milliseconds_"),
)
"""Beginnings of the names of numbers that say nothing of how well a model does."""

ORIGINAL_CARD = "README.original.md"
"""The card of the model that a compressed one was made of."""

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "model.onnx",
    "model.onnx[._]data",
    "openvino_model.xml",
    "openvino_model.bin",
    "config.json",
    "*_config.json",
    "config_*.json",
    "modules.json",
    "tokenizer*",
    "vocab.*",
    "vocab-*.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.*",
    "README.md",
    ORIGINAL_CARD,
    "LICENSE*",
    ".gitattributes",
    ".DS_Store",
    "factorformer*.json",
    "training.json",
    "training_args.bin",
    "modeling_*.py",
    "configuration_*.py",
    "tokenization_*.py",
)
"""Names of the files that make up a model directory; a directory that holds others is never replaced."""

FOLDERS = ("[0-9]*_[A-Z]*", "onnx", "openvino")
"""Names of the folders in which sentence-transformers keeps the modules behind the Transformer, such as `1_Pooling`,
and looks for the model in the forms of other runtimes."""

_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Errors that mean a failed write, whatever file they name."""

_LONGEST_NAME = 255
"""Bytes that the name of a file can have on usual file systems."""


def read_result(directory: Path) -> dict[str, Any]:
    """The result that lies in a directory; empty where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def short_names(sources: Sequence[str]) -> list[str]:
    """Short names of files, each but once: `test`, or `mrpc_test` where several are called so."""
    parts = [Path(source.replace(":", "/")).parts for source in sources]
    stems = [Path(part[-1]).name.partition(".")[0] for part in parts]
    names = [
        stem if stems.count(stem) == 1 or len(part) < 2 else f"{part[-2]}_{stem}"
        for stem, part in zip(stems, parts, strict=True)
    ]
    return [name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names, 1)]


def check_output(path: Name, *, overwrite: bool, inputs: Iterable[Name | None] = (), known: Iterable[str] = ()) -> None:
    """Refuse a place for a directory where it would fail after the work, or cost somebody else's files.

    Only a directory that is empty, or a model's and nothing else, can be replaced. Links are followed.

    Args:
        path: the directory to make.
        overwrite: replace what is there.
        inputs: what the command reads, models, data and plans; names that are no paths here are passed over.
        known: names of further files and folders that the command itself writes, beside those of a model directory.

    Raises:
        OutputError: something is there and `overwrite` is off; it is not a model directory; the place equals, holds or
            lies inside an input, or holds the current directory or the home directory; or it cannot be written to.
    """
    target = _resolved(path)
    _check_inputs(path, target, inputs)
    _check_parent(path, target, next(parent for parent in target.parents if os.path.lexists(parent)))
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"'{path}' is a file: give a directory name that is free")
    if not overwrite:
        raise OutputError(f"'{path}' exists already: choose another name or allow --overwrite")
    if not any(target.iterdir()):
        return
    if not _is_model(target):
        raise OutputError(f"'{path}' is not a model directory, so --overwrite does not replace it: choose another name")
    folders = [Path(name) for name in inputs if name is not None and Path(name).is_dir()]
    foreign = _foreign(target, folders, tuple(known))
    if foreign is not None:
        raise OutputError(
            f"'{path}' holds '{foreign}', which is no part of a model, so --overwrite does not replace it: move that "
            "file or choose another name"
        )


def check_file(path: Name, *, overwrite: bool, inputs: Iterable[Name | None] = ()) -> None:
    """Refuse a place for a file where it would fail after the work, or cost an input.

    Args:
        path: the file to make.
        overwrite: replace what is there.
        inputs: as for `check_output`.

    Raises:
        OutputError: something is there and `overwrite` is off, it is a directory, an input or a file of one, its
            directory is missing, or it cannot be written to.
    """
    target = _resolved(path)
    if target.is_dir():
        raise OutputError(f"'{path}' is a directory: give the name of a file")
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    if folder == "/dev" or folder.startswith("/proc") or (target.exists() and not target.is_file()):
        raise OutputError(f"'{path}' is a device or a pipe, which cannot be replaced: give the name of a file")
    if target.exists() and not overwrite:
        raise OutputError(f"'{path}' exists already: choose another name or allow --overwrite")
    _check_inputs(path, target, inputs)
    if not target.parent.exists():
        raise OutputError(f"cannot write '{path}': there is no directory '{Path(path).parent}'")
    _check_parent(path, target, target.parent)


def check_files(folder: Name, names: Iterable[str], *, overwrite: bool) -> None:
    """Refuse places for files in a folder, which is made if there is none, and may hold others.

    Raises:
        OutputError: one of them is there and `overwrite` is off; or they cannot be written to.
    """
    target = _resolved(folder)
    _check_parent(folder, target, next(parent for parent in target.parents if os.path.lexists(parent)))
    if target.exists():
        _check_parent(folder, target / "files", target)
    for path in (target / name for name in names):
        if path.is_dir():
            raise OutputError(f"'{path}' is a directory, and a file is to be there: move it")
        if path.exists() and not overwrite:
            raise OutputError(f"'{path}' exists already: allow --overwrite")


def _resolved(path: Name) -> Path:
    """A place without links; `OutputError` for what is no name of one."""
    if str(path).startswith("~"):
        raise OutputError(f"'{path}' begins with '~', which the shell did not replace: write the directory out")
    target = Path(path).resolve()
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in target.parts):
        raise OutputError(f"'{path}' is too long a name")
    return target


def _check_inputs(path: Name, target: Path, inputs: Iterable[Name | None]) -> None:
    """`OutputError` if a place equals, holds or lies inside what a command reads, or where the user is at home."""
    if not target.name:
        raise OutputError(f"'{path}' is the root of the file system: choose another name")
    for what, folder in (("the current directory", "."), ("the home directory", os.path.expanduser("~"))):
        if _within(Path(folder).resolve(), target):
            raise OutputError(f"'{path}' is or holds {what}: choose another name")
    for name in inputs:
        if name is None or not os.path.exists(name):
            continue
        source = Path(name).resolve()
        if _within(source, target):
            kind = "is" if _within(target, source) else "holds"
            raise OutputError(f"'{path}' {kind} the input '{name}': choose another name")
        if source.is_dir() and _within(target, source):
            raise OutputError(f"'{path}' lies inside the input '{name}': choose a name outside of it")
        linked = [file.resolve() for file in source.iterdir() if file.is_symlink()] if source.is_dir() else []
        if any(_within(file, target) for file in linked):
            raise OutputError(f"'{path}' holds files that '{name}' links to: choose another name")


def _within(path: Path, folder: Path) -> bool:
    """Whether a resolved path is a folder or lies in it, however the file system spells the two."""
    if path == folder or folder in path.parents:
        return True
    if not os.path.exists(folder):
        return False
    return any(os.path.exists(place) and place.samefile(folder) for place in (path, *path.parents))


def _check_parent(path: Name, target: Path, parent: Path) -> None:
    """`OutputError` if a place cannot be made in a folder, which only an attempt can tell: nothing stays of it."""
    if not parent.is_dir():
        raise OutputError(f"cannot write '{path}': '{parent}' is not a directory")
    attempt = _neighbour(parent / target.relative_to(parent).parts[0], "check")
    try:
        attempt.mkdir()
        attempt.rmdir()
    except OSError as error:
        raise OutputError(f"cannot write '{path}': '{parent}': {error.strerror}") from error


def _is_model(directory: Path) -> bool:
    """Whether a directory is a model's, or was made by one of our commands."""
    if (directory / RESULT_FILE).is_file():
        return True
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and not {"model_type", "architectures"}.isdisjoint(config)


def _foreign(directory: Path, inputs: Iterable[Path], known: tuple[str, ...]) -> Path | None:
    """Something in a directory that belongs to no model, and of which no input has a copy; None if all of it does."""
    for path in sorted(directory.rglob("*")):
        place, is_folder = path.relative_to(directory), path.is_dir() and not path.is_symlink()
        if any(fnmatchcase(path.name, name) for name in (FOLDERS if is_folder else MODEL_FILES) + known):
            continue
        copies = [folder / place for folder in inputs]
        if is_folder and any(copy.is_dir() for copy in copies):  # what is in it is looked at by itself
            continue
        if is_folder or not any(copy.is_file() and filecmp.cmp(path, copy, shallow=False) for copy in copies):
            return place
    return None


@contextlib.contextmanager
def whole_file(path: Name, what: str) -> Iterator[Path]:
    """A name beside `path` to write to; what was written there takes the name `path` at the end.

    After an error, whatever stood at `path` is as it was. A file that is replaced keeps its permissions.

    Args:
        path: the file to make or to replace.
        what: its description, for the message.

    Raises:
        OutputError: it cannot be written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(Path(folder, "plan.json"), "the plan") as partial:
    ...         _ = partial.write_text("{}")
    ...     [file.name for file in Path(folder).iterdir()]
    ['plan.json']
    """
    target = Path(path).resolve()
    partial = _neighbour(target, "partial")
    try:
        try:
            yield partial
            if target.exists():
                shutil.copymode(target, partial)
            _flush(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except Exception as error:
        if not failed_to_write(error, partial):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"cannot write {what} to '{path}': {reason}") from error


@contextlib.contextmanager
def output_directory(
    path: Name, *, overwrite: bool = False, inputs: Iterable[Name | None] = (), known: Iterable[str] = ()
) -> Iterator[Path]:
    """A directory that appears under its name only when the block ends without an error.

    Everything is written to a hidden neighbour first, then renamed: an interruption at any moment leaves no directory
    or a complete one. What is overwritten stays in a hidden neighbour until the new content is in place. If the place
    was taken meanwhile, the new content is kept under another name.

    Args:
        path: the directory to make.
        overwrite: replace what is there; the old content is deleted after the new one is in place.
        inputs, known: as for `check_output`.

    Raises:
        OutputError: see `check_output`; or the content cannot be written.
    """
    target, inputs, known = Path(path).resolve(), tuple(inputs), tuple(known)
    check_output(path, overwrite=overwrite, inputs=inputs, known=known)
    made = [parent for parent in target.parents if not parent.exists()]
    partial = _neighbour(target, "partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty any more
            for parent in made:
                parent.rmdir()
        if isinstance(error, Exception) and failed_to_write(error, partial):
            raise OutputError(f"could not write '{path}': {error}; nothing was left behind") from error
        raise
    try:
        check_output(path, overwrite=overwrite, inputs=inputs, known=known)
        _swap(partial, target)
    except (OSError, OutputError) as error:
        kept = target.with_name(f"{target.name}-{partial.name[-8:]}")
        try:
            partial.rename(kept)
        except OSError:
            kept = partial
        raise OutputError(f"{error}; the result is in '{kept}'") from error


@contextlib.contextmanager
def output_files(folder: Name, names: Iterable[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A directory whose files go into a folder, in this order, when the block ends without an error.

    Other files of the folder stay. Those of these names are deleted before new ones take their place, the last one
    first: an interruption leaves what belongs together, or no file that reads the others.

    Args:
        folder: made if there is none.
        names: of all files that the block may write; what reads the others is last.
        overwrite: replace them.

    Raises:
        OutputError: see `check_files`; or the content cannot be written.
    """
    target, names = Path(folder).resolve(), tuple(names)
    check_files(folder, names, overwrite=overwrite)
    partial = _neighbour(target, "partial")
    try:
        partial.mkdir()
        yield partial
        written = [name for name in names if (partial / name).is_file()]
        for name in written:
            _flush(partial / name)
        check_files(folder, names, overwrite=overwrite)
        target.mkdir(exist_ok=True)
        for name in reversed(names):
            (target / name).unlink(missing_ok=True)
        for name in written:
            (partial / name).replace(target / name)
    except Exception as error:
        if not failed_to_write(error, partial) and not failed_to_write(error, target):
            raise
        raise OutputError(f"could not write to '{folder}': {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Give a directory the name of another one, which is deleted once it is replaced."""
    old = _neighbour(target, "old")
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _neighbour(target: Path, what: str) -> Path:
    """A hidden name beside a file or directory that no other process uses, and as short as a name has to be."""
    return target.with_name(f".{target.name[:50]}.{what}-{uuid.uuid4().hex[:8]}")


def _flush(file: Path) -> None:
    """Bring a file to the disk before its name says that it is complete."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def failed_to_write(error: Exception, partial: Path) -> bool:
    """Whether an error is about what is being written to a place, and not about something that is read meanwhile."""
    if isinstance(error, SafetensorError):  # of the writer of weights, which has a class of its own for a full disk
        return "serializ" in str(error) and "deserializ" not in str(error)
    if type(error) is Exception:  # of the writer of tokenizers, which has none
        return "(os error " in str(error)
    if not isinstance(error, OSError):
        return False
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return error.errno in _WRITING or any(name == partial or partial in name.parents for name in names)
