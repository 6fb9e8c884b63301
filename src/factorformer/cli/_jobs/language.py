"""The job of `evaluate` for causal language models: how well they go on with texts, alone or beside the original."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from factorformer.cli._inputs import check_speaks_alike
from factorformer.cli._measure import measure
from factorformer.cli._options import LENGTH
from factorformer.cli._texts import columns_of, encode_text, plain_columns, read_text
from factorformer.files import short_names
from factorformer.hf.source import find, load_model, load_tokenizer, read_config
from factorformer.progress import bars
from factorformer.report import Result, inventory


@dataclasses.dataclass(frozen=True)
class LanguageJob:
    """What is measured.

    Args:
        model: compressed, or any other.
        against: the original; None for the model alone.
        data: files, or data sets of the Hub.
        text: the column of texts, or of messages.
        sequence_length: tokens of a window.
        device: where models run; None for a GPU if there is one.
    """

    model: str
    against: str | None
    data: Sequence[str]
    text: list[str] | None
    sequence_length: int | None
    device: str | None


def evaluate_language(job: LanguageJob) -> Result:
    """Measure a language model on texts, each of them by itself.

    Raises:
        ModelError: the original is none, or of other tokens; or a model that cannot be read.
        DataError: a text that cannot be read, or is too short.
    """
    path, original = find(job.model), None if job.against is None else find(job.against)
    config, tokenizer = read_config(path), load_tokenizer(path)
    if job.against is not None:
        check_speaks_alike(job.against, config, path)
    data = []
    for source in job.data:
        columns = plain_columns(source, columns_of(job.text, None))
        text = read_text(source, columns, config)
        lengths = {"max_length": LENGTH, "sequence_length": job.sequence_length}
        data.append(encode_text(source, text, columns, tokenizer, config, **lengths))
    model = load_model(path, device=job.device)
    other = None if original is None else load_model(original, device=str(model.device))
    metrics: dict[str, float] = {}
    started = time.perf_counter()
    with bars() as progress:
        for name, windows in zip(short_names(job.data), data, strict=True):
            found = measure(model, tokenizer, windows, None, progress, f"evaluate {name}", original=other).metrics
            metrics |= found if len(data) == 1 else {_prefixed(metric, name): found[metric] for metric in found}
    seconds = {"evaluate": time.perf_counter() - started}
    costs = inventory(model, "all")
    if other is not None:
        whole = inventory(other.to(model.dtype), "all")  # pyright: ignore[reportArgumentType]
        costs = dataclasses.replace(costs, before=whole.compressed)
    return Result.of(costs, metrics=metrics, seconds=seconds)


def _prefixed(metric: str, name: str) -> str:
    """`original_loss` of a file is `original_wiki_loss`, so that it stands beside `wiki_loss`."""
    before = "original_" if metric.startswith("original_") else ""
    return f"{before}{name}_{metric.removeprefix(before)}"
