"""What a model directory is: a plain one, or one of sentence-transformers with a Transformer somewhere inside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factorformer.errors import CheckpointError

MODULES, ROUTER, ADAPTER = "modules.json", "router_config.json", "adapter_config.json"

TRANSFORMERS = {"Transformer": None, "MLMTransformer": "fill-mask", "CLIPModel": "clip"}
"""Kinds of sentence-transformers modules that hold a model of transformers, and the task of those that have but one."""

POINTER, LONGEST_POINTER = b"version https://git-lfs", 1024
"""How a file begins that stands for a large one that was not downloaded, and how many bytes it can have."""

ENCODES = "feature-extraction"
"""The task of a sentence-transformers module that uses no head."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the model of transformers lies in a directory.

    Args:
        folder: with its config.json, weights and tokenizer.
        task: what sentence-transformers does with it; None in a plain directory.
    """

    folder: Path
    task: str | None = None


def place(path: Path) -> Place:
    """Find the model of transformers in a directory.

    Raises:
        CheckpointError: there is none, or several; an adapter without the model that it belongs to; descriptions that
            cannot be read; files that were not downloaded. The message says what to do.
    """
    if not path.is_dir():
        raise CheckpointError(f"no such model directory: '{path}'")
    if (path / ADAPTER).is_file():
        base = _mapping(path / ADAPTER).get("base_model_name_or_path")
        raise CheckpointError(
            f"'{path}' holds a PEFT adapter of {base!r}: merge it into that model first (`merge_and_unload`), and save "
            "the result as a model directory"
        )
    if not (path / MODULES).is_file():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"'{path}' is not a model directory: it has no config.json")
        _check_files(path)
        return Place(path)
    listed = list(modules(path))
    found = {folder: kind for kind, folder in listed if kind in TRANSFORMERS}
    if len(found) != 1:
        kinds = ", ".join(kind for kind, _ in listed) or "nothing"
        names = ", ".join(f"'{path / folder}'" for folder in found)
        raise CheckpointError(
            f"'{path}' holds several Transformers: give the directory of one of them, {names}"
            if found
            else f"'{path}/{MODULES}' lists no Transformer to compress: {kinds}"
        )
    ((relative, kind),) = found.items()
    folder = path / relative
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{path}/{MODULES}' lists the Transformer '{relative or '.'}', which has no config.json")
    _check_files(folder)
    return Place(folder, TRANSFORMERS[kind] or _task(folder))


def _check_files(folder: Path) -> None:
    """Raise `CheckpointError` if a file was left behind on a server for large files."""
    for file in folder.iterdir():
        if file.is_file() and file.stat().st_size < LONGEST_POINTER:
            with file.open("rb") as opened:
                if opened.read(len(POINTER)) == POINTER:
                    raise CheckpointError(f"'{file}' is a pointer of Git LFS, not the file: run `git lfs pull` there")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json of a model says.

    Raises:
        CheckpointError: it cannot be read.
    """
    return _mapping(folder / "config.json")


def module_folders(path: Path) -> list[str]:
    """Folders below a directory of sentence-transformers that hold its modules; none in a plain directory."""
    if not (path / MODULES).is_file():
        return []
    return [folder for _, folder in modules(path) if folder not in ("", ".") and (path / folder).is_dir()]


def modules(path: Path) -> Iterator[tuple[str, str]]:
    """Kind and folder of each module, and in the place of a router those that it chooses from."""
    try:
        listed = [(str(module["type"]), str(module["path"])) for module in read_json(path / MODULES)]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"'{path}/{MODULES}' does not list modules with a type and a path") from error
    for kind, folder in listed:
        _check_inside(path, folder)
        router = path / folder / ROUTER
        if not router.is_file():
            yield kind.rpartition(".")[2], folder
            continue
        types = _mapping(router).get("types")
        if not isinstance(types, dict):
            raise CheckpointError(f"'{router}' does not list the types of its modules")
        for name, inner in types.items():
            below = f"{folder}/{name}" if folder else str(name)
            _check_inside(path, below)
            yield str(inner).rpartition(".")[2], below


def _check_inside(path: Path, folder: str) -> None:
    if ".." in Path(folder).parts or Path(folder).is_absolute():
        raise CheckpointError(f"'{path}' lists the module '{folder}', which lies outside of it")


def _task(folder: Path) -> str:
    for file in sorted(folder.glob("sentence_*_config.json")):
        return _mapping(file).get("transformer_task") or ENCODES
    return ENCODES


def _mapping(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file}' holds no JSON object")
    return content


def read_json(file: Path) -> Any:
    """What a description says; `CheckpointError` if it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read '{file}': {error}") from error
