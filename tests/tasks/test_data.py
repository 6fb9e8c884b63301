"""Texts and labels arrive as they were written, or the error says what is wrong with the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factorformer.errors import DataError
from factorformer.tasks.data import Columns, Labels, batches, encode, indexed_batches, read, sample

AWKWARD = [
    'a "quoted" word',
    '"',
    '"begins with a quote',
    "NA",
    "null",
    "None",
    "nan",
    "N/A",
    "",
    "123",
    "1.50",
    "True",
    "it's, with a comma",
    "naïve café — 中文",
    " spaces around ",
]


def table(**columns: list) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


# Files


def test_tsv_has_no_quoting_and_no_missing_values(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    file.write_text("text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(AWKWARD)), encoding="utf-8")
    rows = read(file)
    assert list(rows["text"]) == AWKWARD
    assert list(rows["label"]) == [i % 2 for i in range(len(AWKWARD))]


def test_csv_is_quoted(tmp_path: Path) -> None:
    file = tmp_path / "data.CSV"
    quoted = ['"' + text.replace('"', '""') + '"' for text in AWKWARD]
    file.write_text("text,label\n" + "".join(f"{text},yes\n" for text in quoted), encoding="utf-8")
    rows = read(str(file))
    assert list(rows["text"]) == AWKWARD
    assert set(rows["label"]) == {"yes"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    lines = [json.dumps({"text": text, "label": i / 4}) + "\n" for i, text in enumerate(AWKWARD)]
    file.write_text("".join(lines), encoding="utf-8")
    rows = read(file)
    assert list(rows["text"]) == AWKWARD
    assert list(rows["label"]) == [i / 4 for i in range(len(AWKWARD))]


def test_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    texts = [text for text in AWKWARD if text]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    assert list(read(file)["text"]) == texts


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    for text in ("one", "two"):
        file.write_text(f"text\n{text}\n")
        assert list(read(file)["text"]) == [text]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".json", ".txt"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_text("")
    with pytest.raises(DataError, match=f"'{re.escape(str(file))}' is empty"):
        read(file)


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_a_file_with_a_header_only(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_text("text\n")
    with pytest.raises(DataError, match="data"):
        read(file)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such data file: .*nothing\.tsv"):
        read(tmp_path / "nothing.tsv")


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.tsv").mkdir()
    with pytest.raises(DataError, match="no such data file"):
        read(tmp_path / "data.tsv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", b'{"text": "cut'),
        ("data.jsonl", b"no json at all\n"),
        ("data.tsv", b"text\tlabel\none\ttwo\none\ttwo\tthree\n"),
        ("data.csv", b"\xff\xfe\x00\x01\x80\n\x81,\x82\n"),
    ],
)
def test_a_malformed_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        read(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Length of header")
@pytest.mark.parametrize(("name", "mark"), [("data.tsv", "\t"), ("data.csv", ",")])
def test_surplus_fields_do_not_shift_the_columns(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(f"text{mark}label\none{mark}1{mark}\ntwo{mark}0{mark}\n")
    rows = read(tmp_path / name)
    assert list(rows["text"]) == ["one", "two"]
    assert list(rows["label"]) == [1, 0]


@pytest.mark.parametrize("source", ["some-data", "data.parquet", "a:b:c:d"])
def test_a_name_that_is_neither_a_file_nor_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"neither a file \(\.tsv, .*nor a data set on the Hub"):
        read(source)


def test_reading_leaves_the_progress_bars_of_datasets_alone(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("text\n")
    for enabled in (True, False):
        (datasets.enable_progress_bars if enabled else datasets.disable_progress_bars)()
        read(tmp_path / "data.txt")
        assert datasets.is_progress_bar_enabled() is enabled


# Columns


def test_columns_that_are_there() -> None:
    rows = table(text=["a"], other=["b"], label=[1])
    Columns(("text",)).check(rows)
    Columns(("text", "other"), "label").check(rows)


@pytest.mark.parametrize("columns", [Columns(("txt",)), Columns(("text", "txt")), Columns(("text",), "txt")])
def test_a_missing_column_is_named_with_the_nearest(columns: Columns) -> None:
    with pytest.raises(
        DataError, match=r"train\.tsv has no column 'txt' \(did you mean 'text'\?\); allowed: text, label"
    ):
        columns.check(table(text=["a"], label=[1]), "train.tsv")


@pytest.mark.parametrize("count", [0, 3])
def test_one_or_two_texts(count: int) -> None:
    with pytest.raises(DataError, match=f"two for sentence pairs; got {count}"):
        Columns(("text",) * count).check(table(text=["a"]))


# Labels


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([2, 10, 1, 2], ("1", "2", "10")),
        (["10", "9", "1"], ("1", "9", "10")),
        (["yes", "no"], ("no", "yes")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
        ([-1, 1], ("-1", "1")),
        ([True, False], ("False", "True")),
        (["b", "3", "a"], ("3", "a", "b")),
    ],
)
def test_classes_are_in_natural_order(values: list, names: tuple[str, ...]) -> None:
    rows = table(label=values)
    labels = Labels.of(rows, "label")
    assert labels == Labels("classification", names)
    assert [names[i] for i in labels.ids(rows, "label")] == [
        str(int(v)) if isinstance(v, float) else str(v) for v in values
    ]


def test_class_labels_of_a_data_set_keep_their_order() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["zebra", "ant"])})
    rows = datasets.Dataset.from_dict({"label": [1, 0, 1]}, features=features)
    labels = Labels.of(rows, "label")
    assert labels.names == ("zebra", "ant")
    assert labels.ids(rows, "label") == [1, 0, 1]
    assert labels.ids(table(label=["ant", "zebra"]), "label") == [1, 0]


def test_fractions_mean_regression() -> None:
    rows = table(label=[0.5, 1.0, 2.0])
    labels = Labels.of(rows, "label")
    assert labels == Labels("regression")
    assert labels.ids(rows, "label") == [0.5, 1, 2]
    assert labels.ids(table(label=["1.5", "2"]), "label") == [1.5, 2]


def test_a_label_never_seen_in_training() -> None:
    labels = Labels.of(table(label=["a", "b"]), "label")
    with pytest.raises(DataError, match=r"never seen in training: \['c', 'd'\]; known: \['a', 'b'\]"):
        labels.ids(table(label=["a", "d", "c"]), "label")


@pytest.mark.parametrize("values", [["x"], ["x", "x"], [1.0]])
def test_a_single_class(values: list) -> None:
    with pytest.raises(DataError, match="single label"):
        Labels.of(table(label=values), "label")


def test_a_row_without_a_label() -> None:
    with pytest.raises(DataError, match="without a label"):
        Labels.of(table(label=[1, None, 0]), "label")


@pytest.mark.parametrize(
    ("values", "message"),
    [(["x"], "must hold numbers"), ([None], "must hold numbers"), ([float("nan")], "NaN"), (["inf"], "NaN or inf")],
)
def test_regression_wants_numbers(values: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Labels("regression").ids(table(label=values), "label")


# Tokens and batches


def test_encode(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    rows = table(text=["w1 w2", "w3"], label=["b", "a"])
    data = encode(tokenizer, rows, Columns(("text",), "label"), Labels.of(rows, "label"))
    assert [tokenizer.decode(ids) for ids in data["input_ids"]] == ["[CLS] w1 w2 [SEP]", "[CLS] w3 [SEP]"]
    assert list(data["labels"]) == [1, 0]
    assert list(data["length"]) == [4, 3]
    assert "labels" not in encode(tokenizer, rows, Columns(("text",))).column_names


def test_encode_pairs(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    data = encode(tokenizer, table(a=["w1"], b=["w2 w3"]), Columns(("a", "b")))
    assert tokenizer.decode(data["input_ids"][0]) == "[CLS] w1 [SEP] w2 w3 [SEP]"
    assert data["token_type_ids"][0] == [0, 0, 0, 1, 1, 1]


def test_encode_cuts_long_texts(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    data = encode(tokenizer, table(text=["w1 " * 50]), Columns(("text",)), max_length=10)
    assert list(data["length"]) == [10]


def test_encode_takes_numbers_for_texts(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    assert len(encode(tokenizer, table(text=[1, 2]), Columns(("text",)))) == 2


def test_encode_checks_columns(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="has no column 'label'"):
        encode(tokenizer, table(text=["w1"]), Columns(("text",), "label"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=20), size=st.integers(1, 8))
def test_batches_hold_every_row_once(tokenizer: tf.PreTrainedTokenizerBase, lengths: list[int], size: int) -> None:
    texts = [" ".join(f"w{(row + i) % 60}" for i in range(length)) for row, length in enumerate(lengths)]
    data = encode(tokenizer, table(text=texts), Columns(("text",)))
    order, found = [], {}
    for rows, batch in indexed_batches(tokenizer, data, size):
        assert 1 <= len(rows) <= size
        assert batch["input_ids"].shape == (len(rows), max(data["length"][row] for row in rows))
        assert "length" not in batch
        order += rows
        for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
            found[row] = ids[mask.bool()].tolist()
    assert sorted(order) == list(range(len(texts)))
    assert [found[row] for row in range(len(texts))] == list(data["input_ids"])
    seen = [data["length"][row] for row in order]
    assert seen == sorted(seen, reverse=True)
    assert len(list(batches(tokenizer, data, size))) == -(-len(texts) // size)


def test_batches_carry_labels(tokenizer: tf.PreTrainedTokenizerBase) -> None:
    for values, dtype in (([1, 0], torch.int64), ([0.5, 1.5], torch.float32)):
        rows = table(text=["w1", "w2 w3"], label=values)
        data = encode(tokenizer, rows, Columns(("text",), "label"), Labels.of(rows, "label"))
        (batch,) = batches(tokenizer, data)
        assert batch["labels"].dtype == dtype
        assert batch["labels"].tolist() == [values[1], values[0]]  # the longer text comes first


def test_samples_are_drawn_without_replacement() -> None:
    data = table(row=list(range(50)))
    drawn = sample(data, 20)["row"]
    assert len(set(drawn)) == 20
    assert list(sample(data, 20)["row"]) == list(drawn)
    assert list(sample(data, 20, seed=1)["row"]) != list(drawn)
    assert list(sample(data, 50)["row"]) == list(sample(data, 99)["row"]) == list(range(50))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "columns", "rows", "classes"),
    [
        ("banking77/test.tsv", Columns(("text",), "label"), 3080, 77),
        ("sst2/dev.tsv", None, 872, 2),
        ("mrpc/test.tsv", None, 1725, 2),
    ],
)
def test_real_files(data: Path, name: str, columns: Columns | None, rows: int, classes: int) -> None:
    found = read(data / name)
    assert len(found) == rows
    label = columns.label if columns else "label"
    assert label is not None
    assert len(Labels.of(found, label).names) == classes
    assert len((data / name).read_text(encoding="utf-8").splitlines()) == rows + 1


@pytest.mark.parametrize("columns", [("a",), ("b", "a")])
def test_a_row_without_text(columns: tuple[str, ...], tokenizer: tf.PreTrainedTokenizerBase) -> None:
    rows = table(a=["w1", None, None], b=["w1", "w2", "w3"])
    with pytest.raises(DataError, match="column 'a' has no text in row 2 of 3"):
        encode(tokenizer, rows, Columns(columns))


def test_whole_numbers_are_scores_on_demand() -> None:
    rows = table(label=[0, 5, 3])
    assert Labels.of(rows, "label").names == ("0", "3", "5")
    labels = Labels.of(rows, "label", regression=True)
    assert labels == Labels("regression")
    assert labels.ids(rows, "label") == [0.0, 5.0, 3.0]
