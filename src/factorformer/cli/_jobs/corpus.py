"""The text that a model learns from scratch: pairs for a translation, plain text for a language model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from factorformer.cli._options import note
from factorformer.cli._text_files import TextFiles
from factorformer.cli._texts import columns_of, plain_columns, read_table
from factorformer.errors import DataError
from factorformer.progress import Progress
from factorformer.tasks import language_modelling, translation
from factorformer.tasks.architectures import Task
from factorformer.tasks.data import hold_out
from factorformer.tasks.tokenization import train_tokenizer

Item = TypeVar("Item")


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text, and everything that depends on its kind.

    Args:
        task: what is learned of it.
        train, held: pairs of texts for a translation, else texts.
        max_length: tokens after which a text is cut, or in a block of text.
    """

    task: Task
    train: Sequence[Any]
    held: Sequence[Any]
    max_length: int

    def new_tokenizer(self, vocabulary: int, progress: Progress) -> PreTrainedTokenizerFast:
        """A tokenizer of so many tokens, trained on the training text."""
        texts = [text for pair in self.train for text in pair] if self.task == "translation" else self.train
        return train_tokenizer(texts, vocabulary, progress, task=self.task)

    def encode(self, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> list[datasets.Dataset]:
        """Token ids of the training and of the held-out text."""
        phases = (("encode", self.train), ("encode held-out text", self.held))
        if self.task == "translation":
            return [translation.encode(pairs, tokenizer, self.max_length, progress, phase) for phase, pairs in phases]
        return [
            language_modelling.encode(texts, tokenizer, self.task, self.max_length, progress, phase)
            for phase, texts in phases
        ]

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: datasets.Dataset, progress: Progress
    ) -> dict[str, float]:
        """Metrics on the held-out text."""
        metrics = language_modelling.predict(model, tokenizer, held, self.task, progress=progress)
        if self.task != "translation":
            return metrics
        sources, references = zip(*self.held, strict=True)
        texts = translation.translate(model, tokenizer, sources, max_length=self.max_length, progress=progress)
        scores = translation.bleu(texts, references)
        return metrics | {name: score for name, score in scores.items() if not isinstance(score, str)}


def read_corpus(files: TextFiles, task: Task, config: str, max_length: int, seed: int) -> Corpus:
    """Read what a model of this task learns from; a part is held out where no files to measure on are given.

    Args:
        files: as the options name them.
        task: what the architecture learns.
        config: its name, for messages.
        max_length: see `Corpus`.
        seed: of the choice of what is held out.

    Raises:
        DataError: files that do not fit the task, or are missing, malformed, empty, or too short to hold some out.
    """
    if (task == "translation") != files.pairs:
        raise DataError(
            f"'{config}' is an encoder-decoder, which learns from pairs of texts: give --source and --target"
            if task == "translation"
            else f"'{config}' reads a single text: give --train, or a --config that translates, such as t5"
        )
    if task == "translation":
        if importlib.util.find_spec("sacrebleu") is None:
            raise DataError("BLEU needs sacreBLEU: pip install 'factorformer[translation]'")
        pairs = _pairs(files.source, files.target), _pairs(files.eval_source, files.eval_target)
        return Corpus(task, *_split(*pairs, seed, "--eval-source and --eval-target"), max_length)
    texts = _texts(files, files.train), _texts(files, files.evaluation)
    return Corpus(task, *_split(*texts, seed, "--eval"), max_length)


def _split(train: list[Item], held: list[Item], seed: int, options: str) -> tuple[list[Item], list[Item]]:
    """The two as they are, or where nothing is held out yet, a part of the first."""
    if held:
        return train, held
    kept, out = hold_out(datasets.Dataset.from_dict({"row": range(len(train))}), seed, options)
    return [train[row] for row in kept["row"]], [train[row] for row in out["row"]]


def _pairs(source: str | None, target: str | None) -> list[tuple[str, str]]:
    if source is None or target is None:
        return []
    return translation.read_parallel(Path(source), Path(target), note)


def _texts(files: TextFiles, name: str | None) -> list[str]:
    if name is None:
        return []
    columns = plain_columns(name, columns_of(files.text, None))
    texts = [str(text) for text in read_table(name, columns)[columns.text[0]] if text is not None]
    filled = [text for text in texts if text.strip()]
    if not filled:
        raise DataError(f"'{name}' holds no text: every row is empty")
    return filled
