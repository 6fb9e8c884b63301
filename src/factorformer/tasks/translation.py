"""Translation with an encoder-decoder: parallel text, beam search, BLEU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import DataError
from factorformer.hf.source import most_tokens
from factorformer.layers.modes import evaluating, fast_float32
from factorformer.progress import Progress, silent
from factorformer.tasks import language_modelling
from factorformer.tasks.reading import read_lines
from factorformer.tasks.tokenization import token_ids

ENDLESS = 10**6
"""Tokens of a text that no model limits."""

Pairs = Sequence[tuple[str, str]]
"""Texts and their translations."""


def read_parallel(source: Path, target: Path, note: Callable[[str], None] = warnings.warn) -> list[tuple[str, str]]:
    """Pairs of lines from two files, compressed or not; lines that are empty in both are passed over.

    Args:
        source: texts.
        target: their translations.
        note: told if the encoding of a file had to be guessed.

    Raises:
        DataError: a file that is missing, damaged or empty, files of different length, or a line with no translation.
    """
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
        progress: progress callback, called with the number of texts done.
        phase: name of the phase reported to `progress`.

    Raises:
        DataError: no pairs, or a tokenizer that marks no end of text, so that a translation would never end.
    """
    if not pairs:
        raise DataError("there are no pairs of texts")
    if tokenizer.eos_token_id is None or tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        raise DataError("the tokenizer does not append an end of text: a model could not learn where to stop")
    sides = [
        token_ids(tokenizer, texts, progress, phase, target=target, truncation=True, max_length=max_length)
        for texts, target in zip(zip(*pairs, strict=True), (False, True), strict=True)
    ]
    lengths = [max(map(len, both)) for both in zip(*sides, strict=True)]
    return datasets.Dataset.from_dict({"input_ids": sides[0], "labels": sides[1], "length": lengths})


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
    return write(model, tokenizer, ids, beams, max_length, batch, progress, phase)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    beams: int,
    max_length: int,
    batch: int = 64,
    progress: Progress = silent,
    phase: str = "translate",
) -> list[str]:
    """As `translate`, of texts that are tokens already."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]), reverse=True)
    collate, generate = DataCollatorWithPadding(tokenizer), cast(Any, model).generate
    result = [""] * len(ids)
    with evaluating(model), torch.inference_mode(), fast_float32(model.device):
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


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: datasets.Dataset,
    progress: Progress = silent,
    phase: str = "evaluate",
) -> dict[str, float]:
    """How well an encoder-decoder writes the text that belongs to each text.

    Args:
        model: writes with as many beams as its own settings say, up to twice the longest reference.
        tokenizer: of it.
        data: from `encode`, with a column `reference`.
        progress: told of `phase`, and how many texts are done.
        phase: see there.

    Returns:
        `loss` (nats a token, with the reference before it), `perplexity` and `token_accuracy`; `bleu` and `chrf`.
    """
    rows = data.select_columns(["input_ids", "labels", "length"])
    metrics = language_modelling.predict(model, tokenizer, rows, "translation", progress=progress, phase=phase)
    beams = getattr(model.generation_config, "num_beams", None) or 1
    longest = min(2 * max(map(len, data["labels"])), most_tokens(model) or ENDLESS)
    texts = write(model, tokenizer, data["input_ids"], beams, longest, 32, progress, f"{phase}: write")
    scores = bleu(texts, data["reference"])
    return metrics | {name: score for name, score in scores.items() if not isinstance(score, str)}


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
