"""Translation with an encoder-decoder: parallel text, training from scratch, beam search, BLEU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from factorformer.errors import DataError, ModelError
from factorformer.layers.modes import evaluating
from factorformer.progress import Progress, silent
from factorformer.tasks.data import check_lengths
from factorformer.tasks.from_scratch import IGNORED, ScratchSettings, optimize
from factorformer.tasks.reading import check_file, read_lines

Pairs = Sequence[tuple[str, str]]
"""Texts and their translations."""

_CHUNK = 1000


def read_parallel(source: Path, target: Path, note: Callable[[str], None] = warnings.warn) -> list[tuple[str, str]]:
    """Pairs of lines from two files; lines that are empty in both are passed over.

    Args:
        source, target: texts and their translations, on the same lines.
        note: told if the encoding of a file had to be guessed.

    Raises:
        DataError: a file that is missing, no text or empty, files of different length, or a line with no translation.
    """
    for path in (source, target):
        check_file(path)
    lines = [read_lines(path, note) for path in (source, target)]
    if len(lines[0]) != len(lines[1]):
        raise DataError(
            f"'{source}' has {len(lines[0])} lines and '{target}' has {len(lines[1])}: line by line one has to be the "
            "translation of the other"
        )
    pairs = []
    for number, pair in enumerate(zip(*lines, strict=True), 1):
        if bool(pair[0].strip()) != bool(pair[1].strip()):
            empty, other = (source, target) if not pair[0].strip() else (target, source)
            raise DataError(f"line {number} of '{empty}' is empty, and that of '{other}' is not")
        if pair[0].strip():
            pairs.append(pair)
    if not pairs:
        raise DataError(f"'{source}' and '{target}' hold no text")
    return pairs


def encode(
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 128,
    progress: Progress = silent,
    phase: str = "encode",
) -> datasets.Dataset:
    """Token ids of both sides (`input_ids`, `labels`), and as `length` the longer one's number of tokens.

    Args:
        pairs: texts and their translations.
        tokenizer: of both languages; it appends its end of text.
        max_length: longer texts are cut, their end of text kept.
        progress: progress callback, called with the number of pairs done.
        phase: name of the phase reported to `progress`.

    Raises:
        DataError: no pairs, or a tokenizer that marks no end of text, so that a translation would never end.
    """
    if not pairs:
        raise DataError("there are no pairs of texts")
    if tokenizer.eos_token_id is None or tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise DataError("the tokenizer does not append an end of text: a model could not learn where to stop")
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for start in range(0, len(pairs), _CHUNK):
        for column, texts in zip(columns, zip(*pairs[start : start + _CHUNK], strict=True), strict=True):
            columns[column] += tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        progress(phase, min(start + _CHUNK, len(pairs)), len(pairs))
    lengths = [max(map(len, both)) for both in zip(*columns.values(), strict=True)]
    return datasets.Dataset.from_dict({**columns, "length": lengths})


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    settings: ScratchSettings,
    output: Path,
    progress: Progress = silent,
    phase: str = "train",
) -> list[dict[str, float]]:
    """Train an encoder-decoder in place on pairs of texts, as `from_scratch.optimize` does.

    Args:
        model: fresh, dense or factorized.
        tokenizer: of the model, for padding.
        train, validation: from `encode`.
        settings, output, progress, phase: as for `optimize`.

    Returns:
        The learning curve, as from `optimize`.

    Raises:
        DataError: texts longer than the model can read.
        ModelError: not an encoder-decoder, no token to start a translation with, or the loss became NaN or infinite.
        OutputError: `output` holds checkpoints of a run with other settings.
    """
    if not model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} is no encoder-decoder: it cannot be trained on pairs of texts")
    if getattr(model.config, "decoder_start_token_id", None) is None:
        raise ModelError("the model's configuration has no decoder_start_token_id to start a translation with")
    check_lengths(model, train, "the training data")
    check_lengths(model, validation, "the validation data")
    # With the model, which shifts the labels to the decoder's inputs: the loss is not the model's own.
    collate = DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=IGNORED)
    return optimize(model, collate, train, validation, settings, output, progress, phase)


def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    beams: int = 5,
    max_length: int = 128,
    batch: int = 64,
    progress: Progress = silent,
    phase: str = "translate",
) -> list[str]:
    """Translations by beam search, in the order of the texts; 1 beam is greedy search.

    Args:
        model: an encoder-decoder.
        tokenizer: of both languages.
        texts: to translate.
        beams: kept hypotheses.
        max_length: in tokens, of texts, which are cut, and of translations.
        batch: texts that are translated together; sorted by length first, so that little is padded.
        progress: progress callback, called with the number of texts done.
        phase: name of the phase reported to `progress`.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"] if texts else []
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    collate, generate = DataCollatorWithPadding(tokenizer), cast(Any, model).generate
    result = [""] * len(ids)
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = collate([{"input_ids": ids[row]} for row in rows])
            written = generate(
                **{key: value.to(model.device) for key, value in inputs.items()},
                num_beams=beams,
                do_sample=False,
                max_new_tokens=max_length - 1,  # the token that the decoder starts with has a position too
                suppress_tokens=[tokenizer.pad_token_id],
            )
            for row, text in zip(rows, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                result[row] = text.strip()
            progress(phase, start + len(rows), len(order))
    return result


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """BLEU and chrF of a corpus as sacreBLEU (Post 2018) computes them, with the signatures that make them comparable.

    Raises:
        DataError: not one reference for each hypothesis.

    Example:
        >>> scores = bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
        >>> round(scores["bleu"], 1), scores["bleu_signature"].partition("|")[0]
        (100.0, 'nrefs:1')
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if len(hypotheses) != len(references) or not references:
        raise DataError(f"{len(hypotheses)} translations cannot be scored with {len(references)} references")
    scores: dict[str, float | str] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        scores[name] = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
