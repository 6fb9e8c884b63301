"""Unfinished trainings on disk: where they are kept, how they go on, and that none of them is lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from factorformer.cli._options import note
from factorformer.errors import DivergedError, OutputError
from factorformer.files import failed_to_write
from factorformer.tasks.checkpoints import begun_at, differences, last_checkpoint, locked


class Unfinished:
    """The files of a run that has not ended, in a hidden neighbour of the output: options, checkpoints, and more.

    That is the tokenizer of a model from scratch, or the plan of one that is compressed.

    Args:
        output: the directory that the run is to make.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.parent / f".{output.name}.training"
        self.checkpoints, self.tokenizer = self.folder / "checkpoints", self.folder / "tokenizer"
        self.plan = self.folder / "plan.json"
        self._options = self.folder / "options.json"

    @contextlib.contextmanager
    def open(self, options: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Begin a run or go on with it, alone among all processes; after success, its files are deleted.

        After any failure its checkpoints are kept. Those of an earlier run that this one takes the place of are deleted
        only when this one has one of its own; if it never gets there, they are put back.

        Args:
            options: JSON-ready; with `resume` they have to be those of the interrupted run.
            resume: go on from the last checkpoint.
            overwrite: start over although there is one.

        Raises:
            OutputError: there is a checkpoint and neither option, or none to resume, or one of a run with other
                options; or another process has the run open.
        """
        with locked(self.folder.with_name(f"{self.folder.name}.lock")):
            begun, earlier = begun_at(self.checkpoints), None
            if resume:
                if begun is None:
                    raise OutputError(
                        f"no interrupted run for '{self.output}' has a checkpoint to resume: leave --resume out"
                    )
                if other := differences(self._options, options):
                    raise OutputError(
                        f"the interrupted run had other options: {'; '.join(other)}; repeat its command, or start over "
                        "with --overwrite"
                    )
                note(f"resumed from step {begun}")
            else:
                if begun is not None and not overwrite:
                    raise OutputError(
                        f"an interrupted run for '{self.output}' can go on: add --resume, or start over with "
                        "--overwrite"
                    )
                earlier = self._set_aside()
            try:
                if not resume:
                    self._begin(options)
                yield
            except BaseException as error:
                # What diverged before its first checkpoint is not to go on from where it began.
                kept = last_checkpoint if isinstance(error, DivergedError) else begun_at
                if not resume and kept(self.checkpoints) is None:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    if earlier is not None:
                        earlier.rename(self.folder)
                    if begun is not None:
                        note(f"the interrupted run for '{self.output}' is as it was: --resume goes on with it")
                else:
                    if earlier is not None:
                        shutil.rmtree(earlier, ignore_errors=True)
                    self._say_what_is_kept(error)
                if isinstance(error, Exception) and failed_to_write(error, self.folder):
                    raise OutputError(f"cannot write to '{self.folder}': {error}") from error
                raise
            shutil.rmtree(self.folder, ignore_errors=True)
            if earlier is not None:
                shutil.rmtree(earlier, ignore_errors=True)

    def _set_aside(self) -> Path | None:
        """Give the files of an earlier run another name, if there are any."""
        if not self.folder.exists():
            return None
        if any(self.folder.iterdir()) and not self._options.exists():
            raise OutputError(f"'{self.folder}' is no run of factorformer: move it, or choose another output")
        earlier = self.folder.with_name(f"{self.folder.name}-{uuid.uuid4().hex[:8]}")
        self.folder.rename(earlier)
        return earlier

    def _begin(self, options: Mapping[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True)
            self._options.write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to '{self.folder.parent}': {error.strerror}") from error

    def _say_what_is_kept(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            note("interrupted; to go on from the last checkpoint, add --resume to the same command")
        elif isinstance(error, DivergedError):
            note(f"checkpoints are kept in '{self.checkpoints}': start over with other options and --overwrite")
        else:
            note(f"checkpoints are kept in '{self.folder}': repeat the command with --resume to go on from there")


def is_unfinished(output: Path) -> bool:
    """Whether a run for this directory has a checkpoint from which it could go on."""
    return begun_at(Unfinished(output).checkpoints) is not None
