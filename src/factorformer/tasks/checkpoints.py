"""Directories of checkpoints: the newest complete one, one process at a time, one run only."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from factorformer.errors import OutputError
from factorformer.files import whole_file

RUN_FILE = "run.json"
"""What a run is lies beside its checkpoints under this name."""

FILES = "checkpoint_files"
"""Key in it of the files that callbacks add to each checkpoint."""

CLOSEST = "closest.safetensors"
"""The model before a healing, or at its closest point: kept before there is a checkpoint."""


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint in a directory; those whose writing was interrupted are passed over.

    What callbacks write after the Trainer's own files is known from the description of the run (`FILES`).
    """
    folders = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    more: list[str] = []
    with contextlib.suppress(OSError, ValueError, TypeError):
        more = list(json.loads((output / RUN_FILE).read_text(encoding="utf-8")).get(FILES) or ())
    for folder in sorted(folders, key=step_of, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))  # what the Trainer writes last
            if all((folder / name).is_file() for name in more):
                return folder
    return None


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def begun_at(output: Path) -> int | None:
    """The step from which an interrupted run in a directory of checkpoints can go on; None where nothing was kept."""
    if (newest := last_checkpoint(output)) is not None:
        return step_of(newest)
    return 0 if (output / CLOSEST).exists() else None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out while this one trains into a directory.

    Args:
        path: the lock file; its directory is made, and the file is deleted at the end.

    Raises:
        OutputError: another process holds the lock, or the file cannot be made.
    """
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"another process is training into '{path.parent}' (it holds '{path.name}')") from error
    except OSError as error:
        raise OutputError(f"cannot write to '{path.parent}': {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def differences(path: Path, run: Mapping[str, Any]) -> list[str]:
    """What distinguishes a run from the one that a file describes: "NAME was VALUE, not VALUE", each once.

    Args:
        path: a JSON file of everything on which the result of a run depends.
        run: the same of another run.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        begun = dict(_values(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise OutputError(f"cannot read what the run in '{path.parent}' was: {error}; start over") from error
    now = dict(_values(run))
    others = [name for name in dict.fromkeys([*begun, *now]) if begun.get(name) != now.get(name)]
    return list(dict.fromkeys(f"{name[-1]} was {begun.get(name)}, not {now.get(name)}" for name in others))


def _values(run: Mapping[str, Any], *parents: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values of a description and of those within it, by where they are."""
    for name, value in run.items():
        if isinstance(value, Mapping) and value:
            yield from _values(value, *parents, name)
        else:
            yield (*parents, name), value


def check_same_run(output: Path, run: Mapping[str, Any]) -> None:
    """Write down what a run is, or compare with what stands there, so that none goes on with what another has kept.

    Args:
        output: directory of checkpoints.
        run: everything on which the result depends, JSON-ready.

    Raises:
        OutputError: the directory holds checkpoints of another run, or cannot be read or written.
    """
    path = output / RUN_FILE
    if begun_at(output) is None:
        with whole_file(path, "the description of the run") as partial:
            partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    elif other := differences(path, run):
        raise OutputError(
            f"'{output}' holds checkpoints of another run: {'; '.join(other)}; go on with the same settings or give "
            "another output"
        )
