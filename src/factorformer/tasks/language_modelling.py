"""Language modelling on plain text: texts packed into blocks of equal length, labels, batches, perplexity."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorformer.errors import DataError, ModelError
from factorformer.layers.modes import evaluating, fast_float32
from factorformer.progress import Progress, silent
from factorformer.tasks.architectures import Task
from factorformer.tasks.labels import IGNORED
from factorformer.tasks.tokenization import CHUNK, token_ids
from factorformer.training.distillation import logit_loss

PLACES = 512
"""Predictions that are looked at together: each is as wide as the vocabulary."""

MASKED = 0.15
"""Part of the tokens that a masked language model predicts, as in BERT."""


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
        tokenizer: of the model.
        task: what is predicted.
        max_length: tokens in a block.
        progress: progress callback, called with the number of texts done.
        phase: name of the phase reported to `progress`.

    Raises:
        DataError: no text at all, or a length that leaves no room for text.
    """
    end = np.asarray([tokenizer.eos_token_id], np.int32)
    before, after = _frame(tokenizer) if task == "masked" else ([], [])
    room = max_length - len(before) - len(after)
    if room < 2:
        raise DataError(
            f"a --max-length of {max_length} leaves no room for text: give at least {len(before) + len(after) + 2}"
        )
    written = [text for text in texts if text and not text.isspace()]
    if not written:
        raise DataError("there is no text: every line is empty")
    encoded = token_ids(tokenizer, written, progress, phase, add_special_tokens=False)
    # Texts begin where another ends: the first one too.
    tokens = np.concatenate([end, *(part for ids in encoded for part in (ids, end))])
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


def with_labels(data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task) -> datasets.Dataset:
    """Rows with `labels` where the model predicts them and -100 where it predicts nothing, if they have none yet.

    A causal model predicts its own inputs; it is the loss that shifts them, as everywhere in transformers. Of a masked
    model some tokens are hidden, drawn once: what it is measured on.
    """
    if "labels" in data.column_names:
        return data
    if task != "masked":
        return data.add_column("labels", data["input_ids"])  # pyright: ignore[reportCallIssue]
    collate = _hiding(tokenizer, seed=0)
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": list(data["length"])}
    for start in range(0, len(data), CHUNK):
        ids = data[start : start + CHUNK]["input_ids"]
        batch = collate([{"input_ids": block} for block in ids])
        for name in ("input_ids", "labels"):
            rows[name] += [row[: len(block)].numpy() for row, block in zip(batch[name], ids, strict=True)]
    return datasets.Dataset.from_dict(rows)


def collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> DataCollatorForSeq2Seq:
    """Rows with `labels` to batches, padded on the right, where positions count from the start of every text.

    It takes the model, if that is an encoder-decoder, to shift the labels to the decoder's inputs.
    """
    return DataCollatorForSeq2Seq(padding_right(tokenizer), model, label_pad_token_id=IGNORED)


def padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, which pads behind texts."""
    right = copy.copy(tokenizer)
    right.padding_side = "right"
    return right


def training_collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, task: Task) -> Any:
    """As `collator`; of rows without labels for a masked model, other tokens are hidden in every batch.

    Raises:
        ModelError: the tokenizer has no token to hide others with.
    """
    return _hiding(tokenizer) if task == "masked" else collator(tokenizer, model)


def _hiding(tokenizer: PreTrainedTokenizerBase, seed: int | None = None) -> DataCollatorForLanguageModeling:
    if tokenizer.mask_token is None:
        raise ModelError("a masked language model needs a tokenizer with a mask token")
    return DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED, seed=seed)


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    task: Task,
    batch_size: int = 32,
    progress: Progress = silent,
    phase: str = "evaluate",
    original: PreTrainedModel | None = None,
) -> dict[str, float]:
    """How well a model predicts tokens: mean negative log-likelihood in nats, its exponential, and accuracy.

    Every predicted token counts the same. A masked language model predicts the same hidden tokens in every call; its
    perplexity is that of hidden tokens and cannot be compared with a causal model's. That of a causal one depends on
    its tokens and on how many of them are known before each: their number, and the length and distance of the windows
    that they are predicted in, come along, and bits per byte of the text, which do not depend on the tokens.

    Args:
        model: dense or factorized.
        tokenizer: of the model.
        data: from the `encode` of the task, or `windows`, or texts one by one from `data.encode`.
        task: what is predicted.
        batch_size: rows in a forward pass.
        progress: progress callback, called with the number of rows done.
        phase: name of the phase reported to `progress`.
        original: what the model was made of. Its own metrics come along under `original_...`, and how far the two
            predictions are apart: `next_token_divergence`, the mean of KL(original || model) in nats, and
            `next_token_agreement`, how often both find the same token the likeliest.

    Raises:
        DataError: too little text: no token is predicted.
        ModelError: predictions that are NaN or infinite.
    """
    collate, rows = collator(tokenizer, model), with_labels(data, tokenizer, task)
    order = np.argsort(rows["length"], kind="stable").tolist()
    rows = rows.select_columns(["input_ids", "labels"])
    models = [model] if original is None else [model, original]
    tallies, divergence, same, written = [_Tally() for _ in models], 0.0, 0, 0
    with contextlib.ExitStack() as stack:
        for each in (*map(evaluating, models), torch.inference_mode(), fast_float32(model.device)):
            stack.enter_context(each)
        for start in range(0, len(order), batch_size):
            batch = collate([rows[row] for row in order[start : start + batch_size]]).to(model.device)
            labels = batch.pop("labels")
            labels = labels[:, 1:] if task == "causal" else labels
            predicted = labels != IGNORED
            # A causal model predicts something behind the last token as well.
            logits = [each(**batch).logits[:, : labels.shape[1]][predicted].split(PLACES) for each in models]
            for wanted, *parts in zip(labels[predicted].split(PLACES), *logits, strict=True):
                parts = [part.float() for part in parts]
                for tally, part in zip(tallies, parts, strict=True):
                    tally.add(part, wanted)
                if original is not None:
                    same += int((parts[0].argmax(-1) == parts[1].argmax(-1)).sum())
                    divergence += float(logit_loss(parts[0], parts[1], temperature=1.0)) * len(wanted)
            if task == "causal":
                texts = tokenizer.batch_decode([row[row != IGNORED] for row in labels], skip_special_tokens=True)
                written += sum(len(text.encode()) for text in texts)
            progress(phase, min(start + batch_size, len(order)), len(order))
    found = [tally.metrics(written) for tally in tallies]
    metrics = {**{f"original_{name}": value for each in found[1:] for name, value in each.items()}, **found[0]}
    tokens, longest = tallies[0].tokens, max(data["length"])
    if original is not None:
        metrics |= {"next_token_divergence": divergence / tokens, "next_token_agreement": same / tokens}
    return metrics | ({"tokens": tokens, "window": longest, "stride": longest} if task == "causal" else {})


class _Tally:
    """What a model predicted, added up over places."""

    def __init__(self) -> None:
        self.loss, self.right, self.tokens = 0.0, 0, 0

    def add(self, logits: Tensor, wanted: Tensor) -> None:
        """Predictions `(places, vocabulary)`, float32, and what was right."""
        self.loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        self.right += int((logits.argmax(-1) == wanted).sum())
        self.tokens += len(wanted)

    def metrics(self, written: int) -> dict[str, float]:
        """Means over places, and over the bytes of their text where these are counted."""
        if self.tokens == 0:
            raise DataError("too little text to measure on: no token is predicted")
        if not math.isfinite(self.loss):
            raise ModelError("the model's predictions are NaN or infinite")
        mean = self.loss / self.tokens
        found = {"loss": mean, "perplexity": math.exp(min(mean, 700)), "token_accuracy": self.right / self.tokens}
        return found | ({"bits_per_byte": self.loss / math.log(2) / written} if written else {})
