"""Texts and labels to batches of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from factorformer.errors import DataError, ModelError
from factorformer.hf.source import most_tokens
from factorformer.layers.embeddings import embeddings_of
from factorformer.tasks import answers, language_modelling, translation
from factorformer.tasks.cells import row_name
from factorformer.tasks.labels import IGNORED, TASKS, Labels
from factorformer.tasks.tables import Columns, read
from factorformer.tasks.translation import ENDLESS

__all__ = [
    "AT_ONCE",
    "Columns",
    "Labels",
    "batches",
    "check_ends",
    "check_lengths",
    "collator",
    "count_tokens",
    "encode",
    "hold_out",
    "indexed_batches",
    "read",
    "sample",
    "unlike",
    "with_decoder_inputs",
]

BESIDE = ("length", "reference", "example", "context", "answers", "offsets")
"""Columns of encoded rows that models do not read."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    columns: Columns,
    labels: Labels | None = None,
    max_length: int | None = 128,
) -> datasets.Dataset:
    """Token ids of every row, with `labels` where the task has them, and `length` for bucketing.

    The first token of a word carries its label, the others none (-100). Plain texts without a single token are left
    out. Of questions and contexts there is a row for each window (see `answers.encode`). Where a text belongs to each
    text, `labels` are its tokens, and `reference` is the text itself.

    Args:
        tokenizer: of the model.
        rows: a table.
        columns: where its texts and labels are.
        labels: read from the training data; None for plain text.
        max_length: longer inputs are cut; None cuts none.

    Raises:
        DataError: a missing column or text, a labelled text without any token, or labels that do not fit.
        ModelError: labels of words, and a tokenizer that does not tell which word a token is of.
    """
    columns.check(rows)
    words = columns.words
    if labels is not None and (labels.kind == "tokens") != words:
        needed = "a list of words (say --task token-classification)" if labels.kind == "tokens" else "a string"
        raise DataError(f"the task is {TASKS[labels.kind]}: a cell of column '{columns.text[0]}' has to be {needed}")
    if labels is not None and labels.kind == "text":
        return _encode_pairs(tokenizer, rows, columns, max_length)
    if labels is not None and labels.kind == "answers":
        return _encode_answers(tokenizer, rows, columns, labels, max_length)
    if words and not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} does not tell which word a token is of: a fast tokenizer does")
    texts: Any = [[v if isinstance(v, list) else str(v) for v in rows[column]] for column in columns.text]
    options: dict[str, Any] = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    options["is_split_into_words"] = words
    encoded = tokenizer(texts[0], texts[1] if len(texts) > 1 else None, **options)
    content: dict[str, Any] = {key: encoded[key] for key in encoded if key in tokenizer.model_input_names}
    content["length"] = [len(ids) for ids in content["input_ids"]]
    if labels is not None and columns.label is not None:
        ids = labels.ids(rows, columns.label)
        content["labels"] = [_aligned(encoded.word_ids(i), ids[i]) for i in range(len(ids))] if words else ids
    empty = [row for row, length in enumerate(content["length"]) if length == 0]
    if empty and labels is not None:
        raise DataError(f"{row_name(empty[0])}: the tokenizer makes no token of the text {texts[0][empty[0]]!r}")
    data = datasets.Dataset.from_dict(content)
    if not empty:
        return data
    if len(empty) == len(data):
        raise DataError("there is no text: every row is empty")
    return data.select(sorted(set(range(len(data))) - set(empty)))


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, columns: Columns, max_length: int | None
) -> datasets.Dataset:
    if len(columns.text) != 1 or columns.label is None:
        raise DataError(f"the task is {TASKS['text']}: give one text column, and --label for the other text")
    sides = [[str(cell) for cell in rows[name]] for name in (*columns.text, columns.label)]
    encoded = translation.encode(list(zip(*sides, strict=True)), tokenizer, max_length or ENDLESS)
    return encoded.add_column("reference", sides[1])  # pyright: ignore[reportCallIssue]


def _encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    columns: Columns,
    labels: Labels,
    max_length: int | None,
) -> datasets.Dataset:
    if len(columns.text) != 2 or columns.label is None:
        raise DataError(
            f"the task is {TASKS['answers']}: give the columns of the question and of the context, as in --text "
            "question --text context --label answers"
        )
    questions, contexts = ([str(cell) for cell in rows[name]] for name in columns.text)
    return answers.encode(tokenizer, questions, contexts, labels.ids(rows, columns.label), max_length or ENDLESS)


def _aligned(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """The label of each token: that of its word for the first token of a word."""
    before = [None, *words[:-1]]
    return [IGNORED if w is None or w == last else labels[w] for w, last in zip(words, before, strict=True)]


def collator(
    tokenizer: PreTrainedTokenizerBase | None, data: datasets.Dataset, multiple: int | None = None
) -> Callable[[Any], Any]:
    """What pads rows of encoded data to a batch, of a length that is a multiple; lists of labels with them.

    Rows of other inputs, such as images, are stacked, and need no tokenizer.
    """
    if tokenizer is None:
        return default_data_collator
    if not {"reference", "start_positions"}.isdisjoint(data.column_names):  # places count from the start of a text
        tokenizer = language_modelling.padding_right(tokenizer)
    labels = data.features.get("labels")
    several = isinstance(labels, datasets.List) and labels.feature.dtype.startswith("int")
    kind = DataCollatorForSeq2Seq if several else DataCollatorWithPadding  # which pads labels by themselves
    return kind(tokenizer, pad_to_multiple_of=multiple)


AT_ONCE = 2**13
"""Tokens, padding included, that go forward and back together, however many rows are asked for: by these the memory of
an encoder of long texts stays what it is for sentences."""


def batches(
    tokenizer: PreTrainedTokenizerBase, data: datasets.Dataset, batch_size: int = 32, tokens: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of encoded rows, sorted by length so that little is padded; the order is not that of the rows."""
    for _, batch in indexed_batches(tokenizer, data, batch_size, tokens):
        yield batch


def indexed_batches(
    tokenizer: PreTrainedTokenizerBase | None,
    data: datasets.Dataset,
    batch_size: int = 32,
    tokens: int | None = None,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """As `batches`, with the row numbers of each batch; without a tokenizer rows are stacked in their order.

    Args:
        tokenizer: of the model.
        data: encoded rows.
        batch_size: rows of a batch, at most.
        tokens: of a batch, padding included, unless a single row has more; None for any number.
    """
    collate, order, inputs = collator(tokenizer, data), list(range(len(data))), data
    lengths: Sequence[int] = [1] * len(data)
    if "length" in data.column_names:
        lengths = data["length"][:]
        order.sort(key=lambda row: lengths[row], reverse=True)
        inputs = data.remove_columns([name for name in BESIDE if name in data.column_names])
    start = 0
    while start < len(order):
        most = batch_size if tokens is None else min(batch_size, max(tokens // max(lengths[order[start]], 1), 1))
        chosen = order[start : start + most]
        yield chosen, dict(collate([inputs[row] for row in chosen]))
        start += most


def sample(data: datasets.Dataset, rows: int, seed: int = 0) -> datasets.Dataset:
    """At most `rows` rows, drawn without replacement."""
    if rows >= len(data):
        return data
    generator = torch.Generator().manual_seed(seed)
    return data.select(torch.randperm(len(data), generator=generator)[:rows].tolist())


HELD_OUT = 500
"""At most so many rows, and at most a tenth of them, are held out of plain text to compare embeddings on."""


def hold_out(
    data: datasets.Dataset, seed: int, options: str = "--eval", least: int = 3
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows at random into those to train on and those to measure on.

    Args:
        data: rows.
        seed: of the choice.
        options: those that make it unnecessary, for the message.
        least: rows to hold out: similarities are ranked of three or more, and of windows one is enough.

    Raises:
        DataError: too few rows.
    """
    rows = min(len(data) // 10, HELD_OUT)
    if rows < least:
        found = "1 row is" if len(data) == 1 else f"{len(data)} rows are"
        raise DataError(f"{found} too few to hold some out and measure on them: give {options}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return data.select(order[rows:]), data.select(order[:rows])


def unlike(data: datasets.Dataset, others: datasets.Dataset) -> list[int]:
    """Encoded rows that are not among others, where texts occur several times; all of them if none would be left."""
    if "input_ids" not in data.column_names or "input_ids" not in others.column_names:
        return list(range(len(data)))
    known = {tuple(ids) for ids in others["input_ids"]}
    return [row for row, ids in enumerate(data["input_ids"]) if tuple(ids) not in known] or list(range(len(data)))


CHUNK = 10_000
"""Rows whose tokens are counted at a time."""


def count_tokens(data: Iterable[datasets.Dataset], vocabulary: int) -> Tensor:
    """How often each token occurs in encoded rows, `(vocabulary,)`; padding is none of them."""
    counts = np.zeros(vocabulary, np.int64)
    for rows in data:
        for first in range(0, len(rows), CHUNK):
            lists = rows[first : first + CHUNK]["input_ids"]
            ids = np.fromiter(itertools.chain.from_iterable(lists), np.int64)
            counts += np.bincount(ids, minlength=vocabulary)
    return torch.from_numpy(counts)


def check_lengths(model: PreTrainedModel, data: datasets.Dataset, source: str = "the data") -> None:
    """Raise `DataError` if a row is longer than a model with a table of positions can read, or has unknown tokens.

    Args:
        model: dense or compressed; models with rotary or relative positions read anything.
        data: from `data.encode`.
        source: the data's name in the message.
    """
    positions = most_tokens(model)
    longest = max(data["length"])
    if positions is not None and longest > positions:
        raise DataError(
            f"{source} holds a text of {longest} tokens, and the model has {positions} positions: "
            f"cut texts with a --max-length of at most {positions}"
        )
    table = embeddings_of(model, "input_embeddings")
    rows = getattr(table, "num_embeddings", None)
    largest = max((max(ids, default=0) for ids in data["input_ids"]), default=0)
    if rows is not None and largest >= rows:
        raise DataError(
            f"{source} holds the token {largest}, and the model has {rows} of them: the tokenizer is not its own, or "
            "was enlarged without the model (resize_token_embeddings)"
        )


def check_ends(config: PretrainedConfig, data: datasets.Dataset, source: str = "the data") -> None:
    """Raise `DataError` if texts for an encoder-decoder's classification head do not end alike.

    Such a head (of T5, BART and their kin) reads the state of the last end token, of which all texts of a batch need
    the same number.

    Args:
        config: of the model.
        data: from `data.encode`.
        source: the data's name in the message.
    """
    if not config.is_encoder_decoder:
        return
    end = config.eos_token_id
    counts = [ids.count(end) for ids in data["input_ids"]]
    if not min(counts):
        raise DataError(
            f"{source}, {row_name(counts.index(0))}: the tokenizer adds no end token (id {end}), whose state the "
            "classification head of an encoder-decoder reads: use a tokenizer that ends texts, or an encoder"
        )
    if min(counts) != max(counts):
        row = next(row for row, count in enumerate(counts) if count != counts[0])
        raise DataError(f"{source}, {row_name(row)}: the text holds {counts[row]} end tokens, and row 1 {counts[0]}")


def with_decoder_inputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text as an encoder-decoder runs on it: the decoder reads the text as well, one token late.

    Args:
        model: batches of models that need nothing but `input_ids` stay as they are.
        batch: `input_ids` and `attention_mask`, `(rows, tokens)`.

    Raises:
        DataError: the model does not say with what token its decoder starts.
    """
    own = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    if not model.config.is_encoder_decoder or own or model.main_input_name != "input_ids":
        return batch
    ids = batch["input_ids"]
    start = getattr(model.config, "decoder_start_token_id", None)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if start is None:
        raise DataError(
            f"{type(model).__name__} does not say with what token its decoder starts (decoder_start_token_id in "
            "config.json): calibrate in Python, on batches with decoder_input_ids, or use a method that needs no text"
        )
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1) if shift is None else shift(labels=ids)
    mask = batch["attention_mask"]
    return {
        **batch,
        "decoder_input_ids": shifted,
        "decoder_attention_mask": torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1),
    }
