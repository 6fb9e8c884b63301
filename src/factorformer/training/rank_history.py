"""The record of how units moved between matrices in a training with dynamic ranks."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from factorformer.errors import CheckpointError
from factorformer.files import whole_file

FILE = "factorformer_ranks.json"
"""The name of the record in a model directory."""


@dataclasses.dataclass
class RankHistory:
    """Remaining units of every matrix after each removal.

    Args:
        layers: names of the matrices.
        structures: kinds of what each of them becomes.
        full: units that each began with.
        steps: optimizer steps after which units were removed.
        ranks: for each of these, the units that were left in each matrix. A low-rank matrix that has as many as at the
            start is still whole: dense, or dense in integers.
        scores: for each of these, the mean importance of the units that were left, in each matrix.
    """

    layers: list[str]
    structures: list[str]
    full: list[int]
    steps: list[int] = dataclasses.field(default_factory=list)
    ranks: list[list[int]] = dataclasses.field(default_factory=list)
    scores: list[list[float]] = dataclasses.field(default_factory=list)

    def add(self, step: int, ranks: list[int], scores: list[float]) -> None:
        """Record one removal."""
        self.steps.append(step)
        self.ranks.append(ranks)
        self.scores.append(scores)

    @property
    def final(self) -> list[int]:
        """Units that are left at the end."""
        return self.ranks[-1] if self.ranks else self.full

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Any, where: str) -> RankHistory:
        """Read back what `to_dict` wrote.

        Raises:
            CheckpointError: something else.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        lists = isinstance(content, dict) and all(isinstance(value, list) for value in content.values())
        if not lists or set(content) != fields:
            raise CheckpointError(f"{where} is no history of ranks: it has to hold the lists {sorted(fields)}")
        history = cls(**content)
        wide, long = len(history.layers), len(history.steps)
        rows = [history.structures, history.full, *history.ranks, *history.scores]
        if any(not isinstance(row, list) or len(row) != wide for row in rows) or not (
            len(history.ranks) == len(history.scores) == long
        ):
            raise CheckpointError(f"{where} is a damaged history of ranks: its lists differ in length")
        texts = [*history.layers, *history.structures]
        counts = [*history.full, *history.steps, *(count for row in history.ranks for count in row)]
        scores = [score for row in history.scores for score in row]
        if not (
            all(isinstance(text, str) for text in texts)
            and all(type(count) is int and count > 0 for count in counts)
            and all(isinstance(score, int | float) for score in scores)
            and history.steps == sorted(history.steps)
        ):
            raise CheckpointError(f"{where} is a damaged history of ranks: it has to hold whole numbers above 0")
        return history

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write it into a model directory; the file appears whole or not at all.

        Raises:
            OutputError: it cannot be written there.
        """
        with whole_file(Path(directory) / FILE, "the history of ranks") as partial:
            partial.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> RankHistory | None:
        """What lies in a model directory; None if there is none.

        Raises:
            CheckpointError: the file cannot be read, or is damaged.
        """
        path = Path(directory) / FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read '{path}': {error}") from error
        return cls.from_dict(content, f"'{path}'")
