"""Files of text as the options name them: one, or two of which each line of one belongs to that line of the other."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated

import typer

from factorformer.errors import DataError

pairs_option = partial(typer.Option, rich_help_panel="Data of a translation: two files, line by line")
SourceFile = Annotated[
    str | None, pairs_option("--source", metavar="FILE", help="What is translated, a text on each line.")
]
TargetFile = Annotated[str | None, pairs_option("--target", metavar="FILE", help="Its translations.")]
EvalSourceFile = Annotated[str | None, pairs_option("--eval-source", metavar="FILE", help="What BLEU is measured on.")]
EvalTargetFile = Annotated[str | None, pairs_option("--eval-target", metavar="FILE", help="Its translations.")]


PAIR = ("source", "target")
"""The columns of two files."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Two files, in the place of one with columns of the same names."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}, {self.target}"


Source = str | Parallel
"""What rows are read from: a file, a data set of the Hub, or two files."""


def source_of(
    option: str, given: str | None, source: str | None, target: str | None, prefix: str = ""
) -> Source | None:
    """The one that was given, in one file or in two; None for none.

    Args:
        option: that names a single file.
        given: its value.
        source, target: those of the options that name two.
        prefix: of the names of these.

    Raises:
        DataError: both, or half of two.
    """
    names = [f"--{prefix}{name}" for name in ("source", "target")]
    if (source is None) != (target is None):
        here, missing = names if target is None else reversed(names)
        raise DataError(f"{here} alone is no translation: give the same lines in the other language with {missing}")
    if source is None or target is None:
        return given
    if given is not None:
        raise DataError(
            f"{option} is one file with columns, and {names[0]} and {names[1]} are two: give the one or the others"
        )
    return Parallel(source, target)


def names_of(*sources: Source | None) -> list[str]:
    """The files, and data sets, of all that was given."""
    return [
        name
        for each in sources
        if each is not None
        for name in ((each.source, each.target) if isinstance(each, Parallel) else (each,))
    ]


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
        source_of("--train", None, self.source, self.target)
        source_of("--eval", None, self.eval_source, self.eval_target, "eval-")
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
