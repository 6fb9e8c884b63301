"""The text of the benchmark of sentence encoders: 107,000 sentences to learn from, and 20,000 others to judge by."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from common import TASKS

from factorformer.tasks import data

LONGEST = 60
"""Words of a sentence of WikiText-2."""

HELD_OUT = 30
"""One in so many sentences of the training parts is judged by as well."""

PASSAGE, PASSAGES = (100, 200), 500
"""Words of a passage, and how many there are."""

JUDGED = 20_000
"""Sentences among which neighbours are looked for, at most."""


def split(folder: Path, without: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Sentences to learn from, and others of the same kinds among which neighbours are looked for, each once.

    The first are training texts of all tasks, the English side of Multi30k, and sentences of WikiText-2; the others
    those of their validation and test parts, and every `HELD_OUT`th of the first. Nothing of these is learned, be it in
    other letters or with other punctuation.

    Args:
        folder: with one folder for each task.
        without: tasks of which no text is learned.
    """
    texts, others, left = list(_lines(folder / "multi30k" / "train.en")), [], set()
    for task in TASKS.values():
        for name, into in (("train.tsv", texts), (task.test, others)):
            table = data.read(folder / task.name / name)
            for column in task.text:
                into += table[column]
                left.update(table[column] if task.name in without else [])
    texts += wiki_sentences(folder / "wikitext2" / "train.txt")
    for name in ("val.en", "test2016.en"):
        others += _lines(folder / "multi30k" / name)
    for name in ("valid.txt", "test.txt"):
        others += wiki_sentences(folder / "wikitext2" / name)
    texts = list(dict.fromkeys(texts))
    others = list(dict.fromkeys([*others, *texts[::HELD_OUT]]))
    test = set(map(bare, others))
    return [text for text in texts if bare(text) not in test and text not in left], others[:JUDGED]


def passages(folder: Path) -> list[str]:
    """Paragraphs of WikiText-2 that nothing is learned from."""
    files = (folder / "wikitext2" / name for name in ("valid.txt", "test.txt"))
    found = (_tidy(line) for file in files for line in _lines(file) if not line.startswith("="))
    return [text for text in found if PASSAGE[0] <= len(text.split()) <= PASSAGE[1]][:PASSAGES]


def bare(text: str) -> str:
    """Its words alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def wiki_sentences(file: Path) -> Iterator[str]:
    """Sentences of WikiText, without its marks and the spaces that it puts around punctuation."""
    for line in _lines(file):
        if line.startswith("="):
            continue
        for sentence in re.split(r"(?<= [.!?]) ", line):
            tidy = _tidy(sentence)
            if 4 <= len(tidy.split()) <= LONGEST and "<unk>" not in tidy:
                yield tidy


def _tidy(text: str) -> str:
    plain = re.sub(r" @([-,.])@ ", r"\1", text)
    return re.sub(r" ([.,;:!?)'])", r"\1", plain).replace("( ", "(")


def _lines(file: Path) -> Iterable[str]:
    return (line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
