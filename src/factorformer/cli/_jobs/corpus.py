"""The two kinds of text that a model learns from scratch: pairs for a translation, plain text for a language model."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerFast

from factorformer.cli._inputs import columns_of, hold_out, plain_columns, read_table
from factorformer.cli._text_files import TextFiles
from factorformer.errors import DataError
from factorformer.progress import Progress
from factorformer.tasks import language_modelling, translation
from factorformer.tasks.architectures import Task
from factorformer.tasks.from_scratch import IGNORED, ScratchSettings, token_loss
from factorformer.tasks.tokenization import train_tokenizer

Item = TypeVar("Item")
Data = tuple[datasets.Dataset, datasets.Dataset]
"""Token ids of the training and of the held-out text."""


class Corpus(ABC):
    """Training and held-out text, and everything that depends on its kind.

    Args:
        train: items to learn from.
        held: items to measure on.
        max_length: tokens after which a text is cut, or in a block of text.
    """

    def __init__(self, train: Sequence[Any], held: Sequence[Any], max_length: int) -> None:
        self.train, self.held, self.max_length = train, held, max_length

    @abstractmethod
    def tokenizer(self, vocabulary: int, progress: Progress) -> PreTrainedTokenizerFast:
        """A new tokenizer of so many tokens, trained on the training text."""

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> Data:
        """Token ids of the training and of the held-out text."""

    @abstractmethod
    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        data: Data,
        settings: ScratchSettings,
        checkpoints: Path,
        progress: Progress,
    ) -> list[dict[str, float]]:
        """Train a model in place; the learning curve."""

    @abstractmethod
    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: datasets.Dataset, progress: Progress
    ) -> dict[str, float]:
        """Metrics on the held-out text."""


class _Pairs(Corpus):
    """Texts and their translations."""

    def tokenizer(self, vocabulary: int, progress: Progress) -> PreTrainedTokenizerFast:
        return train_tokenizer([text for pair in self.train for text in pair], vocabulary, progress)

    def encode(self, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> Data:
        return (
            translation.encode(self.train, tokenizer, self.max_length, progress),
            translation.encode(self.held, tokenizer, self.max_length, progress, "encode held-out text"),
        )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        data: Data,
        settings: ScratchSettings,
        checkpoints: Path,
        progress: Progress,
    ) -> list[dict[str, float]]:
        return translation.train(model, tokenizer, *data, settings, checkpoints, progress)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: datasets.Dataset, progress: Progress
    ) -> dict[str, float]:
        loss = token_loss(model, DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=IGNORED), held)
        sources, references = zip(*self.held, strict=True)
        texts = translation.translate(model, tokenizer, sources, max_length=self.max_length, progress=progress)
        scores = translation.bleu(texts, references)
        numbers = {name: score for name, score in scores.items() if not isinstance(score, str)}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700)), **numbers}


class _PlainText(Corpus):
    """Texts of which a language model learns to predict tokens: the next, or hidden ones."""

    def __init__(self, train: Sequence[str], held: Sequence[str], max_length: int, task: language_modelling.Task):
        super().__init__(train, held, max_length)
        self.task: language_modelling.Task = task

    def tokenizer(self, vocabulary: int, progress: Progress) -> PreTrainedTokenizerFast:
        tokenizer = train_tokenizer(self.train, vocabulary - (self.task == "masked"), progress)
        return language_modelling.adapt_tokenizer(tokenizer, self.task)

    def encode(self, tokenizer: PreTrainedTokenizerFast, progress: Progress) -> Data:
        return (
            language_modelling.encode(self.train, tokenizer, self.task, self.max_length, progress),
            language_modelling.encode(
                self.held, tokenizer, self.task, self.max_length, progress, "encode held-out text"
            ),
        )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        data: Data,
        settings: ScratchSettings,
        checkpoints: Path,
        progress: Progress,
    ) -> list[dict[str, float]]:
        return language_modelling.train(model, tokenizer, *data, self.task, settings, checkpoints, progress)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, held: datasets.Dataset, progress: Progress
    ) -> dict[str, float]:
        return language_modelling.evaluate(model, tokenizer, held, self.task, progress=progress)


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
        train, held = _pairs(files.source, files.target), _pairs(files.eval_source, files.eval_target)
        return _Pairs(*_split(train, held, seed, "--eval-source and --eval-target"), max_length)
    train, held = _texts(files, files.train), _texts(files, files.evaluation)
    return _PlainText(*_split(train, held, seed, "--eval"), max_length, task)


def _split(train: list[Item], held: list[Item], seed: int, options: str) -> tuple[list[Item], list[Item]]:
    """The two as they are, or where nothing is held out yet, a part of the first."""
    if held:
        return train, held
    kept, out = hold_out(datasets.Dataset.from_dict({"row": range(len(train))}), seed, options)
    return [train[row] for row in kept["row"]], [train[row] for row in out["row"]]


def _pairs(source: str | None, target: str | None) -> list[tuple[str, str]]:
    if source is None or target is None:
        return []
    return translation.read_parallel(Path(source), Path(target))


def _texts(files: TextFiles, name: str | None) -> list[str]:
    if name is None:
        return []
    columns = plain_columns(name, columns_of(files.text, None))
    texts = [str(text) for text in read_table(name, columns)[columns.text[0]] if text is not None]
    filled = [text for text in texts if not text.isspace() and text]
    if not filled:
        raise DataError(f"'{name}' holds no text: every row is empty")
    return filled
