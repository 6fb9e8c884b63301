"""The text that `train` learns from, as the options name it."""

from __future__ import annotations

import dataclasses

from factorformer.errors import DataError


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Two files of pairs for a translation, or plain text for a language model; and the same to measure on.

    Raises:
        DataError: options that do not go together.
    """

    source: str | None = None
    target: str | None = None
    eval_source: str | None = None
    eval_target: str | None = None
    train: str | None = None
    evaluation: str | None = None
    text: list[str] | None = None

    def __post_init__(self) -> None:
        if (self.source is None) != (self.target is None):
            given, missing = ("--source", "--target") if self.target is None else ("--target", "--source")
            raise DataError(
                f"{given} alone is no translation: give the same lines in the other language with {missing}"
            )
        if (self.eval_source is None) != (self.eval_target is None):
            raise DataError("--eval-source and --eval-target are measured on together: give both or none")
        plain = self.train is not None
        if self.pairs and (plain or self.evaluation is not None or self.text is not None):
            raise DataError(
                "--train, --eval and --text are for language models: leave them out beside --source, --target"
            )
        if self.eval_source is not None and not self.pairs:
            raise DataError("--eval-source and --eval-target are for translations: give --source and --target")
        if not self.pairs and not plain:
            hint = "; --text names a column of it" if self.text is not None else ""
            raise DataError(f"there is nothing to learn: give --source and --target to translate, or --train{hint}")
        if self.text is not None and len(self.text) > 1:
            raise DataError("a language model reads a single text: give --text once")

    @property
    def pairs(self) -> bool:
        """Whether the files hold pairs of texts."""
        return self.source is not None

    @property
    def names(self) -> list[str]:
        """All files that are given."""
        files = (self.source, self.target, self.eval_source, self.eval_target, self.train, self.evaluation)
        return [name for name in files if name is not None]
