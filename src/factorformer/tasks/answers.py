"""Extractive question answering: contexts in windows, the best answer of each, exact match and F1."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factorformer.errors import DataError, ModelError, one_line
from factorformer.layers.modes import evaluating, fast_float32
from factorformer.progress import Progress, silent
from factorformer.tasks.cells import row_name

SHARED = 4
"""Windows of a long context have a part of their tokens in common, one in so many."""

LONGEST = 30
"""Tokens of an answer, as in BERT's experiments on SQuAD (Devlin et al. 2019)."""

OUTSIDE = -1
"""The place of a token that is none of the context."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[Any],
    max_length: int,
) -> datasets.Dataset:
    """Windows of a question and a part of its context, with the first answer where it lies in that part.

    Args:
        tokenizer: a fast one, which tells where in the context a token is from.
        questions, contexts: texts.
        answers: objects with lists `text` and `answer_start`, or texts, which are looked for in the context; empty ones
            say that the context does not answer the question.
        max_length: tokens of a window.

    Returns:
        A row for each window: inputs of the model, `start_positions` and `end_positions`, 0 where there is no answer,
        `length`; and for `measure` the number of its `example`, its `context`, `answers`, and `offsets`: for each token
        where it begins and ends in the context.

    Raises:
        ModelError: the tokenizer is none of those.
        DataError: an answer that is not in its context, or questions that leave no room for one.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} does not tell where a token is from: a fast tokenizer does")
    known = [_found(*pair, row) for row, pair in enumerate(zip(answers, contexts, strict=True))]
    options: dict[str, Any] = {"truncation": "only_second", "max_length": max_length, "verbose": False}
    options |= {"return_overflowing_tokens": True, "return_offsets_mapping": True, "stride": max_length // SHARED}
    try:
        encoded = tokenizer(list(questions), list(contexts), **options)
    except BaseException as error:  # of Rust, which panics where nothing is left of a context
        if isinstance(error, KeyboardInterrupt):
            raise
        longest = max(range(len(questions)), key=lambda row: len(tokenizer(questions[row], verbose=False)["input_ids"]))
        raise DataError(
            f"{row_name(longest)}: a question leaves no room for its context within {max_length} tokens: give a larger "
            f"--max-length ({one_line(error)})"
        ) from error
    content: dict[str, list[Any]] = {
        name: list(encoded[name]) for name in tokenizer.model_input_names if name in encoded
    }
    names = ("start_positions", "end_positions", "length", "example", "context", "answers", "offsets")
    content |= {name: [] for name in names}
    for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
        parts = encoded.sequence_ids(window)
        places = [
            pair if part == 1 else (OUTSIDE, OUTSIDE)
            for part, pair in zip(parts, encoded["offset_mapping"][window], strict=True)
        ]
        texts, offsets = [text for text, _ in known[row]], np.ravel(places).tolist()
        found = (*_tokens(places, known[row][:1]), len(places), row, contexts[row], texts, offsets)
        for name, value in zip(names, found, strict=True):
            content[name].append(value)
    return datasets.Dataset.from_dict(content)


def _found(given: Any, context: str, row: int) -> list[tuple[str, int]]:
    """Answers of a row, with where they begin."""
    if isinstance(given, Mapping):
        pairs = list(zip(given["text"], map(int, given["answer_start"]), strict=True))
    else:
        pairs = [(given, context.find(given))] if given.strip() else []
    found: list[tuple[str, int]] = []
    for text, start in pairs:
        # No token is of spaces around.
        begin = start + len(text) - len(text.lstrip())
        if start < 0 or not text.strip() or not context.startswith(text.strip(), begin):
            raise DataError(f"{row_name(row)}: the answer {text!r:.80} is not in the context where it should be")
        found.append((text.strip(), begin))
    return found


def _tokens(places: Sequence[tuple[int, int]], answer: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """The first and the last token of an answer; the first of all, twice, where it is not in the window whole."""
    for text, start in answer:
        end = start + len(text)
        inside = [place for place, (a, b) in enumerate(places) if a != OUTSIDE and a < end and b > start]
        if inside and places[inside[0]][0] <= start and places[inside[-1]][1] >= end:
            return inside[0], inside[-1]
    return 0, 0


def measure(
    model: PreTrainedModel,
    data: datasets.Dataset,
    batches: Iterable[tuple[Sequence[int], dict[str, Tensor]]],
    progress: Progress = silent,
    phase: str = "evaluate",
) -> dict[str, float]:
    """How well a model answers questions.

    Args:
        model: with a head for the start and the end of answers.
        data: from `encode`.
        batches: of it, with the numbers of their rows; see `data.indexed_batches`.
        progress: told of `phase`, and how many windows are done.
        phase: see there.

    Returns:
        `exact_match` and `f1` of words, the best over all answers of a question, means over questions, as SQuAD
        measures them (Rajpurkar et al. 2016); where some have no answer, none is one that can be given (2018). `loss`:
        the mean negative log-likelihood of start and end in a window, in nats.

    Raises:
        ModelError: predictions that are NaN or infinite.
    """
    optional = any(not answers for answers in data["answers"])
    best: dict[int, tuple[float, str]] = {}
    loss, done = 0.0, 0
    with evaluating(model), torch.inference_mode(), fast_float32(model.device):
        for rows, batch in batches:
            wanted = [batch.pop(name) for name in ("start_positions", "end_positions")]
            output = model(**{name: value.to(model.device) for name, value in batch.items()})
            logits = [found.float().cpu() for found in (output.start_logits, output.end_logits)]
            losses = [F.cross_entropy(*pair, reduction="sum") for pair in zip(logits, wanted, strict=True)]
            loss += float(sum(losses)) / 2
            for place, row in enumerate(rows):
                window = data[row]
                real = batch["attention_mask"][place].bool()
                start, end = (found[place][real].numpy() for found in logits)
                score, text = _best(start, end, np.reshape(window["offsets"], (-1, 2)), window["context"])
                known = best.get(window["example"], (-np.inf, ""))
                best[window["example"]] = max(known, (score, text), key=lambda found: found[0])
            done += len(rows)
            progress(phase, done, len(data))
    if not np.isfinite(loss):
        raise ModelError("the model's predictions are NaN or infinite")
    references = dict(zip(data["example"], data["answers"], strict=True))
    given = {example: "" if optional and score < 0 else text for example, (score, text) in best.items()}
    scores = [(exact_match, "exact_match"), (word_f1, "f1")]
    found = {
        name: float(np.mean([max(of(given[e], text) for text in references[e] or [""]) for e in references]))
        for of, name in scores
    }
    return {**found, "loss": loss / len(data)}


def _best(
    start: Float[np.ndarray, " tokens"], end: Float[np.ndarray, " tokens"], places: np.ndarray, context: str
) -> tuple[float, str]:
    """The likeliest answer in a window, and how far it is above none."""
    inside = places[:, 0] != OUTSIDE
    scores = start[:, None] + end[None, :]
    near = np.triu(np.ones_like(scores, bool)) & ~np.triu(np.ones_like(scores, bool), LONGEST)
    scores = np.where(near & inside[:, None] & inside[None, :], scores, -np.inf)
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    text = context[places[first, 0] : places[last, 1]] if inside[first] else ""
    return float(scores[first, last] - start[0] - end[0]), text


def exact_match(given: str, wanted: str) -> float:
    """Whether two answers are the same but for case, punctuation, articles and spaces: 1 or 0.

    >>> exact_match("The  Nile.", "nile")
    1.0
    """
    return float(_words(given) == _words(wanted))


def word_f1(given: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of words.

    >>> word_f1("the long Nile", "the Nile river"), word_f1("", ""), word_f1("", "Nile")
    (0.5, 1.0, 0.0)
    """
    one, other = _words(given), _words(wanted)
    common = sum((collections.Counter(one) & collections.Counter(other)).values())
    return 2 * common / (len(one) + len(other)) if one and other else float(one == other)


def _words(text: str) -> list[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()
