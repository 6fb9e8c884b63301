"""The text of the benchmark of sentence encoders: 107,000 sentences to learn from, and 20,000 others to judge by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import TASKS

from factorformer.tasks import data

LONGEST = 60
"""Words of a sentence of WikiText-2."""

HELD_OUT = 30
"""One in so many sentences of the training parts is judged by as well."""

JUDGED = 20_000
"""Sentences among which neighbours are looked for, at most."""


def split(folder: Path) -> tuple[list[str], list[str]]:
    """Sentences to learn from, and others of the same kinds among which neighbours are looked for, each once.

    The first are training texts of all tasks, the English side of Multi30k, and sentences of WikiText-2; the others
    those of their validation and test parts, and every `HELD_OUT`th of the first.
    """
    texts, others = list(_lines(folder / "multi30k" / "train.en")), []
    for task in TASKS.values():
        for name, into in (("train.tsv", texts), (task.test, others)):
            table = data.read(folder / task.name / name)
            for column in task.text:
                into += table[column]
    texts += wiki_sentences(folder / "wikitext2" / "train.txt")
    for name in ("val.en", "test2016.en"):
        others += _lines(folder / "multi30k" / name)
    for name in ("valid.txt", "test.txt"):
        others += wiki_sentences(folder / "wikitext2" / name)
    texts, test = list(dict.fromkeys(texts)), set(others)
    kept = [text for place, text in enumerate(texts) if place % HELD_OUT and text not in test]
    return kept, list(dict.fromkeys([*others, *texts[::HELD_OUT]]))[:JUDGED]


def wiki_sentences(file: Path) -> Iterator[str]:
    """Sentences of WikiText, without its marks and the spaces that it puts around punctuation."""
    for line in _lines(file):
        if line.startswith("="):
            continue
        plain = re.sub(r" @([-,.])@ ", r"\1", line)
        for sentence in re.split(r"(?<= [.!?]) ", plain):
            tidy = re.sub(r" ([.,;:!?)'])", r"\1", sentence).replace("( ", "(")
            if 4 <= len(tidy.split()) <= LONGEST and "<unk>" not in tidy:
                yield tidy


def _lines(file: Path) -> Iterable[str]:
    return (line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
