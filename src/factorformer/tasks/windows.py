"""Text for causal language models: documents one after another, cut into windows of one length.

Pre-trained models read long texts. Perplexities of short pieces, each of which begins with nothing known, say little
about them, and neither do statistics of such pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from factorformer.errors import DataError, one_line, one_of
from factorformer.tasks.cells import row_name
from factorformer.tasks.reading import read_lines, text_format
from factorformer.tasks.tables import Columns, read
from factorformer.tasks.tokenization import CHUNK

LONGEST = 2048
"""Tokens of a window, unless told otherwise, of a model that reads so many."""

CALIBRATED = 2**17
"""Tokens that are calibrated on, unless told otherwise."""

MEASURED = 2**19
"""Tokens that a compressed model is measured on at most, unless it is by `evaluate`."""

TOGETHER = 2**12
"""Tokens in a batch, whose layers are kept for the backward pass."""


def sequence_length(config: PretrainedConfig, asked: int | None) -> int:
    """Tokens of a window.

    Args:
        config: of the model.
        asked: by the user; None for `LONGEST`, or what the model reads.

    Raises:
        DataError: more than the model reads.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and positions is not None and asked > positions:
        raise DataError(f"--sequence-length {asked:,}: the model reads {positions:,} tokens at most")
    return asked or min(LONGEST, positions or LONGEST)


def read_documents(source: str, columns: Columns, note: Callable[[str], None]) -> list[Any]:
    """Texts of a file or of a data set on the Hub, or conversations.

    A plain text file is one document, byte by byte. Of other data each row is one, or a list of messages, each with a
    `role` and its `content`.

    Raises:
        DataError: as `read`; several columns of text; or a message without one of its fields.
    """
    if text_format(Path(source)) == ".txt":
        text = "\n".join(read_lines(Path(source), note))
        if not text.strip():
            raise DataError(f"'{source}' has no text: every line is empty")
        return [text]
    if len(columns.text) != 1:
        raise DataError(
            f"a language model reads one column of text; got {len(columns.text)}: {', '.join(columns.text)}"
        )
    (name,) = columns.text
    rows = read(source, None, note)
    if name not in rows.column_names:
        raise DataError(f"'{source}' has no column {one_of(name, rows.column_names)}")
    cells = list(rows[name])
    if all(isinstance(cell, list) for cell in cells) and any(isinstance(m, Mapping) for cell in cells for m in cell):
        _check_messages(source, name, cells)
        return cells
    Columns((name,)).check_cells({name: cells}, [name], f"'{source}'", row_name)
    texts = [text for text in map(str, cells) if text.strip()]
    if not texts:
        raise DataError(f"'{source}' has no text: every row is empty")
    return texts


def _check_messages(source: str, column: str, cells: Sequence[Sequence[Any]]) -> None:
    for row, messages in enumerate(cells):
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise DataError(
                    f"'{source}', {row_name(row)}, column '{column}': a message has a 'role' and a 'content'; got "
                    f"{message!r:.100}"
                )


def windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Any], length: int) -> datasets.Dataset:
    """Windows (`input_ids`) of so many tokens, cut from all documents one after another; the last may be shorter.

    Documents begin as the tokenizer begins texts, and where there are several each ends with the end of text.
    Conversations are written by the tokenizer's template.

    Args:
        tokenizer: of the model.
        documents: texts, or conversations, from `read_documents`.
        length: tokens in a window.

    Raises:
        DataError: not two tokens of text, or conversations and a tokenizer without a template.
    """
    end = [] if tokenizer.eos_token_id is None or len(documents) == 1 else [tokenizer.eos_token_id]
    parts: list[Any] = []
    for start in range(0, len(documents), CHUNK):
        some = list(documents[start : start + CHUNK])
        if isinstance(some[0], str):
            encoded = tokenizer(some, verbose=False)["input_ids"]
        else:
            encoded = tokenizer([_written(tokenizer, talk) for talk in some], add_special_tokens=False, verbose=False)
            encoded = encoded["input_ids"]
        for ids in encoded:
            parts += [np.asarray(ids, np.int64)] if ids[-1:] == end else [np.asarray(ids, np.int64), np.asarray(end)]
    tokens = np.concatenate(parts).astype(np.int64)
    cut = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    if len(cut[-1]) < 2:  # a single token, of which nothing can be predicted
        cut.pop()
    if not cut:
        raise DataError("there is no text of two tokens: give one at least, to predict the second")
    ones = [np.ones_like(window) for window in cut]
    return datasets.Dataset.from_dict({"input_ids": cut, "attention_mask": ones, "length": [len(w) for w in cut]})


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    if tokenizer.chat_template is None:
        raise DataError("these are conversations, and the tokenizer has no chat template: give a column of text")
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    except Exception as error:  # of Jinja, and of what templates raise
        raise DataError(f"the tokenizer's chat template refuses a conversation: {one_line(error)}") from error
