"""Texts and tables that commands read: their columns, what they are encoded to, and batches to calibrate on."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from factorformer.cli._options import LENGTH, TaskChoice, note
from factorformer.cli._text_files import PAIR, Parallel, Source
from factorformer.errors import DataError
from factorformer.export.sentence import Writing, read_longest
from factorformer.hf.layout import place
from factorformer.hf.source import most_tokens
from factorformer.tasks import windows
from factorformer.tasks.classification import is_causal
from factorformer.tasks.data import (
    AT_ONCE,
    Columns,
    Labels,
    batches,
    check_ends,
    check_lengths,
    encode,
    read,
    sample,
    with_decoder_inputs,
)
from factorformer.tasks.reading import read_rows, text_format
from factorformer.tasks.translation import read_parallel
from factorformer.tasks.windows import read_documents

LOGITS = 2**27
"""A language model's predictions of so many numbers are held at a time."""


def columns_of(text: list[str] | None, label: str | None, task: TaskChoice | None = None) -> Columns:
    """The columns that the options name."""
    return Columns(tuple(text or ["text"]), label, words=task is TaskChoice.tokens)


def columns_in(source: Source, columns: Columns) -> Columns:
    """Those of a table; two files have their own."""
    return Columns((PAIR[0],), PAIR[1]) if isinstance(source, Parallel) else columns


def read_table(source: Source, columns: Columns) -> datasets.Dataset:
    """Rows of a file, of two or of the Hub that have these columns, and nothing in them that does not belong there.

    Raises:
        DataError: missing, unreadable, malformed or empty, or without one of the columns.
    """
    if isinstance(source, Parallel):
        pairs = read_parallel(Path(source.source), Path(source.target), note)
        return datasets.Dataset.from_dict(dict(zip(PAIR, map(list, zip(*pairs, strict=True)), strict=True)))
    return read(source, columns, note)


def plain_columns(source: Source, columns: Columns) -> Columns:
    """The text columns alone; a plain text file has its own."""
    if isinstance(source, Parallel):
        return Columns((PAIR[0],))
    plain = text_format(Path(source)) == ".txt"
    return Columns(("text",)) if plain else dataclasses.replace(columns, label=None)


def read_text(source: Source, columns: Columns, config: PretrainedConfig) -> datasets.Dataset | list[Any]:
    """Rows of plain text, or the documents that a causal language model reads.

    Raises:
        DataError: as `read_table`, or `read_documents`.
    """
    if is_causal(config) and not isinstance(source, Parallel):
        return read_documents(source, columns, note)
    return read_table(source, columns)


def encode_text(
    source: Source,
    text: datasets.Dataset | list[Any],
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    max_length: int,
    sequence_length: int | None,
) -> datasets.Dataset:
    """Rows of plain text, each cut at `max_length`, or the windows of documents, encoded.

    Raises:
        DataError: what does not fit tokenizer or model; the message names the source.
    """
    if isinstance(text, datasets.Dataset):
        return encode_table(source, text, columns, tokenizer, None, max_length, config)
    skeleton = _skeleton(config)
    positions = None if skeleton is None else most_tokens(skeleton)
    length = windows.sequence_length(config, sequence_length, positions)
    with about(source):
        cut = windows.windows(tokenizer, text, length)
    tokens = sum(cut["length"])
    note(f"'{source}': {tokens:,} tokens in {len(cut):,} windows of {min(length, tokens):,}")
    if skeleton is not None:
        check_lengths(skeleton, cut, f"'{source}'")
    return cut


def encode_table(
    source: Source,
    rows: datasets.Dataset,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels | None,
    max_length: int,
    config: PretrainedConfig,
) -> datasets.Dataset:
    """Encoded rows that a model of this configuration can read.

    Raises:
        DataError: what does not fit labels, tokenizer or model; the message names the source.
    """
    with about(source):
        encoded = encode(tokenizer, rows, columns, labels, max_length)
    cut = sum(length >= max_length for length in encoded["length"])
    if labels is not None and labels.kind == "answers":
        note(f"'{source}': {len(rows):,} questions, in {len(encoded):,} windows of at most {max_length:,} tokens")
    elif cut:
        note(f"'{source}': {cut:,} of {len(encoded):,} rows have {max_length:,} tokens or more, and are cut there")
    skeleton = _skeleton(config)
    if skeleton is not None:
        check_lengths(skeleton, encoded, f"'{source}'")
    if labels is not None and labels.kind not in ("tokens", "text"):
        check_ends(config, encoded, f"'{source}'")
    return encoded


@contextlib.contextmanager
def about(source: Source) -> Iterator[None]:
    """Begin messages on data with the name of the data, and let them tell lines of a file where it has some."""
    try:
        yield
    except DataError as error:
        raise DataError(f"'{source}': {_with_lines(Path(str(source)), str(error))}") from error


def _with_lines(path: Path, message: str) -> str:
    place = r"\brow (\d+)(?=[;:,])"
    if not re.search(place, message) or text_format(path) is None or not path.is_file():
        return message
    rows = read_rows(path, None, lambda _: None)
    return re.sub(place, lambda found: rows.where(int(found[1]) - 1), message)


def longest_of(path: Path, config: PretrainedConfig, asked: int | None) -> int:
    """Tokens after which texts are cut: unless told otherwise where sentence-transformers cuts those of a directory."""
    skeleton = _skeleton(config)
    known = (read_longest(place(path).folder), None if skeleton is None else most_tokens(skeleton))
    return asked or min((tokens for tokens in known if tokens is not None), default=LENGTH)


def written(rows: datasets.Dataset, columns: Columns, writing: Writing) -> datasets.Dataset:
    """Rows whose texts are what sentence-transformers makes of them."""
    if not writing.prompt and not writing.lower:
        return rows
    before = writing.prompt.split()

    def made(cell: Any) -> Any:
        if isinstance(cell, list):  # of words
            return [writing.cased(word) for word in (*before, *cell)]
        return writing(str(cell))

    return datasets.Dataset.from_dict({name: [made(cell) for cell in rows[name]] for name in columns.text})


def _skeleton(config: PretrainedConfig) -> PreTrainedModel | None:
    """A model without weights, to be asked for its sizes; None for one that cannot be made without them."""
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except Exception:  # code of many architectures; what is asked here is asked again of the model itself
        return None


def calibration_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    rows: int | None,
    seed: int,
    batch_size: int = 32,
    usual: int = 512,
) -> list[dict[str, Tensor]]:
    """Batches of some of the rows, as the model runs on them.

    Args:
        model: that is calibrated.
        tokenizer: of it.
        data: encoded rows, or windows.
        rows: at most; None for `usual`, or for windows as many as hold `CALIBRATED` tokens.
        seed: of the choice.
        batch_size: rows together, at most; no more than hold so many tokens as are read together.
        usual: see `rows`.

    Raises:
        DataError: an encoder-decoder that does not say how its decoder starts.
    """
    if is_causal(model.config) and "labels" not in data.column_names:
        longest = max(data["length"])
        usual = max(windows.CALIBRATED // longest, 1)
        batch_size = min(batch_size, windows.together(model.config, longest, LOGITS))
        if (rows or usual) < len(data):
            note(f"calibrated on {rows or usual:,} windows of them, drawn at random")
    made = batches(tokenizer, sample(data, rows or usual, seed), batch_size, AT_ONCE)
    return [batch if "labels" in batch else with_decoder_inputs(model, batch) for batch in made]
