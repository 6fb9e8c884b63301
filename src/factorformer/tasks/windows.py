"""Text for causal language models: documents one after another, cut into windows of one length.

Pre-trained models read long texts. Perplexities of short pieces, each of which begins with nothing known, say little
about them, and neither do statistics of such pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from factorformer.errors import DataError, one_line, one_of
from factorformer.tasks.cells import row_name
from factorformer.tasks.reading import check_file, read_lines, read_rows, text_format
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


LINE = re.compile(r"(?<=\n)(?=\S)")
"""Where a line begins."""

PIECE = 2**20
"""Characters of a document that are encoded together, or a little more, up to the end of a line."""


def sequence_length(config: PretrainedConfig, asked: int | None, positions: int | None = None) -> int:
    """Tokens of a window.

    Args:
        config: of the model.
        asked: by the user; None for `LONGEST`, or what the model reads.
        positions: of its table, if it has one.

    Raises:
        DataError: more than the model reads.
    """
    most = positions or getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and most is not None and asked > most:
        raise DataError(f"--sequence-length {asked:,}: the model reads {most:,} tokens at most")
    return asked or min(LONGEST, most or LONGEST)


def together(config: PretrainedConfig, longest: int, numbers: int) -> int:
    """Windows in a batch whose layers are kept for the backward pass: few where the vocabulary is large.

    Args:
        config: of the model.
        longest: tokens of a window.
        numbers: of predictions that are held, at most, unless a single window has more.
    """
    vocabulary = config.get_text_config().vocab_size
    return max(min(TOGETHER, numbers // vocabulary) // longest, 1)


def read_documents(source: str, columns: Columns, note: Callable[[str], None]) -> list[Any]:
    """Texts of a file or of a data set on the Hub, or conversations.

    A plain text file is one document, empty lines included. Of other data each row is one, or a list of messages, each
    with a `role` and its `content`.

    Raises:
        DataError: as `read`; several columns of text; or a message without one of its fields.
    """
    path = Path(source)
    if text_format(path) == ".txt":
        text = "\n".join(read_lines(path, note))
        if not text.strip():
            raise DataError(f"'{source}' has no text: every line is empty")
        return [text]
    if len(columns.text) != 1:
        raise DataError(
            f"a language model reads one column of text; got {len(columns.text)}: {', '.join(columns.text)}"
        )
    (name,) = columns.text
    if text_format(path) is None:
        rows = read(source, None, note)
        names, where = rows.column_names, row_name
        cells = list(rows[name]) if name in names else []
    else:
        check_file(path)
        found = read_rows(path, [name], note)  # other columns may hold anything
        names, where, cells = found.names, found.where, list(found.columns.get(name, ()))
    if name not in names:
        raise DataError(f"'{source}' has no column {one_of(name, names)}")
    if any(isinstance(cell, list) and any(isinstance(m, Mapping) for m in cell) for cell in cells):
        return [_checked(cell, f"'{source}', {where(row)}, column '{name}'") for row, cell in enumerate(cells)]
    Columns((name,)).check_cells({name: cells}, [name], f"'{source}'", where)
    texts = [text for text in map(str, cells) if text.strip()]
    if not texts:
        raise DataError(f"'{source}' has no text: every row is empty")
    return texts


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    """The messages of a conversation, whose contents are texts; parts of a text are joined."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: a conversation is a list of messages, and this is {messages!r:.100}")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") is None or "content" not in message:
            raise DataError(f"{place}: a message has a 'role' and a 'content'; got {message!r:.100}")
        content = message["content"]
        if isinstance(content, list) and all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(f"{place}: the content of a message is text; got {content!r:.100}")
        checked.append({key: value for key, value in message.items() if value is not None} | {"content": content})
    return checked


def windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Any], length: int) -> datasets.Dataset:
    """Windows (`input_ids`) of so many tokens, cut from all documents one after another; the last may be shorter.

    Each window begins as the tokenizer begins texts. Where there are several documents each ends with the end of text;
    conversations end as the tokenizer's template writes them.

    Args:
        tokenizer: of the model.
        documents: texts, or conversations, from `read_documents`.
        length: tokens in a window.

    Raises:
        DataError: not two tokens of text, or conversations and a tokenizer without a template.
    """
    talks, begin = not isinstance(documents[0], str), _beginning(tokenizer)
    texts = [_written(tokenizer, talk) for talk in documents] if talks else documents
    end = [] if talks or tokenizer.eos_token_id is None or len(texts) == 1 else [tokenizer.eos_token_id]
    parts: list[npt.NDArray[np.int32]] = []
    for some in _groups(texts):
        encoded = tokenizer([piece for piece, _ in some], add_special_tokens=False, verbose=False)["input_ids"]
        for ids, (_, last) in zip(encoded, some, strict=True):
            parts.append(np.asarray([*ids, *(end if last and ids[-1:] != end else [])], np.int32))
    tokens = np.concatenate(parts).astype(np.int64)
    if length <= len(begin):
        raise DataError(f"a --sequence-length of {length} leaves no room for text: give {len(begin) + 1} at least")
    cut: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(tokens):
        first = [] if tokens[start] in begin else begin  # conversations may begin so by themselves
        window = np.concatenate([np.asarray(first, np.int64), tokens[start : start + length - len(first)]])
        cut.append(window)
        start += len(window) - len(first)
    if cut and len(cut[-1]) < 2:  # a single token, of which nothing can be predicted
        cut.pop()
    if not cut:
        raise DataError("there is no text of two tokens: give one at least, to predict the second")
    ones = [np.ones_like(window) for window in cut]
    return datasets.Dataset.from_dict({"input_ids": cut, "attention_mask": ones, "length": [len(w) for w in cut]})


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer begins every text with, if it does."""
    begin: Any = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of texts to encode together, and whether a text ends with them."""
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        pieces = list(_pieces(text))
        for place, piece in enumerate(pieces, 1):
            group.append((piece, place == len(pieces)))
            size += len(piece)
            if len(group) >= CHUNK or size >= PIECE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    """Parts of a text that begin with a line, and not within spaces, which tokenizers take together."""
    start = 0
    while len(text) - start > PIECE:
        found = LINE.search(text, start + PIECE)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    if tokenizer.chat_template is None:
        raise DataError("these are conversations, and the tokenizer has no chat template: give a column of text")
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    except Exception as error:  # of Jinja, and of what templates raise
        raise DataError(f"the tokenizer's chat template refuses a conversation: {one_line(error)}") from error
