"""The docstring task: nothing leaks, nothing depends on the run, and it is neither trivial nor hopeless."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import datasets
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from factorformer.errors import DataError
from factorformer.tasks import docstrings
from factorformer.tasks.docstrings import GROUPS, MAX_CHARACTERS, MIN_CHARACTERS, stdlib_docstrings

Task = dict[str, datasets.Dataset]


@pytest.fixture(scope="module")
def task() -> Task:
    return stdlib_docstrings()


def texts(task: Task) -> list[str]:
    return [text for part in task.values() for text in part["text"]]


def letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.casefold()))


def fake_library(root: Path, files: dict[str, str]) -> Path:
    """A directory laid out like a standard library, with two texts for each group and `files` on top."""
    numerals = ["one", "two", "three", "four", "five", "six", "seven"]
    for position, modules in enumerate(GROUPS.values()):
        first, second = numerals[position % 7], numerals[position // 7]
        lines = [f'"""Some {first} {second} {part} words about nothing at all."""' for part in ("early", "late")]
        files.setdefault(f"{modules[0]}.py", f"{lines[0]}\ndef f():\n    {lines[1]}\n")
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def use_library(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})


def test_size_and_labels(task: Task) -> None:
    assert 3000 <= len(task["train"]) <= 6000
    assert set(task["train"]["label"]) == set(GROUPS)
    assert len(GROUPS) >= 12


def test_no_text_is_in_both_parts_or_twice_in_one(task: Task) -> None:
    repeated = [text for text, n in Counter(map(letters, texts(task))).items() if n > 1]
    assert repeated == []


def test_every_label_is_split_in_the_same_proportion(task: Task) -> None:
    train, test = Counter(task["train"]["label"]), Counter(task["test"]["label"])
    assert set(train) == set(test) == set(GROUPS)
    for label in GROUPS:
        assert test[label] == round(0.2 * (train[label] + test[label])), label


def test_texts_are_single_lines_of_the_stated_length(task: Task) -> None:
    for text in texts(task):
        assert MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS
        assert text == " ".join(text.split())
        assert ">>>" not in text


def test_texts_name_no_module_and_no_label(task: Task) -> None:
    names = {name for modules in GROUPS.values() for name in modules} | set(GROUPS)
    for text in texts(task):
        words = set("".join(c if c.isalnum() or c == "_" else " " for c in text.casefold()).split())
        assert not words & {name.casefold() for name in names}, text


def test_rows_are_mixed_so_that_a_prefix_sees_most_labels(task: Task) -> None:
    assert len(set(task["train"]["label"][:200])) >= 12


def test_another_process_with_another_hash_seed_agrees(task: Task) -> None:
    hash_seed = "0" if os.environ.get("PYTHONHASHSEED") == "4242" else "4242"
    script = (
        "import hashlib\n"
        "from factorformer.tasks.docstrings import stdlib_docstrings\n"
        "parts = {name: part.to_dict() for name, part in stdlib_docstrings().items()}\n"
        "print(hashlib.sha256(repr(parts).encode()).hexdigest())\n"
    )
    source = Path(docstrings.__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=900,
    )
    parts = {name: part.to_dict() for name, part in task.items()}
    assert done.stdout.strip() == hashlib.sha256(repr(parts).encode()).hexdigest()


def test_a_bag_of_words_learns_it_but_does_not_solve_it(task: Task) -> None:
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=20, max_iter=300))
    model.fit(task["train"]["text"][:], task["train"]["label"][:])
    labels = task["test"]["label"][:]
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    assert majority < 0.15
    assert 4 * majority < model.score(task["test"]["text"][:], labels) < 0.9


def test_every_module_is_in_one_group() -> None:
    counts = Counter(module for modules in GROUPS.values() for module in modules)
    assert [module for module, n in counts.items() if n > 1] == []


def test_sources_are_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""A text that is long enough to be taken up."""\nraise RuntimeError("imported")\n'
    use_library(monkeypatch, fake_library(tmp_path, {"logging/handlers.py": source}))
    task = stdlib_docstrings()
    assert "A that is long enough to be taken up." in texts(task)


def test_tests_of_a_package_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '"""A sentence that nobody should ever get to see here."""\n'
    use_library(
        monkeypatch,
        fake_library(tmp_path, {"unittest/test/test_case.py": source, "ctypes/tests/a.py": source}),
    )
    task = stdlib_docstrings()
    assert not [text for text in texts(task) if "nobody" in text]


def test_conflicting_labels_drop_a_text_and_equal_ones_keep_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "socket.py": '"""Words in two different groups, 1st."""\n',
        "html.py": '"""WORDS in two different groups; 22st!"""\n',
        "ssl.py": '"""Words in a single group, number 1."""\n',
        "uuid.py": '"""Words in a single group, number 2."""\n',
        "hmac.py": '"""Something else that the group needs."""\n',
    }
    use_library(monkeypatch, fake_library(tmp_path, files))
    found = texts(stdlib_docstrings())
    assert not [text for text in found if "different" in text]
    assert [text for text in found if "single" in text] == ["Words in a single group, number 1."]


def test_a_python_without_sources_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_library(monkeypatch, tmp_path / "python311.zip")
    with pytest.raises(DataError, match=r"(?s)asyncio, .*python311\.zip"):
        stdlib_docstrings()
