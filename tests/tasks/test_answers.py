"""Answers to questions are found where they stand, in contexts of any length, and scored as SQuAD does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factorformer.errors import DataError
from factorformer.tasks import answers
from factorformer.tasks.answers import OUTSIDE, encode, exact_match, word_f1
from factorformer.tasks.data import Columns
from factorformer.tasks.tables import read


def answer(text: str, start: int) -> dict[str, Any]:
    return {"text": [text], "answer_start": [start]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=st.lists(st.integers(0, 59), min_size=1, max_size=60), place=st.integers(0, 59), size=st.integers(1, 3))
def test_every_answer_lies_in_a_window(
    tokenizer: tf.PreTrainedTokenizerBase, words: list[int], place: int, size: int
) -> None:
    context = " ".join(f"w{word}" for word in words)
    place = place % len(words)
    text = " ".join(f"w{word}" for word in words[place : place + size])
    start = len(" ".join(f"w{word}" for word in words[:place])) + (place > 0)
    data = encode(tokenizer, ["w1 w2"], [context], [answer(text, start)], 20)
    found = 0
    for row in data:
        offsets = np.reshape(row["offsets"], (-1, 2))
        assert len(offsets) == row["length"] == len(row["input_ids"]) <= 20
        assert {a for a, _ in offsets[:3]} == {OUTSIDE}  # the question, and what is before it
        if row["end_positions"]:
            assert context[offsets[row["start_positions"]][0] : offsets[row["end_positions"]][1]] == text
            found += 1
    assert found >= 1
    covered = {a for row in data for a, _ in np.reshape(row["offsets"], (-1, 2)) if a != OUTSIDE}
    assert len(covered) == len(words)


def test_answers_that_cannot_be(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    for given_answer in (answer("w3", 1), "w9"):
        with pytest.raises(DataError, match=r"row 1: the answer 'w[39]' is not in the context"):
            encode(tokenizer, ["w1"], ["w2 w3"], [given_answer], 20)
    with pytest.raises(DataError, match=r"row 2: a question leaves no room.*--max-length"):
        encode(tokenizer, ["w1", "w1 " * 40], ["w2", "w3"], ["w2", "w3"], 20)
    none = encode(tokenizer, ["w1", "w1"], ["w2", "w3"], [{"text": [], "answer_start": []}, ""], 20)
    assert none["start_positions"][:] == none["end_positions"][:] == [0, 0]
    assert none["answers"][:] == [[], []]


def test_cells_that_are_no_answers(tmp_path: Any) -> None:
    file = tmp_path / "rows.jsonl"
    right = '{"q": "a", "c": "b", "a": {"text": ["b"], "answer_start": [0]}}\n'
    for wrong in (
        '{"text": ["b"]}',
        '{"text": ["b"], "answer_start": []}',
        '{"text": [1], "answer_start": [0]}',
        '"b"',
    ):
        file.write_text(right + '{"q": "a", "c": "b", "a": ' + wrong + "}\n")
        with pytest.raises(DataError, match="line 2, column 'a': answers are an object of two lists"):
            read(file, Columns(("q", "c"), "a"))
    file.write_text(right)
    assert read(file, Columns(("q", "c"), "a"))["a"][0] == {"text": ["b"], "answer_start": [0]}


def test_the_best_answer_of_a_window() -> None:
    places = np.array([[OUTSIDE, OUTSIDE], [0, 2], [3, 5], [6, 8]])
    start, end = np.array([9.0, 0.0, 3.0, 1.0]), np.array([9.0, 5.0, 0.0, 2.0])
    score, text = answers._best(start, end, places, "ab cd ef")
    assert (score, text) == (5.0 - 18, "ab")
    start[2] = 4.0  # now both of the others together are likelier
    assert answers._best(start, end, places, "ab cd ef") == (6.0 - 18, "cd ef")


def test_scores_of_words() -> None:
    """Of the examples in the script of SQuAD's authors, by hand."""
    assert exact_match("The Eiffel-Tower!", "eiffeltower") == 1
    assert exact_match("an apple", "apples") == 0
    assert word_f1("in the city of Paris", "Paris, the city") == pytest.approx(2 * 2 / (4 + 2))
    assert word_f1("b b", "b") == pytest.approx(2 / 3)
    assert word_f1("the", "") == 1  # an article is no word
