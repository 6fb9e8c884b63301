"""Language modelling on plain text: texts packed into blocks of equal length, training from scratch, perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from tokenizers import processors
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from factorformer.errors import DataError, ModelError
from factorformer.layers.modes import evaluating
from factorformer.progress import Progress, silent
from factorformer.tasks.data import check_lengths
from factorformer.tasks.from_scratch import IGNORED, ScratchSettings, optimize

Task = Literal["causal", "masked"]
"""What is predicted: the next token, or tokens that are hidden."""

MASK = "<mask>"
MASKED = 0.15
"""Part of the tokens that a masked language model predicts, as in BERT."""

_CHUNK = 1000


def adapt_tokenizer(tokenizer: PreTrainedTokenizerFast, task: Task) -> PreTrainedTokenizerFast:
    """Make a tokenizer of `train_tokenizer` frame texts as a language model wants them, in place.

    A causal model goes on with what it is given, so nothing is appended; its texts also begin where another ends, as in
    GPT-2. A masked one reads `<s> text </s>`, as RoBERTa does, and gets one token more to hide others with: `<mask>` in
    a text is then that token.

    >>> from factorformer.tasks.tokenization import train_tokenizer
    >>> tokenizer = adapt_tokenizer(train_tokenizer(["to be, or not to be"] * 2, 268), "masked")
    >>> tokenizer.convert_ids_to_tokens(tokenizer("to <mask>")["input_ids"])
    ['<s>', 'to', 'Ġ', '<mask>', '</s>']
    """
    bytes_of_text = processors.ByteLevel(trim_offsets=False)
    start, end = str(tokenizer.bos_token), str(tokenizer.eos_token)
    if task == "causal":
        tokenizer.backend_tokenizer.post_processor = bytes_of_text
        tokenizer.bos_token = end
        return tokenizer
    frame = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B:1 {end}:1",
        special_tokens=[(token, tokenizer.backend_tokenizer.token_to_id(token)) for token in (start, end)],
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([bytes_of_text, frame])
    special: dict[str, Any] = {"mask_token": MASK, "cls_token": start, "sep_token": end}
    tokenizer.add_special_tokens(special)
    tokenizer.split_special_tokens = False
    return tokenizer


def encode(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int = 128,
    progress: Progress = silent,
    phase: str = "encode",
) -> datasets.Dataset:
    """Blocks (`input_ids`) of `max_length` tokens, cut from all texts one after another; the last may be shorter.

    Every text ends with the tokenizer's end of text. Blocks of a masked language model are framed by the tokenizer's
    special tokens, as its inputs are later.

    Args:
        texts: lines or documents; empty ones are passed over.
        tokenizer: of the model, see `adapt_tokenizer`.
        task: what is predicted.
        max_length: tokens in a block.
        progress: progress callback, called with the number of texts done.
        phase: name of the phase reported to `progress`.

    Raises:
        DataError: no text at all, or a length that leaves no room for text.
    """
    end = tokenizer.eos_token_id
    before, after = _frame(tokenizer) if task == "masked" else ([], [])
    room = max_length - len(before) - len(after)
    if room < 2:
        raise DataError(
            f"a --max-length of {max_length} leaves no room for text: give at least {len(before) + len(after) + 2}"
        )
    written = [text for text in texts if text and not text.isspace()]
    if not written:
        raise DataError("there is no text: every line is empty")
    parts = [np.asarray([end], np.int64)]  # texts begin where another ends: the first one too
    for start in range(0, len(written), _CHUNK):
        encoded = tokenizer(written[start : start + _CHUNK], add_special_tokens=False)["input_ids"]
        parts.append(np.asarray([token for ids in encoded for token in (*ids, end)], np.int64))
        progress(phase, min(start + _CHUNK, len(written)), len(written))
    tokens = np.concatenate(parts)
    blocks = [tokens[start : start + room] for start in range(0, len(tokens), room)]
    if len(blocks[-1]) < 2:  # a single token, of which nothing can be predicted
        blocks.pop()
    framed = [np.concatenate([before, block, after]).astype(np.int64) for block in blocks]
    return datasets.Dataset.from_dict({"input_ids": framed, "length": [len(block) for block in framed]})


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens that a tokenizer puts before and after a text."""
    plain, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    return framed[:start], framed[start + len(plain) :]


class BlockCollator:
    """Blocks to padded batches whose `labels` stand where the model predicts them; -100 where it predicts nothing.

    The labels of a causal model are its inputs one place earlier. Those of a masked model are redrawn in every
    batch, from torch's generator, unless the blocks bring their own (see `hide`).

    Args:
        tokenizer: of the model.
        task: what is predicted.
        seed: of the choice of hidden tokens; None for torch's own generator.

    Raises:
        ModelError: the tokenizer has no token to hide others with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int | None = None) -> None:
        if task == "masked" and tokenizer.mask_token is None:
            raise ModelError("a masked language model needs a tokenizer with a mask token: see `adapt_tokenizer`")
        self.task = task
        self.collate = DataCollatorForLanguageModeling(
            tokenizer, mlm=task == "masked", mlm_probability=MASKED, seed=seed
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each `(blocks, tokens)`."""
        ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        if self.task == "masked" and "labels" not in rows[0]:
            return dict(self.collate([{"input_ids": block} for block in ids]))
        given = ids if self.task == "causal" else [torch.as_tensor(row["labels"]) for row in rows]
        pad: Any = self.collate.tokenizer.pad_token_id
        inputs = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        labels = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=IGNORED)
        if self.task == "causal":
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        lengths = torch.tensor([len(block) for block in ids])
        mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def hide(data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> datasets.Dataset:
    """Blocks with hidden tokens and their `labels`, drawn once: what a masked language model is measured on."""
    collate = BlockCollator(tokenizer, "masked", seed)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": list(data["length"])}
    for start in range(0, len(data), _CHUNK):
        ids = data[start : start + _CHUNK]["input_ids"]
        batch = collate([{"input_ids": block} for block in ids])
        for name in ("input_ids", "labels"):
            rows[name] += [row[: len(block)].numpy() for row, block in zip(batch[name], ids, strict=True)]
    return datasets.Dataset.from_dict(rows)


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    task: Task,
    settings: ScratchSettings,
    output: Path,
    progress: Progress = silent,
    phase: str = "train",
) -> list[dict[str, float]]:
    """Train a language model in place, with the schedule, checkpoints and learning curve of `from_scratch.optimize`.

    A run that was interrupted goes on from the last checkpoint in `output`.

    Args:
        model: fresh, dense or factorized.
        tokenizer: of the model, for padding and hiding.
        train: from `encode`.
        validation: from `encode`; its loss is measured, and nothing else is done with it.
        task: what is predicted.
        settings: of the training; label smoothing of language models is usually 0.
        output: directory of checkpoints.
        progress: progress callback, called with the number of steps done.
        phase: name of the phase reported to `progress`.

    Returns:
        The learning curve, see `from_scratch.optimize`.

    Raises:
        DataError: blocks longer than the model can read.
        ModelError: an encoder-decoder, or the loss became NaN or infinite.
        OutputError: `output` holds checkpoints of a run with other settings.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is an encoder-decoder: it learns from pairs of texts")
    check_lengths(model, train, "the training data")
    check_lengths(model, validation, "the validation data")
    if task == "masked":
        validation = hide(validation, tokenizer)
    collate = BlockCollator(tokenizer, task)
    return optimize(model, collate, train, validation, settings, output, progress, phase, keep_columns=True)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    task: Task,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> dict[str, float]:
    """How well a model predicts tokens: mean negative log-likelihood in nats, its exponential, and accuracy.

    Every predicted token counts the same. A masked language model predicts the same hidden tokens in every call; its
    perplexity is that of hidden tokens and cannot be compared with a causal model's.

    Args:
        model: dense or factorized.
        tokenizer: of the model.
        data: from `encode`, or texts one by one from `data.encode`.
        task: what is predicted.
        batch_size: blocks in a forward pass.
        progress: progress callback, called with the number of blocks done.
        phase: name of the phase reported to `progress`.

    Raises:
        DataError: too little text: no token is predicted.
        ModelError: predictions that are NaN or infinite.
    """
    return predict(model, tokenizer, data, task, batch_size, progress, phase)[0]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    task: Task,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> tuple[dict[str, float], Tensor]:
    """As `evaluate`, with the likeliest token of every place, `(tokens,)`, in the order of the data."""
    collate = BlockCollator(tokenizer, task)
    rows = (hide(data, tokenizer) if task == "masked" else data).remove_columns("length")
    loss, right = 0.0, 0
    likeliest: list[Tensor] = []
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            chosen = range(start, min(start + batch_size, len(rows)))
            batch = {name: value.to(model.device) for name, value in collate([rows[i] for i in chosen]).items()}
            labels = batch.pop("labels")
            predicted = labels != IGNORED
            logits, labels = model(**batch).logits[predicted].float(), labels[predicted]
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            best = logits.argmax(-1)
            right += int((best == labels).sum())
            likeliest.append(best.cpu())
            progress(phase, chosen.stop, len(rows))
    tokens = sum(map(len, likeliest))
    if tokens == 0:
        raise DataError("too little text to measure on: no token is predicted")
    if not math.isfinite(loss):
        raise ModelError("the model's predictions are NaN or infinite")
    mean = loss / tokens
    metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "token_accuracy": right / tokens}
    return metrics, torch.cat(likeliest)
