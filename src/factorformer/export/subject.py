"""What is exported: a model as a function of tensors, where it goes, and what the files have to compute."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import ExportError, OutputError
from factorformer.export import lowering
from factorformer.export.sentence import Layout, Pooling, find_layout, read_longest
from factorformer.export.task import HEADS, Continuation, Task, task_of
from factorformer.files import check_files, check_output, output_directory, output_files
from factorformer.hf.checkpoint import choose
from factorformer.hf.layout import place
from factorformer.hf.source import load_model, load_tokenizer, most_tokens
from factorformer.layers._compat import undivided

TOLERANCE = 1e-4
"""Of the norm of the outputs, by which those of a file in float32 may deviate from torch's."""

LOSS_INT8 = 0.7
"""Of the norm of the outputs, by which those of a file in int8 may deviate from torch's on text: half of what outputs
that have nothing to do with each other do. Rounding adds up over layers: to 0.13 in MiniLM, 0.5 in all-mpnet-base-v2.
"""

TEXTS = 16
"""Texts on which a file in int8 is compared, in two batches."""

LONGEST = 128
"""Tokens after which these are cut."""

SHAPES = ((4, 9), (7, 16))
"""Batch and length of the comparison, neither of them that of the trace."""

Text = str | tuple[str, str]
"""What a model reads: a text, or two."""

Batch = list[Tensor]
"""The inputs of a model, in order of their names, tokens and their mask first, int64 of `(rows, length)`."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """Result of an export.

    Args:
        path: the directory.
        file_bytes: of the graph and its weights.
        inputs: names of its inputs, int64 of `(batch, length)` each, but for keys and values of a language model.
        output: the name of its (first) output: `logits`, `last_hidden_state` or `sentence_embedding`.
        deviation: from torch, the norm of the difference relative to that of the output, of the worse of two batches:
            of random tokens, or of text where products are in int8.
        cosine: of the outputs and torch's, the mean over the rows of the worse batch; None where an output is a number.
    """

    path: Path
    file_bytes: int
    inputs: tuple[str, ...]
    output: str
    deviation: float
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """Inputs of a model, and what torch makes of them.

    Args:
        batches: of inputs, tokens and their mask first.
        expected: the outputs of each.
    """

    batches: list[Batch]
    expected: list[tuple[Tensor, ...]]

    def feeds(self, names: Sequence[str]) -> list[dict[str, Tensor]]:
        """The inputs by name."""
        return [dict(zip(names, batch, strict=True)) for batch in self.batches]

    def compare(self, found: Sequence[Sequence[Tensor]], tolerance: float, what: str) -> tuple[float, float | None]:
        """Deviation of outputs, and cosine of the first, of the worse batch; padding does not count, nor do the last
        outputs where fewer were found.

        Raises:
            ExportError: they deviate by more than the tolerance; `what` names the model and its runtime.
        """
        pairs = [
            [(_real(a, batch), _real(b, batch)) for a, b in zip(outputs, wanted[: len(outputs)], strict=True)]
            for outputs, wanted, batch in zip(found, self.expected, self.batches, strict=True)
        ]
        wide = [(a.float(), b.float()) for (a, b), *_ in pairs if a.shape[-1] > 1]
        cosines = [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in wide]
        every = [pair for outputs in pairs for pair in outputs]
        return checked(every, tolerance, f"{what} deviates from torch"), min(cosines, default=None)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to export, in float32 on the CPU.

    Args:
        task: what the file is to compute.
        tokenizer: of the model, if it has one.
        dtype: of the model as it was.
        path: the directory to make.
        inside: whether that is a folder of the model's own directory.
        overwrite: replace what is there.
    """

    task: Task | Continuation
    tokenizer: PreTrainedTokenizerBase | None
    dtype: torch.dtype
    path: Path
    inside: bool
    overwrite: bool

    @property
    def kind(self) -> str:
        """The class of the model."""
        return type(self.task.model).__name__

    def sample(self, batches: list[Batch]) -> Sample:
        """What the model makes of inputs now; it is not to be changed before."""
        with torch.no_grad():
            made = [self.task(*batch) for batch in batches]
        return Sample(batches, [each if isinstance(each, tuple) else (each,) for each in made])

    def random(self) -> Sample:
        """Of random tokens, padded on the right and on the left."""
        return self.sample([self.draw(*shape, seed) for seed, shape in enumerate(SHAPES)])

    def draw(self, rows: int, length: int, seed: int) -> Batch:
        """Random tokens, all rows but the first padded, each to another length; on the left where the seed is odd.

        Of a model that goes on with a text half of the tokens are known already, but for the first seed.
        """
        config, draws = self.task.model.config, torch.Generator().manual_seed(seed)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None:  # models that count positions from behind the padding token have fewer of them
            length = max(2, min(length, longest - 2 - (config.pad_token_id or 0)))
        padding = config.pad_token_id or 0
        ids = torch.randint(0, config.vocab_size, (rows, length), generator=draws)
        ids = torch.where(ids == padding, (padding + 1) % config.vocab_size, ids)
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            mask[row, -min(row + 1, length - 1) :] = 0
        mask = mask.flip(1) if seed % 2 else mask
        ids = torch.where(mask == 0, padding, ids)
        given = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.task.names:
            given["token_type_ids"] = torch.zeros_like(ids)
            given["token_type_ids"][:, length // 2 :] = 1
        return self.task.complete(given, length // 2 if seed else 0)

    def read(self, texts: Sequence[Text], rows: int) -> list[Batch]:
        """Batches of text, so many rows in each; none without a tokenizer."""
        if self.tokenizer is None:
            return []
        found = []
        longest = min(self.tokenizer.model_max_length, most_tokens(self.task.model) or LONGEST, LONGEST)
        for first in range(0, len(texts), rows):
            part: Any = list(texts[first : first + rows])  # a tokenizer takes tuples for pairs
            batch = self.tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            ids = batch["input_ids"]
            found.append(self.task.complete({"token_type_ids": torch.zeros_like(ids), **batch}, 0))
        return found

    def spoken(self, texts: Sequence[Text] | None) -> Sample:
        """Of text, in two batches, without one of words of the vocabulary, and of random tokens without any."""
        known = [] if texts is None else [text for text in texts if "".join(text).strip()][:TEXTS]
        texts = self._made_up() if texts is None else known
        halves = [half for half in (texts[::2], texts[1::2]) if half]
        batches = [batch for half in halves for batch in self.read(half, len(half))]
        return self.sample(batches) if batches else self.random()

    def _made_up(self) -> list[Text]:
        """Sentences of whole words of a vocabulary, always the same; none where it has too few words."""
        if self.tokenizer is None:
            return []
        tokens = sorted(set(self.tokenizer.get_vocab()) - set(self.tokenizer.all_special_tokens))
        words = [self.tokenizer.convert_tokens_to_string([token]).strip() for token in tokens]
        words = [word for word in words if word.isalpha() and (len(word) > 2 or not word.isascii())]
        draws = random.Random(0)
        return [
            " ".join(draws.choices(words, k=draws.randint(5, 14))) + "." for _ in range(TEXTS if len(words) > 9 else 0)
        ]

    @contextlib.contextmanager
    def files(self, *names: str) -> Iterator[list[Path]]:
        """Where to write these files, the most important one last; they appear when the block ends without an error.

        In a directory of their own the configuration, which needs no plug-in to be read, and the tokenizer come along.
        """
        with (
            output_files(self.path, names, overwrite=self.overwrite)
            if self.inside
            else output_directory(self.path, overwrite=self.overwrite)
        ) as directory:
            yield [directory / name for name in names]
            if not self.inside:
                self._write_companions(directory)

    def _write_companions(self, directory: Path) -> None:
        config: Any = copy.deepcopy(self.task.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.save_pretrained(directory)
        if isinstance(self.task, Continuation) and self.task.model.generation_config is not None:
            self.task.model.generation_config.save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def exported(self, files: Sequence[Path], deviation: float, cosine: float | None) -> Exported:
        """The result, of files that are written."""
        size = sum(file.stat().st_size for file in files if file.is_file())
        return Exported(self.path, size, tuple(self.task.names), self.task.output, deviation, cosine)


def check_exportable(layout: Layout) -> None:
    """Refuse a directory by its descriptions alone, before weights are read.

    Raises:
        CheckpointError: descriptions that cannot be read.
        ExportError: neither the class of the model nor that without a head can be exported.
    """
    choice = choose(layout.source)
    refused: list[ExportError] = []
    for kind in (choice.loader, choice.base):
        if choice.config is None or kind is None:
            continue
        try:
            with torch.device("meta"):
                skeleton = kind(choice.config)
            head = kind.__name__.endswith(HEADS)
            task_of(skeleton, None, None if head else layout.pooling)
        except ExportError as error:
            refused.append(error)
            continue
        except Exception:  # a class that cannot be made without weights is asked when it has some
            return
        return
    if refused:
        raise refused[0]


def layout_of(model: str, *, inside: bool) -> Layout:
    """Where the parts of a model are; of one whose directory gets the file, the Transformer alone.

    Raises:
        CheckpointError, ExportError: as from `find_layout`.
        OutputError: the directory is a package's, or the Hub's.
    """
    if not inside:
        return find_layout(model)
    if not Path(model).is_dir():
        raise OutputError(
            f"'{model}' is no directory of yours to put a file in: save the model first, or give --output"
        )
    return Layout(Path(model), place(Path(model)).folder)


def prepare(
    model: PreTrainedModel | str | os.PathLike[str],
    path: str | os.PathLike[str] | None,
    folder: str,
    files: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    pooling: Pooling | None,
    overwrite: bool,
) -> Subject:
    """Read a model, and see that what is made of it has a place.

    Args:
        model: or its directory, a name on the Hub, or `minilm`. It is left as it is.
        path: the directory to make; None makes `folder` in the model's own, whose file puts out hidden states: what is
            made of these is said by the files beside it.
        folder: as other programs look for it.
        files: that are going to be in it.
        tokenizer: by default that of the directory.
        pooling: by default what `modules.json` of the directory says.
        overwrite: replace what is there.

    Raises:
        ExportError: the model is of a kind that cannot be exported, or has no directory to put anything in.
        ModelError: no such model.
        OutputError: the path exists and `overwrite` is off, or it cannot be written.
    """
    inside = path is None
    if isinstance(model, PreTrainedModel):
        if inside:
            raise ExportError(f"a {type(model).__name__} in memory has no directory to put '{folder}' in: give a path")
        check_output(path, overwrite=overwrite)
        whole = undivided(model)
    else:
        layout = layout_of(os.fspath(model), inside=inside)
        if path is None:
            path = layout.transformer / folder
            check_files(path, files, overwrite=overwrite)
        else:
            check_output(path, overwrite=overwrite, inputs=(model, layout.source))
        if tokenizer is None:
            with_tokenizer = (layout.source / "tokenizer_config.json").is_file()
            tokenizer = load_tokenizer(layout.source if with_tokenizer else layout.transformer)
            tokenizer.model_max_length = read_longest(layout.transformer) or tokenizer.model_max_length
        whole = load_model(layout.source)
        if pooling is None and not inside and not type(whole).__name__.endswith(HEADS):
            pooling = layout.pooling
    dtype = whole.dtype
    whole.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
    lowering.freeze(whole, quantized=True)
    task = task_of(whole, tokenizer, pooling)
    return Subject(task, tokenizer, dtype, Path(path), inside, overwrite)


def checked(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float, what: str) -> float:
    """The largest deviation among pairs of found and expected; `ExportError` if it is more than the tolerance."""
    tiny = torch.finfo(torch.float32).tiny
    found = [float((got - wanted).norm() / wanted.norm().clamp_min(tiny)) for got, wanted in pairs]
    deviation = max(found, key=lambda value: (value != value, value), default=0.0)
    if not deviation <= tolerance:
        raise ExportError(f"{what} by {deviation:.2g} of the output, more than the {tolerance:g} allowed")
    return deviation


def _real(output: Tensor, batch: Batch) -> Tensor:
    """What is put out for tokens, without that for padding."""
    ids, mask = batch[0], batch[1].bool()
    if output.dim() == 4 and (output.shape[0], output.shape[2]) == mask.shape:  # keys or values, by heads
        return output.transpose(1, 2)[mask]
    return output[mask[:, -ids.shape[1] :]] if output.shape[:-1] == ids.shape else output
